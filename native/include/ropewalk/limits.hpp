// The largest sizes that the core takes: far above any model, and small enough that no product of them leaves int64.
// ropewalk/base/limits.py has the same numbers for what is read from files; tests/native/test_limits.py compares them.
#pragma once

#include <cstdint>

namespace ropewalk {

constexpr int64_t kMostFeatures = int64_t{1} << 30;   // of a linear, all of its parts together
constexpr int64_t kMostHeads = int64_t{1} << 14;      // of queries, keys or values
constexpr int64_t kMostHeadDim = int64_t{1} << 13;
constexpr int64_t kMostPositions = int64_t{1} << 24;  // of a cache
constexpr int64_t kMostInstances = int64_t{1} << 16;  // of layers, in one cache
constexpr int64_t kMostBuffers = 1024;                // of a layer
constexpr int64_t kMostExperts = 1024;                // of a layer
constexpr int64_t kMostThreads = 1024;

// The bytes of a cache in float32, and the floats of a row of queries.
static_assert(kMostHeads * kMostHeadDim <= kMostFeatures);
// And those of a page.
static_assert(kMostInstances <= INT64_MAX / (4 * 64 * 2 * kMostHeads * kMostHeadDim));
static_assert(kMostPositions <= INT64_MAX / (4 * kMostHeads * kMostHeadDim));

}  // namespace ropewalk
