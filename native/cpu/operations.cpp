// One function per operation: how its work is cut into independent items for the threads.
#include "ropewalk/operations.hpp"

#include <algorithm>
#include <mutex>

namespace ropewalk {

namespace {

// Chunks small enough that threads finish together, large enough that taking one costs nothing.
int64_t even_chunk(const CpuRuntime& runtime, int64_t num_items, int64_t least) {
  const int64_t threads = const_cast<CpuRuntime&>(runtime).pool().num_threads();
  return std::max(least, ceil_div(num_items, threads * 8));
}

// The same for rows of cheap elementwise work: below about 16 K floats one thread is faster than waking another.
void run_rows(CpuRuntime& runtime, int64_t num_rows, int64_t floats_per_row,
              const std::function<void(int64_t, int64_t)>& job) {
  constexpr int64_t kFloatsPerChunk = 16384;
  const int64_t chunk = std::max<int64_t>(1, kFloatsPerChunk / std::max<int64_t>(1, floats_per_row));
  const std::lock_guard lock(runtime.mutex());
  runtime.pool().run(num_rows, chunk, [&](int64_t begin, int64_t end, int) { job(begin, end); });
}

// Places in the runtime's scratch, each on a cache line of its own.
struct Places {
  int64_t end = 0;
  int64_t take(int64_t bytes) {
    const int64_t place = end;
    end = round_up(end + bytes, 64);
    return place;
  }
};

// The prepared activations of one input order.
struct Prepared {
  const PackedGptq* weights;
  PrepareArgs args{};
  int64_t gathered = 0, values = 0, block_scales = 0, group_sums = 0;  // places
};

// In "exact", rows without a permutation or padding are read where they are.
bool read_in_place(const Prepared& input, Compute compute) {
  return compute == Compute::exact && input.weights->weights().source_row == nullptr;
}

void reserve(Prepared& input, Compute compute, int64_t num_rows, Places& places) {
  const GptqWeights& w = input.weights->weights();
  const int64_t padded = w.num_blocks * kBlockRows;
  if (read_in_place(input, compute)) return;
  if (compute == Compute::exact) {
    input.gathered = places.take(num_rows * padded * 4);
    return;
  }
  input.values = places.take(num_rows * padded);
  input.block_scales = places.take(num_rows * w.num_blocks * 4);
  input.group_sums = places.take(num_rows * w.num_groups * 4);
}

void describe(Prepared& input, Compute compute, const float* x, int64_t x_stride, uint8_t* scratch) {
  const GptqWeights& w = input.weights->weights();
  input.args = {
      .x = x,
      .x_stride = x_stride,
      .in_features = w.in_features,
      .num_blocks = w.num_blocks,
      .num_groups = w.num_groups,
      .source_row = w.source_row,
      .group_starts = w.group_starts,
      .gathered = nullptr,
      .values = nullptr,
      .block_scales = nullptr,
      .group_sums = nullptr,
  };
  if (read_in_place(input, compute)) return;
  if (compute == Compute::exact) {
    input.args.gathered = reinterpret_cast<float*>(scratch + input.gathered);
    return;
  }
  input.args.values = reinterpret_cast<int8_t*>(scratch + input.values);
  input.args.block_scales = reinterpret_cast<float*>(scratch + input.block_scales);
  input.args.group_sums = reinterpret_cast<float*>(scratch + input.group_sums);
}

// Where the product with A of a low-rank change goes.
struct Inner {
  const LowRankWeights* change;  // or null
  LowRankInnerArgs args{};
  int64_t place = 0;
};

void describe(Inner& inner, const float* x, int64_t x_stride, uint8_t* scratch) {
  const LowRankWeights& w = *inner.change;
  inner.args = {
      .a = w.a,
      .type = w.type,
      .scales = w.scales,
      .in_features = w.in_features,
      .x = x,
      .x_stride = x_stride,
      .inner = reinterpret_cast<float*>(scratch + inner.place),
      .inner_stride = round_up(w.rank, kRankTile),
  };
}

// What the parts of a linear share, in one job for all threads: the prepared activations, and the inner product.
void run_shared(CpuRuntime& runtime, std::vector<Prepared>& inputs, Inner& inner, Compute compute, const float* x,
                int64_t x_stride, int64_t num_rows) {
  constexpr int64_t kRows = 8;  // of one item
  Places places;
  for (Prepared& input : inputs) reserve(input, compute, num_rows, places);
  const int64_t panels = inner.change != nullptr ? ceil_div(inner.change->rank, kRankTile) : 0;
  inner.place = places.take(num_rows * panels * kRankTile * 4);
  uint8_t* scratch = runtime.activations(places.end).as<uint8_t>();
  for (Prepared& input : inputs) describe(input, compute, x, x_stride, scratch);
  if (panels != 0) describe(inner, x, x_stride, scratch);
  std::vector<const PrepareArgs*> prepared;
  for (const Prepared& input : inputs) {
    if (!read_in_place(input, compute)) prepared.push_back(&input.args);
  }
  const int64_t row_items = ceil_div(num_rows, kRows);
  const int64_t prepare_items = static_cast<int64_t>(prepared.size()) * row_items;
  const int64_t inner_items = ceil_div(num_rows, kPanelRows) * panels;
  runtime.pool().run(prepare_items + inner_items, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t item = begin; item < end; ++item) {
      if (item < prepare_items) {
        const int64_t row = item % row_items * kRows;
        runtime.table().prepare(*prepared[static_cast<size_t>(item / row_items)], row, std::min(row + kRows, num_rows));
      } else {
        const int64_t row = (item - prepare_items) / panels * kPanelRows, panel = (item - prepare_items) % panels;
        runtime.table().low_rank_inner(inner.args, row, std::min(row + kPanelRows, num_rows), panel, panel + 1);
      }
    }
  });
}

// The change of one part, as the kernel takes it; a rank of 0 if there is none.
LowRankArgs part_change(const Inner& inner, size_t part, float* out, int64_t out_stride) {
  if (inner.change == nullptr) return {};
  const LowRankWeights::Part& p = inner.change->parts[part];
  const float* ranks = inner.args.inner + p.first_rank;
  return {p.b, inner.change->type, p.scales, p.rank, p.out_features, ranks, inner.args.inner_stride, out, out_stride};
}

// Ask for the tiles of B that a token's outputs will need, while the linear itself is computed.
void prefetch_tiles(const LowRankArgs& change, int64_t tile_begin, int64_t tile_end) {
  const int64_t tile_bytes = change.rank * kLanes * (change.type == LowRankType::i8 ? 1 : 4);
  const char* b = static_cast<const char*>(change.b);
  for (int64_t i = tile_begin * tile_bytes; i < tile_end * tile_bytes; i += 64) __builtin_prefetch(b + i);
}

// Rows outside, tiles inside: a panel of prepared rows stays in cache while the weights stream past it.
template <class Run>
void run_panels(CpuRuntime& runtime, int64_t num_rows, int64_t num_items, int64_t chunk, const Run& run) {
  for (int64_t row = 0; row < num_rows; row += kPanelRows) {
    const int64_t row_end = std::min(row + kPanelRows, num_rows);
    runtime.pool().run(num_items, chunk, [&](int64_t begin, int64_t end, int) { run(row, row_end, begin, end); });
  }
}

void run_gptq(CpuRuntime& runtime, const PackedGptq& weights, const Prepared& input, Compute compute,
              int64_t num_rows, const LowRankArgs& change, float* out, int64_t out_stride) {
  const bool in_place = read_in_place(input, compute);
  const PrepareArgs& p = input.args;
  const GptqLinearArgs args{
      .weights = &weights.weights(),
      .gathered = in_place ? p.x : p.gathered,
      .values = p.values,
      .block_scales = p.block_scales,
      .group_sums = p.group_sums,
      .x_stride = in_place ? p.x_stride : p.num_blocks * kBlockRows,
      .out = out,
      .out_stride = out_stride,
  };
  const auto kernel = compute == Compute::int8 ? runtime.table().gptq_int8 : runtime.table().gptq_exact;
  const int64_t tiles = args.weights->num_tiles;
  run_panels(runtime, num_rows, tiles, even_chunk(runtime, tiles, 1),
             [&](int64_t row, int64_t row_end, int64_t begin, int64_t end) {
               if (change.rank != 0 && num_rows == 1) prefetch_tiles(change, begin, end);
               kernel(args, row, row_end, begin, end);
               if (change.rank != 0) runtime.table().low_rank(change, row, row_end, begin, end);
             });
}

void run_dense(CpuRuntime& runtime, const DenseWeights& w, const float* x, int64_t x_stride, int64_t num_rows,
               const LowRankArgs& change, float* out, int64_t out_stride) {
  const DenseLinearArgs args{w.weight, w.type, w.in_features, w.out_features, w.bias, x, x_stride, out, out_stride};
  const int64_t chunk = round_up(even_chunk(runtime, w.out_features, 16), kLanes);  // whole tiles of a change
  run_panels(runtime, num_rows, w.out_features, chunk, [&](int64_t row, int64_t row_end, int64_t begin, int64_t end) {
    runtime.table().dense(args, row, row_end, begin, end);
    if (change.rank != 0) runtime.table().low_rank(change, row, row_end, begin / kLanes, ceil_div(end, kLanes));
  });
}

}  // namespace

void LinearPlan::add(const PackedGptq& weights) {
  const auto known = std::find_if(inputs_.begin(), inputs_.end(),
                                  [&](const PackedGptq* input) { return input->shares_input(weights); });
  const auto input = static_cast<size_t>(known - inputs_.begin());
  if (known == inputs_.end()) inputs_.push_back(&weights);
  parts_.push_back({&weights, nullptr, out_features_, input});
  out_features_ += weights.weights().out_features;
}

void LinearPlan::add(const DenseWeights& weights) {
  parts_.push_back({nullptr, &weights, out_features_, 0});
  out_features_ += weights.out_features;
}

void linear(CpuRuntime& runtime, const LinearPlan& plan, Compute compute, const float* x, int64_t x_stride,
            int64_t num_rows, float* out, int64_t out_stride, const LowRankWeights* change) {
  if (num_rows == 0) return;
  const std::lock_guard lock(runtime.mutex());
  std::vector<Prepared> inputs;
  for (const PackedGptq* weights : plan.inputs()) inputs.push_back({weights});
  Inner inner{change};
  run_shared(runtime, inputs, inner, compute, x, x_stride, num_rows);
  for (size_t i = 0; i < plan.parts().size(); ++i) {
    const LinearPlan::Part& part = plan.parts()[i];
    float* target = out + part.column;
    const LowRankArgs changed = part_change(inner, i, target, out_stride);
    if (part.gptq != nullptr) {
      run_gptq(runtime, *part.gptq, inputs[part.input], compute, num_rows, changed, target, out_stride);
    } else {
      run_dense(runtime, *part.dense, x, x_stride, num_rows, changed, target, out_stride);
    }
  }
}

void add_low_rank(CpuRuntime& runtime, const LowRankWeights& change, const float* x, int64_t x_stride,
                  int64_t num_rows, float* out, int64_t out_stride) {
  if (num_rows == 0) return;
  const std::lock_guard lock(runtime.mutex());
  std::vector<Prepared> none;
  Inner inner{&change};
  run_shared(runtime, none, inner, Compute::exact, x, x_stride, num_rows);
  for (size_t i = 0; i < change.parts.size(); out += change.parts[i++].out_features) {
    const LowRankArgs args = part_change(inner, i, out, out_stride);
    if (args.rank == 0) continue;
    const int64_t tiles = ceil_div(args.out_features, kLanes);
    run_panels(runtime, num_rows, tiles, even_chunk(runtime, tiles, 16),
               [&](int64_t row, int64_t row_end, int64_t begin, int64_t end) {
                 runtime.table().low_rank(args, row, row_end, begin, end);
               });
  }
}

void rms_norm(CpuRuntime& runtime, const RmsNormArgs& args, int64_t num_rows) {
  run_rows(runtime, num_rows, args.num_heads * args.size,
           [&](int64_t begin, int64_t end) { runtime.table().rms_norm(args, begin, end); });
}

void rotate(CpuRuntime& runtime, const RotateArgs& args, int64_t num_rows) {
  run_rows(runtime, num_rows, args.num_heads * args.head_dim,
           [&](int64_t begin, int64_t end) { runtime.table().rotate(args, begin, end); });
}

void silu_mul(CpuRuntime& runtime, const SiluMulArgs& args, int64_t num_rows) {
  run_rows(runtime, num_rows, 2 * args.size,
           [&](int64_t begin, int64_t end) { runtime.table().silu_mul(args, begin, end); });
}

void add(CpuRuntime& runtime, const AddArgs& args, int64_t num_rows) {
  run_rows(runtime, num_rows, 2 * args.size,
           [&](int64_t begin, int64_t end) { runtime.table().add(args, begin, end); });
}

void embed(CpuRuntime& runtime, const EmbedArgs& args, int64_t num_rows) {
  run_rows(runtime, num_rows, args.size,
           [&](int64_t begin, int64_t end) { runtime.table().embed(args, begin, end); });
}

void append(CpuRuntime& runtime, const AppendArgs& args) {
  run_rows(runtime, args.kv.num_heads, args.num_rows * args.kv.head_dim * 2,
           [&](int64_t begin, int64_t end) { runtime.table().append(args, begin, end); });
}

void attend(CpuRuntime& runtime, const AttendArgs& args) {
  const std::lock_guard lock(runtime.mutex());
  const int64_t items =
      args.kv.num_heads * attend_items_per_head(args.num_rows, args.num_query_heads, args.kv.num_heads);
  const int64_t floats = round_up(attend_scratch_floats(args.kv.head_dim), kLanes);
  float* scratch = runtime.attend_scratch(floats);
  runtime.pool().run(items, 1, [&](int64_t begin, int64_t end, int thread) {
    runtime.table().attend(args, begin, end, scratch + thread * floats);
  });
}

}  // namespace ropewalk
