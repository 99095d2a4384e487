// Repacking of checkpoint words into 16-column tiles (layout: native/README.md, "Packed GPTQ tiles").
//
// A model is packed only once, but somebody is waiting for it.  A panel of kPackColumns columns is brought into cache as
// rows of words that each hold whole codes; then every row of a tile is a shift and a mask of 16 lanes, whatever its
// place in the order.  Where rows lie in order and a code has as many bits as its tile gives it, a block is whole words
// and no panel is needed.
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

// One block of one tile from its 32 rows: line by line in loops over lanes, which the compiler turns into vectors.
template <class V, int kBits>
void pack_block(const CodeRow* rows, uint32_t mask, uint8_t* out) {
  alignas(64) uint32_t quads[8][kLanes];  // in the order of a product: rows 4q.., 16 + 4q.., then the next q
  for (int64_t quad = 0; quad < 4; ++quad) {  // two at a time: one loop over all eight took GCC 12 three times as long
    interleave_quad<V>(rows + quad * 4, mask, quads[2 * quad]);
    interleave_quad<V>(rows + (quad + 4) * 4, mask, quads[2 * quad + 1]);
  }
  alignas(64) uint32_t lines[kBits][kLanes];
  if constexpr (kBits == 2) {
    for (int64_t line = 0; line < 2; ++line) {
      const auto* q = quads + line * 4;
      for (int64_t c = 0; c < kLanes; ++c) lines[line][c] = q[0][c] | q[1][c] << 2 | q[2][c] << 4 | q[3][c] << 6;
    }
  }
  if constexpr (kBits == 3) {
    constexpr uint32_t kLow = 0x03030303, kTop = 0x04040404;
    for (int64_t line = 0; line < 3; ++line) {
      const auto* q = quads + line * 2;
      for (int64_t c = 0; c < kLanes; ++c) lines[line][c] = q[0][c] | q[1][c] << 3;
    }
    for (int64_t c = 0; c < kLanes; ++c) {
      lines[0][c] |= (quads[6][c] & kLow) << 6;
      lines[1][c] |= (quads[7][c] & kLow) << 6;
      lines[2][c] |= (quads[6][c] & kTop) << 4 | (quads[7][c] & kTop) << 5;
    }
  }
  if constexpr (kBits == 4) {
    for (int64_t line = 0; line < 4; ++line) {
      const auto* q = quads + line * 2;
      for (int64_t c = 0; c < kLanes; ++c) lines[line][c] = q[0][c] | q[1][c] << 4;
    }
  }
  if constexpr (kBits == 8) {
    for (int64_t i = 0; i < 8; ++i) __builtin_memcpy(lines[i / 2 + i % 2 * 4], quads[i], sizeof quads[i]);
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

// The lower two bytes as the even bytes of a word.
static inline uint32_t spread_bytes(uint32_t two) { return (two | two << 8) & 0x00ff00ff; }

// One block of one tile from the words of 32 rows in order.
template <class V, int kBits>
void pack_words(const uint32_t* words, int64_t stride, uint8_t* out) {
  alignas(64) uint32_t lines[kBits][kLanes];
  if constexpr (kBits == 8) {
    for (int64_t row = 0; row < kBits; ++row) __builtin_memcpy(lines[row], words + row * stride, sizeof lines[row]);
  } else {
    constexpr uint32_t kLow = 0x0f0f0f0f;
    for (int64_t word = 0; word < 2; ++word) {
      const uint32_t* low = words + word * stride;
      const uint32_t* high = words + (word + 2) * stride;
      for (int64_t c = 0; c < kLanes; ++c) {
        const uint32_t even = (low[c] & kLow) | (high[c] & kLow) << 4;  // rows 0, 2, 4, 6 of the words
        const uint32_t odd = (low[c] >> 4 & kLow) | (high[c] & ~kLow);  // rows 1, 3, 5, 7
        lines[2 * word][c] = spread_bytes(even & 0xffff) | spread_bytes(odd & 0xffff) << 8;
        lines[2 * word + 1][c] = spread_bytes(even >> 16) | spread_bytes(odd >> 16) << 8;
      }
    }
  }
  __builtin_memcpy(out, lines, sizeof lines);
}

// Block by block across the tiles, so that the rows of words are read in long pieces.
template <class V, int kBits>
void pack_in_order(const PackArgs& a, int64_t tile_begin, int64_t tile_end) {
  constexpr int64_t kBlockBytes = kBlockRows * kLanes * kBits / 8;
  const int64_t stride = a.out_features;
  const auto* words = reinterpret_cast<const uint32_t*>(a.qweight);
  for (int64_t b = 0; b < a.num_blocks; ++b, words += kBits * stride) {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      uint8_t* out = a.codes + (tile * a.num_blocks + b) * kBlockBytes;
      const uint32_t* first = words + tile * kLanes;
      const int64_t left = a.out_features - tile * kLanes;
      if (left >= kLanes) {
        // The next block of these columns lies in other pages, where the processor does not look ahead.
        for (int64_t row = 0; row < kBits && b + 1 < a.num_blocks; ++row) {
          V::prefetch_far(first + (kBits + row) * stride);
        }
        pack_words<V, kBits>(first, stride, out);
        continue;
      }
      uint32_t padded[kBits][kLanes] = {};
      for (int64_t row = 0; row < kBits; ++row) {
        for (int64_t c = 0; c < left; ++c) padded[row][c] = first[row * stride + c];
      }
      pack_words<V, kBits>(padded[0], kLanes, out);
    }
  }
}

template <class V>
void pack(const PackArgs& a, int64_t panel_begin, int64_t panel_end, uint32_t* scratch) noexcept {
  const int64_t block_bytes = kBlockRows * kLanes * a.code_bits / 8;
  const int64_t num_tiles = ceil_div(a.out_features, kLanes);
  if (a.in_order && !a.planar && a.bits == a.code_bits && (a.bits == 4 || a.bits == 8)) {
    const int64_t tile_begin = panel_begin * (kPackColumns / kLanes), panels_end = panel_end * (kPackColumns / kLanes);
    const int64_t tile_end = panels_end < num_tiles ? panels_end : num_tiles;
    return a.bits == 4 ? pack_in_order<V, 4>(a, tile_begin, tile_end) : pack_in_order<V, 8>(a, tile_begin, tile_end);
  }
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
