// Repacking of checkpoint words into 16-column tiles (layout: native/README.md, "Packed GPTQ tiles").
//
// A model is packed only once, but somebody is waiting for it.  A panel of kPackColumns columns is brought into cache as
// rows of words that each hold whole codes; then every row of a tile is a shift and a mask of 16 lanes, whatever its
// place in the order.
#pragma once

#include "load.inl.hpp"
#include "ropewalk/kernels.hpp"

namespace ropewalk {

// `width` bits of the words of kPackColumns columns, or'ed into `codes` at bit `position`.  A field may straddle two
// words.
template <class V>
void add_field(const uint32_t* words, int64_t stride, int64_t first_bit, int32_t width, int32_t position,
               uint8_t* codes) {
  const uint32_t* low = words + first_bit / 32 * stride;
  const uint32_t shift = static_cast<uint32_t>(first_bit % 32);
  const uint32_t mask = (1u << width) - 1u;
  if (shift + static_cast<uint32_t>(width) <= 32) {
    for (int64_t c = 0; c < kPackColumns; ++c) {
      codes[c] = static_cast<uint8_t>(codes[c] | (low[c] >> shift & mask) << position);
    }
    return;
  }
  const uint32_t* high = low + stride;
  for (int64_t c = 0; c < kPackColumns; ++c) {
    codes[c] = static_cast<uint8_t>(codes[c] | ((low[c] >> shift | high[c] << (32 - shift)) & mask) << position);
  }
}

// The stored code of input feature `row` for kPackColumns neighbouring columns.
//
// Bit stream: code i occupies bits [i * bits, (i + 1) * bits) of the little-endian stream of a column's words (3 bits:
// codes 10 and 21 of 32 straddle two words).
// Planar: 32 codes are `bits` words, one power-of-two plane after the other, low plane first (3 = 2 + 1, 5 = 4 + 1,
// 6 = 4 + 2, 7 = 4 + 2 + 1), each plane a bit stream of its own.
template <class V>
void read_codes(const PackArgs& a, const uint32_t* words, int64_t stride, int64_t row, uint8_t* codes) {
  for (int64_t c = 0; c < kPackColumns; ++c) codes[c] = 0;
  if (!a.planar) return add_field<V>(words, stride, row * a.bits, a.bits, 0, codes);
  const int64_t block_bit = row / 32 * 32 * a.bits;
  int32_t position = 0;
  for (int32_t width = 8; width != 0; width /= 2) {
    if ((a.bits & width) == 0) continue;
    add_field<V>(words, stride, block_bit + position * 32 + row % 32 * width, width, position, codes);
    position += width;
  }
}

// Where the codes of one input feature are: 16 lanes of `words`, shifted.
struct CodeRow {
  const uint32_t* words;
  uint32_t shift;
};

// Four rows become the four bytes of each of 16 lanes.
template <class V>
void interleave_quad(const CodeRow* rows, uint32_t mask, uint32_t* lanes) {
  const CodeRow r0 = rows[0], r1 = rows[1], r2 = rows[2], r3 = rows[3];
  for (int64_t c = 0; c < kLanes; ++c) {
    lanes[c] = (r0.words[c] >> r0.shift & mask) | (r1.words[c] >> r1.shift & mask) << 8 |
               (r2.words[c] >> r2.shift & mask) << 16 | (r3.words[c] >> r3.shift & mask) << 24;
  }
}

// `width` bits of the codes of a quad, from bit `from`, to bit `to` of the bytes of a line that is zero there.
template <class V>
void put_field(const uint32_t (&quad)[kLanes], int width, int from, int to, uint8_t* line) {
  const uint32_t mask = 0x01010101u * ((1u << width) - 1u);
  for (int64_t c = 0; c < kLanes; ++c) {
    uint32_t lane;
    __builtin_memcpy(&lane, line + c * 4, 4);
    lane |= (quad[c] >> from & mask) << to;
    __builtin_memcpy(line + c * 4, &lane, 4);
  }
}

// One block of one tile from its 32 rows.
template <class V, int kBits>
void pack_block(const CodeRow* rows, uint32_t mask, uint8_t* out) {
  alignas(64) uint32_t quads[8][kLanes];  // in the order of a product: rows 4q.., 16 + 4q.., then the next q
  for (int64_t i = 0; i < 8; ++i) interleave_quad<V>(rows + (i / 2 + i % 2 * 4) * 4, mask, quads[i]);
  alignas(64) uint8_t lines[kBits][64] = {};
  for (int i = 0; i < 8; ++i) {
    if constexpr (kBits == 2) put_field<V>(quads[i], 2, 0, i % 4 * 2, lines[i / 4]);
    if constexpr (kBits == 3) {
      if (i < 6) {
        put_field<V>(quads[i], 3, 0, i % 2 * 3, lines[i / 2]);
      } else {
        put_field<V>(quads[i], 2, 0, 6, lines[i - 6]);
        put_field<V>(quads[i], 1, 2, i, lines[2]);
      }
    }
    if constexpr (kBits == 4) put_field<V>(quads[i], 4, 0, i % 2 * 4, lines[i / 2]);
    if constexpr (kBits == 8) put_field<V>(quads[i], 8, 0, 0, lines[i / 2 + i % 2 * 4]);
  }
  __builtin_memcpy(out, lines, sizeof lines);
}

// The words of columns [column, column + kPackColumns), columns past N as zero: [word_rows][kPackColumns].
template <class V>
void copy_words(const PackArgs& a, int64_t column, int64_t num_words, uint32_t* out) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(a.qweight) + column;
  const int64_t left = a.out_features - column;
  for (int64_t row = 0; row < num_words; ++row, words += a.out_features, out += kPackColumns) {
    if (left >= kPackColumns) {
      __builtin_memcpy(out, words, kPackColumns * 4);
      continue;
    }
    for (int64_t c = 0; c < kPackColumns; ++c) out[c] = c < left ? words[c] : 0;
  }
}

// A panel as rows of words in which no code straddles two: bits per code and the words.
struct CodePanel {
  const uint32_t* words;  // [K * bits / 32][kPackColumns]
  int64_t bits;
};

template <class V>
CodePanel read_panel(const PackArgs& a, int64_t column, uint32_t* scratch) {
  const int64_t num_words = a.planar ? ceil_div(a.in_features, 32) * a.bits : ceil_div(a.in_features * a.bits, 32);
  copy_words<V>(a, column, num_words, scratch);
  if (!a.planar && 32 % a.bits == 0) return {scratch, a.bits};
  // Straddling or planar codes become bytes first: four rows to a word.
  uint32_t* widened = scratch + num_words * kPackColumns;
  for (int64_t row = 0; row < a.in_features; ++row) {
    uint8_t codes[kPackColumns];
    read_codes<V>(a, scratch, kPackColumns, row, codes);
    uint32_t* words = widened + row / 4 * kPackColumns;
    for (int64_t c = 0; c < kPackColumns; ++c) {
      const uint32_t below = row % 4 == 0 ? 0 : words[c];
      words[c] = below | static_cast<uint32_t>(codes[c]) << row % 4 * 8;
    }
  }
  return {widened, 8};
}

template <class V>
void pack(const PackArgs& a, int64_t panel_begin, int64_t panel_end, uint32_t* scratch) noexcept {
  const int64_t block_bytes = kBlockRows * kLanes * a.code_bits / 8;
  const int64_t num_tiles = ceil_div(a.out_features, kLanes);
  const uint32_t no_codes[kLanes] = {};
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t first_tile = panel * (kPackColumns / kLanes);
    const CodePanel source = read_panel<V>(a, panel * kPackColumns, scratch);
    const uint32_t mask = (1u << source.bits) - 1u;
    for (int64_t j = 0; j < kPackColumns / kLanes && first_tile + j < num_tiles; ++j) {
      uint8_t* out = a.codes + (first_tile + j) * a.num_blocks * block_bytes;
      for (int64_t b = 0; b < a.num_blocks; ++b) {
        CodeRow rows[kBlockRows];
        for (int64_t i = 0; i < kBlockRows; ++i) {
          const int64_t row = a.source_row[b * kBlockRows + i];
          const int64_t bit = row * source.bits;
          rows[i] = row < 0 ? CodeRow{no_codes, 0}
                            : CodeRow{source.words + bit / 32 * kPackColumns + j * kLanes,
                                      static_cast<uint32_t>(bit % 32)};
        }
        for_code_bits(a.code_bits, [&]<int kBits>() { pack_block<V, kBits>(rows, mask, out + b * block_bytes); });
      }
    }
  }
}

}  // namespace ropewalk
