// The limits of this machine, measured on all threads at once.
#include <algorithm>
#include <atomic>

#include "ropewalk/operations.hpp"

namespace ropewalk {

float probe_read(CpuRuntime& runtime, const float* floats, int64_t num_floats) {
  constexpr int64_t kChunk = 64 << 10;  // floats: short enough that threads finish together
  const int64_t num_chunks = ceil_div(num_floats, kChunk);
  std::atomic<float> total{0.0f};
  runtime.pool().run(num_chunks, 1, [&](int64_t begin, int64_t end, int) {
    const int64_t first = begin * kChunk, last = std::min(end * kChunk, num_floats);
    total.fetch_add(runtime.table().probe_read(floats + first, last - first), std::memory_order_relaxed);
  });
  return total.load();
}

int64_t probe_products(CpuRuntime& runtime, ProbeKind kind, int64_t steps) {
  constexpr int64_t kChunks = 64;  // of each thread, which finish together
  std::atomic<int64_t> operations{0};
  const int8_t operands[2][4] = {{1, -1, 2, -2}, {-1, 1, -2, 2}};
  runtime.pool().run(kChunks * runtime.pool().num_threads(), 1, [&](int64_t begin, int64_t end, int) {
    alignas(64) float out[kLanes] = {};
    for (int64_t i = begin; i < end; ++i) {
      operations += runtime.table().probe_products(kind, ceil_div(steps, kChunks), operands[0], out);
    }
  });
  return operations.load();
}

}  // namespace ropewalk
