// All kernel tables, one per instruction set.  Each is in a file compiled with its own flags.  Calling a kernel that
// the machine does not support is undefined; asking for its table is not.
#pragma once

#include "ropewalk/kernels.hpp"

#if defined(__x86_64__) || defined(_M_X64)
#define ROPEWALK_X86_64 1
#else
#define ROPEWALK_X86_64 0
#endif

namespace ropewalk::scalar {
const KernelTable& kernel_table() noexcept;
}

#if ROPEWALK_X86_64
namespace ropewalk::avx2 {
const KernelTable& kernel_table() noexcept;
}
namespace ropewalk::avxvnni {
const KernelTable& kernel_table() noexcept;
}
namespace ropewalk::avx512bf16 {
const KernelTable& kernel_table() noexcept;
}
namespace ropewalk::avx512 {
const KernelTable& kernel_table() noexcept;
}
#endif
