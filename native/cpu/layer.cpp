// A step through a layer: its stages one after the other, each shared by all threads.
#include "ropewalk/layer.hpp"

#include <algorithm>
#include <type_traits>
#include <utility>

namespace ropewalk {

namespace {

// Rows of a step that go through the stages together. The inner activations are wide (2 * I floats a row: 90 MB for
// 2048 rows of a 1.1B model): buffers of this many rows stay partly in cache.
constexpr int64_t kBlockOfRows = 256;

// The buffers that a stage reads or writes.
std::vector<int64_t> buffers_of(const Stage& stage) {
  return std::visit(
      [](const auto& s) -> std::vector<int64_t> {
        using S = std::decay_t<decltype(s)>;
        if constexpr (std::is_same_v<S, RmsNormStage> || std::is_same_v<S, LayerNormStage> ||
                      std::is_same_v<S, LinearStage> || std::is_same_v<S, ActivateStage>) {
          return {s.x.buffer, s.out.buffer};
        } else if constexpr (std::is_same_v<S, RotateStage>) {
          return {s.x.buffer};
        } else if constexpr (std::is_same_v<S, AppendStage>) {
          return {s.k.buffer, s.v.buffer};
        } else if constexpr (std::is_same_v<S, AttendStage>) {
          return {s.q.buffer, s.out.buffer};
        } else if constexpr (std::is_same_v<S, SigmoidMulStage>) {
          return {s.x.buffer, s.gate.buffer, s.out.buffer};
        } else if constexpr (std::is_same_v<S, RouteStage>) {
          return {s.logits.buffer, s.out.buffer};
        } else if constexpr (std::is_same_v<S, ExpertsStage>) {
          return {s.x.buffer, s.routes.buffer, s.out.buffer};
        } else {
          static_assert(std::is_same_v<S, AddResidualStage>);
          return {s.y.buffer};
        }
      },
      stage);
}

// Some rows of a step on their way through one layer.
class Block {
 public:
  Block(CpuRuntime& runtime, const Layer& layer, const Step& step, int64_t instance, float weight,
        const std::vector<LayerChange>& changes, int64_t first, int64_t end)
      : runtime_(runtime), layer_(layer), step_(step), instance_(instance), weight_(weight), changes_(changes),
        first_(first), num_rows_(end - first), buffers_(runtime.buffers(layer.num_floats() * num_rows_)) {
    int64_t row = 0;  // of the step
    for (const RowSpan& span : step.spans) {
      const int64_t begin = std::max(row, first), last = std::min(row + span.num_rows, end);
      if (begin < last) spans_.push_back({&span, begin - first, last - begin, span.start + begin - row});
      row += span.num_rows;
    }
  }

  void operator()(const RmsNormStage& s) {
    const RmsNormArgs args{at(s.x), stride(s.x), s.x.heads, s.x.size, s.weight, s.epsilon, at(s.out)};
    rms_norm(runtime_, args, num_rows_);
  }

  void operator()(const LayerNormStage& s) {
    const LayerNormArgs args{at(s.x), stride(s.x), s.x.heads, s.x.size, s.weight, s.weight_stride, s.bias,
                             s.bias_stride, s.epsilon, at(s.out)};
    layer_norm(runtime_, args, num_rows_);
  }

  void operator()(const LinearStage& s) {
    std::vector<RowChange> changes;
    for (const LayerChange& change : changes_) {
      const int64_t begin = std::max(change.first - first_, int64_t{0}), end = std::min(change.end - first_, num_rows_);
      if (begin < end && change.slots[s.slot] != nullptr) changes.push_back({begin, end, change.slots[s.slot]});
    }
    linear(runtime_, layer_.compute(), {s.plan, at(s.x), stride(s.x), num_rows_, at(s.out), stride(s.out), &changes});
  }

  void operator()(const RotateStage& s) {
    const int64_t table = (s.table * step_.num_rows + first_) * step_.half;
    const RotateArgs args{at(s.x), stride(s.x), s.x.heads, s.x.size, step_.half, step_.cos + table, step_.sin + table};
    rotate(runtime_, args, num_rows_);
  }

  void operator()(const AppendStage& s) {
    std::vector<AppendArgs> sequences;
    for (const Rows& rows : spans_) {
      sequences.push_back({view(rows), at(s.k, rows.first), at(s.v, rows.first), stride(s.k), stride(s.v),
                           rows.num_rows, rows.start});
    }
    append(runtime_, sequences);
  }

  void operator()(const AttendStage& s) {
    std::vector<AttendArgs> sequences;
    for (const Rows& rows : spans_) {
      sequences.push_back({view(rows), layer_.compute(), at(s.q, rows.first), stride(s.q), rows.num_rows, s.q.heads,
                           rows.start, s.window, s.scale, s.softcap, at(s.out, rows.first)});
    }
    attend(runtime_, sequences);
  }

  void operator()(const ActivateStage& s) {
    activate(runtime_, {at(s.x), stride(s.x), s.out.columns(), s.gated, s.activation, at(s.out)}, num_rows_);
  }

  void operator()(const SigmoidMulStage& s) {
    sigmoid_mul(runtime_, {at(s.x), stride(s.x), at(s.gate), stride(s.gate), s.out.columns(), at(s.out)}, num_rows_);
  }

  void operator()(const RouteStage& s) {
    route(runtime_, {at(s.logits), stride(s.logits), s.logits.columns(), s.top_k, s.normalised, at(s.out)}, num_rows_);
  }

  void operator()(const ExpertsStage& s) {
    const ExpertsArgs args{s.experts, s.activation, at(s.x), stride(s.x), at(s.routes), stride(s.routes), s.routes.size,
                           at(s.out)};
    experts(runtime_, layer_.compute(), args, num_rows_);
  }

  void operator()(const AddResidualStage& s) {
    const auto weight = static_cast<float>(static_cast<double>(weight_) * s.scale);
    add(runtime_, {step_.x + first_ * step_.width, at(s.y), weight, step_.width}, num_rows_);
  }

 private:
  // Rows of one sequence in this block.
  struct Rows {
    const RowSpan* span;
    int64_t first;  // of the block
    int64_t num_rows;
    int64_t start;  // position of the first
  };

  int64_t stride(const View& view) const { return layer_.widths()[static_cast<size_t>(view.buffer)]; }

  float* at(const View& view, int64_t row = 0) const {
    float* buffer = view.buffer == 0 ? step_.x + first_ * step_.width : buffers_ + layer_.place(view.buffer) * num_rows_;
    return buffer + row * stride(view) + view.first;
  }

  KvView view(const Rows& rows) const {
    return step_.format.view(rows.span->pages.data(), instance_, rows.span->recent.data());
  }

  CpuRuntime& runtime_;
  const Layer& layer_;
  const Step& step_;
  const int64_t instance_;
  const float weight_;
  const std::vector<LayerChange>& changes_;
  const int64_t first_, num_rows_;
  float* const buffers_;
  std::vector<Rows> spans_;
};

}  // namespace

// Stage by stage, each buffer takes the first gap that is wide enough, and leaves it after its last stage.
void Layer::place_buffers() {
  const auto num_buffers = widths_.size();
  std::vector<size_t> last_use(num_buffers, 0);
  for (size_t i = 0; i < stages_.size(); ++i) {
    for (const int64_t buffer : buffers_of(stages_[i])) last_use[static_cast<size_t>(buffer)] = i;
  }
  places_.assign(num_buffers, -1);
  std::vector<std::pair<int64_t, size_t>> live;  // (place, buffer), by place
  for (size_t i = 0; i < stages_.size(); ++i) {
    for (const int64_t used : buffers_of(stages_[i])) {
      const auto buffer = static_cast<size_t>(used);
      if (buffer == 0 || places_[buffer] >= 0) continue;
      int64_t place = 0;
      auto next = live.begin();
      for (; next != live.end() && next->first < place + widths_[buffer]; ++next) {
        place = next->first + round_up(widths_[next->second], kLanes);
      }
      places_[buffer] = place;
      live.insert(next, {place, buffer});
      num_floats_ = std::max(num_floats_, place + round_up(widths_[buffer], kLanes));
    }
    std::erase_if(live, [&](const auto& entry) { return last_use[entry.second] == i; });
  }
}

void run_layer(CpuRuntime& runtime, const Layer& layer, const Step& step, int64_t instance, float weight,
               const std::vector<LayerChange>& changes) {
  for (int64_t first = 0; first < step.num_rows; first += kBlockOfRows) {
    const int64_t end = std::min(first + kBlockOfRows, step.num_rows);
    Block block(runtime, layer, step, instance, weight, changes, first, end);
    for (const Stage& stage : layer.stages()) std::visit(block, stage);
  }
}

}  // namespace ropewalk
