// Recorded layers, and the steps that run through them, as Python holds them.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.hpp"
#include "computing.hpp"
#include "experts.hpp"
#include "linears.hpp"
#include "ropewalk/layer.hpp"

namespace ropewalk {

namespace py = pybind11;

// The rows of some sequences: the arrays and pages are kept alive.
class BoundStep {
 public:
  using Pages = std::vector<std::shared_ptr<Page>>;
  using Span = std::tuple<int64_t, int64_t, Pages, Pages>;  // num_rows, start, pages, recent

  BoundStep(py::array x, const py::array& cos, const py::array& sin, const std::vector<Span>& spans)
      : x_(std::move(x)), cos_(cos), sin_(sin) {
    require(x_.ndim() == 2 && cos_.ndim() == 3, "x must be [T, C] and cos, sin [tables, T, R / 2]");
    check_extent(cos_, "cos");
    step_.x = writable_contiguous<float>(x_, "x", shape_of(x_));
    step_.num_rows = x_.shape(0);
    step_.width = x_.shape(1);
    step_.num_tables = cos_.shape(0);
    step_.half = cos_.shape(2);
    step_.cos = contiguous<float>(cos_, "cos", {step_.num_tables, step_.num_rows, step_.half});
    step_.sin = contiguous<float>(sin_, "sin", {step_.num_tables, step_.num_rows, step_.half});
    check_apart(x_, "x", cos_, "cos");
    check_apart(x_, "x", sin_, "sin");
    int64_t num_rows = 0;
    for (const auto& [rows, start, pages, recent] : spans) {
      add_span(rows, start, pages);
      add_recent(step_.spans.back(), recent);
      num_rows += rows;
      require(num_rows <= step_.num_rows, "the spans have more rows than x");
    }
    require(num_rows == step_.num_rows && num_rows > 0, "the spans have fewer rows than x, or none");
    step_.format = pages_[0]->pool().format();
    if (spans.size() > 1) check_written_pages();
  }

  const Step& step() const { return step_; }

  void check_instance(int64_t instance) const {
    for (const auto& page : pages_) {
      if (instance >= 0 && instance < page->num_instances()) continue;
      throw ShapeFailure("instance " + std::to_string(instance) + " lies outside pages of " +
                         std::to_string(page->num_instances()) + " layer instances");
    }
  }

 private:
  void add_span(int64_t num_rows, int64_t start, const std::vector<std::shared_ptr<Page>>& pages) {
    require(num_rows > 0 && num_rows <= kMostPositions, "the rows of a span are out of range");
    const auto num_pages = static_cast<int64_t>(pages.size());
    require(num_pages <= kMostPositions / kKvTile, "the pages of a span are out of range");
    if (start < 0 || start > num_pages * kKvTile - num_rows) {
      throw ShapeFailure("positions from " + std::to_string(start) + " on, " + std::to_string(num_rows) +
                         " of them, do not fit " + std::to_string(num_pages) + " pages");
    }
    RowSpan& span = step_.spans.emplace_back(RowSpan{num_rows, start, {}, {}});
    for (const auto& page : pages) {
      require(page != nullptr, "a page is None");
      require(pages_.empty() || &page->pool() == &pages_[0]->pool(), "the pages are of several pools");
      require(!page->recent(), "a page is of those for the last positions");
      span.pages.push_back(page->data());
      pages_.push_back(page);
    }
  }

  // From the first page that a row of the span reads as it was given, to the last one that a row writes.
  void add_recent(RowSpan& span, const Pages& recent) {
    const int64_t positions = pages_[0]->pool().format().recent;
    if (positions == 0) {
      require(recent.empty(), "this pool has no pages of the last positions");
      return;
    }
    require(recent.size() == span.pages.size(), "a span has a page of the last positions, or None, for each of its pages");
    const auto first = static_cast<size_t>(std::max<int64_t>(0, span.start + 1 - positions) / kKvTile);
    const auto last = static_cast<size_t>((span.start + span.num_rows - 1) / kKvTile);
    for (size_t i = 0; i < recent.size(); ++i) {
      const auto& page = recent[i];
      require(page != nullptr || i < first || i > last, "a page of the last positions is None where a row reads it");
      span.recent.push_back(page == nullptr ? nullptr : page->data());
      if (page == nullptr) continue;
      require(&page->pool() == &pages_[0]->pool() && page->recent(), "a page of the last positions is of another kind");
      pages_.push_back(page);
    }
  }

  // What one sequence writes, no other may read.
  void check_written_pages() const {
    std::map<const uint8_t*, int64_t> users;
    for (const RowSpan& span : step_.spans) {
      for (const uint8_t* page : span.pages) ++users[page];
      for (const uint8_t* page : span.recent) ++users[page];
    }
    for (const RowSpan& span : step_.spans) {
      for (int64_t i = span.start / kKvTile; i <= (span.start + span.num_rows - 1) / kKvTile; ++i) {
        const auto written = static_cast<size_t>(i);
        require(users[span.pages[written]] == 1 && (span.recent.empty() || users[span.recent[written]] == 1),
                "a page that a span writes is used by another");
      }
    }
  }

  py::array x_, cos_, sin_;
  std::vector<std::shared_ptr<Page>> pages_;
  Step step_{};
};

// A layer: the weights are kept alive.
class BoundLayer {
 public:
  using Columns = std::array<int64_t, 4>;  // buffer, first, heads, size
  using Change = std::tuple<int64_t, int64_t, std::vector<py::object>>;  // first, end, LowRank or None by linear

  BoundLayer(std::vector<int64_t> widths, const std::string& compute) : layer_(checked(widths), compute_named(compute)) {}

  void rms_norm(const Columns& x, const py::array& weight, float epsilon, const Columns& out) {
    const RmsNormStage stage{view(x), contiguous<float>(weight, "weight", {x[3]}), epsilon, whole(out)};
    require(stage.x.heads == stage.out.heads && stage.x.size == stage.out.size, "a norm's views differ in shape");
    require(epsilon >= 0.0f && epsilon <= 1.0f, "epsilon must be in [0, 1]");
    keep(weight, stage.x, stage.out, stage);
  }

  void layer_norm(const Columns& x, const py::array& weight, const py::object& bias, float epsilon, const Columns& out) {
    LayerNormStage stage{view(x), nullptr, 0, nullptr, 0, epsilon, whole(out)};
    require(stage.x.heads == stage.out.heads && stage.x.size == stage.out.size, "a norm's views differ in shape");
    require(epsilon >= 0.0f && epsilon <= 1.0f, "epsilon must be in [0, 1]");
    stage.weight = norm_of(weight, "weight", stage.x.heads, stage.x.size, stage.weight_stride);
    if (!bias.is_none()) {
      stage.bias = norm_of(array_of(bias, "bias"), "bias", stage.x.heads, stage.x.size, stage.bias_stride);
      owners_.push_back(bias);
    }
    keep(weight, stage.x, stage.out, stage);
  }

  void linear(const Columns& x, const py::object& weight, const Columns& out) {
    require(py::isinstance<LinearGroup>(weight), "weight is not a LinearGroup");
    const auto& group = weight.cast<const LinearGroup&>();
    const LinearStage stage{view(x), &group.plan(), linears_.size(), view(out)};
    require(stage.x.columns() == group.in_features() && stage.out.columns() == group.out_features(),
            "a linear's views differ in size from its weight");
    keep(weight, stage.x, stage.out, stage);
    linears_.push_back(&group);
  }

  void rotate(const Columns& x, int64_t table) {
    require(table >= 0 && table <= kMostBuffers, "the number of a table is out of range");
    add(RotateStage{view(x), table});
    rotated_.push_back(view(x));
    num_tables_ = std::max(num_tables_, table + 1);
  }

  void append(const Columns& k, const Columns& v) {
    add(AppendStage{view(k), view(v)});
    appended_.push_back(view(k));
    appended_.push_back(view(v));
  }

  void attend(const Columns& q, const Columns& out, int64_t window, float scale, float softcap) {
    const AttendStage stage{view(q), whole(out), window, scale, softcap};
    require(stage.q.columns() == stage.out.columns(), "attention's views differ in size");
    require(window >= 0, "window must be at least 0 (0: unlimited)");
    require(std::isfinite(scale), "scale must be finite");
    check_softcap(softcap);
    keep(py::none(), stage.q, stage.out, stage);
    queries_.push_back(stage.q);
  }

  void activate(const Columns& x, const std::string& activation, const Columns& out) {
    const ActivateStage stage{view(x), false, activation_named(activation), whole(out)};
    require(stage.x.columns() == stage.out.columns(), "an activation's views differ in size");
    keep(py::none(), stage.x, stage.out, stage);
  }

  void gate(const Columns& gate_up, const std::string& activation, const Columns& out) {
    const ActivateStage stage{view(gate_up), true, activation_named(activation), whole(out)};
    require(stage.x.columns() == 2 * stage.out.columns(), "a gate has half the columns of its input");
    keep(py::none(), stage.x, stage.out, stage);
  }

  void sigmoid_mul(const Columns& x, const Columns& gate, const Columns& out) {
    const SigmoidMulStage stage{view(x), view(gate), whole(out)};
    require(stage.x.columns() == stage.out.columns() && stage.gate.columns() == 1,
            "what is multiplied and the result differ in size, or the gate is not one column");
    require(stage.gate.buffer != stage.out.buffer, "a stage cannot write to the buffer that it reads");
    keep(py::none(), stage.x, stage.out, stage);
  }

  void route(const Columns& logits, int64_t top_k, bool normalised, const Columns& out) {
    const RouteStage stage{view(logits), top_k, normalised, whole(out)};
    require(stage.logits.columns() <= kMostExperts, "a layer has at most 1024 experts");
    require(top_k > 0 && top_k <= stage.logits.columns(), "top_k must be 1 to the number of experts");
    require(stage.out.heads == 2 && stage.out.size == top_k, "routes are two heads of top_k");
    keep(py::none(), stage.logits, stage.out, stage);
  }

  void experts(const Columns& x, const Columns& routes, const py::object& weight, const std::string& activation,
               const Columns& out) {
    require(py::isinstance<BoundExperts>(weight), "weight is not an Experts");
    const auto& source = weight.cast<const BoundExperts&>();
    const ExpertsStage stage{view(x), view(routes), &source, activation_named(activation), whole(out)};
    require(stage.x.columns() == source.size && stage.out.columns() == source.size,
            "views of experts differ in size from their weights");
    require(stage.routes.heads == 2 && stage.routes.size <= source.num_experts,
            "routes are two heads, of at most as many columns as there are experts");
    require(stage.routes.buffer != stage.out.buffer, "a stage cannot write to the buffer that it reads");
    keep(weight, stage.x, stage.out, stage);
  }

  void add_residual(const Columns& y, double scale) {
    require(std::isfinite(scale), "scale must be finite");
    const AddResidualStage stage{whole(y), scale};
    require(stage.y.columns() == layer_.widths()[0], "what is added has the width of buffer 0");
    keep(py::none(), stage.y, View{0, 0, 1, 1}, stage);
  }

  void finish() {
    require(!finished_, "the layer is finished");
    layer_.place_buffers();
    finished_ = true;
  }

  void run(CpuRuntime& runtime, const BoundStep& bound, int64_t instance, float weight,
           const std::vector<Change>& changes) const {
    const Step& step = bound.step();
    require(finished_, "the layer is not finished");
    require(step.width == layer_.widths()[0], "the rows of the step have another width than buffer 0");
    bound.check_instance(instance);
    check_heads(step);
    const std::vector<LayerChange> checked = checked_changes(step, changes);
    const Computing computing(runtime);
    run_layer(runtime, layer_, step, instance, weight, checked);
  }

 private:
  static std::vector<int64_t> checked(std::vector<int64_t> widths) {
    require(!widths.empty() && static_cast<int64_t>(widths.size()) <= kMostBuffers, "a layer has 1 to 1024 buffers");
    for (const int64_t width : widths) {
      require(width > 0 && width <= kMostFeatures, "the width of a buffer is out of range");
    }
    return widths;
  }

  View view(const Columns& columns) const {
    const auto [buffer, first, heads, size] = columns;
    require(buffer >= 0 && buffer < static_cast<int64_t>(layer_.widths().size()), "there is no such buffer");
    const int64_t width = layer_.widths()[static_cast<size_t>(buffer)];
    require(heads > 0 && heads <= kMostHeads && size > 0 && size <= width && first >= 0 && first <= width - heads * size,
            "a view lies outside its buffer");
    return {buffer, first, heads, size};
  }

  View whole(const Columns& columns) const {
    const View found = view(columns);
    require(found.columns() == layer_.widths()[static_cast<size_t>(found.buffer)], "this view must cover its buffer");
    return found;
  }

  void keep(const py::object& weight, const View& read, const View& written, const Stage& stage) {
    require(read.buffer != written.buffer, "a stage cannot write to the buffer that it reads");
    if (!weight.is_none()) owners_.push_back(weight);
    add(stage);
  }

  void add(const Stage& stage) {
    require(!finished_, "the layer is finished");
    layer_.add(stage);
  }

  void check_heads(const Step& step) const {
    require(num_tables_ <= step.num_tables, "the layer rotates by a table that the step does not have");
    for (const View& x : rotated_) require(2 * step.half <= x.size, "cos has more than D / 2 columns");
    for (const View& x : appended_) {
      require(x.heads == step.format.num_heads && x.size == step.format.head_dim, "keys or values do not fit the pages");
    }
    for (const View& q : queries_) {
      require(q.heads % step.format.num_heads == 0 && q.size == step.format.head_dim, "queries do not fit the pages");
    }
  }

  std::vector<LayerChange> checked_changes(const Step& step, const std::vector<Change>& changes) const {
    std::vector<LayerChange> found;
    int64_t last = 0;
    for (const auto& [first, end, low_ranks] : changes) {
      require(first >= last && first < end && end <= step.num_rows, "the rows of changes must ascend within the step");
      require(low_ranks.size() == linears_.size(), "a change names each linear of the layer");
      LayerChange& change = found.emplace_back(LayerChange{first, end, {}});
      for (size_t i = 0; i < low_ranks.size(); ++i) {
        const LinearGroup& group = *linears_[i];
        change.slots.push_back(low_ranks[i].is_none() ? nullptr
                                                      : &low_rank_of(low_ranks[i]).weights_for(group.plan(), group.in_features()));
      }
      last = end;
    }
    return found;
  }

  Layer layer_;
  std::vector<py::object> owners_;
  std::vector<const LinearGroup*> linears_;
  std::vector<View> rotated_, appended_, queries_;
  int64_t num_tables_ = 0;  // that it rotates by
  bool finished_ = false;
};

}  // namespace ropewalk
