// 256-bit tables for x86-64 CPUs with AVX2, FMA and F16C (2013 on). The 16 lanes are two registers.
#include <cstdint>

#include "internal.h"

#if defined(__x86_64__)
#include <immintrin.h>

// From here on, and only here, the compiler may use these instructions. No header may be included below this line
// except generic.inc, whose code lives in the unnamed namespace.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace mimo {
namespace {
namespace avx2 {

constexpr const char *kName = "avx2";

#include "ops_avx2.inc"
#define MIMO_BYTES "bytes_avx2.inc"
#define MIMO_DOT "dot_avx2.inc"
#define MIMO_PANELS "panels_avx2.inc"
#include "generic.inc"

}  // namespace avx2
}  // namespace

const mimo_table *avx2_table() noexcept { return &avx2::kTable; }

}  // namespace mimo

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace mimo {
const mimo_table *avx2_table() noexcept { return nullptr; }
}  // namespace mimo

#endif
