// The cache of one layer for the kernels alone, and the pages that the caches of a model are made of.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <map>
#include <memory>
#include <string>

#include "checks.hpp"
#include "computing.hpp"
#include "linears.hpp"
#include "ropewalk/cache.hpp"
#include "ropewalk/operations.hpp"

namespace ropewalk {

inline KvType kv_type_named(const std::string& name, const std::string& type) {
  if (name == "f32") return KvType::f32;
  if (name == "f16") return KvType::f16;
  if (name == "q8") return KvType::q8;
  if (name == "q6") return KvType::q6;
  if (name == "q4") return KvType::q4;
  throw ShapeFailure("type of a cache is '" + type + "'; accepted: 'f32', 'f16', 'q8', 'q6', 'q4', or two of them, keys "
                     "first, as in 'q8_q4'");
}

// type: of keys and values, or of each as in "q8_q4".
inline KvFormat checked_format(int64_t num_heads, int64_t head_dim, const std::string& type, int64_t recent) {
  require(num_heads > 0 && num_heads <= kMostHeads, "num_heads is out of range");
  require(head_dim > 0 && head_dim <= kMostHeadDim, "head_dim is out of range");
  const size_t between = type.find('_');
  const KvType keys = kv_type_named(type.substr(0, between), type);
  const KvType values = between == std::string::npos ? keys : kv_type_named(type.substr(between + 1), type);
  require(recent >= 0 && recent <= kMostPositions && recent % kKvTile == 0, "recent must be a multiple of 64");
  require(recent == 0 || code_bits(keys) != 0 || code_bits(values) != 0, "recent is for caches with codes");
  return {keys, values, num_heads, head_dim, recent};
}

inline std::shared_ptr<KvCache> new_kv_cache(int64_t num_heads, int64_t head_dim, int64_t capacity,
                                             const std::string& type) {
  require(capacity > 0 && capacity <= kMostPositions, "capacity is out of range");
  return std::make_shared<KvCache>(checked_format(num_heads, head_dim, type, 0), capacity);
}

inline std::shared_ptr<PagePool> new_page_pool(int64_t num_heads, int64_t head_dim, const std::string& type,
                                               int64_t num_bytes, int64_t recent) {
  require(num_bytes >= 0, "num_bytes is negative");
  return std::make_shared<PagePool>(checked_format(num_heads, head_dim, type, recent), num_bytes);
}

inline std::shared_ptr<Page> take_page(PagePool& pool, int64_t num_instances, bool recent) {
  require(num_instances > 0 && num_instances <= kMostInstances, "num_instances is out of range");
  require(!recent || pool.format().recent > 0, "this pool has no pages of the last positions");
  return pool.take(num_instances, recent);
}

inline std::shared_ptr<Page> copy_page(PagePool& pool, const Page& page) {
  require(&page.pool() == &pool, "the page is of another pool");
  return pool.copy(page);
}

// The memory of a page as an array that keeps it alive.
inline py::array page_bytes(const std::shared_ptr<Page>& page) {
  return py::array(py::dtype::of<uint8_t>(), Shape{page->num_bytes()}, page->data(), py::cast(page));
}

using Pages = std::vector<std::shared_ptr<Page>>;

// The memory of pages of one pool and kind, at least of positions up to start + num_rows.
inline std::vector<uint8_t*> move_places(const Pages& pages, const Page& like, const char* name, int64_t start,
                                         int64_t num_rows) {
  const auto num_pages = static_cast<int64_t>(pages.size());
  if (num_pages > kMostPositions / kKvTile || start < 0 || start > num_pages * kKvTile - num_rows) {
    throw ShapeFailure(std::to_string(num_rows) + " positions from " + std::to_string(start) + " on do not fit the " +
                       std::to_string(num_pages) + " pages of " + name);
  }
  std::vector<uint8_t*> places;
  for (const auto& page : pages) {
    require(page != nullptr, "a page is None");
    require(&page->pool() == &like.pool() && page->recent() == like.recent() && page->num_bytes() == like.num_bytes(),
            "the pages are of several pools, kinds or numbers of layer instances");
    places.push_back(page->data());
  }
  return places;
}

// Rows move one after the other: in pages that are both read and written, each must be read before it is written.
inline void check_ascending(const std::vector<uint8_t*>& source, int64_t source_start,
                            const std::vector<uint8_t*>& target, int64_t target_start, int64_t num_rows) {
  std::map<const uint8_t*, int64_t> read;
  for (int64_t i = source_start / kKvTile; i * kKvTile < source_start + num_rows; ++i) {
    read[source[static_cast<size_t>(i)]] = i;
  }
  for (int64_t i = target_start / kKvTile; i * kKvTile < target_start + num_rows; ++i) {
    const auto found = read.find(target[static_cast<size_t>(i)]);
    if (found == read.end()) continue;
    require(found->second == i && target_start <= source_start, "rows would be written before they are read");
  }
}

inline void run_move_rows(CpuRuntime& runtime, const Pages& source, int64_t source_start, const Pages& target,
                          int64_t target_start, int64_t num_rows, const py::array& cos, const py::array& sin,
                          const std::vector<int32_t>& tables) {
  require(num_rows >= 0 && num_rows <= kMostPositions, "num_rows is out of range");
  require(cos.ndim() == 3, "cos and sin must be [tables, T, R / 2]");
  check_extent(cos, "cos");
  MoveArgs args{};
  args.num_rows = num_rows;
  args.half = cos.shape(2);
  args.cos = contiguous<float>(cos, "cos", {cos.shape(0), num_rows, args.half});
  args.sin = contiguous<float>(sin, "sin", {cos.shape(0), num_rows, args.half});
  for (const int32_t table : tables) {
    require(table >= -1 && table < cos.shape(0), "keys are to be turned by a table that there is not");
  }
  args.tables = tables.data();
  if (num_rows == 0) return;
  require(!source.empty() && source[0] != nullptr, "source has no pages");
  const Page& like = *source[0];
  const KvFormat& format = like.format();
  require(2 * args.half <= format.head_dim, "cos has more than D / 2 columns");
  require(static_cast<int64_t>(tables.size()) == like.num_instances(), "there is one table, or -1, for each layer instance");
  const std::vector<uint8_t*> from = move_places(source, like, "source", source_start, num_rows);
  const std::vector<uint8_t*> to = move_places(target, like, "target", target_start, num_rows);
  check_ascending(from, source_start, to, target_start, num_rows);
  args.source = format.view(from.data(), 0);
  args.target = format.view(to.data(), 0);
  args.instance_bytes = format.instance_bytes();
  args.source_start = source_start;
  args.target_start = target_start;
  const Computing computing(runtime);
  move_rows(runtime, args, like.num_instances());
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
                float scale, float softcap, const std::string& compute, py::array& out) {
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
  check_softcap(softcap);
  AttendArgs args{};
  args.kv = kv;
  args.q = queries.data;
  args.q_stride = queries.row_stride;
  args.num_rows = queries.num_rows;
  args.num_query_heads = queries.num_heads;
  args.start = start;
  args.window = window;
  args.scale = scale;
  args.softcap = softcap;
  args.compute = compute_named(compute);
  args.out = writable_contiguous<float>(out, "out", {queries.num_rows, queries.num_heads * kv.head_dim});
  check_apart(out, "out", q, "q");
  const Computing computing(runtime);
  attend(runtime, {args});
}

}  // namespace ropewalk
