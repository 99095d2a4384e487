#include "ropewalk/runtime.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "ropewalk/tables.hpp"

namespace ropewalk {

namespace {

int64_t process_id() {
#if defined(__unix__) || defined(__APPLE__)
  return getpid();
#else
  return 0;  // there is no fork
#endif
}

// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
std::vector<const KernelTable*> detect_tables() {
  std::vector<const KernelTable*> tables;
#if ROPEWALK_X86_64
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) tables.push_back(&avx512bf16::kernel_table());
  if (avx512) tables.push_back(&avx512::kernel_table());
  if (avx2 && __builtin_cpu_supports("avxvnni")) tables.push_back(&avxvnni::kernel_table());
  if (avx2) tables.push_back(&avx2::kernel_table());
#endif
  tables.push_back(&scalar::kernel_table());
  return tables;
}

void pause_briefly() {
#if ROPEWALK_X86_64
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

}  // namespace

std::vector<const KernelTable*> available_tables() { return detect_tables(); }

const KernelTable& choose_table(const std::string& isa) {
  const auto tables = available_tables();
  if (isa.empty()) return *tables.front();
  std::string names;
  for (const KernelTable* table : tables) {
    if (isa == table->name) return *table;
    names += (names.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::invalid_argument("instruction set '" + isa + "' is not available on this machine; available: " + names);
}

// Over-allocates and aligns by hand, so that zeroed memory comes from calloc: fresh pages of the system are zero and
// cost nothing until they are touched, and a long cache is not paid for in advance.
AlignedBytes::AlignedBytes(int64_t size, bool zeroed) : size_(size) {
  constexpr int64_t kHugePage = int64_t{2} << 20;
  constexpr int64_t kLine = 64;
  if (size < 0) throw std::bad_alloc();
  const bool huge_pages = !zeroed && size >= 2 * kHugePage;
  const int64_t alignment = huge_pages ? kHugePage : kLine;
  const size_t bytes = static_cast<size_t>(size) + static_cast<size_t>(alignment);
  memory_.reset(zeroed ? std::calloc(bytes, 1) : std::malloc(bytes));
  if (memory_ == nullptr) throw std::bad_alloc();
  const auto address = reinterpret_cast<uintptr_t>(memory_.get());
  const auto mask = static_cast<uintptr_t>(alignment) - 1;
  data_ = reinterpret_cast<void*>((address + mask) & ~mask);
#ifdef MADV_HUGEPAGE
  if (huge_pages) madvise(data_, static_cast<size_t>(size) / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
}

void AlignedBytes::Release::operator()(void* p) const { std::free(p); }

ArenaBytes Arena::take(int64_t size) {
  const int64_t needed = round_up(size, 64);
  auto [block, offset] = places_->take(needed);
  uint8_t* const data = block->as<uint8_t>() + offset;
  const auto give = [places = places_, block = std::move(block), offset = offset, needed](uint8_t*) {
    places->give({block, offset}, needed);
  };
  return {std::shared_ptr<uint8_t>(data, give), size};
}

std::pair<std::shared_ptr<AlignedBytes>, int64_t> Arena::Places::take(int64_t size) {
  const std::lock_guard lock(mutex);
  for (std::vector<Place>& places = free[size]; !places.empty();) {
    const Place place = places.back();
    places.pop_back();
    if (auto held = place.block.lock()) return {std::move(held), place.offset};
  }
  std::shared_ptr<AlignedBytes> newest = block.lock();
  if (newest == nullptr || size > newest->size() - used) {
    newest = std::make_shared<AlignedBytes>(std::max(size, kBlockBytes));
    block = newest;
    used = 0;
  }
  const int64_t offset = used;
  used += size;
  return {std::move(newest), offset};
}

void Arena::Places::give(Place place, int64_t size) noexcept {
  const std::lock_guard lock(mutex);
  try {
    free[size].push_back(std::move(place));
  } catch (const std::bad_alloc&) {
    // It stays unused as long as its block is there.
  }
}

// Not a block of more than twice the size: the next large result would miss it.
AlignedBytes SpareMemory::take(int64_t size) {
  const std::lock_guard lock(mutex_);
  auto best = spare_.end();
  for (auto block = spare_.begin(); block != spare_.end(); ++block) {
    const bool fits = size <= block->size() && block->size() <= 2 * size;
    if (fits && (best == spare_.end() || block->size() < best->size())) best = block;
  }
  if (best == spare_.end()) return AlignedBytes(size);
  AlignedBytes taken = std::move(*best);
  spare_.erase(best);
  num_bytes_ -= taken.size();
  return taken;
}

void SpareMemory::give(AlignedBytes memory) noexcept {
  const std::lock_guard lock(mutex_);
  num_bytes_ += memory.size();
  spare_.push_back(std::move(memory));
  while (num_bytes_ > kMostBytes || spare_.size() > kMostBlocks) {
    num_bytes_ -= spare_.front().size();
    spare_.erase(spare_.begin());
  }
}

int64_t SpareMemory::num_bytes() {
  const std::lock_guard lock(mutex_);
  return num_bytes_;
}

// A job is cut into chunks, and every thread has a range of neighbouring ones: memory is read in one long stream.  Who
// has finished his own takes the last chunk of another's, so that all finish together.  The caller waits for chunks, not
// for threads: a worker that the system has not woken yet, or has suspended, delays nobody, and finds nothing left.
struct ThreadPool::Shared {
  // The chunks of a thread that nobody has taken: the job's number in the upper 28 bits, then `begin` and `end`.  The
  // number keeps a thread that was suspended in between from taking a chunk of another job than it looked at.
  static constexpr int kBits = 18;
  static constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;
  struct alignas(64) Range {
    std::atomic<uint64_t> packed{0};
  };

  explicit Shared(int num_threads) : ranges(static_cast<size_t>(num_threads)) {}

  std::vector<Range> ranges;
  alignas(64) std::atomic<uint32_t> number{0};  // of the job
  alignas(64) std::atomic<int64_t> done{0};     // chunks finished
  std::atomic<bool> stopping{false};
  // Written while all ranges are empty.
  int64_t num_items = 0;
  int64_t chunk = 1;
  const Job* job = nullptr;

  // The next chunk of a range, from its front or from its back; -1: there is none.
  static int64_t take(Range& range, bool front);
  void wait_for_job(uint32_t seen);
};

int64_t ThreadPool::Shared::take(Range& range, bool front) {
  uint64_t packed = range.packed.load();
  for (;;) {
    const uint64_t begin = packed >> kBits & kMask, end = packed & kMask;
    if (begin >= end) return -1;
    if (range.packed.compare_exchange_weak(packed, front ? packed + (uint64_t{1} << kBits) : packed - 1)) {
      return static_cast<int64_t>(front ? begin : end - 1);
    }
  }
}

// Waits until there is another job than `seen`, or the pool stops.
void ThreadPool::Shared::wait_for_job(uint32_t seen) {
  // The operations of one token are about ten microseconds apart: spin that long before going to sleep.
  constexpr int kSpins = 2000;
  for (int i = 0; i < kSpins; ++i) {
    if (number.load() != seen) return;
    pause_briefly();
  }
  while (number.load() == seen) number.wait(seen);
}

ThreadPool::ThreadPool(int num_threads) {
  if (num_threads < 1 || num_threads > kMostThreads) {
    throw std::invalid_argument("threads must be between 1 and " + std::to_string(kMostThreads));
  }
  shared_ = std::make_unique<Shared>(num_threads);
  process_ = process_id();
  try {
    for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (const std::system_error&) {
    stop();
    throw std::invalid_argument("the system refuses to start " + std::to_string(num_threads) + " threads");
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  if (process_id() != process_) {  // a fork has no workers, and their stacks may be those of other threads by now
    new std::vector<std::thread>(std::move(workers_));  // never freed: std::thread ends the process if it is not joined
    return;
  }
  shared_->stopping.store(true);
  shared_->number.fetch_add(1);
  shared_->number.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

// Takes chunks, of its own range first, until there are none.
void ThreadPool::take_chunks(int thread) {
  Shared& s = *shared_;
  const int num_ranges = static_cast<int>(s.ranges.size());
  for (int i = 0; i < num_ranges; ++i) {
    Shared::Range& range = s.ranges[static_cast<size_t>((thread + i) % num_ranges)];
    for (int64_t index = Shared::take(range, i == 0); index >= 0; index = Shared::take(range, i == 0)) {
      const int64_t begin = index * s.chunk;
      const int64_t end = begin + s.chunk < s.num_items ? begin + s.chunk : s.num_items;
      (*s.job)(begin, end, thread);
      s.done.fetch_add(1);
    }
  }
}

void ThreadPool::work(int thread) {
  Shared& s = *shared_;
  for (;;) {
    const uint32_t seen = s.number.load();
    if (s.stopping.load()) return;
    take_chunks(thread);
    s.wait_for_job(seen);
  }
}

void ThreadPool::run(int64_t num_items, int64_t chunk, const Job& job) {
  if (num_items <= 0) return;
  if (workers_.empty() || num_items <= chunk) {
    job(0, num_items, 0);
    return;
  }
  Shared& s = *shared_;
  chunk = std::max(chunk, ceil_div(num_items, static_cast<int64_t>(Shared::kMask)));
  const int64_t num_chunks = ceil_div(num_items, chunk);
  s.num_items = num_items;
  s.chunk = chunk;
  s.job = &job;
  s.done.store(0);
  const uint32_t number = s.number.load() + 1;
  const auto num_ranges = static_cast<int64_t>(s.ranges.size());
  for (int64_t i = 0; i < num_ranges; ++i) {
    const auto begin = static_cast<uint64_t>(num_chunks * i / num_ranges);
    const auto end = static_cast<uint64_t>(num_chunks * (i + 1) / num_ranges);
    const uint64_t packed = uint64_t{number} << 2 * Shared::kBits | begin << Shared::kBits | end;
    s.ranges[static_cast<size_t>(i)].packed.store(packed);
  }
  s.number.store(number);
  s.number.notify_all();
  take_chunks(0);
  // The chunks still open are being worked on: spin, but yield to a worker that has lost its processor.
  constexpr int kSpins = 1000;
  for (int i = 0; s.done.load() != num_chunks; ++i) {
    if (i < kSpins) {
      pause_briefly();
    } else {
      std::this_thread::yield();
    }
  }
}

CpuRuntime::CpuRuntime(const std::string& isa, int num_threads) : table_(choose_table(isa)), pool_(num_threads) {}

namespace {

// The old memory goes before the new is asked for.
AlignedBytes& grown(AlignedBytes& memory, int64_t size) {
  if (memory.size() < size) {
    memory = AlignedBytes();
    memory = AlignedBytes(size);
  }
  return memory;
}

constexpr int64_t kFloat = sizeof(float);

}  // namespace

float* CpuRuntime::attend_scratch(int64_t floats_per_thread) {
  return grown(attend_scratch_, floats_per_thread * kFloat * pool_.num_threads()).as<float>();
}

AlignedBytes& CpuRuntime::activations(int64_t size) { return grown(activations_, size); }

float* CpuRuntime::buffers(int64_t floats) { return grown(buffers_, floats * kFloat).as<float>(); }

float* CpuRuntime::expert_rows(int64_t floats) { return grown(expert_rows_, floats * kFloat).as<float>(); }

float* CpuRuntime::attend_parts(int64_t floats) { return grown(attend_parts_, floats * kFloat).as<float>(); }

}  // namespace ropewalk
