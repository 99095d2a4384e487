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

// Where the prepared activations of one input order lie in the runtime's scratch.
struct Prepared {
  const PackedGptq* weights;
  PrepareArgs args;
};

// Bytes of scratch for `num_rows` prepared rows, and the pointers into it once `base` is known.
int64_t lay_out(Prepared& prepared, Compute compute, int64_t num_rows, uint8_t* base, int64_t offset) {
  const GptqWeights& w = prepared.weights->weights();
  const int64_t padded = w.num_blocks * kBlockRows;
  const auto take = [&](int64_t bytes) {
    uint8_t* taken = base + offset;
    offset = round_up(offset + bytes, 64);
    return taken;
  };
  if (compute == Compute::exact) {
    if (w.source_row == nullptr) return offset;  // rows are read where they are
    prepared.args.gathered = reinterpret_cast<float*>(take(num_rows * padded * 4));
    return offset;
  }
  prepared.args.values = reinterpret_cast<int8_t*>(take(num_rows * padded));
  prepared.args.block_scales = reinterpret_cast<float*>(take(num_rows * w.num_blocks * 4));
  prepared.args.group_sums = reinterpret_cast<float*>(take(num_rows * w.num_groups * 4));
  return offset;
}

// The distinct input orders among the parts: q, k and v of an act-order model share one.
std::vector<Prepared> distinct_inputs(const std::vector<LinearPart>& parts) {
  std::vector<Prepared> inputs;
  for (const LinearPart& part : parts) {
    if (part.gptq == nullptr) continue;
    const bool known = std::any_of(inputs.begin(), inputs.end(),
                                   [&](const Prepared& p) { return p.weights->shares_input(*part.gptq); });
    if (!known) inputs.push_back({part.gptq, {}});
  }
  return inputs;
}

void prepare_inputs(CpuRuntime& runtime, std::vector<Prepared>& inputs, Compute compute, const float* x,
                    int64_t x_stride, int64_t num_rows) {
  int64_t bytes = 0;
  for (Prepared& input : inputs) bytes = lay_out(input, compute, num_rows, nullptr, bytes);
  uint8_t* base = runtime.activations(bytes).as<uint8_t>();
  int64_t offset = 0;
  for (Prepared& input : inputs) {
    offset = lay_out(input, compute, num_rows, base, offset);
    const GptqWeights& w = input.weights->weights();
    input.args.x = x;
    input.args.x_stride = x_stride;
    input.args.in_features = w.in_features;
    input.args.num_blocks = w.num_blocks;
    input.args.num_groups = w.num_groups;
    input.args.source_row = w.source_row;
    input.args.group_starts = w.group_starts;
    if (compute == Compute::exact && w.source_row == nullptr) continue;
    runtime.pool().run(num_rows, num_rows == 1 ? 1 : 8, [&](int64_t begin, int64_t end, int) {
      runtime.table().prepare(input.args, begin, end);
    });
  }
}

GptqLinearArgs gptq_args(const LinearPart& part, const std::vector<Prepared>& inputs, Compute compute, float* out,
                         int64_t out_stride) {
  const auto input = std::find_if(inputs.begin(), inputs.end(),
                                  [&](const Prepared& p) { return p.weights->shares_input(*part.gptq); });
  const PrepareArgs& p = input->args;
  const bool in_place = compute == Compute::exact && p.gathered == nullptr;
  return {
      .weights = &part.gptq->weights(),
      .gathered = in_place ? p.x : p.gathered,
      .values = p.values,
      .block_scales = p.block_scales,
      .group_sums = p.group_sums,
      .x_stride = in_place ? p.x_stride : p.num_blocks * kBlockRows,
      .out = out + part.column,
      .out_stride = out_stride,
  };
}

}  // namespace

void linear(CpuRuntime& runtime, const std::vector<LinearPart>& parts, Compute compute, const float* x,
            int64_t x_stride, int64_t num_rows, float* out, int64_t out_stride) {
  if (num_rows == 0) return;
  const std::lock_guard lock(runtime.mutex());
  std::vector<Prepared> inputs = distinct_inputs(parts);
  prepare_inputs(runtime, inputs, compute, x, x_stride, num_rows);
  const KernelTable& table = runtime.table();
  for (const LinearPart& part : parts) {
    if (part.gptq != nullptr) {
      const GptqLinearArgs args = gptq_args(part, inputs, compute, out, out_stride);
      const auto kernel = compute == Compute::int8 ? table.gptq_int8 : table.gptq_exact;
      const int64_t tiles = args.weights->num_tiles;
      const int64_t chunk = even_chunk(runtime, tiles, 1);
      for (int64_t row = 0; row < num_rows; row += kPanelRows) {
        const int64_t row_end = std::min(row + kPanelRows, num_rows);
        runtime.pool().run(tiles, chunk,
                           [&](int64_t begin, int64_t end, int) { kernel(args, row, row_end, begin, end); });
      }
      continue;
    }
    const DenseWeights& w = *part.dense;
    const DenseLinearArgs args{w.weight, w.type, w.in_features, w.out_features, w.bias, x, x_stride,
                               out + part.column, out_stride};
    const int64_t chunk = round_up(even_chunk(runtime, w.out_features, 16), 4);
    for (int64_t row = 0; row < num_rows; row += kPanelRows) {
      const int64_t row_end = std::min(row + kPanelRows, num_rows);
      runtime.pool().run(w.out_features, chunk,
                         [&](int64_t begin, int64_t end, int) { table.dense(args, row, row_end, begin, end); });
    }
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
