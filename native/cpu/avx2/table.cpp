// AVX2 with FMA and F16C: see verbs.inl.hpp.
#include "ropewalk/tables.hpp"
#include "verbs.inl.hpp"

namespace ropewalk::avx2 {
namespace {

struct Verbs : Avx2Verbs {
  // Dot products of unsigned codes with signed activations over one block of 32 rows, by maddubs, whose 16-bit sums of two
  // products saturate.
  template <int kBits>
  struct Dot : BlockCodes<kBits> {
    using Sum = Codes;
    static Sum zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static __m256i add_half(__m256i sum, __m256i codes, __m256i x) {
      // Up to 15: the 16-bit sums of a block reach at most 8 * 2 * 15 * 128 = 30720, so they are widened once.
      if constexpr (kBits <= 4) return added_now(_mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x)));
      // Up to 63: a pair of products is at most 2 * 63 * 128, and two of them would overflow.
      if constexpr (kBits == 6) return added_now(_mm256_add_epi32(sum, pair_sums(_mm256_maddubs_epi16(codes, x))));
      // Up to 255: a pair would saturate (2 * 255 * 128 > 32767), so the top bit goes separately.
      if constexpr (kBits == 8) {
        const __m256i low = _mm256_and_si256(codes, _mm256_set1_epi8(0x7f));
        const __m256i top = _mm256_and_si256(_mm256_srli_epi16(codes, 7), _mm256_set1_epi8(1));
        const __m256i top_products = _mm256_madd_epi16(_mm256_maddubs_epi16(top, x), _mm256_set1_epi16(128));
        return added_now(
            _mm256_add_epi32(sum, _mm256_add_epi32(pair_sums(_mm256_maddubs_epi16(low, x)), top_products)));
      }
    }
    static Sum add(Sum sum, Codes codes, Quad x) {
      return {add_half(sum.low, codes.low, x), add_half(sum.high, codes.high, x)};
    }
    static __m256i widened(__m256i sum) { return kBits <= 4 ? pair_sums(sum) : sum; }
    static F32 to_f32(Sum sum) { return {_mm256_cvtepi32_ps(widened(sum.low)), _mm256_cvtepi32_ps(widened(sum.high))}; }
    // Sums of 16 bits have no room for a start: it is added at the end.
    static Sum begin(int32_t) { return zero(); }
    static __m256 half_end(__m256i sum, int32_t start) {
      return _mm256_cvtepi32_ps(_mm256_add_epi32(widened(sum), _mm256_set1_epi32(start)));
    }
    static F32 end(Sum sum, int32_t start) { return {half_end(sum.low, start), half_end(sum.high, start)}; }
  };
};

constexpr KernelTable kTable = make_table<Verbs>("avx2");

}  // namespace

const KernelTable& kernel_table() noexcept { return kTable; }

}  // namespace ropewalk::avx2
