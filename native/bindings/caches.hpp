// The cache of one layer for the kernels alone, and the pages that the caches of a model are made of.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <memory>
#include <string>

#include "checks.hpp"
#include "computing.hpp"
#include "linears.hpp"
#include "ropewalk/cache.hpp"
#include "ropewalk/operations.hpp"

namespace ropewalk {

inline KvFormat checked_format(int64_t num_heads, int64_t head_dim, const std::string& type) {
  require(num_heads > 0 && num_heads <= kMostHeads, "num_heads is out of range");
  require(head_dim > 0 && head_dim <= kMostHeadDim, "head_dim is out of range");
  const FloatType element = float_type_named(type);
  require(element != FloatType::bf16, "a cache holds 'f16' or 'f32'");
  return {element, num_heads, head_dim};
}

inline std::shared_ptr<KvCache> new_kv_cache(int64_t num_heads, int64_t head_dim, int64_t capacity,
                                             const std::string& type) {
  require(capacity > 0 && capacity <= kMostPositions, "capacity is out of range");
  return std::make_shared<KvCache>(checked_format(num_heads, head_dim, type), capacity);
}

inline std::shared_ptr<PagePool> new_page_pool(int64_t num_heads, int64_t head_dim, const std::string& type,
                                               int64_t num_bytes) {
  require(num_bytes >= 0, "num_bytes is negative");
  return std::make_shared<PagePool>(checked_format(num_heads, head_dim, type), num_bytes);
}

inline std::shared_ptr<Page> take_page(PagePool& pool, int64_t num_instances) {
  require(num_instances > 0 && num_instances <= kMostInstances, "num_instances is out of range");
  return pool.take(num_instances);
}

inline std::shared_ptr<Page> copy_page(PagePool& pool, const Page& page) {
  require(&page.pool() == &pool, "the page is of another pool");
  return pool.copy(page);
}

inline std::string range_of(int64_t start, int64_t num_rows) {
  // Added as unsigned numbers: these are the positions that are refused.
  const auto end = static_cast<int64_t>(static_cast<uint64_t>(start) + static_cast<uint64_t>(num_rows));
  return std::to_string(start) + " to " + std::to_string(end);
}

// The cache's length is read and written with the GIL held, so that of two threads each sees the other's append as
// done or as not begun.
inline void run_append(CpuRuntime& runtime, KvCache& cache, const py::array& k, const py::array& v, int64_t start) {
  const KvView kv = cache.view();
  const Heads<const float> keys = heads_of(k, "k", kv.head_dim);
  const Heads<const float> values = heads_of(v, "v", kv.head_dim);
  if (keys.num_heads != kv.num_heads || values.num_heads != kv.num_heads) {
    throw ShapeFailure("k and v must have the cache's " + std::to_string(kv.num_heads) + " heads");
  }
  require(keys.num_rows == values.num_rows, "k and v differ in their number of rows");
  if (start < 0 || start > cache.capacity() - keys.num_rows) {
    throw ShapeFailure("positions " + range_of(start, keys.num_rows) + " do not fit a cache of " +
                       std::to_string(cache.capacity()));
  }
  if (start > cache.length()) {
    throw ShapeFailure("positions " + range_of(start, keys.num_rows) + " would leave a gap in a cache that holds " +
                       std::to_string(cache.length()));
  }
  if (keys.num_rows == 0) return;
  cache.set_length(start);
  {
    const AppendArgs args{kv, keys.data, values.data, keys.row_stride, values.row_stride, keys.num_rows, start};
    const Computing computing(runtime);
    append(runtime, {args});
  }
  cache.set_length(start + keys.num_rows);
}

inline void run_attend(CpuRuntime& runtime, const py::array& q, const KvCache& cache, int64_t start, int64_t window,
                float scale, py::array& out) {
  const KvView kv = cache.view();
  const Heads<const float> queries = heads_of(q, "q", kv.head_dim);
  if (queries.num_heads == 0 || queries.num_heads % kv.num_heads != 0) {
    throw ShapeFailure("the number of query heads (" + std::to_string(queries.num_heads) +
                       ") must be a multiple of the cache's " + std::to_string(kv.num_heads));
  }
  if (start < 0 || start > cache.capacity() - queries.num_rows) {
    throw ShapeFailure("queries at positions " + range_of(start, queries.num_rows) + " lie outside a cache of " +
                       std::to_string(cache.capacity()));
  }
  if (queries.num_rows > 0 && start + queries.num_rows > cache.length()) {
    throw ShapeFailure("queries at positions " + range_of(start, queries.num_rows) +
                       " see keys that were not appended: the cache holds " + std::to_string(cache.length()));
  }
  require(window >= 0, "window must be at least 0 (0: unlimited)");
  require(std::isfinite(scale), "scale must be finite");
  AttendArgs args{};
  args.kv = kv;
  args.q = queries.data;
  args.q_stride = queries.row_stride;
  args.num_rows = queries.num_rows;
  args.num_query_heads = queries.num_heads;
  args.start = start;
  args.window = window;
  args.scale = scale;
  args.out = writable_contiguous<float>(out, "out", {queries.num_rows, queries.num_heads * kv.head_dim});
  check_apart(out, "out", q, "q");
  const Computing computing(runtime);
  attend(runtime, {args});
}

}  // namespace ropewalk
