// Where keys and values are: pages of kKvTile positions from a pool, and the cache of one layer for the kernels alone.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "ropewalk/runtime.hpp"

namespace ropewalk {

// How keys and values lie in a page; layout in native/README.md, "Pages of keys and values".
struct KvFormat {
  FloatType type;  // f16 or f32
  int64_t num_heads, head_dim;

  // Of one page in one layer instance.
  int64_t instance_bytes() const;
  // Of layer instance `instance` in these pages.
  KvView view(uint8_t* const* pages, int64_t instance) const;
};

class PagePool;

// Keys and values of kKvTile positions in all layer instances. Its memory goes back to the pool.
class Page {
 public:
  Page(std::shared_ptr<PagePool> pool, AlignedBytes memory) : pool_(std::move(pool)), memory_(std::move(memory)) {}
  ~Page();
  Page(const Page&) = delete;
  Page& operator=(const Page&) = delete;

  uint8_t* data() const { return memory_.as<uint8_t>(); }
  const PagePool& pool() const { return *pool_; }
  int64_t num_bytes() const { return memory_.size(); }

 private:
  std::shared_ptr<PagePool> pool_;
  AlignedBytes memory_;
};

// At most `num_bytes` of pages. Those that come back are kept for the next, of the same number of instances: fresh
// memory of the system costs as much as filling it. May be used from any thread.
class PagePool : public std::enable_shared_from_this<PagePool> {
 public:
  PagePool(const KvFormat& format, int64_t num_bytes) : format_(format), limit_(num_bytes) {}

  const KvFormat& format() const { return format_; }
  int64_t num_bytes() const { return limit_; }
  int64_t used_bytes() const;
  // Not initialised. Throws std::bad_alloc where the limit or the system does not allow it.
  std::shared_ptr<Page> take(int64_t num_instances);
  std::shared_ptr<Page> copy(const Page& page);

 private:
  friend class Page;
  AlignedBytes take_bytes(int64_t size);
  void give(AlignedBytes memory) noexcept;

  const KvFormat format_;
  const int64_t limit_;
  mutable std::mutex mutex_;
  int64_t used_ = 0;
  std::vector<AlignedBytes> spare_;  // all of one size
};

// The keys and values of one sequence in one layer. It holds the positions [0, length). An append begins at one of them
// or at their end, so there are no gaps, and forgets what followed: positions are written again where a sequence takes
// another turn, and what is left of the old one beyond them must not be read.
class KvCache {
 public:
  // capacity is rounded up to whole pages; the system provides their memory as it is first written.
  // Throws std::bad_alloc.
  KvCache(const KvFormat& format, int64_t capacity);
  const KvFormat& format() const { return format_; }
  KvView view() const { return format_.view(pages_.data(), 0); }
  int64_t capacity() const { return static_cast<int64_t>(pages_.size()) * kKvTile; }
  int64_t length() const { return length_; }
  void set_length(int64_t length) { length_ = length; }
  int64_t num_bytes() const { return memory_.size(); }

 private:
  KvFormat format_;
  AlignedBytes memory_;
  std::vector<uint8_t*> pages_;
  int64_t length_ = 0;
};

}  // namespace ropewalk
