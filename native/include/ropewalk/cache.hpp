// Where keys and values are: pages of kKvTile positions from a pool, and the cache of one layer for the kernels alone.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "ropewalk/runtime.hpp"

namespace ropewalk {

// How keys and values lie in a page; layout in native/README.md, "Pages of keys and values".
struct KvFormat {
  KvType keys, values;
  int64_t num_heads, head_dim;
  int64_t recent;  // positions that are kept in f16 besides; 0 where nothing is coded

  // Of one page in one layer instance.
  int64_t instance_bytes() const;
  // That of the pages of the last positions.
  KvFormat recent_format() const { return {KvType::f16, KvType::f16, num_heads, head_dim, 0}; }
  // Of layer instance `instance` in these pages; recent_pages: as in KvView, where recent > 0.
  KvView view(uint8_t* const* pages, int64_t instance, uint8_t* const* recent_pages = nullptr) const;
};

class PagePool;

// Keys and values of kKvTile positions in all layer instances. Its memory goes back to the pool.
class Page {
 public:
  Page(std::shared_ptr<PagePool> pool, ArenaBytes memory, bool recent)
      : pool_(std::move(pool)), memory_(std::move(memory)), recent_(recent) {}
  ~Page();
  Page(const Page&) = delete;
  Page& operator=(const Page&) = delete;

  uint8_t* data() const { return memory_.as<uint8_t>(); }
  const PagePool& pool() const { return *pool_; }
  int64_t num_bytes() const { return memory_.size(); }
  // Of the last positions, in f16.
  bool recent() const { return recent_; }
  const KvFormat& format() const;
  int64_t num_instances() const { return num_bytes() / format().instance_bytes(); }

 private:
  std::shared_ptr<PagePool> pool_;
  ArenaBytes memory_;
  bool recent_;
};

// At most `num_bytes` of pages, of both kinds together. Those that come back are kept for the next, of the same kind and
// number of instances: fresh memory of the system costs as much as filling it. They lie in huge pages, because a token
// visits every one of them in each layer for a few kilobytes. May be used from any thread.
class PagePool : public std::enable_shared_from_this<PagePool> {
 public:
  PagePool(const KvFormat& format, int64_t num_bytes)
      : format_(format), recent_format_(format.recent_format()), limit_(num_bytes) {}

  const KvFormat& format() const { return format_; }
  const KvFormat& recent_format() const { return recent_format_; }
  int64_t num_bytes() const { return limit_; }
  int64_t used_bytes() const;
  // Not initialised. Throws std::bad_alloc where the limit or the system does not allow it.
  std::shared_ptr<Page> take(int64_t num_instances, bool recent);
  std::shared_ptr<Page> copy(const Page& page);

 private:
  friend class Page;
  // Pages of one kind that came back, all of one size.
  struct Spare {
    std::vector<ArenaBytes> pages;
    int64_t num_used = 0;
    int64_t num_bytes() const { return pages.empty() ? 0 : pages.back().size() * static_cast<int64_t>(pages.size()); }
  };

  ArenaBytes take_bytes(int64_t size, bool recent);
  void give(ArenaBytes memory, bool recent) noexcept;

  const KvFormat format_, recent_format_;
  const int64_t limit_;
  mutable std::mutex mutex_;
  int64_t used_ = 0;
  Arena arena_;
  Spare spare_[2];  // of codes, or whatever the format is; and of the last positions
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
