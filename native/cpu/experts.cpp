// Mixture of experts: the rows of each expert are brought together, so that its weights are read once for all of them,
// and only those of experts that a row has chosen.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "ropewalk/limits.hpp"
#include "ropewalk/operations.hpp"

namespace ropewalk {

namespace {

// Which rows go to which expert. A pair is a row on its way through one expert; those of an expert are neighbours.
struct Grouping {
  std::vector<int64_t> numbers;  // of the experts that have rows, ascending
  std::vector<int64_t> starts;   // of the pairs of each, and their end
  std::vector<int64_t> rows;     // of each pair
  std::vector<int32_t> places;   // [T][top_k] the pairs of a row, in the order of its experts
};

int64_t expert_of(const ExpertsArgs& args, int64_t row, int64_t place) {
  const float number = args.routes[row * args.routes_stride + place];
  if (!(number >= 0.0f && number < static_cast<float>(args.experts->num_experts))) {
    throw std::invalid_argument("a route leads to expert " + std::to_string(number) + " of " +
                                std::to_string(args.experts->num_experts));
  }
  return static_cast<int64_t>(number);
}

Grouping grouped(const ExpertsArgs& args, int64_t num_rows) {
  Grouping found;
  std::vector<int64_t> counts(static_cast<size_t>(args.experts->num_experts), 0);
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t k = 0; k < args.top_k; ++k) ++counts[static_cast<size_t>(expert_of(args, row, k))];
  }
  std::vector<int64_t> next(counts.size(), 0);
  found.starts.push_back(0);
  for (size_t expert = 0; expert < counts.size(); ++expert) {
    next[expert] = found.starts.back();
    if (counts[expert] == 0) continue;
    found.numbers.push_back(static_cast<int64_t>(expert));
    found.starts.push_back(found.starts.back() + counts[expert]);
  }
  found.rows.resize(static_cast<size_t>(num_rows * args.top_k));
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t k = 0; k < args.top_k; ++k) {
      const int64_t pair = next[static_cast<size_t>(expert_of(args, row, k))]++;
      found.rows[static_cast<size_t>(pair)] = row;
      found.places.push_back(static_cast<int32_t>(pair));
    }
  }
  return found;
}

// Chunks of rows that are worth waking a thread for.
int64_t row_chunk(int64_t floats) { return std::max<int64_t>(1, 16384 / floats); }

// A linear of each expert, over its pairs.
std::vector<LinearJob> jobs_of(const Grouping& grouping, const std::vector<std::shared_ptr<const Expert>>& experts,
                               const LinearPlan* Expert::*plan, const float* x, int64_t x_size, float* out,
                               int64_t out_size) {
  std::vector<LinearJob> jobs;
  for (size_t i = 0; i < experts.size(); ++i) {
    const int64_t first = grouping.starts[i];
    jobs.push_back({*experts[i].*plan, x + first * x_size, x_size, grouping.starts[i + 1] - first,
                    out + first * out_size, out_size, nullptr});
  }
  return jobs;
}

}  // namespace

void experts(CpuRuntime& runtime, Compute compute, const ExpertsArgs& args, int64_t num_rows) {
  if (num_rows == 0) return;
  const int64_t size = args.experts->size, inner = args.experts->inner;
  const Grouping grouping = grouped(args, num_rows);
  // Before scratch memory is looked at: an expert that is packed now uses it.
  const auto taken = args.experts->take(grouping.numbers);
  const int64_t num_pairs = num_rows * args.top_k;
  const int64_t widths[] = {size, 2 * inner, inner};
  float* x = runtime.expert_rows(num_pairs * (widths[0] + widths[1] + widths[2]) + 3 * kLanes);
  float* gate_up = x + round_up(num_pairs * widths[0], kLanes);
  float* gated = gate_up + round_up(num_pairs * widths[1], kLanes);
  runtime.pool().run(num_pairs, row_chunk(size), [&](int64_t begin, int64_t end, int) {
    for (int64_t pair = begin; pair < end; ++pair) {
      std::copy_n(args.x + grouping.rows[static_cast<size_t>(pair)] * args.x_stride, size, x + pair * size);
    }
  });
  linears(runtime, compute, jobs_of(grouping, taken, &Expert::gate_up, x, size, gate_up, 2 * inner));
  activate(runtime, {gate_up, 2 * inner, inner, true, args.activation, gated}, num_pairs);
  float* y = x;  // which nobody needs any more
  linears(runtime, compute, jobs_of(grouping, taken, &Expert::down, gated, inner, y, size));
  const CombineArgs combined{y, grouping.places.data(), args.routes + args.top_k, args.routes_stride, args.top_k, size,
                             args.out};
  runtime.pool().run(num_rows, row_chunk(size * (args.top_k + 1)),
                     [&](int64_t begin, int64_t end, int) { runtime.table().combine(combined, begin, end); });
}

}  // namespace ropewalk
