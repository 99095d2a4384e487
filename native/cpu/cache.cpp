#include "ropewalk/cache.hpp"

#include <cstring>
#include <new>
#include <utility>

namespace ropewalk {

int64_t KvFormat::instance_bytes() const {
  const int64_t element = type == FloatType::f16 ? 2 : 4;
  return num_heads * kKvTile * (head_dim + round_up(head_dim, kLanes)) * element;
}

KvView KvFormat::view(uint8_t* const* pages, int64_t instance) const {
  return {type, num_heads, head_dim, round_up(head_dim, kLanes), pages, instance * instance_bytes()};
}

Page::~Page() { pool_->give(std::move(memory_)); }

int64_t PagePool::used_bytes() const {
  const std::lock_guard lock(mutex_);
  return used_;
}

std::shared_ptr<Page> PagePool::take(int64_t num_instances) {
  return std::make_shared<Page>(shared_from_this(), take_bytes(num_instances * format_.instance_bytes()));
}

std::shared_ptr<Page> PagePool::copy(const Page& page) {
  auto taken = std::make_shared<Page>(shared_from_this(), take_bytes(page.num_bytes()));
  std::memcpy(taken->data(), page.data(), static_cast<size_t>(page.num_bytes()));
  return taken;
}

AlignedBytes PagePool::take_bytes(int64_t size) {
  const std::lock_guard lock(mutex_);
  if (size > limit_ - used_) throw std::bad_alloc();
  if (!spare_.empty() && spare_.back().size() != size) spare_.clear();  // of another layer order
  AlignedBytes memory;
  if (spare_.empty()) {
    memory = AlignedBytes(size);
  } else {
    memory = std::move(spare_.back());
    spare_.pop_back();
  }
  spare_.reserve(spare_.size() + static_cast<size_t>(used_ / size) + 1);  // giving back allocates nothing
  used_ += size;
  return memory;
}

void PagePool::give(AlignedBytes memory) noexcept {
  const std::lock_guard lock(mutex_);
  used_ -= memory.size();
  const bool kept = spare_.empty() || spare_.back().size() == memory.size();
  if (kept && spare_.size() < spare_.capacity()) spare_.push_back(std::move(memory));
}

KvCache::KvCache(const KvFormat& format, int64_t capacity)
    : format_(format), memory_(ceil_div(capacity, kKvTile) * format.instance_bytes(), true) {
  for (int64_t i = 0; i < ceil_div(capacity, kKvTile); ++i) {
    pages_.push_back(memory_.as<uint8_t>() + i * format.instance_bytes());
  }
}

}  // namespace ropewalk
