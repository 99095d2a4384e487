// Vector verbs for AVX2 with FMA and F16C: two ymm registers are one row of 16 lanes.  Products of codes with activations
// (Dot) are not among them: they are what the tables that share these verbs differ in.
#pragma once

#include <immintrin.h>

#include "../generic/table.inl.hpp"

namespace ropewalk {
namespace {

struct Avx2Verbs {
  struct F32 {
    __m256 low, high;
  };
  static constexpr int kInt8Rows = 3;
  static constexpr int kInt8Tiles = 1;
  static constexpr int kExactRows = 1;
  static constexpr int kExactTiles = 1;
  static constexpr int kLowRankRows = 2;
  static constexpr int kLowRankTiles = 2;
  static constexpr int kDenseRows = 1;
  static constexpr int kAttendRows = 2;
  static constexpr int kCodeRows = 2;
  static constexpr bool kBf16Pairs = false;

  static F32 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F32 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F32 v) {
    _mm256_storeu_ps(p, v.low);
    _mm256_storeu_ps(p + 8, v.high);
  }
  // All-ones in the lanes i < n of the eight lanes from `first`.
  static __m256i lane_mask(int64_t n, int first) {
    const __m256i lanes = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(first));
    const int32_t limit = static_cast<int32_t>(n < 0 ? 0 : n > 16 ? 16 : n);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(limit), lanes);
  }
  static F32 load_partial(const float* p, int64_t n) {
    if (n >= 16) return load(p);
    return {_mm256_maskload_ps(p, lane_mask(n, 0)), _mm256_maskload_ps(p + 8, lane_mask(n, 8))};
  }
  static void store_partial(float* p, F32 v, int64_t n) {
    if (n >= 16) return store(p, v);
    _mm256_maskstore_ps(p, lane_mask(n, 0), v.low);
    _mm256_maskstore_ps(p + 8, lane_mask(n, 8), v.high);
  }
  static F32 load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
  }
  static void store_f16(uint16_t* p, F32 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(v.high, _MM_FROUND_TO_NEAREST_INT));
  }
  static __m256 widen_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static F32 load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
  static __m256 widen_u8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static F32 load_u8(const uint8_t* p) { return {widen_u8(p), widen_u8(p + 8)}; }
  static __m256 widen_i8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static F32 load_i8(const int8_t* p) { return {widen_i8(p), widen_i8(p + 8)}; }
  static __m256 gather_half(const float* base, const int32_t* index) {
    const __m256i i = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
    const __m256i used = _mm256_cmpgt_epi32(i, _mm256_set1_epi32(-1));
    return _mm256_mask_i32gather_ps(_mm256_setzero_ps(), base, i, _mm256_castsi256_ps(used), 4);
  }
  static F32 gather_or_zero(const float* base, const int32_t* index) {
    return {gather_half(base, index), gather_half(base, index + 8)};
  }
  static F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  static F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
  static F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
  static F32 div(F32 a, F32 b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
  static F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
  static F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
  static F32 abs(F32 a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
  }
  static F32 fma(F32 a, F32 b, F32 c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  static F32 fnma(F32 a, F32 b, F32 c) {
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
  }
  static __m256 round_half(__m256 a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F32 round(F32 a) { return {round_half(a.low), round_half(a.high)}; }
  static __m256 pow2(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  }
  // For |n| <= 126.
  static F32 mul_pow2(F32 a, F32 n) {
    return {_mm256_mul_ps(a.low, pow2(n.low)), _mm256_mul_ps(a.high, pow2(n.high))};
  }
  static float sqrt(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }
  static float first(F32 a) { return _mm256_cvtss_f32(a.low); }
  static float reduce_add(F32 a) {
    const __m256 half = _mm256_add_ps(a.low, a.high);
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
  }
  static float reduce_max(F32 a) {
    const __m256 half = _mm256_max_ps(a.low, a.high);
    const __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 pair = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_max_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
  }
  static __m256 select_half(__m256 a, __m256 b, int64_t begin, int64_t end, int first) {
    const __m256i use = _mm256_andnot_si256(lane_mask(begin, first), lane_mask(end, first));
    return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(use));
  }
  // Lanes begin <= i < end of `a`, the others of `b`.
  static F32 select_range(F32 a, F32 b, int64_t begin, int64_t end) {
    return {select_half(a.low, b.low, begin, end, 0), select_half(a.high, b.high, begin, end, 8)};
  }
  static void store_int8(int8_t* p, F32 v) {
    // packs works within 128-bit halves: put the four-lane runs back in order before and after narrowing.
    const __m256i words = _mm256_permute4x64_epi64(
        _mm256_packs_epi32(_mm256_cvtps_epi32(v.low), _mm256_cvtps_epi32(v.high)), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }
  static void store_int16(int16_t* p, F32 v) {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(v.low), _mm256_cvtps_epi32(v.high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(words, 0xd8));
  }
  template <int kBlend>
  static __m256 sum_or_difference(__m256 a, __m256 other) {
    return _mm256_blend_ps(_mm256_add_ps(a, other), _mm256_sub_ps(other, a), kBlend);
  }
  // (a, b) -> (a + b, a - b) for lanes kDistance apart.
  template <int kDistance>
  static F32 butterfly(F32 a) {
    if constexpr (kDistance == 8) return {_mm256_add_ps(a.low, a.high), _mm256_sub_ps(a.low, a.high)};
    const auto half = [](__m256 v) {
      if constexpr (kDistance == 1) return sum_or_difference<0xaa>(v, _mm256_permute_ps(v, 0xb1));
      if constexpr (kDistance == 2) return sum_or_difference<0xcc>(v, _mm256_permute_ps(v, 0x4e));
      return sum_or_difference<0xf0>(v, _mm256_permute2f128_ps(v, v, 1));
    };
    return {half(a.low), half(a.high)};
  }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
  static void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

  struct Codes {  // 16 lanes of 4 codes
    __m256i low, high;
  };
  static __m256 byte_to_f32(__m256i codes, int j) {
    const __m256i byte = _mm256_and_si256(_mm256_srli_epi32(codes, 8 * j), _mm256_set1_epi32(0xff));
    return _mm256_cvtepi32_ps(byte);
  }
  static F32 codes_to_f32(Codes codes, int j) { return {byte_to_f32(codes.low, j), byte_to_f32(codes.high, j)}; }
  static __m256i load_line(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  using Quad = __m256i;  // 4 activations in every lane
  static Quad broadcast_quad(const int8_t* values) {
    int32_t four;
    __builtin_memcpy(&four, values, 4);
    return _mm256_set1_epi32(four);
  }
  // Else GCC computes all products of a block first, keeps them in memory, and adds them at the end.
  static __m256i added_now(__m256i sum) {
    asm("" : "+x"(sum));
    return sum;
  }
  static __m256i pair_sums(__m256i words) { return _mm256_madd_epi16(words, _mm256_set1_epi16(1)); }

  // The codes of one block of 32 rows; the products with them differ (Dot of each table).
  template <int kBits>
  struct BlockCodes {
    // kWidth bits of every byte of half a line, from bit `from`, at bit `to`.
    template <int kWidth>
    static __m256i field(const uint8_t* half_line, int from, int to = 0) {
      const __m256i all = load_line(half_line);
      const __m256i moved = from == to  ? all
                            : from > to ? _mm256_srli_epi16(all, from - to)
                                        : _mm256_slli_epi16(all, to - from);
      return _mm256_and_si256(moved, _mm256_set1_epi8(static_cast<char>(((1 << kWidth) - 1) << to)));
    }
    // Of quad i in the order of a product: rows 4q.., 16 + 4q.., then the next q.  block: of the first or second half of
    // its lines.
    static __m256i half_of(const uint8_t* block, int i) {
      if constexpr (kBits == 2) return field<2>(block + i / 4 * 64, i % 4 * 2);
      if constexpr (kBits == 3) {
        if (i < 6) return field<3>(block + i / 2 * 64, i % 2 * 3);
        return _mm256_or_si256(field<2>(block + (i - 6) * 64, 6), field<1>(block + 2 * 64, i, 2));
      }
      if constexpr (kBits == 4) return field<4>(block + i / 2 * 64, i % 2 * 4);
      if constexpr (kBits == 6) {
        return _mm256_or_si256(field<4>(block + i / 2 * 64, i % 2 * 4), field<2>(block + (4 + i / 4) * 64, i % 4 * 2, 4));
      }
      if constexpr (kBits == 8) return load_line(block + (i / 2 + i % 2 * 4) * 64);
    }
    static Codes quad_of(const uint8_t* block, int i) { return {half_of(block, i), half_of(block + 32, i)}; }
    static Codes first_half(const uint8_t* block, int quad) { return quad_of(block, 2 * quad); }
    static Codes second_half(const uint8_t* block, int quad) { return quad_of(block, 2 * quad + 1); }
  };

  using Words = Codes;    // 16 lanes of 2 words: two keys of a value, or 32 weights
  using PairSum = Codes;
  static Words load_words(const int16_t* p) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(p);
    return {load_line(bytes), load_line(bytes + 32)};
  }
  static void store_words(int16_t* p, Words a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), a.high);
  }
  static Words mul_words(Words a, Words b) {
    return {_mm256_mulhrs_epi16(a.low, b.low), _mm256_mulhrs_epi16(a.high, b.high)};
  }
  static PairSum pair_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static PairSum add_pair(PairSum sum, Words words, const int16_t* two) {
    int32_t both;
    __builtin_memcpy(&both, two, 4);
    const __m256i weights = _mm256_set1_epi32(both);
    return {added_now(_mm256_add_epi32(sum.low, _mm256_madd_epi16(words.low, weights))),
            added_now(_mm256_add_epi32(sum.high, _mm256_madd_epi16(words.high, weights)))};
  }
  static PairSum add_sums(PairSum a, PairSum b) {
    return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
  }
  static F32 pair_to_f32(PairSum sum) { return {_mm256_cvtepi32_ps(sum.low), _mm256_cvtepi32_ps(sum.high)}; }
  static __m256 word_half(__m256i words, int which) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(which == 0 ? _mm256_slli_epi32(words, 16) : words, 16));
  }
  static F32 word_to_f32(Words words, int which) { return {word_half(words.low, which), word_half(words.high, which)}; }

  // Codes of 32 keys in 16 dims as pairs of neighbouring keys, kPerLine of them to a line.
  template <int kBits>
  struct Pairs {
    static constexpr int kPerLine = kBits == 8 ? 2 : 4;
    static constexpr int kLines = 16 / kPerLine;
    static __m256i low_bits(__m256i words, int mask) {
      return _mm256_and_si256(words, _mm256_set1_epi16(static_cast<short>(mask)));
    }
    static __m256i low_codes(const uint8_t* line, int i) {
      if constexpr (kBits == 8) return i == 0 ? low_bits(load_line(line), 0xff) : _mm256_srli_epi16(load_line(line), 8);
      return low_bits(_mm256_srli_epi16(load_line(line), 4 * i), 0x0f);
    }
    // Of 6 bits: the upper bits of the pairs of two lines, 2 bits each.
    static __m256i upper_codes(const uint8_t* line, int field) {
      const __m256i plane = load_line(line);
      const __m256i shifted =
          field < 2 ? _mm256_slli_epi16(plane, 4 - 2 * field) : _mm256_srli_epi16(plane, 2 * field - 4);
      return low_bits(shifted, 0x30);
    }
    static __m256i codes(const uint8_t* block, int index, int i, int byte) {
      const __m256i low = low_codes(block + index * 64 + byte, i);
      if constexpr (kBits != 6) return low;
      return _mm256_or_si256(low, upper_codes(block + (4 + index / 2) * 64 + byte, index % 2 * 4 + i));
    }
    static void load(const uint8_t* block, int index, Words (&words)[kPerLine]) {
      for (int i = 0; i < kPerLine; ++i) words[i] = {codes(block, index, i, 0), codes(block, index, i, 32)};
    }
  };
};

}  // namespace
}  // namespace ropewalk
