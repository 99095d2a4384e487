// Vector verbs for AVX-512 (F, BW, DQ, VL, VNNI): one zmm register is one row of 16 lanes.
#pragma once

#include <immintrin.h>

#include "../generic/table.inl.hpp"

namespace ropewalk {
namespace {

struct Avx512Verbs {
  using F32 = __m512;
  static constexpr int kInt8Rows = 6;
  static constexpr int kInt8Tiles = 2;
  static constexpr int kExactRows = 2;
  static constexpr int kExactTiles = 2;
  static constexpr int kLowRankRows = 4;
  static constexpr int kLowRankTiles = 4;
  static constexpr int kDenseRows = 4;
  static constexpr int kAttendRows = 8;
  static constexpr int kCodeRows = 8;
  static constexpr bool kBf16Pairs = false;

  static F32 zero() { return _mm512_setzero_ps(); }
  static F32 broadcast(float x) { return _mm512_set1_ps(x); }
  static F32 load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
  static __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u); }
  static F32 load_partial(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
  static void store_partial(float* p, F32 v, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
  static F32 load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store_f16(uint16_t* p, F32 v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static F32 load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static F32 load_u8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static F32 load_i8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static F32 gather_or_zero(const float* base, const int32_t* index) {
    const __m512i i = _mm512_loadu_si512(index);
    const __mmask16 used = _mm512_cmpge_epi32_mask(i, _mm512_setzero_si512());
    return _mm512_mask_i32gather_ps(zero(), used, i, base, 4);
  }
  static F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
  static F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
  static F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
  static F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
  static F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
  static F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
  static F32 abs(F32 a) { return _mm512_abs_ps(a); }
  static F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
  static F32 fnma(F32 a, F32 b, F32 c) { return _mm512_fnmadd_ps(a, b, c); }
  static F32 round(F32 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F32 mul_pow2(F32 a, F32 n) { return _mm512_scalef_ps(a, n); }
  static float sqrt(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }
  static float first(F32 a) { return _mm512_cvtss_f32(a); }
  static float reduce_add(F32 a) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
  }
  static float reduce_max(F32 a) { return _mm512_reduce_max_ps(a); }
  // Lanes begin <= i < end of `a`, the others of `b`.
  static F32 select_range(F32 a, F32 b, int64_t begin, int64_t end) {
    const __mmask16 upper = end <= 0 ? 0 : first_lanes(end);
    const __mmask16 lower = begin <= 0 ? 0 : first_lanes(begin);
    return _mm512_mask_blend_ps(static_cast<__mmask16>(upper & ~lower), b, a);
  }
  static void store_int8(int8_t* p, F32 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
  }
  static void store_int16(int16_t* p, F32 v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v)));
  }
  // (a, b) -> (a + b, a - b) for lanes kDistance apart.
  template <int kDistance>
  static F32 butterfly(F32 a) {
    const auto with = [a](F32 other, __mmask16 upper) {
      return _mm512_mask_sub_ps(_mm512_add_ps(a, other), upper, other, a);
    };
    if constexpr (kDistance == 1) return with(_mm512_permute_ps(a, 0xb1), 0xaaaa);
    if constexpr (kDistance == 2) return with(_mm512_permute_ps(a, 0x4e), 0xcccc);
    if constexpr (kDistance == 4) return with(_mm512_shuffle_f32x4(a, a, 0xb1), 0xf0f0);
    return with(_mm512_shuffle_f32x4(a, a, 0x4e), 0xff00);
  }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
  static void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

  using Codes = __m512i;  // 16 lanes of 4 codes
  using Quad = __m512i;   // 4 activations in every lane
  static Quad broadcast_quad(const int8_t* values) {
    int32_t four;
    __builtin_memcpy(&four, values, 4);
    return _mm512_set1_epi32(four);
  }
  static F32 codes_to_f32(Codes codes, int j) {
    const __m512i byte = _mm512_and_si512(_mm512_srli_epi32(codes, static_cast<unsigned>(8 * j)), _mm512_set1_epi32(0xff));
    return _mm512_cvtepi32_ps(byte);
  }

  // Dot products of unsigned codes with signed activations over one block of 32 rows.
  template <int kBits>
  struct Dot {
    using Sum = __m512i;
    static Sum zero() { return _mm512_setzero_si512(); }
    static Sum begin(int32_t start) { return _mm512_set1_epi32(start); }
    // kWidth bits of every byte of a line, from bit `from`, at bit `to`; what stands there besides is `below`.
    template <int kWidth>
    static Codes field(const uint8_t* line, int from, int to = 0, Codes below = _mm512_setzero_si512()) {
      Codes all = _mm512_loadu_si512(line);
      // GCC would read the line anew for each of its four quads: then loads bind, and a row from L2 takes a tenth longer.
      // (With 4 bits six rows would take as much longer without a read for each.)
      if constexpr (kBits == 2) asm("" : "+v"(all));
      const Codes moved = from == to  ? all
                          : from > to ? _mm512_srli_epi16(all, static_cast<unsigned>(from - to))
                                      : _mm512_slli_epi16(all, static_cast<unsigned>(to - from));
      const Codes mask = _mm512_set1_epi8(static_cast<char>(((1 << kWidth) - 1) << to));
      if (to == 0) return _mm512_and_si512(moved, mask);
      constexpr int kBelowOrBoth = 0xf8;  // below | (moved & mask)
      return _mm512_ternarylogic_epi32(below, moved, mask, kBelowOrBoth);
    }
    // Quads in the order of a product: rows 4q.., 16 + 4q.., then the next q.
    static Codes quad_of(const uint8_t* block, int i) {
      if constexpr (kBits == 2) return field<2>(block + i / 4 * 64, i % 4 * 2);
      if constexpr (kBits == 3) {
        if (i < 6) return field<3>(block + i / 2 * 64, i % 2 * 3);
        return field<1>(block + 2 * 64, i, 2, field<2>(block + (i - 6) * 64, 6));
      }
      if constexpr (kBits == 4) return field<4>(block + i / 2 * 64, i % 2 * 4);
      if constexpr (kBits == 6) {
        return field<2>(block + (4 + i / 4) * 64, i % 4 * 2, 4, field<4>(block + i / 2 * 64, i % 2 * 4));
      }
      if constexpr (kBits == 8) return _mm512_loadu_si512(block + (i / 2 + i % 2 * 4) * 64);
    }
    static Codes first_half(const uint8_t* block, int quad) { return quad_of(block, 2 * quad); }
    static Codes second_half(const uint8_t* block, int quad) { return quad_of(block, 2 * quad + 1); }
    static Sum add(Sum sum, Codes codes, Quad values) { return _mm512_dpbusd_epi32(sum, codes, values); }
    static F32 to_f32(Sum sum) { return _mm512_cvtepi32_ps(sum); }
    static F32 end(Sum sum, int32_t) { return to_f32(sum); }
  };

  using Words = __m512i;    // 16 lanes of 2 words: two keys of a value, or 32 weights
  using PairSum = __m512i;
  static Words load_words(const int16_t* p) { return _mm512_loadu_si512(p); }
  static void store_words(int16_t* p, Words a) { _mm512_storeu_si512(p, a); }
  static Words mul_words(Words a, Words b) { return _mm512_mulhrs_epi16(a, b); }
  static PairSum pair_zero() { return _mm512_setzero_si512(); }
  static PairSum add_pair(PairSum sum, Words words, const int16_t* two) {
    int32_t both;
    __builtin_memcpy(&both, two, 4);
    return _mm512_dpwssd_epi32(sum, words, _mm512_set1_epi32(both));
  }
  static PairSum add_sums(PairSum a, PairSum b) { return _mm512_add_epi32(a, b); }
  static F32 pair_to_f32(PairSum sum) { return _mm512_cvtepi32_ps(sum); }
  static F32 word_to_f32(Words words, int which) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(which == 0 ? _mm512_slli_epi32(words, 16) : words, 16));
  }

  // Codes of 32 keys in 16 dims as pairs of neighbouring keys, kPerLine of them to a line.
  template <int kBits>
  struct Pairs {
    static constexpr int kPerLine = kBits == 8 ? 2 : 4;
    static constexpr int kLines = 16 / kPerLine;
    static __m512i line(const uint8_t* block, int index) { return _mm512_loadu_si512(block + index * 64); }
    static Words low_bits(Words words, int mask) {
      return _mm512_and_si512(words, _mm512_set1_epi16(static_cast<short>(mask)));
    }
    static void load(const uint8_t* block, int index, Words (&words)[kPerLine]) {
      const Words all = line(block, index);
      if constexpr (kBits == 8) {
        words[0] = low_bits(all, 0xff);
        words[1] = _mm512_srli_epi16(all, 8);
        return;
      } else {
        words[0] = low_bits(all, 0x0f);
        words[1] = low_bits(_mm512_srli_epi16(all, 4), 0x0f);
        words[2] = low_bits(_mm512_srli_epi16(all, 8), 0x0f);
        words[3] = _mm512_srli_epi16(all, 12);
      }
      if constexpr (kBits == 6) {  // the upper bits of the pairs of two lines, 2 bits each
        Words upper = line(block, 4 + index / 2);
        if (index % 2 == 1) upper = _mm512_srli_epi16(upper, 8);
        words[0] = _mm512_or_si512(words[0], low_bits(_mm512_slli_epi16(upper, 4), 0x30));
        words[1] = _mm512_or_si512(words[1], low_bits(_mm512_slli_epi16(upper, 2), 0x30));
        words[2] = _mm512_or_si512(words[2], low_bits(upper, 0x30));
        words[3] = _mm512_or_si512(words[3], low_bits(_mm512_srli_epi16(upper, 2), 0x30));
      }
    }
  };
};

}  // namespace
}  // namespace ropewalk
