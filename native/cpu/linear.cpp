// Linears over one input, with their low-rank changes: what they share is computed first, then tiles of all outputs.
#include <algorithm>

#include "ropewalk/operations.hpp"

namespace ropewalk {

namespace {

// Chunks small enough that threads finish together, large enough that taking one costs nothing.
constexpr int64_t kChunksOfThread = 8;

int64_t even_chunk(CpuRuntime& runtime, int64_t num_items, int64_t least, int64_t chunks_of_thread) {
  return std::max(least, ceil_div(num_items, runtime.pool().num_threads() * chunks_of_thread));
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
  int64_t digits = 0, scales = 0, starts = 0, group_sums = 0;  // places
};

void reserve(Prepared& input, int64_t num_digits, int64_t num_rows, Places& places) {
  const GptqWeights& w = input.weights->weights();
  input.args.num_digits = num_digits;
  input.digits = places.take(num_rows * w.num_blocks * num_digits * kBlockRows);
  input.scales = places.take(num_rows * w.num_blocks * 4);
  input.starts = places.take(num_rows * w.num_blocks * num_digits * 4);
  input.group_sums = places.take(num_rows * w.num_groups * 4);
}

void describe(Prepared& input, const float* x, int64_t x_stride, uint8_t* scratch) {
  input.args.x = x;
  input.args.x_stride = x_stride;
  input.args.weights = &input.weights->weights();
  input.args.out = {
      .digits = reinterpret_cast<int8_t*>(scratch + input.digits),
      .scales = reinterpret_cast<float*>(scratch + input.scales),
      .starts = reinterpret_cast<int32_t*>(scratch + input.starts),
      .group_sums = reinterpret_cast<float*>(scratch + input.group_sums),
  };
}

// Where the product with A goes for the rows of a change.
struct Inner {
  RowChange change;
  LowRankInnerArgs args{};  // its row 0 is the first row of the change
  int64_t place = 0;

  int64_t num_rows() const { return change.end - change.first; }
  int64_t panels() const { return ceil_div(change.weights->rank, kRankTile); }
  int64_t items() const { return ceil_div(num_rows(), kPanelRows) * panels(); }
};

void describe(Inner& inner, const float* x, int64_t x_stride, uint8_t* scratch) {
  const LowRankWeights& w = *inner.change.weights;
  inner.args = {
      .a = w.a,
      .type = w.type,
      .scales = w.scales,
      .in_features = w.in_features,
      .x = x + inner.change.first * x_stride,
      .x_stride = x_stride,
      .inner = reinterpret_cast<float*>(scratch + inner.place),
      .inner_stride = round_up(w.rank, kRankTile),
  };
}

void run_inner(CpuRuntime& runtime, const Inner& inner, int64_t item) {
  const int64_t row = item / inner.panels() * kPanelRows, panel = item % inner.panels();
  runtime.table().low_rank_inner(inner.args, row, std::min(row + kPanelRows, inner.num_rows()), panel, panel + 1);
}

// A linear on its way: what its parts share.
struct Shared {
  const LinearJob* job;
  std::vector<Prepared> inputs;
  std::vector<Inner> inners;
};

Shared shared_of(const LinearJob& job) {
  Shared shared{&job, {}, {}};
  for (const PackedGptq* weights : job.plan->inputs()) shared.inputs.push_back({weights});
  if (job.changes != nullptr) {
    for (const RowChange& change : *job.changes) shared.inners.push_back({change});
  }
  return shared;
}

// Rows of an input that are prepared together.
struct PrepareItem {
  const PrepareArgs* args;
  int64_t row, row_end;
};

// What the parts of linears share, in one job for all threads: the prepared activations, and the inner products.
void run_shared(CpuRuntime& runtime, std::vector<Shared>& linears, Compute compute) {
  Places places;
  const int64_t num_digits = compute == Compute::int8 ? kInt8Digits : kExactDigits;
  for (Shared& shared : linears) {
    for (Prepared& input : shared.inputs) reserve(input, num_digits, shared.job->num_rows, places);
    for (Inner& inner : shared.inners) inner.place = places.take(inner.num_rows() * inner.panels() * kRankTile * 4);
  }
  uint8_t* scratch = runtime.activations(places.end).as<uint8_t>();
  std::vector<PrepareItem> prepared;
  std::vector<const Inner*> inners;
  int64_t num_inner_items = 0;
  for (Shared& shared : linears) {
    const LinearJob& job = *shared.job;
    // A few rows in small items, for all threads: a step of eight at 1.1B took 51 and 54 ms, as one item 60 and 64.
    const int64_t rows_of_item = job.num_rows > 16 ? 8 : 2;
    for (Prepared& input : shared.inputs) {
      describe(input, job.x, job.x_stride, scratch);
      for (int64_t row = 0; row < job.num_rows; row += rows_of_item) {
        prepared.push_back({&input.args, row, std::min(row + rows_of_item, job.num_rows)});
      }
    }
    for (Inner& inner : shared.inners) {
      describe(inner, job.x, job.x_stride, scratch);
      inners.push_back(&inner);
      num_inner_items += inner.items();
    }
  }
  const auto prepare_items = static_cast<int64_t>(prepared.size());
  runtime.pool().run(prepare_items + num_inner_items, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      if (i < prepare_items) {
        const PrepareItem& item = prepared[static_cast<size_t>(i)];
        runtime.table().prepare(*item.args, item.row, item.row_end);
        continue;
      }
      int64_t rest = i - prepare_items;
      auto inner = inners.begin();
      for (; rest >= (*inner)->items(); ++inner) rest -= (*inner)->items();
      run_inner(runtime, **inner, rest);
    }
  });
}

// The change of part `index`, as the kernel takes it: its row 0 is the first row of the change. A rank of 0: none.
LowRankArgs part_change(const Inner& inner, size_t index, float* out, int64_t out_stride) {
  const LowRankWeights& w = *inner.change.weights;
  const LowRankWeights::Part& part = w.parts[index];
  return {
      .b = part.b,
      .type = w.type,
      .scales = part.scales,
      .rank = part.rank,
      .out_features = part.out_features,
      .inner = inner.args.inner + part.first_rank,
      .inner_stride = inner.args.inner_stride,
      .out = out + inner.change.first * out_stride,
      .out_stride = out_stride,
  };
}

// Ask for the tiles of B that a token's outputs will need, while the linear itself is computed.
void prefetch_tiles(const LowRankArgs& change, int64_t tile_begin, int64_t tile_end) {
  const int64_t tile_bytes = change.rank * kLanes * (change.type == LowRankType::i8 ? 1 : 4);
  const char* b = static_cast<const char*>(change.b);
  for (int64_t i = tile_begin * tile_bytes; i < tile_end * tile_bytes; i += 64) __builtin_prefetch(b + i);
}

// One part of a linear, ready to run on any of its rows and tiles.
class PartRun {
 public:
  PartRun(CpuRuntime& runtime, const LinearPlan::Part& part, size_t index, Compute compute,
          const std::vector<Prepared>& inputs, const std::vector<Inner>& inners, const float* x, int64_t x_stride,
          float* out, int64_t out_stride)
      : table_(runtime.table()), part_(part), compute_(compute) {
    if (part.gptq != nullptr) {
      gptq_ = {&part.gptq->weights(), inputs[part.input].args.out, out, out_stride};
    } else {
      const DenseWeights& w = *part.dense;
      dense_ = {w.weight, w.type, w.in_features, w.out_features, w.bias, x, x_stride, out, out_stride};
    }
    for (const Inner& inner : inners) {
      const LowRankArgs args = part_change(inner, index, out, out_stride);
      if (args.rank != 0) changes_.push_back({inner.change.first, inner.change.end, args});
    }
  }

  int64_t num_tiles() const {
    return part_.gptq != nullptr ? part_.gptq->weights().num_tiles : ceil_div(part_.dense->out_features, kLanes);
  }

  void run(int64_t row, int64_t row_end, int64_t tile, int64_t tile_end) const {
    if (row_end - row == 1) {
      for (const Change& change : changes_) prefetch_tiles(change.args, tile, tile_end);
    }
    if (part_.gptq == nullptr) {
      table_.dense(dense_, row, row_end, tile * kLanes, std::min(tile_end * kLanes, dense_.out_features));
    } else {
      (compute_ == Compute::int8 ? table_.gptq_int8 : table_.gptq_exact)(gptq_, row, row_end, tile, tile_end);
    }
    for (const Change& change : changes_) {
      const int64_t first = std::max(row, change.first), end = std::min(row_end, change.end);
      if (first < end) table_.low_rank(change.args, first - change.first, end - change.first, tile, tile_end);
    }
  }

 private:
  struct Change {
    int64_t first, end;
    LowRankArgs args;
  };

  const KernelTable& table_;
  const LinearPlan::Part& part_;
  Compute compute_;
  GptqLinearArgs gptq_{};
  DenseLinearArgs dense_{};
  std::vector<Change> changes_;
};

// Some rows of a part.
struct Unit {
  const PartRun* part;
  int64_t row, row_end;
};

// Tiles of all units, counted through: small parts (keys and values) keep no thread waiting.
void run_units(CpuRuntime& runtime, const std::vector<Unit>& units, int64_t chunks_of_thread) {
  int64_t num_tiles = 0;
  for (const Unit& unit : units) num_tiles += unit.part->num_tiles();
  const int64_t chunk = even_chunk(runtime, num_tiles, 1, chunks_of_thread);
  runtime.pool().run(num_tiles, chunk, [&](int64_t begin, int64_t end, int) {
    int64_t before = 0;
    for (const Unit& unit : units) {
      const int64_t tiles = unit.part->num_tiles();
      const int64_t first = std::max(begin - before, int64_t{0}), last = std::min(end - before, tiles);
      if (first < last) unit.part->run(unit.row, unit.row_end, first, last);
      before += tiles;
    }
  });
}

std::vector<PartRun> parts_of(CpuRuntime& runtime, const Shared& shared, Compute compute) {
  const LinearJob& job = *shared.job;
  std::vector<PartRun> parts;
  parts.reserve(job.plan->parts().size());
  for (size_t i = 0; i < job.plan->parts().size(); ++i) {
    const LinearPlan::Part& part = job.plan->parts()[i];
    parts.emplace_back(runtime, part, i, compute, shared.inputs, shared.inners, job.x, job.x_stride,
                       job.out + part.column, job.out_stride);
  }
  return parts;
}

}  // namespace

void linear(CpuRuntime& runtime, Compute compute, const LinearJob& job) {
  if (job.num_rows == 0) return;
  std::vector<Shared> shared{shared_of(job)};
  run_shared(runtime, shared, compute);
  const std::vector<PartRun> parts = parts_of(runtime, shared[0], compute);
  // Rows outside, tiles inside: a panel of prepared rows stays in cache while the weights stream past it.
  for (int64_t row = 0; row < job.num_rows; row += kPanelRows) {
    std::vector<Unit> units;
    for (const PartRun& part : parts) units.push_back({&part, row, std::min(row + kPanelRows, job.num_rows)});
    run_units(runtime, units, kChunksOfThread);
  }
}

void linears(CpuRuntime& runtime, Compute compute, const std::vector<LinearJob>& jobs) {
  std::vector<Shared> shared;
  for (const LinearJob& job : jobs) shared.push_back(shared_of(job));
  run_shared(runtime, shared, compute);
  std::vector<std::vector<PartRun>> parts;
  for (const Shared& one : shared) parts.push_back(parts_of(runtime, one, compute));
  std::vector<Unit> units;
  for (size_t i = 0; i < jobs.size(); ++i) {
    for (int64_t row = 0; row < jobs[i].num_rows; row += kPanelRows) {
      for (const PartRun& part : parts[i]) units.push_back({&part, row, std::min(row + kPanelRows, jobs[i].num_rows)});
    }
  }
  // Units of a few rows and units of many are chunks of unequal work: smaller ones.
  run_units(runtime, units, 4 * kChunksOfThread);
}

void add_low_rank(CpuRuntime& runtime, const LowRankWeights& change, const float* x, int64_t x_stride,
                  int64_t num_rows, float* out, int64_t out_stride) {
  if (num_rows == 0) return;
  const LinearPlan none;
  const std::vector<RowChange> changes{{0, num_rows, &change}};
  const LinearJob job{&none, x, x_stride, num_rows, out, out_stride, &changes};
  std::vector<Shared> shared{shared_of(job)};
  run_shared(runtime, shared, Compute::exact);
  for (size_t i = 0; i < change.parts.size(); out += change.parts[i++].out_features) {
    const LowRankArgs args = part_change(shared[0].inners[0], i, out, out_stride);
    if (args.rank == 0) continue;
    const int64_t tiles = ceil_div(args.out_features, kLanes);
    for (int64_t row = 0; row < num_rows; row += kPanelRows) {
      const int64_t row_end = std::min(row + kPanelRows, num_rows);
      runtime.pool().run(tiles, even_chunk(runtime, tiles, 16, kChunksOfThread), [&](int64_t begin, int64_t end, int) {
        runtime.table().low_rank(args, row, row_end, begin, end);
      });
    }
  }
}

}  // namespace ropewalk
