// Keys and values as codes: how a row of a head is coded, and where its codes go in the tiles of a page.
#pragma once

#include "hadamard.inl.hpp"
#include "kv_pages.inl.hpp"
#include "linear.inl.hpp"
#include "ropewalk/limits.hpp"

namespace ropewalk {

// One row of a head as it is coded, in blocks of 32 dims.
struct CodedRow {
  alignas(64) int16_t codes[kMostHeadDim];
  uint16_t scales[kMostHeadDim / kBlockRows];  // f16
};

// One block of 32: d = f16(max|x| / zero), code = clamp(rint(x / d + zero)).  Nothing but zeros: code 0 and d 0.
template <class V>
void code_block(const float* x, int bits, int16_t* codes, uint16_t* scale) {
  const float zero = zero_point(bits);
  const auto low = V::load(x), high = V::load(x + kLanes);
  const float largest = V::reduce_max(V::max(V::abs(low), V::abs(high)));
  // Maxima may lose a NaN, differences do not: a block that holds inf or NaN reads NaN.
  const float poison = V::reduce_add(V::add(V::sub(low, low), V::sub(high, high)));
  uint16_t halves[kLanes];
  V::store_f16(halves, V::broadcast(largest / zero + poison));
  *scale = halves[0];
  const auto d = V::load_f16(halves);
  const bool empty = V::first(d) == 0.0f;
  const auto code = [&](typename V::F32 v) {
    if (empty) return V::zero();
    const auto rounded = V::round(V::add(V::div(v, d), V::broadcast(zero)));
    return V::min(V::max(rounded, V::zero()), V::broadcast(2.0f * zero));  // a NaN becomes 0
  };
  V::store_int16(codes, code(low));
  V::store_int16(codes + kLanes, code(high));
}

// x: [D] -> coded, rotated before where the type asks for it; dims past D are coded as zeros.
template <class V>
void code_row(const float* x, int64_t head_dim, KvType type, CodedRow& coded) {
  alignas(64) float row[kMostHeadDim];
  const int64_t padded = round_up(head_dim, kBlockRows);
  for (int64_t d = 0; d < padded; d += kLanes) {
    V::store(row + d, V::load_partial(x + d, head_dim - d < 0 ? 0 : head_dim - d));
  }
  if (is_rotated(type)) hadamard<V>(row, head_dim);
  for (int64_t d = 0; d < padded; d += kBlockRows) {
    code_block<V>(row + d, code_bits(type), coded.codes + d, coded.scales + d / kBlockRows);
  }
}

// The inverse, into [D rounded up to 32].
template <class V>
void decode_row(const CodedRow& coded, int64_t head_dim, KvType type, float* row) {
  const float zero = zero_point(code_bits(type));
  for (int64_t d = 0; d < head_dim; d += kBlockRows) {
    uint16_t halves[kLanes];
    for (uint16_t& half : halves) half = coded.scales[d / kBlockRows];
    const float scale = V::first(V::load_f16(halves));
    for (int64_t i = d; i < d + kBlockRows; ++i) row[i] = scale * (static_cast<float>(coded.codes[i]) - zero);
  }
  if (is_rotated(type)) hadamard<V>(row, head_dim);
}

// Where one code is: some bits of a byte, and for 6 bits two more of another.
struct CodePlace {
  int64_t byte;
  int shift;
  int64_t high_byte;
  int high_shift;
};

// Dim d of a block of 32 of key `lane`: a tile of GptqWeights.codes, with dims down and keys across.
static inline CodePlace key_place(int bits, int64_t d, int64_t lane) {
  const int64_t quad = d % 16 / 4, column = 4 * lane + d % 4;
  const int half = static_cast<int>(d / 16);
  if (bits == 8) return {d / 4 * 64 + column, 0, 0, 0};
  const int field = static_cast<int>(quad % 2) * 2 + half;
  return {quad * 64 + column, 4 * half, 256 + quad / 2 * 64 + column, 2 * field};
}

// Dim `lane` of 16 of key `key` of 32: pairs of neighbouring keys are 16 bits apart.
static inline CodePlace value_place(int bits, int64_t key, int64_t lane) {
  const int64_t word = 4 * lane + key % 2 * 2;  // first byte of the 16 bits
  const int pair = static_cast<int>(key % 8 / 2);
  if (bits == 8) return {key / 4 * 64 + word + pair % 2, 0, 0, 0};
  const int field = static_cast<int>(key % 16 / 8) * 4 + pair;
  return {key / 8 * 64 + word + pair / 2, pair % 2 * 4, 256 + key / 16 * 64 + word + field / 4, field % 4 * 2};
}

static inline void put_code(uint8_t* tile, int bits, const CodePlace& place, int code) {
  const auto put = [](uint8_t& byte, int shift, int mask, int value) {
    byte = static_cast<uint8_t>((byte & ~(mask << shift)) | value << shift);
  };
  if (bits == 8) {
    tile[place.byte] = static_cast<uint8_t>(code);
    return;
  }
  put(tile[place.byte], place.shift, 15, code & 15);
  if (bits == 6) put(tile[place.high_byte], place.high_shift, 3, code >> 4);
}

static inline int code_at(const uint8_t* tile, int bits, const CodePlace& place) {
  if (bits == 8) return tile[place.byte];
  const int low = tile[place.byte] >> place.shift & 15;
  return bits == 4 ? low : low | (tile[place.high_byte] >> place.high_shift & 3) << 4;
}

// Every place of one row of a page: visit(tile, place, index of the dim).
template <int kBits, class Visit>
void for_key_codes(uint8_t* keys, int64_t head_dim, int64_t place, Visit visit) {
  const int64_t num_blocks = ceil_div(head_dim, kBlockRows);
  uint8_t* tile = keys + place / kLanes * num_blocks * 64 * kBits;
  for (int64_t b = 0; b < num_blocks; ++b) {
    for (int64_t d = 0; d < kBlockRows; ++d) {
      visit(tile + b * 64 * kBits, key_place(kBits, d, place % kLanes), b * kBlockRows + d);
    }
  }
}

template <int kBits, class Visit>
void for_value_codes(uint8_t* values, int64_t head_dim, int64_t place, Visit visit) {
  const int64_t padded = round_up(head_dim, kBlockRows);
  for (int64_t d = 0; d < padded; d += kLanes) {
    uint8_t* tile = values + (d / kLanes * (kKvTile / kBlockRows) + place / kBlockRows) * 64 * kBits;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      visit(tile, value_place(kBits, place % kBlockRows, lane), d + lane);
    }
  }
}

// The f16 scale of block b of the row at `place`.
static inline uint16_t* key_scale(uint8_t* keys, KvType type, int64_t head_dim, int64_t place, int64_t b) {
  const int64_t num_blocks = ceil_div(head_dim, kBlockRows);
  auto* scales = reinterpret_cast<uint16_t*>(keys + code_bytes(type, head_dim));
  return scales + (place / kLanes * num_blocks + b) * kLanes + place % kLanes;
}

static inline uint16_t* value_scale(uint8_t* values, KvType type, int64_t head_dim, int64_t place, int64_t b) {
  return reinterpret_cast<uint16_t*>(values + code_bytes(type, head_dim)) + b * kKvTile + place;
}

static inline void put_keys(uint8_t* keys, KvType type, int64_t head_dim, int64_t place, const CodedRow& row) {
  for_bits(type, [&]<int kBits>() {
    for_key_codes<kBits>(keys, head_dim, place, [&](uint8_t* tile, const CodePlace& at, int64_t d) {
      put_code(tile, kBits, at, row.codes[d]);
    });
  });
  for (int64_t b = 0; b < ceil_div(head_dim, kBlockRows); ++b) {
    *key_scale(keys, type, head_dim, place, b) = row.scales[b];
  }
}

static inline void put_values(uint8_t* values, KvType type, int64_t head_dim, int64_t place, const CodedRow& row) {
  for_bits(type, [&]<int kBits>() {
    for_value_codes<kBits>(values, head_dim, place, [&](uint8_t* tile, const CodePlace& at, int64_t d) {
      put_code(tile, kBits, at, row.codes[d]);
    });
  });
  for (int64_t b = 0; b < ceil_div(head_dim, kBlockRows); ++b) {
    *value_scale(values, type, head_dim, place, b) = row.scales[b];
  }
}

static inline void take_keys(uint8_t* keys, KvType type, int64_t head_dim, int64_t place, CodedRow& row) {
  for_bits(type, [&]<int kBits>() {
    for_key_codes<kBits>(keys, head_dim, place, [&](const uint8_t* tile, const CodePlace& at, int64_t d) {
      row.codes[d] = static_cast<int16_t>(code_at(tile, kBits, at));
    });
  });
  for (int64_t b = 0; b < ceil_div(head_dim, kBlockRows); ++b) {
    row.scales[b] = *key_scale(keys, type, head_dim, place, b);
  }
}

static inline void take_values(uint8_t* values, KvType type, int64_t head_dim, int64_t place, CodedRow& row) {
  for_bits(type, [&]<int kBits>() {
    for_value_codes<kBits>(values, head_dim, place, [&](const uint8_t* tile, const CodePlace& at, int64_t d) {
      row.codes[d] = static_cast<int16_t>(code_at(tile, kBits, at));
    });
  });
  for (int64_t b = 0; b < ceil_div(head_dim, kBlockRows); ++b) {
    row.scales[b] = *value_scale(values, type, head_dim, place, b);
  }
}

// code - zero as f32 (exact) for the 32 rows of one block: values[k][16].
template <class V, int kBits>
void dequantise_block(const uint8_t* block, typename V::F32 zero, float* values) {
  using Dot = typename V::template Dot<kBits>;
  for (int quad = 0; quad < 4; ++quad) {
    const auto first = Dot::first_half(block, quad);
    const auto second = Dot::second_half(block, quad);
    for (int j = 0; j < 4; ++j) {
      V::store(values + (quad * 4 + j) * kLanes, V::sub(V::codes_to_f32(first, j), zero));
      V::store(values + (16 + quad * 4 + j) * kLanes, V::sub(V::codes_to_f32(second, j), zero));
    }
  }
}

// Keys of a page as they were coded (rotated or not): [4][D][16] f32, with D dims.
template <class V, int kBits>
void decode_keys(const uint8_t* keys, int64_t head_dim, float* out) {
  const int64_t num_blocks = ceil_div(head_dim, kBlockRows);
  const auto* scales = reinterpret_cast<const uint16_t*>(keys + num_blocks * kKvTile * kBlockRows * kBits / 8);
  const auto zero = V::broadcast(zero_point(kBits));
  alignas(64) float block[kBlockRows * kLanes];
  for (int64_t i = 0; i < kKvTile / kLanes * num_blocks; ++i) {
    dequantise_block<V, kBits>(keys + i * 64 * kBits, zero, block);
    const auto scale = V::load_f16(scales + i * kLanes);
    const int64_t first = i % num_blocks * kBlockRows;
    const int64_t count = head_dim - first < kBlockRows ? head_dim - first : kBlockRows;
    float* target = out + (i / num_blocks * head_dim + first) * kLanes;
    for (int64_t d = 0; d < count; ++d) V::store(target + d * kLanes, V::mul(scale, V::load(block + d * kLanes)));
  }
}

// Values of a page as they were coded: [64][padded_dim] f32.
template <class V, int kBits>
void decode_values(const uint8_t* values, int64_t head_dim, int64_t padded_dim, float* out) {
  using Pairs = typename V::template Pairs<kBits>;
  const int64_t num_blocks = ceil_div(head_dim, kBlockRows);
  const auto* scales = reinterpret_cast<const uint16_t*>(values + num_blocks * kKvTile * kBlockRows * kBits / 8);
  const auto zero = V::broadcast(zero_point(kBits));
  float scale[kKvTile];
  for (int64_t d = 0; d < padded_dim; d += kLanes) {
    for (int64_t j = 0; j < kKvTile; j += kLanes) {
      V::store(scale + j, V::load_f16(scales + d / kBlockRows * kKvTile + j));
    }
    const uint8_t* tile = values + d / kLanes * (kKvTile / kBlockRows) * 64 * kBits;
    int64_t key = 0;
    for (int64_t half = 0; half < kKvTile / kBlockRows; ++half) {
      for (int line = 0; line < Pairs::kLines; ++line) {
        typename V::Words words[Pairs::kPerLine];
        Pairs::load(tile + half * 64 * kBits, line, words);
        for (int i = 0; i < Pairs::kPerLine; ++i) {
          for (int which = 0; which < 2; ++which, ++key) {
            const auto value = V::sub(V::word_to_f32(words[i], which), zero);
            V::store(out + key * padded_dim + d, V::mul(V::broadcast(scale[key]), value));
          }
        }
      }
    }
  }
}

}  // namespace ropewalk
