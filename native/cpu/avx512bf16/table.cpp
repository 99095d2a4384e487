// AVX-512 with VNNI and BF16 (Zen 4, Sapphire Rapids): attention over float16 keys and values in products of pairs.
#include "../avx512/verbs.inl.hpp"
#include "ropewalk/tables.hpp"

namespace ropewalk::avx512bf16 {
namespace {

struct Verbs : Avx512Verbs {
  static constexpr bool kBf16Pairs = true;

  using Bf16Pairs = __m512i;  // 16 lanes of two bf16
  static Bf16Pairs load_pairs(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static void store_pairs(uint32_t* p, Bf16Pairs a) { _mm512_storeu_si512(p, a); }
  // Rounded to nearest even; the lower half of a lane from `low`.
  static Bf16Pairs round_pairs(F32 low, F32 high) {
    const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(interleaved, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
  }
  static void store_bf16(uint16_t* p, F32 v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
  }
  static Bf16Pairs broadcast_pair(const uint16_t* p) {
    int32_t both;
    __builtin_memcpy(&both, p, 4);
    return _mm512_set1_epi32(both);
  }
  static Bf16Pairs keep_low(Bf16Pairs a) { return _mm512_and_si512(a, _mm512_set1_epi32(0xffff)); }
  static Bf16Pairs keep_high(Bf16Pairs a) { return _mm512_andnot_si512(_mm512_set1_epi32(0xffff), a); }
  // sum + a.low * b.low + a.high * b.high in every lane.
  static F32 add_products(F32 sum, Bf16Pairs a, Bf16Pairs b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};

constexpr KernelTable kTable = make_table<Verbs>("avx512bf16");

}  // namespace

const KernelTable& kernel_table() noexcept { return kTable; }

}  // namespace ropewalk::avx512bf16
