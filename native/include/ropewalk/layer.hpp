// A decoder layer as a list of stages over named buffers, and the rows of a step that go through it. The list is what
// ropewalk/families/recorder.py has recorded, with the weights in place of their names.
#pragma once

#include <memory>
#include <variant>
#include <vector>

#include "ropewalk/cache.hpp"
#include "ropewalk/operations.hpp"

namespace ropewalk {

// Columns of a buffer: [T][heads][size], rows one width of the buffer apart.
struct View {
  int64_t buffer;
  int64_t first;  // column
  int64_t heads;
  int64_t size;
  int64_t columns() const { return heads * size; }
};

// A view that is called `whole` covers all columns of its buffer.
struct RmsNormStage {
  View x;
  const float* weight;  // [x.size]
  float epsilon;
  View out;  // whole
};
struct LayerNormStage {
  View x;
  const float* weight;  // [x.size], or [x.heads][x.size]
  int64_t weight_stride;  // as in LayerNormArgs
  const float* bias;  // the same, or null
  int64_t bias_stride;
  float epsilon;
  View out;  // whole
};
struct LinearStage {
  View x;
  const LinearPlan* plan;
  size_t slot;  // of the step's changes
  View out;
};
struct RotateStage {
  View x;
  int64_t table;  // of the step
};
struct AppendStage {
  View k, v;
};
struct AttendStage {
  View q;
  View out;  // whole
  int64_t window;  // 0: unlimited
  float scale, softcap;  // as in AttendArgs
};
struct ActivateStage {
  View x;
  bool gated;
  Activation activation;
  View out;  // whole
};
struct SigmoidMulStage {
  View x, gate;
  View out;  // whole
};
struct RouteStage {
  View logits;
  int64_t top_k;
  bool normalised;
  View out;  // whole
};
struct ExpertsStage {
  View x;
  View routes;
  const ExpertSource* experts;
  Activation activation;
  View out;  // whole
};
struct AddResidualStage {
  View y;  // whole
  double scale;
};
using Stage = std::variant<RmsNormStage, LayerNormStage, LinearStage, RotateStage, AppendStage, AttendStage,
                           ActivateStage, SigmoidMulStage, RouteStage, ExpertsStage, AddResidualStage>;

class Layer {
 public:
  // widths: floats to a row of each buffer; buffer 0 is the residual stream, which a step brings.
  Layer(std::vector<int64_t> widths, Compute compute) : widths_(std::move(widths)), compute_(compute) {}

  void add(Stage stage) { stages_.push_back(std::move(stage)); }
  // Buffers that are not needed at the same time share their place. Call it when all stages are there.
  void place_buffers();

  const std::vector<int64_t>& widths() const { return widths_; }
  const std::vector<Stage>& stages() const { return stages_; }
  Compute compute() const { return compute_; }
  int64_t place(int64_t buffer) const { return places_[static_cast<size_t>(buffer)]; }
  // Of a row of all buffers together.
  int64_t num_floats() const { return num_floats_; }

 private:
  std::vector<int64_t> widths_;
  Compute compute_;
  std::vector<Stage> stages_;
  std::vector<int64_t> places_;  // in floats of a row, by buffer
  int64_t num_floats_ = 0;
};

// Rows of one sequence, one after the other, at positions [start, start + num_rows).
struct RowSpan {
  int64_t num_rows;
  int64_t start;
  std::vector<uint8_t*> pages;
  std::vector<uint8_t*> recent;  // as in KvView, where the format keeps the last positions in f16; else empty
};

// What the layers of a step have in common. The rows of a span follow those of the one before it.
struct Step {
  float* x;  // [T][width], the residual stream, changed in place
  int64_t num_rows;
  int64_t width;
  const float* cos;  // [num_tables][T][half]
  const float* sin;
  int64_t half, num_tables;
  KvFormat format;
  std::vector<RowSpan> spans;
};

// Rows [first, end) of a step and what changes the linears of the layer for them, by slot; null: nothing.
struct LayerChange {
  int64_t first, end;
  std::vector<const LowRankWeights*> slots;
};

// All rows of a step through a layer: x += weight * what the layer adds. changes: disjoint.
void run_layer(CpuRuntime& runtime, const Layer& layer, const Step& step, int64_t instance, float weight,
               const std::vector<LayerChange>& changes);

}  // namespace ropewalk
