// What attention works on: some rows of one key/value head, which keys each of them sees and where it reads them from.
#pragma once

#include "kv_pages.inl.hpp"

namespace ropewalk {

// The softmax of some rows so far, over the keys of one range or of all.
struct SoftmaxState {
  float* out;      // [rows][padded_dim], unnormalised
  float* largest;  // [rows] running maximum of the scores
  float* sum;      // [rows] running sum of exp(score - largest)
};

static inline SoftmaxState state_at(float* memory, int64_t num_rows, int64_t padded_dim) {
  float* largest = memory + num_rows * padded_dim;
  return {memory, largest, largest + num_rows};
}

// Below every score that counts: the running maximum of a row that has seen no key.
static constexpr float kNoScore = -3.0e38f;

// What one item works on: up to kQueryRows (token, head) rows of one key/value head, and its scratch.
struct AttendTile {
  int64_t head;
  int64_t num_rows;
  int64_t first_row;      // flattened: row / group = token, row % group = head within the group
  int64_t group;          // query heads per key/value head
  int64_t padded_dim;     // D rounded up to 16
  int64_t block_dim;      // D rounded up to 32
  float* q;               // [num_rows][block_dim], scaled
  float* turned;          // the same after the Hadamard rotation
  uint16_t* halves;       // [num_rows][block_dim] the same as q in bf16, for products of pairs
  int8_t* codes;          // [num_rows][block_dim] queries for coded keys, in integers: q = codes * code_scales
  float* code_scales;     // [num_rows][block_dim / 32]
  float* code_offsets;    // [num_rows][block_dim / 32] -zero point of the keys * sum(codes) * code_scales
  float* keys;            // [kKvTile / 16][D][16] as f32, or half as many pairs of bf16
  float* values;          // [kKvTile][padded_dim] as f32, or half as many pairs of bf16
  float* scores;          // [num_rows][kKvTile]
  int16_t* weights;       // [num_rows][kKvTile] exp(score - largest of the page), in 1 / 32767; or for pairs as bf16
  float* page_largest;    // [num_rows] of the scores of this page
  float* page_sum;        // [num_rows] of exp(score - page_largest)
  int16_t* value_scales;  // [block_dim / 32][kKvTile] scales of the values of this page, in value_units
  float* value_units;     // [block_dim / 32]
  float* correction;      // [num_rows] exp(previous largest - largest) of this step
  float* take;            // [num_rows] exp(page_largest - largest) of this step
  SoftmaxState state;     // of the keys that are being walked
};

static inline AttendTile tile_of(const AttendArgs& a, int64_t item) {
  AttendTile tile{};
  const int64_t items = attend_items_per_head(a.num_rows, a.num_query_heads, a.kv.num_heads);
  tile.group = a.num_query_heads / a.kv.num_heads;
  tile.head = item / items;
  tile.first_row = item % items * kQueryRows;
  const int64_t remaining = a.num_rows * tile.group - tile.first_row;
  tile.num_rows = remaining < kQueryRows ? remaining : kQueryRows;
  tile.padded_dim = round_up(a.kv.head_dim, kLanes);
  tile.block_dim = round_up(a.kv.head_dim, kBlockRows);
  return tile;
}

// Takes the scratch of a tile; returns what is left of it, room for two states.
static inline float* carve_scratch(AttendTile& tile, float* scratch) {
  const auto take = [&scratch](int64_t floats) {
    float* taken = scratch;
    scratch += round_up(floats, kLanes);  // to a cache line
    return taken;
  };
  const int64_t blocks = tile.block_dim / kBlockRows;
  tile.q = take(kQueryRows * tile.block_dim);
  tile.turned = take(kQueryRows * tile.block_dim);
  tile.halves = reinterpret_cast<uint16_t*>(take(kQueryRows * tile.block_dim / 2));
  tile.codes = reinterpret_cast<int8_t*>(take(kQueryRows * tile.block_dim / 4));
  tile.code_scales = take(kQueryRows * blocks);
  tile.code_offsets = take(kQueryRows * blocks);
  tile.keys = take(kKvTile * tile.block_dim);
  tile.values = take(kKvTile * tile.block_dim);
  tile.scores = take(kQueryRows * kKvTile);
  tile.weights = reinterpret_cast<int16_t*>(take(kQueryRows * kKvTile / 2));
  tile.value_scales = reinterpret_cast<int16_t*>(take(blocks * kKvTile / 2));
  tile.value_units = take(blocks);
  tile.page_largest = take(kQueryRows);
  tile.page_sum = take(kQueryRows);
  tile.correction = take(kQueryRows);
  tile.take = take(kQueryRows);
  return scratch;
}

// The keys [begin, end) that a row sees.
struct KeyRange {
  int64_t begin, end;
};

static inline KeyRange visible_keys(const AttendArgs& a, const AttendTile& tile, int64_t row) {
  const int64_t position = a.start + (tile.first_row + row) / tile.group;
  const int64_t begin = a.window > 0 && position - a.window + 1 > 0 ? position - a.window + 1 : 0;
  return {begin, position + 1};
}

// Those of a page from first_key on, counted from there: an empty range where the row sees none.
static inline KeyRange visible_places(const AttendArgs& a, const AttendTile& tile, int64_t row, int64_t first_key) {
  const KeyRange range = visible_keys(a, tile, row);
  const int64_t begin = range.begin > first_key ? range.begin - first_key : 0;
  const int64_t end = range.end - first_key < kKvTile ? range.end - first_key : kKvTile;
  return {begin, end > begin ? end : begin};
}

// The keys that any row of a tile sees, from the beginning of a page on.
static inline KeyRange tile_keys(const AttendArgs& a, const AttendTile& tile) {
  return {visible_keys(a, tile, 0).begin / kKvTile * kKvTile, visible_keys(a, tile, tile.num_rows - 1).end};
}

// How many rows of the tile, from the first on, read the page of `first_key` as it was given, and not its codes: those
// at a position i with max(0, i + 1 - recent) < first_key + kKvTile.
static inline int64_t rows_reading_recent(const AttendArgs& a, const AttendTile& tile, int64_t first_key) {
  if (a.kv.recent == 0) return 0;
  const int64_t tokens = first_key + kKvTile + a.kv.recent - 1 - a.start;
  const int64_t rows = tokens * tile.group - tile.first_row;
  return rows < 0 ? 0 : rows < tile.num_rows ? rows : tile.num_rows;
}

// A page, and the rows of the tile that read it.
struct PageRows {
  HeadPage page;
  HeadPage next;  // of the same head, read next
  int64_t first_key;
  int64_t row_begin, row_end;
};

static inline bool see_all(const AttendArgs& a, const AttendTile& tile, const PageRows& rows, int64_t num_keys) {
  return visible_keys(a, tile, rows.row_end - 1).begin <= rows.first_key &&
         visible_keys(a, tile, rows.row_begin).end >= rows.first_key + num_keys;
}

// Calls visit(row_begin, row_end, places) for rows that see the same keys of a page: all at once where each sees all of
// it, else the rows of one token.  Whoever weighs values must not look at those that a row does not see.
template <class Visit>
void for_rows_alike(const AttendArgs& a, const AttendTile& tile, const PageRows& rows, int64_t num_keys, Visit visit) {
  if (see_all(a, tile, rows, num_keys)) {
    visit(rows.row_begin, rows.row_end, KeyRange{0, num_keys});
    return;
  }
  for (int64_t row = rows.row_begin; row < rows.row_end;) {
    const int64_t next_token = ((tile.first_row + row) / tile.group + 1) * tile.group - tile.first_row;
    const int64_t row_end = next_token < rows.row_end ? next_token : rows.row_end;
    const KeyRange places = visible_places(a, tile, row, rows.first_key);
    if (places.begin < places.end) visit(row, row_end, places);
    row = row_end;
  }
}

}  // namespace ropewalk
