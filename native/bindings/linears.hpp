// Linears and their low-rank changes as Python holds them: they keep alive the arrays that the core reads.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.hpp"
#include "computing.hpp"
#include "ropewalk/operations.hpp"

namespace ropewalk {

namespace py = pybind11;

inline Compute compute_named(const std::string& name) {
  if (name == "exact") return Compute::exact;
  if (name == "int8") return Compute::int8;
  throw ShapeFailure("compute is '" + name + "'; accepted: 'exact', 'int8'");
}

inline Activation activation_named(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  throw ShapeFailure("activation is '" + name + "'; accepted: 'silu', 'gelu', 'gelu_tanh'");
}

// As AttendArgs has it.
inline void check_softcap(float softcap) {
  require(std::isfinite(softcap) && (softcap == 0.0f || softcap > 1e-6f), "softcap must be positive (0: none)");
}

inline FloatType float_type_named(const std::string& name) {
  if (name == "f32") return FloatType::f32;
  if (name == "f16") return FloatType::f16;
  if (name == "bf16") return FloatType::bf16;
  throw ShapeFailure("float type is '" + name + "'; accepted: 'f32', 'f16', 'bf16'");
}

// A dense weight, used in place: the array is kept alive.
struct DenseLinear {
  py::array weight, bias;
  DenseWeights view{};
};

inline std::shared_ptr<DenseLinear> dense_linear(const py::array& weight, const std::string& type, const py::object& bias) {
  auto dense = std::make_shared<DenseLinear>();
  dense->weight = weight;
  require(weight.ndim() == 2 && weight.shape(0) > 0 && weight.shape(1) > 0,
          "weight must be a matrix with at least one row and column");
  dense->view.type = float_type_named(type);
  dense->view.out_features = weight.shape(0);
  dense->view.in_features = weight.shape(1);
  const std::vector<int64_t> shape{weight.shape(0), weight.shape(1)};
  dense->view.weight = dense->view.type == FloatType::f32
                           ? static_cast<const void*>(contiguous<float>(weight, "weight", shape))
                           : contiguous<uint16_t>(weight, "weight", shape);
  if (!bias.is_none()) {
    dense->bias = array_of(bias, "bias");
    dense->view.bias = contiguous<float>(dense->bias, "bias", {dense->view.out_features});
  }
  return dense;
}

// A low-rank change, used in place: the arrays are kept alive.
class LowRank {
 public:
  using Part = std::tuple<int64_t, py::object, py::object>;

  // a: [ceil(R / 4)][ceil(K / 16)][4][16].  parts: (N, B in tiles [ceil(N / 16)][rank][16], its scales) of each linear,
  // B None where the linear is not changed.  type: "f32", or "i8" with scales [round_up(R, 4)] and [round_up(N, 16)].
  LowRank(const py::array& a, const py::object& scales, int64_t in_features, const std::string& type,
          const std::vector<Part>& parts) {
    if (type != "f32" && type != "i8") throw ShapeFailure("low-rank type is '" + type + "'; accepted: 'f32', 'i8'");
    require(!parts.empty(), "a low-rank change needs at least one part");
    require(in_features > 0 && in_features <= kMostFeatures, "in_features is out of range");
    weights_.type = type == "i8" ? LowRankType::i8 : LowRankType::f32;
    weights_.in_features = in_features;
    for (const auto& [out_features, b, b_scales] : parts) {
      require(out_features > 0 && out_features <= kMostFeatures, "the output features of a part are out of range");
      weights_.parts.push_back({out_features, weights_.rank, 0, nullptr, nullptr});
      out_features_ += out_features;
      require(out_features_ <= kMostFeatures, "the output features of all parts are out of range");
      if (!b.is_none()) add_tiles(array_of(b, "b"), b_scales, weights_.parts.back());
    }
    require(weights_.rank <= kMostFeatures, "the rank of a low-rank change is out of range");
    require(weights_.rank > 0, "a low-rank change needs a part of a rank above 0");
    const int64_t panels = ceil_div(weights_.rank, kRankTile);
    weights_.a = kept(a, "a", {panels, ceil_div(in_features, kLanes), kRankTile, kLanes});
    weights_.scales = kept_scales(scales, "scales", panels * kRankTile);
  }

  // Throws if the plan holds other linears than those that this changes.
  const LowRankWeights& weights_for(const LinearPlan& plan, int64_t in_features) const {
    bool fits = weights_.in_features == in_features && weights_.parts.size() == plan.parts().size();
    for (size_t i = 0; fits && i < weights_.parts.size(); ++i) {
      const LinearPlan::Part& part = plan.parts()[i];
      const int64_t out_features =
          part.gptq != nullptr ? part.gptq->weights().out_features : part.dense->out_features;
      fits = weights_.parts[i].out_features == out_features;
    }
    require(fits, "the low-rank change was made for linears of other sizes");
    return weights_;
  }

  void add(CpuRuntime& runtime, const py::array& x, py::array& out) const {
    const Rows<const float> rows = rows_of(x, "x", weights_.in_features);
    const Rows<float> target = writable_rows(out, "out", rows.num_rows, out_features_);
    check_apart(out, "out", x, "x");
    check_apart_from(out);
    const Computing computing(runtime);
    add_low_rank(runtime, weights_, rows.data, rows.stride, rows.num_rows, target.data, target.stride);
  }

  void check_apart_from(const py::array& out) const {
    for (const py::array& array : arrays_) check_apart(out, "out", array, "the matrices of a low-rank change");
  }

  int64_t num_bytes() const {
    int64_t bytes = 0;
    for (const py::array& array : arrays_) bytes += array.nbytes();
    return bytes;
  }

 private:
  void add_tiles(const py::array& b, const py::object& scales, LowRankWeights::Part& part) {
    require(b.ndim() == 3 && b.shape(1) > 0 && b.shape(1) <= kMostFeatures, "b must be [tiles, rank, 16]");
    part.b = kept(b, "b", {ceil_div(part.out_features, kLanes), b.shape(1), kLanes});
    part.scales = kept_scales(scales, "scales of b", round_up(part.out_features, kLanes));
    part.rank = b.shape(1);
    weights_.rank += part.rank;
  }

  const void* kept(const py::array& array, const char* name, const Shape& shape) {
    arrays_.push_back(array);
    if (weights_.type == LowRankType::f32) return contiguous<float>(array, name, shape);
    return contiguous<int8_t>(array, name, shape);
  }

  const float* kept_scales(const py::object& scales, const char* name, int64_t size) {
    if (weights_.type == LowRankType::f32) {
      if (!scales.is_none()) throw ShapeFailure(std::string(name) + " must be None for type 'f32'");
      return nullptr;
    }
    if (scales.is_none()) throw ShapeFailure(std::string(name) + " must be an array for type 'i8'");
    arrays_.push_back(array_of(scales, name));
    return contiguous<float>(arrays_.back(), name, {size});
  }

  std::vector<py::array> arrays_;
  LowRankWeights weights_{};
  int64_t out_features_ = 0;
};

inline const LowRank& low_rank_of(const py::object& change) {
  require(py::isinstance<LowRank>(change), "change is neither LowRank nor None");
  return change.cast<const LowRank&>();
}

// Linears over one input, their outputs side by side.
class LinearGroup {
 public:
  explicit LinearGroup(std::vector<py::object> parts) : owners_(std::move(parts)) {
    require(!owners_.empty(), "a linear group needs at least one part");
    for (const py::object& owner : owners_) {
      if (py::isinstance<PackedGptq>(owner)) {
        const auto* part = owner.cast<const PackedGptq*>();
        check_in_features(part->weights().in_features);
        plan_.add(*part);
      } else {
        require(py::isinstance<DenseLinear>(owner), "a part of a linear group is neither PackedGptq nor DenseLinear");
        const auto* part = owner.cast<const DenseLinear*>();
        check_in_features(part->view.in_features);
        plan_.add(part->view);
        dense_.push_back(part);
      }
      require(plan_.out_features() <= kMostFeatures, "the output features of a linear group are out of range");
    }
  }

  void run(CpuRuntime& runtime, const std::string& compute, const py::array& x, py::array& out,
           const py::object& change) const {
    const Rows<const float> rows = rows_of(x, "x", in_features_);
    const Rows<float> target = writable_rows(out, "out", rows.num_rows, plan_.out_features());
    const Compute mode = compute_named(compute);
    check_apart(out, "out", x, "x");
    for (const DenseLinear* dense : dense_) {
      check_apart(out, "out", dense->weight, "the weight");
      if (dense->view.bias != nullptr) check_apart(out, "out", dense->bias, "the bias");
    }
    std::vector<RowChange> changes;
    if (!change.is_none()) {
      const LowRank& low_rank = low_rank_of(change);
      changes.push_back({0, rows.num_rows, &low_rank.weights_for(plan_, in_features_)});
      low_rank.check_apart_from(out);
    }
    const Computing computing(runtime);
    linear(runtime, mode, {&plan_, rows.data, rows.stride, rows.num_rows, target.data, target.stride, &changes});
  }

  int64_t in_features() const { return in_features_; }
  int64_t out_features() const { return plan_.out_features(); }
  const LinearPlan& plan() const { return plan_; }

 private:
  void check_in_features(int64_t in_features) {
    require(in_features_ == 0 || in_features == in_features_, "the parts of a linear group read different inputs");
    in_features_ = in_features;
  }

  std::vector<py::object> owners_;
  std::vector<const DenseLinear*> dense_;  // of the owners
  LinearPlan plan_;
  int64_t in_features_ = 0;
};

}  // namespace ropewalk
