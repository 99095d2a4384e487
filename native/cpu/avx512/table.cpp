// AVX-512 with VNNI: see verbs.inl.hpp.
#include "ropewalk/tables.hpp"
#include "verbs.inl.hpp"

namespace ropewalk::avx512 {
namespace {

constexpr KernelTable kTable = make_table<Avx512Verbs>("avx512");

}  // namespace

const KernelTable& kernel_table() noexcept { return kTable; }

}  // namespace ropewalk::avx512
