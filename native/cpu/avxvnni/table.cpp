// AVX2 with AVX-VNNI (Alder Lake and its successors, which have no AVX-512): products of bytes and of words that sum
// into 32 bits.  The sums are integers, so the results are the bits of "avx2".
#include "../avx2/verbs.inl.hpp"
#include "ropewalk/tables.hpp"

namespace ropewalk::avxvnni {
namespace {

struct Verbs : Avx2Verbs {
  // Dot products of unsigned codes with signed activations over one block of 32 rows.
  template <int kBits>
  struct Dot : BlockCodes<kBits> {
    using Sum = Codes;
    static Sum zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static Sum add(Sum sum, Codes codes, Quad x) {
      return {_mm256_dpbusd_avx_epi32(sum.low, codes.low, x), _mm256_dpbusd_avx_epi32(sum.high, codes.high, x)};
    }
    static Sum begin(int32_t start) { return {_mm256_set1_epi32(start), _mm256_set1_epi32(start)}; }
    static F32 end(Sum sum, int32_t) { return to_f32(sum); }
    static F32 to_f32(Sum sum) { return {_mm256_cvtepi32_ps(sum.low), _mm256_cvtepi32_ps(sum.high)}; }
  };

  static PairSum add_pair(PairSum sum, Words words, const int16_t* two) {
    int32_t both;
    __builtin_memcpy(&both, two, 4);
    const __m256i weights = _mm256_set1_epi32(both);
    return {_mm256_dpwssd_avx_epi32(sum.low, words.low, weights), _mm256_dpwssd_avx_epi32(sum.high, words.high, weights)};
  }
};

constexpr KernelTable kTable = make_table<Verbs>("avxvnni");

}  // namespace

const KernelTable& kernel_table() noexcept { return kTable; }

}  // namespace ropewalk::avxvnni
