// CpuRuntime: the chosen kernel table and the threads that run it.  One per model; no global state.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "ropewalk/kernels.hpp"
#include "ropewalk/limits.hpp"

namespace ropewalk {

// Tables that this machine can run, best first; scalar is always last.
std::vector<const KernelTable*> available_tables();

// The best table, or the one named. Throws std::invalid_argument listing what there is.
const KernelTable& choose_table(const std::string& isa);

// Memory that starts on a cache line; large pieces ask for huge pages, which make decoding from RAM faster.
class AlignedBytes {
 public:
  AlignedBytes() = default;
  // Throws std::bad_alloc.
  explicit AlignedBytes(int64_t size, bool zeroed = false);
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  int64_t size() const { return size_; }

 private:
  struct Release {
    void operator()(void* p) const;
  };
  std::unique_ptr<void, Release> memory_;
  void* data_ = nullptr;
  int64_t size_ = 0;
};

// A place in an arena, which goes back there when it is no longer needed.
class ArenaBytes {
 public:
  ArenaBytes() = default;
  ArenaBytes(std::shared_ptr<uint8_t> data, int64_t size) : data_(std::move(data)), size_(size) {}
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }
  int64_t size() const { return size_; }

 private:
  std::shared_ptr<uint8_t> data_;
  int64_t size_ = 0;
};

// Places one after the other in huge pages, in the order in which they are asked for: for weights, that of a token's way
// through the model. Apart from each other, half of those of a 1.1B model lay in small pages: too small, or the rest
// behind their last huge page. A place that is no longer needed serves the next that asks for its size, as an expert's
// do that makes room for another; otherwise one expert in use would keep the places of a dozen dropped ones. A block
// stays as long as a place in it is used.
class Arena {
 public:
  // Starts on a cache line; not initialised.  Throws std::bad_alloc.
  ArenaBytes take(int64_t size);

 private:
  static constexpr int64_t kBlockBytes = int64_t{32} << 20;

  struct Place {
    std::weak_ptr<AlignedBytes> block;
    int64_t offset;
  };

  // Outlives the arena where what it gave does.
  struct Places {
    std::mutex mutex;
    std::weak_ptr<AlignedBytes> block;  // the newest
    int64_t used = 0;                   // of that
    std::map<int64_t, std::vector<Place>> free;  // by size

    std::pair<std::shared_ptr<AlignedBytes>, int64_t> take(int64_t size);
    void give(Place place, int64_t size) noexcept;
  };

  std::shared_ptr<Places> places_ = std::make_shared<Places>();
};

// Large results that are no longer needed, kept for the next ones: a prefill frees tens of megabytes with every
// operation, and getting fresh pages from the system costs more than filling them.
class SpareMemory {
 public:
  SpareMemory() { spare_.reserve(kMostBlocks + 1); }
  // At least `size` bytes, not initialised.  Throws std::bad_alloc.
  AlignedBytes take(int64_t size);
  void give(AlignedBytes memory) noexcept;
  int64_t num_bytes();

 private:
  static constexpr size_t kMostBlocks = 16;
  static constexpr int64_t kMostBytes = int64_t{128} << 20;

  std::mutex mutex_;  // Python may free a result in any thread
  std::vector<AlignedBytes> spare_;  // oldest first
  int64_t num_bytes_ = 0;
};

// Runs ranges of independent items on a fixed set of threads, the caller being one of them.
class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls job(begin, end, thread) over [0, num_items) in chunks until all are done.  Which thread gets which chunk is
  // not fixed, so items must not depend on each other.
  using Job = std::function<void(int64_t begin, int64_t end, int thread)>;
  void run(int64_t num_items, int64_t chunk, const Job& job);

 private:
  struct Shared;
  void stop();
  void work(int thread);
  void take_chunks(int thread);

  std::unique_ptr<Shared> shared_;
  std::vector<std::thread> workers_;
  int64_t process_ = 0;  // that they belong to
};

class CpuRuntime {
 public:
  // isa: empty for the best.  num_threads: at least 1.
  CpuRuntime(const std::string& isa, int num_threads);

  const KernelTable& table() const { return table_; }
  ThreadPool& pool() { return pool_; }
  // Scratch memory grows to the largest call and is then kept; its size depends on rows and threads, not on context.
  float* attend_scratch(int64_t floats_per_thread);
  AlignedBytes& activations(int64_t size);
  // What the stages of a layer hand to each other, and the parts of attention.
  float* buffers(int64_t floats);
  float* attend_parts(int64_t floats);
  // The rows that experts read and write.
  float* expert_rows(int64_t floats);
  // Of packed weights, which may outlive the runtime.
  Arena& weights() { return weights_; }
  // Results may outlive the runtime.
  const std::shared_ptr<SpareMemory>& spare() const { return spare_; }
  int64_t scratch_bytes() {
    const std::lock_guard lock(mutex_);
    return attend_scratch_.size() + activations_.size() + buffers_.size() + attend_parts_.size() +
           expert_rows_.size() + spare_->num_bytes();
  }
  // Held by whoever computes, for the length of one call: Python threads may share a runtime. Recursive: a layer that
  // waits for an expert packs it.  Nobody waits for it who holds the GIL.
  std::recursive_mutex& mutex() { return mutex_; }

 private:
  const KernelTable& table_;
  ThreadPool pool_;
  AlignedBytes attend_scratch_;
  AlignedBytes activations_;
  AlignedBytes buffers_;
  AlignedBytes attend_parts_;
  AlignedBytes expert_rows_;
  Arena weights_;
  std::shared_ptr<SpareMemory> spare_ = std::make_shared<SpareMemory>();
  std::recursive_mutex mutex_;
};

}  // namespace ropewalk
