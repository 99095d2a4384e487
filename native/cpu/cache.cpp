#include "ropewalk/cache.hpp"

#include <cstring>
#include <new>
#include <utility>

namespace ropewalk {

int64_t KvFormat::instance_bytes() const {
  return num_heads * (key_bytes(keys, head_dim) + value_bytes(values, head_dim));
}

KvView KvFormat::view(uint8_t* const* pages, int64_t instance, uint8_t* const* recent_pages) const {
  const int64_t recent_offset = recent > 0 ? instance * recent_format().instance_bytes() : 0;
  return {keys, values, num_heads, head_dim, pages, instance * instance_bytes(), recent, recent_pages, recent_offset};
}

Page::~Page() { pool_->give(std::move(memory_), recent_); }

const KvFormat& Page::format() const { return recent_ ? pool_->recent_format() : pool_->format(); }

int64_t PagePool::used_bytes() const {
  const std::lock_guard lock(mutex_);
  return used_;
}

std::shared_ptr<Page> PagePool::take(int64_t num_instances, bool recent) {
  const int64_t size = num_instances * (recent ? recent_format_ : format_).instance_bytes();
  return std::make_shared<Page>(shared_from_this(), take_bytes(size, recent), recent);
}

std::shared_ptr<Page> PagePool::copy(const Page& page) {
  auto taken = std::make_shared<Page>(shared_from_this(), take_bytes(page.num_bytes(), page.recent()), page.recent());
  std::memcpy(taken->data(), page.data(), static_cast<size_t>(page.num_bytes()));
  return taken;
}

ArenaBytes PagePool::take_bytes(int64_t size, bool recent) {
  const std::lock_guard lock(mutex_);
  if (size > limit_ - used_) throw std::bad_alloc();
  Spare& spare = spare_[recent];
  Spare& other = spare_[!recent];
  if (!spare.pages.empty() && spare.pages.back().size() != size) spare.pages.clear();  // of another layer order
  ArenaBytes memory;
  if (spare.pages.empty()) {
    // What is kept of the other kind counts as well, or the system would have to give twice the limit.
    while (!other.pages.empty() && size > limit_ - used_ - other.num_bytes()) other.pages.pop_back();
    memory = arena_.take(size);
  } else {
    memory = std::move(spare.pages.back());
    spare.pages.pop_back();
  }
  ++spare.num_used;
  used_ += size;
  try {  // giving back allocates nothing
    spare.pages.reserve(spare.pages.size() + static_cast<size_t>(spare.num_used));
  } catch (...) {
    --spare.num_used;
    used_ -= size;
    throw;
  }
  return memory;
}

void PagePool::give(ArenaBytes memory, bool recent) noexcept {
  const std::lock_guard lock(mutex_);
  Spare& spare = spare_[recent];
  used_ -= memory.size();
  --spare.num_used;
  const bool kept = spare.pages.empty() || spare.pages.back().size() == memory.size();
  if (kept && spare.pages.size() < spare.pages.capacity()) spare.pages.push_back(std::move(memory));
}

KvCache::KvCache(const KvFormat& format, int64_t capacity)
    : format_(format), memory_(ceil_div(capacity, kKvTile) * format.instance_bytes(), true) {
  for (int64_t i = 0; i < ceil_div(capacity, kKvTile); ++i) {
    pages_.push_back(memory_.as<uint8_t>() + i * format.instance_bytes());
  }
}

}  // namespace ropewalk
