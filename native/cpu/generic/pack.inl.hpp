// Repacking of checkpoint words into 16-column tiles (layout: native/README.md, "Packed GPTQ tiles").
#pragma once

#include "ropewalk/kernels.hpp"

namespace ropewalk {

// The stored code of input feature `row` for 16 neighbouring columns.
//
// Bit stream: code i occupies bits [i * bits, (i + 1) * bits) of the little-endian stream of a column's words, so a
// code may straddle two of them (3 bits: codes 10 and 21 of 32).
// Planar: 32 codes are `bits` words, one power-of-two plane after the other, low plane first (3 = 2 + 1, 5 = 4 + 1,
// 6 = 4 + 2, 7 = 4 + 2 + 1), each plane a bit stream of its own.
template <class V>
void read_codes(const PackArgs& a, int64_t row, int64_t column, int64_t num_columns, uint8_t* codes) {
  const int64_t stride = a.out_features;
  uint32_t collected[kLanes] = {};
  const auto add_field = [&](int64_t first_bit, int32_t width, int32_t position) {
    const int32_t* word = a.qweight + first_bit / 32 * stride + column;
    const int32_t shift = static_cast<int32_t>(first_bit % 32);
    const uint32_t mask = (1u << width) - 1u;
    for (int64_t c = 0; c < num_columns; ++c) {
      collected[c] |= (static_cast<uint32_t>(word[c]) >> shift & mask) << position;
    }
    if (shift + width <= 32) return;
    for (int64_t c = 0; c < num_columns; ++c) {
      collected[c] |= (static_cast<uint32_t>(word[c + stride]) << (32 - shift) & mask) << position;
    }
  };
  if (a.planar) {
    const int64_t block_bit = row / 32 * 32 * a.bits;
    int32_t position = 0;
    for (int32_t width = 8; width != 0; width /= 2) {
      if ((a.bits & width) == 0) continue;
      add_field(block_bit + position * 32 + row % 32 * width, width, position);
      position += width;
    }
  } else {
    add_field(row * a.bits, a.bits, 0);
  }
  for (int64_t c = 0; c < kLanes; ++c) codes[c] = static_cast<uint8_t>(collected[c]);
}

// Four rows become the four bytes of 16 lanes.
template <class V>
void interleave_quad(const uint8_t* rows, uint8_t* line) {
  for (int64_t c = 0; c < kLanes; ++c) {
    for (int64_t j = 0; j < 4; ++j) line[c * 4 + j] = rows[j * kLanes + c];
  }
}

template <class V>
void pack_block(const uint8_t* rows, int32_t code_bits, uint8_t* out) {
  alignas(64) uint8_t low[64], high[64];
  for (int64_t quad = 0; quad < 4; ++quad) {
    interleave_quad<V>(rows + quad * 4 * kLanes, low);
    interleave_quad<V>(rows + (quad + 4) * 4 * kLanes, high);
    for (int64_t i = 0; i < 64; ++i) {
      if (code_bits == 4) {
        out[quad * 64 + i] = static_cast<uint8_t>(low[i] | high[i] << 4);
      } else {
        out[quad * 64 + i] = low[i];
        out[(quad + 4) * 64 + i] = high[i];
      }
    }
  }
}

template <class V>
void pack(const PackArgs& a, int64_t tile_begin, int64_t tile_end) noexcept {
  const int64_t block_bytes = kBlockRows * kLanes * a.code_bits / 8;
  alignas(64) uint8_t rows[kBlockRows * kLanes];
  // Blocks outside, tiles inside: the words of one row are read in the order in which they lie in memory.
  for (int64_t b = 0; b < a.num_blocks; ++b) {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      const int64_t column = tile * kLanes;
      const int64_t num_columns = a.out_features - column < kLanes ? a.out_features - column : kLanes;
      for (int64_t i = 0; i < kBlockRows; ++i) {
        const int32_t row = a.source_row[b * kBlockRows + i];
        uint8_t* codes = rows + i * kLanes;
        if (row < 0) {
          for (int64_t c = 0; c < kLanes; ++c) codes[c] = 0;
        } else {
          read_codes<V>(a, row, column, num_columns, codes);
        }
      }
      pack_block<V>(rows, a.code_bits, a.codes + (tile * a.num_blocks + b) * block_bytes);
    }
  }
}

}  // namespace ropewalk
