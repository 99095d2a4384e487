// Packed weights, and one function per operation, which splits the work over the runtime's threads. Arguments have been
// checked against the sizes given here, and the caller holds the runtime's mutex.
#pragma once

#include <memory>
#include <vector>

#include "ropewalk/runtime.hpp"

namespace ropewalk {

// One GPTQ linear in tiles.
class PackedGptq {
 public:
  // The plain form that a checkpoint reader delivers.  All sizes agree and all indices are in range.
  struct Source {
    const int32_t* qweight;       // [word_rows][N]
    int64_t in_features;          // K
    int64_t out_features;         // N
    int32_t bits;
    bool planar;
    const void* scales;           // [G][N]
    FloatType scale_type;         // f16 or f32
    const uint8_t* zeros;         // [G][N]
    int64_t num_groups;
    const int64_t* group_starts;  // [G + 1] in sorted rows
    const int32_t* order;         // [K] or null
    const float* bias;            // [N] or null
  };
  // Throws std::bad_alloc.
  PackedGptq(CpuRuntime& runtime, const Source& source);

  const GptqWeights& weights() const { return weights_; }
  int64_t num_bytes() const;
  // True when both read the same rows in the same order, cut into the same groups, with codes around the same middle:
  // activations prepared for one serve the other.
  bool shares_input(const PackedGptq& other) const;

 private:
  void build_rows(const Source& source);
  void build_tables(CpuRuntime& runtime, const Source& source);

  GptqWeights weights_{};
  std::vector<int32_t> group_starts_;
  std::vector<int32_t> source_row_;  // empty: identity without padding
  ArenaBytes codes_, scales_, zeros_, bias_;
};

// Writes words, scales and zeros.  True if a scale that is not zero leaves the normal numbers of f16.
bool round_rows(CpuRuntime& runtime, const RoundArgs& args);

struct DenseWeights {
  const void* weight;  // [N][K]
  FloatType type;
  int64_t in_features, out_features;
  const float* bias;   // [N] or null
};

// Linears that read the same input, their outputs side by side.  Those that read the same rows in the same order share
// the prepared activations: q, k and v of an act-order model have one permutation.
class LinearPlan {
 public:
  struct Part {
    const PackedGptq* gptq;     // or null
    const DenseWeights* dense;  // or null
    int64_t column;             // of the output
    size_t input;               // of a GPTQ part: index into inputs()
  };

  // The weights must outlive the plan.
  void add(const PackedGptq& weights);
  void add(const DenseWeights& weights);

  const std::vector<Part>& parts() const { return parts_; }
  const std::vector<const PackedGptq*>& inputs() const { return inputs_; }
  int64_t out_features() const { return out_features_; }

 private:
  std::vector<Part> parts_;
  std::vector<const PackedGptq*> inputs_;  // one of each distinct input order
  int64_t out_features_ = 0;
};

// A change of the parts of a LinearPlan, y += (x A) B: A of all parts in one, so that x is read once.
struct LowRankWeights {
  struct Part {
    int64_t out_features;  // N
    int64_t first_rank;    // of those of A
    int64_t rank;          // 0: this part is not changed
    const void* b;         // as in LowRankArgs
    const float* scales;   // of B, as in LowRankArgs
  };

  LowRankType type;     // of A and B
  int64_t in_features;  // K
  int64_t rank;         // R
  const void* a;        // as in LowRankInnerArgs
  const float* scales;  // of A, as in LowRankInnerArgs
  std::vector<Part> parts;  // as many as the plan has
};

// Rows [first, end) of a linear that are changed. Changes of one call are disjoint.
struct RowChange {
  int64_t first, end;
  const LowRankWeights* weights;
};

// out [T][out_stride] = x [T][x_stride] through every part of the plan, plus the changes.
struct LinearJob {
  const LinearPlan* plan;
  const float* x;
  int64_t x_stride;
  int64_t num_rows;
  float* out;
  int64_t out_stride;
  const std::vector<RowChange>* changes;  // or null
};
void linear(CpuRuntime& runtime, Compute compute, const LinearJob& job);
// Several at once, which share nothing: all threads are busy even where each has a few rows.
void linears(CpuRuntime& runtime, Compute compute, const std::vector<LinearJob>& jobs);
// out += the change alone.
void add_low_rank(CpuRuntime& runtime, const LowRankWeights& change, const float* x, int64_t x_stride,
                  int64_t num_rows, float* out, int64_t out_stride);
void rms_norm(CpuRuntime& runtime, const RmsNormArgs& args, int64_t num_rows);
void rotate(CpuRuntime& runtime, const RotateArgs& args, int64_t num_rows);
void layer_norm(CpuRuntime& runtime, const LayerNormArgs& args, int64_t num_rows);
void activate(CpuRuntime& runtime, const ActivateArgs& args, int64_t num_rows);
void sigmoid_mul(CpuRuntime& runtime, const SigmoidMulArgs& args, int64_t num_rows);
void route(CpuRuntime& runtime, const RouteArgs& args, int64_t num_rows);
void add(CpuRuntime& runtime, const AddArgs& args, int64_t num_rows);
void embed(CpuRuntime& runtime, const EmbedArgs& args, int64_t num_rows);
// Of several sequences at once.
void append(CpuRuntime& runtime, const std::vector<AppendArgs>& sequences);
void attend(CpuRuntime& runtime, const std::vector<AttendArgs>& sequences);
// Limits of this machine, as many threads at once as the runtime has; whoever calls takes the time.
// The sum of num_floats floats, a multiple of 64.
float probe_read(CpuRuntime& runtime, const float* floats, int64_t num_floats);
// Operations that the threads do together in `steps` rounds each.
int64_t probe_products(CpuRuntime& runtime, ProbeKind kind, int64_t steps);
void move_rows(CpuRuntime& runtime, const MoveArgs& args, int64_t num_instances);

// One expert: gate_up maps C to 2 * I, down I to C.
struct Expert {
  const LinearPlan* gate_up;
  const LinearPlan* down;
};

// The experts of one layer, all of the same sizes. May be used from any thread.
class ExpertSource {
 public:
  virtual ~ExpertSource() = default;
  // Those of the given numbers, ascending, as long as somebody holds them. Throws if one cannot be had.
  virtual std::vector<std::shared_ptr<const Expert>> take(const std::vector<int64_t>& numbers) const = 0;
  int64_t num_experts, size, inner;  // E, C, I
};

// out [T][C] = sum over the experts e of a row, ascending, of share_e * (f(x Gate_e) * (x Up_e)) Down_e.
struct ExpertsArgs {
  const ExpertSource* experts;
  Activation activation;
  const float* x;       // [T][C], rows x_stride apart
  int64_t x_stride;
  const float* routes;  // [T][2][top_k] as RouteArgs gives them, rows routes_stride apart
  int64_t routes_stride;
  int64_t top_k;
  float* out;           // [T][C] contiguous
};
// Throws std::invalid_argument where a route leads to an expert that there is not.
void experts(CpuRuntime& runtime, Compute compute, const ExpertsArgs& args, int64_t num_rows);

}  // namespace ropewalk
