// Packed weights, and which of them are computed together.
#include <algorithm>
#include <atomic>
#include <bit>

#include "ropewalk/operations.hpp"

namespace ropewalk {

PackedGptq::PackedGptq(CpuRuntime& runtime, const Source& source) {
  weights_.in_features = source.in_features;
  weights_.out_features = source.out_features;
  weights_.num_tiles = ceil_div(source.out_features, kLanes);
  weights_.num_groups = source.num_groups;
  weights_.code_bits = source.bits <= 4 ? source.bits : 8;
  weights_.scale_type = source.scale_type;
  build_rows(source);
  build_tables(runtime, source);

  codes_ = runtime.weights().take(weights_.num_tiles * weights_.num_blocks * kBlockRows * kLanes * weights_.code_bits / 8);
  weights_.codes = codes_.as<uint8_t>();
  const bool in_order = source.order == nullptr && weights_.num_blocks * kBlockRows == source.in_features;
  const PackArgs args{
      .qweight = source.qweight,
      .out_features = source.out_features,
      .in_features = source.in_features,
      .bits = source.bits,
      .planar = source.planar,
      .code_bits = weights_.code_bits,
      .num_blocks = weights_.num_blocks,
      .source_row = source_row_.data(),
      .in_order = in_order,
      .codes = codes_.as<uint8_t>(),
  };
  const int64_t scratch_words = pack_scratch_words(source.in_features);
  uint32_t* scratch = runtime.activations(scratch_words * 4 * runtime.pool().num_threads()).as<uint32_t>();
  // Several panels at a time: their tiles share huge pages, which the system zeroes as they are first written to.
  const int64_t num_panels = ceil_div(source.out_features, kPackColumns);
  const int64_t chunk = std::clamp<int64_t>(num_panels / (4 * runtime.pool().num_threads()), 1, 16);
  runtime.pool().run(num_panels, chunk, [&](int64_t begin, int64_t end, int thread) {
    runtime.table().pack(args, begin, end, scratch + thread * scratch_words);
  });

  if (in_order) {
    source_row_ = {};
  } else {
    weights_.source_row = source_row_.data();
  }
}

// Sorted rows, each group padded with -1 to whole blocks.
void PackedGptq::build_rows(const Source& source) {
  group_starts_.assign(1, 0);
  weights_.groups_are_blocks = true;
  for (int64_t g = 0; g < source.num_groups; ++g) {
    for (int64_t i = source.group_starts[g]; i < source.group_starts[g + 1]; ++i) {
      source_row_.push_back(source.order != nullptr ? source.order[i] : static_cast<int32_t>(i));
    }
    source_row_.resize(static_cast<size_t>(round_up(static_cast<int64_t>(source_row_.size()), kBlockRows)), -1);
    group_starts_.push_back(static_cast<int32_t>(source_row_.size() / kBlockRows));
    if (group_starts_.back() != g + 1) weights_.groups_are_blocks = false;
  }
  weights_.num_blocks = group_starts_.back();
  weights_.group_starts = group_starts_.data();
}

// Scales, zero points and bias from [G][N] to [tile][G][16]; columns past N are zero.
void PackedGptq::build_tables(CpuRuntime& runtime, const Source& source) {
  const int64_t num_groups = source.num_groups;
  const int64_t out_features = source.out_features;
  const int64_t scale_size = source.scale_type == FloatType::f16 ? 2 : 4;
  const int64_t entries = weights_.num_tiles * num_groups * kLanes;
  const auto zeroed = [&](int64_t size) {
    ArenaBytes bytes = runtime.weights().take(size);
    std::fill_n(bytes.as<uint8_t>(), size, uint8_t{0});
    return bytes;
  };
  const auto tile_table = [&](const auto* from, auto* to) {
    runtime.pool().run(weights_.num_tiles, 16, [&](int64_t begin, int64_t end, int) {
      for (int64_t g = 0; g < num_groups; ++g) {
        for (int64_t tile = begin; tile < end; ++tile) {
          const int64_t count = std::min(kLanes, out_features - tile * kLanes);
          std::copy_n(from + g * out_features + tile * kLanes, count, to + (tile * num_groups + g) * kLanes);
        }
      }
    });
  };
  scales_ = zeroed(entries * scale_size);
  if (source.scale_type == FloatType::f16) {
    tile_table(static_cast<const uint16_t*>(source.scales), scales_.as<uint16_t>());
  } else {
    tile_table(static_cast<const float*>(source.scales), scales_.as<float>());
  }
  weights_.scales = scales_.as<void>();

  const uint8_t* zeros_end = source.zeros + num_groups * out_features;
  const auto [least, most] = std::minmax_element(source.zeros, zeros_end);
  const bool none = source.zeros == zeros_end;
  if (none || *least == *most) {
    weights_.middle = none ? 0 : *most;
  } else {
    weights_.middle = static_cast<int32_t>(std::bit_ceil(unsigned{*most}) / 2);  // 8 for most zero points of 4 bits
    zeros_ = zeroed(entries);
    tile_table(source.zeros, zeros_.as<uint8_t>());
    weights_.zeros = zeros_.as<uint8_t>();
  }
  if (source.bias != nullptr) {
    bias_ = zeroed(weights_.num_tiles * kLanes * static_cast<int64_t>(sizeof(float)));
    std::copy(source.bias, source.bias + out_features, bias_.as<float>());
    weights_.bias = bias_.as<float>();
  }
}

int64_t PackedGptq::num_bytes() const {
  return codes_.size() + scales_.size() + zeros_.size() + bias_.size() +
         static_cast<int64_t>((source_row_.size() + group_starts_.size()) * sizeof(int32_t));
}

bool PackedGptq::shares_input(const PackedGptq& other) const {
  return weights_.in_features == other.weights_.in_features && weights_.middle == other.weights_.middle &&
         source_row_ == other.source_row_ && group_starts_ == other.group_starts_;
}

bool round_rows(CpuRuntime& runtime, const RoundArgs& args) {
  std::atomic<bool> leaves{false};
  runtime.pool().run(ceil_div(args.out_features, kLanes), 4, [&](int64_t begin, int64_t end, int) {
    if (runtime.table().round_rows(args, begin, end)) leaves.store(true);
  });
  return leaves.load();
}

void LinearPlan::add(const PackedGptq& weights) {
  const auto known = std::find_if(inputs_.begin(), inputs_.end(),
                                  [&](const PackedGptq* input) { return input->shares_input(weights); });
  const auto input = static_cast<size_t>(known - inputs_.begin());
  if (known == inputs_.end()) inputs_.push_back(&weights);
  parts_.push_back({&weights, nullptr, out_features_, input});
  out_features_ += weights.weights().out_features;
}

void LinearPlan::add(const DenseWeights& weights) {
  parts_.push_back({nullptr, &weights, out_features_, 0});
  out_features_ += weights.out_features;
}

}  // namespace ropewalk
