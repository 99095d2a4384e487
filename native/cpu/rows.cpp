// The row-wise operations: how their rows are cut into items for the threads.
#include <algorithm>

#include "ropewalk/operations.hpp"

namespace ropewalk {

namespace {

// Rows of cheap elementwise work: below about 16 K floats one thread is faster than waking another.
void run_rows(CpuRuntime& runtime, int64_t num_rows, int64_t floats_per_row,
              const std::function<void(int64_t, int64_t)>& job) {
  constexpr int64_t kFloatsPerChunk = 16384;
  const int64_t chunk = std::max<int64_t>(1, kFloatsPerChunk / std::max<int64_t>(1, floats_per_row));
  runtime.pool().run(num_rows, chunk, [&](int64_t begin, int64_t end, int) { job(begin, end); });
}

}  // namespace

void rms_norm(CpuRuntime& runtime, const RmsNormArgs& args, int64_t num_rows) {
  run_rows(runtime, num_rows, args.num_heads * args.size,
           [&](int64_t begin, int64_t end) { runtime.table().rms_norm(args, begin, end); });
}

void rotate(CpuRuntime& runtime, const RotateArgs& args, int64_t num_rows) {
  run_rows(runtime, num_rows, args.num_heads * args.head_dim,
           [&](int64_t begin, int64_t end) { runtime.table().rotate(args, begin, end); });
}

void layer_norm(CpuRuntime& runtime, const LayerNormArgs& args, int64_t num_rows) {
  run_rows(runtime, num_rows, args.num_heads * args.size,
           [&](int64_t begin, int64_t end) { runtime.table().layer_norm(args, begin, end); });
}

void activate(CpuRuntime& runtime, const ActivateArgs& args, int64_t num_rows) {
  run_rows(runtime, num_rows, 2 * args.size,
           [&](int64_t begin, int64_t end) { runtime.table().activate(args, begin, end); });
}

void sigmoid_mul(CpuRuntime& runtime, const SigmoidMulArgs& args, int64_t num_rows) {
  run_rows(runtime, num_rows, args.size,
           [&](int64_t begin, int64_t end) { runtime.table().sigmoid_mul(args, begin, end); });
}

// Choosing an expert looks at all of them.
void route(CpuRuntime& runtime, const RouteArgs& args, int64_t num_rows) {
  run_rows(runtime, num_rows, args.num_experts * (args.top_k + 1),
           [&](int64_t begin, int64_t end) { runtime.table().route(args, begin, end); });
}

void add(CpuRuntime& runtime, const AddArgs& args, int64_t num_rows) {
  run_rows(runtime, num_rows, 2 * args.size,
           [&](int64_t begin, int64_t end) { runtime.table().add(args, begin, end); });
}

void embed(CpuRuntime& runtime, const EmbedArgs& args, int64_t num_rows) {
  run_rows(runtime, num_rows, args.size,
           [&](int64_t begin, int64_t end) { runtime.table().embed(args, begin, end); });
}

}  // namespace ropewalk
