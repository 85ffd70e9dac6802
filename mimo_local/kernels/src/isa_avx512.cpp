// 512-bit tables for x86-64 CPUs with AVX-512 F, BW, DQ, VL and VNNI (and AVX2, FMA, F16C): one register is the 16
// lanes.
// With MIMO_EMULATION the same text is compiled against plain loops, so that tests can run it on any CPU.
#include <cstdint>

#include "internal.h"

#if defined(MIMO_EMULATION)
#include "avx512_emulation.h"
#elif defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// gcc 12's own header passes deliberately undefined registers and is warned about for it (gcc bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

#if defined(MIMO_EMULATION) || defined(__x86_64__)

// From here on, and only here, the compiler may use these instructions. No header may be included below this line
// except generic.inc, whose code lives in the unnamed namespace.
#if defined(MIMO_EMULATION)
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#endif

namespace mimo {
namespace {
namespace avx512 {

constexpr const char *kName = "avx512";

#include "ops_avx512.inc"
#define MIMO_BYTES "bytes_avx512.inc"
#define MIMO_DOT "dot_avx512.inc"
#define MIMO_PANELS "panels_avx512.inc"
#include "generic.inc"

}  // namespace avx512
}  // namespace

const mimo_table *avx512_table() noexcept { return &avx512::kTable; }

}  // namespace mimo

#if defined(MIMO_EMULATION)
#elif defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace mimo {
const mimo_table *avx512_table() noexcept { return nullptr; }
}  // namespace mimo

#endif
