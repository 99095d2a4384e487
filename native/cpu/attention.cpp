// Keys and values of several sequences: how appending them and attention over them are cut into items for the threads.
#include <algorithm>

#include "ropewalk/operations.hpp"

namespace ropewalk {

namespace {

// An item of one sequence: all of its keys, or one range of them.
struct Work {
  const AttendArgs* args;
  int64_t item;
  int64_t range;  // -1: all
  int64_t part;   // where the part of the range goes, in floats
};

// An item whose parts are put together.
struct Merge {
  const AttendArgs* args;
  int64_t item;
  int64_t range_begin, range_end;
  int64_t part;  // of the first range
};

struct Plan {
  std::vector<Work> works;
  std::vector<Merge> merges;
  int64_t part_floats = 0;
};

// A prompt has items enough for all threads. A few rows over many keys have one item to a key/value head: the ranges of
// their keys are computed apart. Each way gives the same bits.
void plan_sequence(const AttendArgs& a, Plan& plan) {
  const int64_t items = attend_items_per_head(a.num_rows, a.num_query_heads, a.kv.num_heads);
  const int64_t first_key = a.window > 0 ? std::max<int64_t>(0, a.start - a.window + 1) : 0;
  const int64_t range_begin = first_key / kKeyRange;
  const int64_t range_end = ceil_div(a.start + a.num_rows, kKeyRange);
  if (items > 1 || range_end - range_begin == 1) {
    for (int64_t item = 0; item < a.kv.num_heads * items; ++item) plan.works.push_back({&a, item, -1, 0});
    return;
  }
  const int64_t floats = attend_part_floats(a.num_rows * (a.num_query_heads / a.kv.num_heads), a.kv.head_dim);
  for (int64_t item = 0; item < a.kv.num_heads; ++item) {
    plan.merges.push_back({&a, item, range_begin, range_end, plan.part_floats});
    for (int64_t range = range_begin; range < range_end; ++range) {
      plan.works.push_back({&a, item, range, plan.part_floats});
      plan.part_floats += floats;
    }
  }
}

}  // namespace

void append(CpuRuntime& runtime, const std::vector<AppendArgs>& sequences) {
  constexpr int64_t kFloatsPerChunk = 16384;
  int64_t num_rows = 0;
  for (const AppendArgs& a : sequences) num_rows += a.num_rows;
  if (num_rows == 0) return;
  const int64_t num_heads = sequences[0].kv.num_heads;
  const int64_t floats = 2 * num_rows * num_heads * sequences[0].kv.head_dim;
  const int64_t items = static_cast<int64_t>(sequences.size()) * num_heads;
  const int64_t chunk = std::max<int64_t>(1, kFloatsPerChunk * items / floats);
  runtime.pool().run(items, chunk, [&](int64_t begin, int64_t end, int) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item % num_heads;
      runtime.table().append(sequences[static_cast<size_t>(item / num_heads)], head, head + 1);
    }
  });
}

void attend(CpuRuntime& runtime, const std::vector<AttendArgs>& sequences) {
  Plan plan;
  for (const AttendArgs& a : sequences) {
    if (a.num_rows != 0) plan_sequence(a, plan);
  }
  if (plan.works.empty()) return;
  const int64_t floats = round_up(attend_scratch_floats(sequences[0].kv.head_dim), kLanes);
  float* scratch = runtime.attend_scratch(floats);
  float* parts = runtime.attend_parts(plan.part_floats);
  const KernelTable& table = runtime.table();
  runtime.pool().run(static_cast<int64_t>(plan.works.size()), 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) {
      const Work& work = plan.works[static_cast<size_t>(i)];
      float* own = scratch + thread * floats;
      if (work.range < 0) {
        table.attend(*work.args, work.item, work.item + 1, own);
      } else {
        table.attend_range(*work.args, work.item, work.range, parts + work.part, own);
      }
    }
  });
  runtime.pool().run(static_cast<int64_t>(plan.merges.size()), 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const Merge& merge = plan.merges[static_cast<size_t>(i)];
      table.attend_merge(*merge.args, merge.item, merge.range_begin, merge.range_end, parts + merge.part);
    }
  });
}

void move_rows(CpuRuntime& runtime, const MoveArgs& args, int64_t num_instances) {
  if (args.num_rows == 0) return;
  runtime.pool().run(num_instances * args.source.num_heads, 1, [&](int64_t begin, int64_t end, int) {
    runtime.table().move_rows(args, begin, end);
  });
}

}  // namespace ropewalk
