// The seam between the host code and the per-instruction-set kernels: one plain struct of arguments per operation and
// one table of function pointers per instruction set.  No containers and no templates here: every file compiled with
// special flags includes this header (see native/README.md, "One definition rule").
//
// Letters: T rows (new tokens), K input features, N output features, G groups, Hq/Hkv query and key/value heads,
// D head size, R rotated dims of a head.  All pointers of one call refer to memory that does not overlap, except where
// `inplace` is noted.  Kernels are noexcept and trust their arguments: bindings/ has checked them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ropewalk {

static constexpr int64_t kLanes = 16;       // output features of a weight tile, keys of a K tile
static constexpr int64_t kBlockRows = 32;   // input features quantised together
static constexpr int64_t kKvTile = 64;      // keys of a page, and of a step of the online softmax
static constexpr int64_t kKeyRange = 512;   // keys whose weighted values are summed apart, so that threads can share a long row
static constexpr int64_t kQueryRows = 64;   // (token, head) rows that share one pass over a KV tile
static constexpr int64_t kPackColumns = 64;  // columns repacked together
static constexpr int64_t kRankTile = 4;     // ranks of a low-rank change that are computed together
static constexpr int64_t kPanelRows = 96;   // rows of a linear's input that share one pass over a weight tile

enum class FloatType : int32_t { f32, f16, bf16 };

// How keys or values are kept: as floats, or as codes of 8, 6 or 4 bits with an f16 scale for each block of 32 dims.
enum class KvType : int32_t { f32, f16, q8, q6, q4 };

// How activations meet weights and keys (native/README.md, "Compute modes"). exact: to float32's precision. int8: to 8 bits.
enum class Compute { exact, int8 };

// An activation of a GPTQ linear is an integer of so many digits in base 256, times the scale of its block.
static constexpr int64_t kInt8Digits = 1;
static constexpr int64_t kExactDigits = 3;

// The function of a feed-forward block: x / (1 + exp(-x)); x Phi(x), Phi the normal distribution; and the latter with
// Phi by a hyperbolic tangent (Hendrycks & Gimpel 2016, arXiv:1606.08415).
enum class Activation : int32_t { silu, gelu, gelu_tanh };

// A GPTQ linear in tiles of 16 output features; layout in native/README.md, "Packed GPTQ tiles".
struct GptqWeights {
  int64_t in_features;        // K, rows before padding
  int64_t out_features;       // N
  int64_t num_blocks;         // blocks of 32 sorted rows; each group is padded to whole blocks
  int64_t num_groups;         // G
  int64_t num_tiles;          // ceil(N / 16)
  int32_t code_bits;          // 2, 3, 4 or 8: width of a code in `codes`
  FloatType scale_type;       // f16 or f32
  const uint8_t* codes;       // [num_tiles][num_blocks][32 * 16 * code_bits / 8]
  const void* scales;         // [num_tiles][G][16]
  const uint8_t* zeros;       // [num_tiles][G][16], or null: every zero point is `middle`
  int32_t middle;             // subtracted from codes in integers; what is left of a zero point, in floats
  const int32_t* group_starts;  // [G + 1], in blocks
  bool groups_are_blocks;       // each group is one block, as with groups of 32
  const int32_t* source_row;    // [num_blocks * 32] input feature of each sorted row, -1 for padding; null: identity
  const float* bias;            // [num_tiles * 16] or null
};

// Repacking of one checkpoint tensor into the tiles of GptqWeights.codes.
struct PackArgs {
  const int32_t* qweight;     // [word_rows][N], row-major, as stored
  int64_t out_features;
  int64_t in_features;
  int32_t bits;               // of the stored code: 2..8
  bool planar;                // gptq_p bit planes instead of one little-endian bit stream
  int32_t code_bits;          // of the packed code: 2, 3, 4 or 8
  int64_t num_blocks;
  const int32_t* source_row;  // as in GptqWeights, never null here
  bool in_order;              // source_row is the identity: every row in its place, none of padding
  uint8_t* codes;
};

// Inputs of one scale when a float matrix is rounded to codes of so many bits, 8 or 4.
template <int kBits>
static constexpr int64_t kRoundRun = kBits == 8 ? 64 : 32;

// Rounding of a float matrix to the codes, scales and zero points of a GPTQ linear, by that of ropewalk/gptq/rounding.py.
struct RoundArgs {
  const void* weight;   // [N][K]
  FloatType type;
  int64_t in_features;  // K, a multiple of 32 / bits
  int64_t out_features;  // N
  int32_t bits;         // 8 or 4
  bool half_scales;     // scales are rounded to f16 before they divide
  int32_t* words;       // [K * bits / 32][N]
  float* scales;        // [G][N], G = ceil(K / kRoundRun<bits>)
  uint8_t* zeros;       // [G][N]
};

// Activations of a GPTQ linear, in sorted order: x = scale of the block * (digits, the highest first, in base 256).
struct PreparedRows {
  int8_t* digits;             // [T][num_blocks][num_digits][32]
  float* scales;              // [T][num_blocks]
  int32_t* starts;            // [T][num_blocks][num_digits], sums of digits times -middle
  float* group_sums;          // [T][G], sums of the values of a group
};

struct PrepareArgs {
  const float* x;             // [T][x_stride]
  int64_t x_stride;
  int64_t num_digits;         // kInt8Digits or kExactDigits
  const GptqWeights* weights;  // whose order, groups and middle are those of all weights that the rows are for
  PreparedRows out;
};

struct GptqLinearArgs {
  const GptqWeights* weights;
  PreparedRows rows;
  float* out;                 // [T][out_stride]
  int64_t out_stride;
};

struct DenseLinearArgs {
  const void* weight;         // [N][K] row-major
  FloatType weight_type;
  int64_t in_features;
  int64_t out_features;
  const float* bias;          // [N] or null
  const float* x;             // [T][x_stride]
  int64_t x_stride;
  float* out;                 // [T][out_stride]
  int64_t out_stride;
};

// How the matrices of a low-rank change are held: i8 are multiples of a scale for each rank of A and output of B.
enum class LowRankType { f32, i8 };

// A low-rank change of a linear, in two halves: inner = x A, then out += inner B.  Layouts in native/README.md.
struct LowRankInnerArgs {
  const void* a;              // [ceil(R / 4)][ceil(K / 16)][4][16], zero past R and K
  LowRankType type;
  const float* scales;        // i8: [round_up(R, 4)]
  int64_t in_features;        // K
  const float* x;             // [T][x_stride]
  int64_t x_stride;
  float* inner;               // [T][inner_stride], written to whole fours of ranks
  int64_t inner_stride;
};

struct LowRankArgs {
  const void* b;              // [ceil(N / 16)][rank][16], zero past N
  LowRankType type;
  const float* scales;        // i8: [round_up(N, 16)]
  int64_t rank;
  int64_t out_features;       // N
  const float* inner;         // [T][inner_stride]
  int64_t inner_stride;
  float* out;                 // [T][out_stride] inplace
  int64_t out_stride;
};

struct RmsNormArgs {
  const float* x;             // [T][H][C], strides below, C contiguous
  int64_t row_stride;
  int64_t num_heads;          // H: 1 for a plain norm
  int64_t size;               // C
  const float* weight;        // [C]
  float epsilon;
  float* out;                 // [T][H][C] contiguous
};

struct LayerNormArgs {
  const float* x;             // [T][H][C], strides below, C contiguous
  int64_t row_stride;
  int64_t num_heads;          // H: 1 for a plain norm
  int64_t size;               // C
  const float* weight;        // [C], or [H][C]
  int64_t weight_stride;      // from one head to the next: 0 or C
  const float* bias;          // the same, or null
  int64_t bias_stride;
  float epsilon;
  float* out;                 // [T][H][C] contiguous
};

struct RotateArgs {
  float* x;                   // [T][H][D] inplace, row stride below, D contiguous
  int64_t row_stride;
  int64_t num_heads;
  int64_t head_dim;
  int64_t half;               // R / 2: element i pairs with i + R/2
  const float* cos;           // [T][R/2]
  const float* sin;
};

struct ActivateArgs {
  const float* x;             // [T][I], rows x_stride apart; gated: [T][2 * I], f(first half) * second half
  int64_t x_stride;
  int64_t size;               // I
  bool gated;
  Activation activation;      // f
  float* out;                 // [T][I]
};

struct SigmoidMulArgs {
  const float* x;             // [T][C]
  int64_t x_stride;
  const float* gate;          // [T]
  int64_t gate_stride;
  int64_t size;               // C
  float* out;                 // [T][C]
};

// The experts of each row: softmax over all logits, of which the `top_k` largest count.
struct RouteArgs {
  const float* logits;        // [T][E]
  int64_t logits_stride;
  int64_t num_experts;        // E, at most kMostExperts
  int64_t top_k;              // 1 to E
  bool normalised;            // shares divided by their sum
  float* out;                 // [T][2][top_k]: numbers of experts, ascending, and their shares
};

// What the experts of each row have computed, put together.
struct CombineArgs {
  const float* y;             // [rows of all experts][C]
  const int32_t* places;      // [T][top_k] rows of y
  const float* shares;        // [T][top_k]
  int64_t shares_stride;
  int64_t top_k;
  int64_t size;               // C
  float* out;                 // [T][C]
};

struct AddArgs {
  float* x;                   // [T][C] inplace: x += weight * y
  const float* y;             // [T][C]
  float weight;
  int64_t size;               // C
};

struct EmbedArgs {
  const void* table;          // [V][C]
  FloatType table_type;
  int64_t size;               // C
  const int64_t* token_ids;   // [T], each in [0, V)
  float* out;                 // [T][C]
};

// The keys and values of one sequence in one layer instance; layout in native/README.md, "Pages of keys and values".
struct KvView {
  KvType keys, values;
  int64_t num_heads;          // Hkv
  int64_t head_dim;           // D
  uint8_t* const* pages;      // of kKvTile positions each
  int64_t offset;             // bytes of a page before this layer instance
  // With recent > 0 the last positions are kept in f16 besides: a row at position i reads the pages from
  // max(0, i + 1 - recent) / kKvTile on from there.
  int64_t recent;
  uint8_t* const* recent_pages;  // of f16; null where no row reads the page
  int64_t recent_offset;
};

struct AppendArgs {
  KvView kv;
  const float* k;             // [T][Hkv][D], row stride below
  const float* v;
  int64_t k_stride;
  int64_t v_stride;
  int64_t num_rows;           // T
  int64_t start;              // position of row 0
};

// Rows of pages moved to other positions: keys are turned by cos and sin, values stay as they are.
struct MoveArgs {
  KvView source;              // of the first layer instance; `recent` is not looked at
  KvView target;              // of the same types and sizes; may be the same pages
  int64_t instance_bytes;     // from one layer instance to the next
  int64_t source_start;
  int64_t target_start;       // rows are moved in ascending order
  int64_t num_rows;           // T
  const int32_t* tables;      // of each layer instance: which of these its keys are turned by; -1: they are not turned
  const float* cos;           // [tables][T][half]
  const float* sin;
  int64_t half;               // R / 2
};

struct AttendArgs {
  KvView kv;
  Compute compute;            // of codes
  const float* q;             // [T][Hq][D], row stride below
  int64_t q_stride;
  int64_t num_rows;           // T
  int64_t num_query_heads;    // Hq
  int64_t start;              // position of row 0: row t sees keys (start + t - window, start + t]
  int64_t window;             // 0: unlimited
  float scale;                // of the scores, 1 / sqrt(D)
  float softcap;              // c for c * tanh(score / c) before the mask; 0: none
  float* out;                 // [T][Hq * D] contiguous
};

// What is multiplied to find the limits of a processor: bytes of codes with bytes of activations, or floats.
enum class ProbeKind { int8, f32 };

// Work is handed to a kernel as a half-open range of independent items, named in each comment.
struct KernelTable {
  const char* name;
  // One item: kPackColumns columns.  `scratch` holds pack_scratch_words(K) words.
  void (*pack)(const PackArgs&, int64_t panel_begin, int64_t panel_end, uint32_t* scratch) noexcept;
  // One item: 16 rows.  True if a scale that is not zero leaves the normal numbers of f16.
  bool (*round_rows)(const RoundArgs&, int64_t tile_begin, int64_t tile_end) noexcept;
  void (*prepare)(const PrepareArgs&, int64_t row_begin, int64_t row_end) noexcept;
  void (*gptq_int8)(const GptqLinearArgs&, int64_t row_begin, int64_t row_end, int64_t tile_begin,
                    int64_t tile_end) noexcept;
  void (*gptq_exact)(const GptqLinearArgs&, int64_t row_begin, int64_t row_end, int64_t tile_begin,
                     int64_t tile_end) noexcept;
  void (*dense)(const DenseLinearArgs&, int64_t row_begin, int64_t row_end, int64_t out_begin,
                int64_t out_end) noexcept;
  // One item: kRankTile ranks.
  void (*low_rank_inner)(const LowRankInnerArgs&, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                         int64_t panel_end) noexcept;
  void (*low_rank)(const LowRankArgs&, int64_t row_begin, int64_t row_end, int64_t tile_begin,
                   int64_t tile_end) noexcept;
  void (*rms_norm)(const RmsNormArgs&, int64_t row_begin, int64_t row_end) noexcept;
  void (*rotate)(const RotateArgs&, int64_t row_begin, int64_t row_end) noexcept;
  void (*layer_norm)(const LayerNormArgs&, int64_t row_begin, int64_t row_end) noexcept;
  void (*activate)(const ActivateArgs&, int64_t row_begin, int64_t row_end) noexcept;
  void (*sigmoid_mul)(const SigmoidMulArgs&, int64_t row_begin, int64_t row_end) noexcept;
  void (*route)(const RouteArgs&, int64_t row_begin, int64_t row_end) noexcept;
  void (*combine)(const CombineArgs&, int64_t row_begin, int64_t row_end) noexcept;
  void (*add)(const AddArgs&, int64_t row_begin, int64_t row_end) noexcept;
  void (*embed)(const EmbedArgs&, int64_t row_begin, int64_t row_end) noexcept;
  void (*append)(const AppendArgs&, int64_t head_begin, int64_t head_end) noexcept;
  // One item: a head of a layer instance.
  void (*move_rows)(const MoveArgs&, int64_t item_begin, int64_t item_end) noexcept;
  // One item: kQueryRows consecutive (token, head of the group) rows of one key/value head.  `scratch` holds
  // attend_scratch_floats(D) floats, 64-byte aligned.
  void (*attend)(const AttendArgs&, int64_t item_begin, int64_t item_end, float* scratch) noexcept;
  // The same in two steps, for few rows over many keys: range `range` of the keys of an item, into a part of
  // attend_part_floats(rows of the item, D) floats; and the parts of ranges [range_begin, range_end), one after the
  // other in `parts`, to the outputs.  The first part is written to.
  void (*attend_range)(const AttendArgs&, int64_t item, int64_t range, float* part, float* scratch) noexcept;
  void (*attend_merge)(const AttendArgs&, int64_t item, int64_t range_begin, int64_t range_end, float* parts) noexcept;
  // Limits of the processor.  The sum of num_floats floats, a multiple of 64; and the operations of `steps` rounds of
  // products, operands [2][4], out [16] read and written.
  float (*probe_read)(const float* floats, int64_t num_floats) noexcept;
  int64_t (*probe_products)(ProbeKind, int64_t steps, const int8_t* operands, float* out) noexcept;
};

static constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
static constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// The words of a panel as stored (at most 8 bits a code), and widened to bytes.
static constexpr int64_t pack_scratch_words(int64_t in_features) {
  return 2 * ceil_div(in_features, 32) * 8 * kPackColumns;
}

// Bits of a code, 0 for floats.
static constexpr int32_t code_bits(KvType type) {
  return type == KvType::q8 ? 8 : type == KvType::q6 ? 6 : type == KvType::q4 ? 4 : 0;
}

// Codes of few bits are those of a head that a Hadamard matrix was applied to.
static constexpr bool is_rotated(KvType type) { return type == KvType::q6 || type == KvType::q4; }

// Of the codes of one head in a page, keys or values, and of their scales.
static constexpr int64_t code_bytes(KvType type, int64_t head_dim) {
  return kKvTile * round_up(head_dim, kBlockRows) * code_bits(type) / 8;
}
static constexpr int64_t scale_bytes(int64_t head_dim) { return kKvTile * ceil_div(head_dim, kBlockRows) * 2; }

// Of the keys, and of the values, of one head in a page.
static constexpr int64_t key_bytes(KvType type, int64_t head_dim) {
  if (code_bits(type) != 0) return code_bytes(type, head_dim) + scale_bytes(head_dim);
  return kKvTile * head_dim * (type == KvType::f16 ? 2 : 4);
}
static constexpr int64_t value_bytes(KvType type, int64_t head_dim) {
  if (code_bits(type) != 0) return code_bytes(type, head_dim) + scale_bytes(head_dim);
  return kKvTile * round_up(head_dim, kLanes) * (type == KvType::f16 ? 2 : 4);
}

// The weighted values of some rows over one range of keys: sums, running maxima, and sums of exp(score - maximum).
static constexpr int64_t attend_part_floats(int64_t num_rows, int64_t head_dim) {
  return num_rows * (round_up(head_dim, kLanes) + 2);
}

// As AttendTile of cpu/generic/attention_tile.inl.hpp carves it up, and two parts.
static constexpr int64_t attend_scratch_floats(int64_t head_dim) {
  const int64_t padded = round_up(head_dim, kBlockRows);
  const int64_t queries = kQueryRows * (2 * padded + padded / 2 + padded / 4 + 2 * padded / kBlockRows);
  const int64_t keys_and_values = 2 * kKvTile * padded + kKvTile / 2 * padded / kBlockRows + padded / kBlockRows;
  const int64_t weights = kQueryRows * (kKvTile + kKvTile / 2 + 4);
  return queries + keys_and_values + weights + 8 * kLanes + 2 * attend_part_floats(kQueryRows, head_dim);
}

// (token, head) rows of one key/value head, cut into items of kQueryRows.
static constexpr int64_t attend_items_per_head(int64_t num_rows, int64_t num_query_heads, int64_t num_kv_heads) {
  return ceil_div(num_rows * (num_query_heads / num_kv_heads), kQueryRows);
}

}  // namespace ropewalk
