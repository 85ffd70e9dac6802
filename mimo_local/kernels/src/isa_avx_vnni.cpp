// 256-bit tables for x86-64 CPUs with AVX-VNNI beside AVX2 (Alder Lake, Zen 5 and their servers): a dot product of bytes
// in one instruction. With MIMO_EMULATION that instruction is plain loops, so that tests can run it on any AVX2 CPU.
#include <cstdint>

#include "internal.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(MIMO_EMULATION)
#include "vnni_emulation.h"
#endif

// From here on, and only here, the compiler may use these instructions. No header may be included below this line
// except generic.inc, whose code lives in the unnamed namespace.
#if defined(__clang__) && defined(MIMO_EMULATION)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#elif defined(MIMO_EMULATION)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif

namespace mimo {
namespace {
namespace avx_vnni {

constexpr const char *kName = "avx_vnni";

#define MIMO_AVX_VNNI
#if defined(MIMO_EMULATION)
MIMO_EMULATED_DOT_BYTES
#else
// sum + products of four unsigned and signed bytes in each int32 lane.
__m256i dot_bytes(__m256i sum, __m256i u, __m256i s) noexcept { return _mm256_dpbusd_avx_epi32(sum, u, s); }
// sum + products of two signed 16-bit numbers in each int32 lane. Written out because gcc 12 copies the sum before and
// after the intrinsic.
MIMO_INLINE __m256i dot_words(__m256i sum, __m256i a, __m256i b) noexcept {
  __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
}
#endif

#include "ops_avx2.inc"
#define MIMO_BYTES "bytes_avx2.inc"
#define MIMO_DOT "dot_avx2.inc"
#define MIMO_PANELS "panels_avx2.inc"
#include "generic.inc"

}  // namespace avx_vnni
}  // namespace

const mimo_table *avx_vnni_table() noexcept { return &avx_vnni::kTable; }

}  // namespace mimo

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace mimo {
const mimo_table *avx_vnni_table() noexcept { return nullptr; }
}  // namespace mimo

#endif
