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

struct F {
  __m256 a;  // lanes 0..7
  __m256 b;  // lanes 8..15
};
struct I {
  __m256i a;
  __m256i b;
};

float half_to_float(std::uint16_t h) noexcept { return _cvtsh_ss(h); }
std::uint16_t float_to_half(float value) noexcept {
  return static_cast<std::uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
}

F zero() noexcept { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
F splat(float s) noexcept { return {_mm256_set1_ps(s), _mm256_set1_ps(s)}; }
F load(const float *p) noexcept { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
void store(float *p, F x) noexcept {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
F mul(F x, F y) noexcept { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
F fma(F x, F y, F z) noexcept { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
float reduce(F x) noexcept {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
F clamp(F x, float limit) noexcept {
  const __m256 high = _mm256_set1_ps(limit);
  const __m256 low = _mm256_set1_ps(-limit);
  return {_mm256_min_ps(_mm256_max_ps(x.a, low), high), _mm256_min_ps(_mm256_max_ps(x.b, low), high)};
}
F round_even(F x) noexcept {
  return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

__m128i load8(const void *p) noexcept { return _mm_loadl_epi64(static_cast<const __m128i *>(p)); }
__m128i load16(const void *p) noexcept { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }

F widen_int8(const std::int8_t *p) noexcept {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load8(p))), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load8(p + 8)))};
}
F widen_bf16(const std::uint16_t *p) noexcept {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p + 8)), 16))};
}
// 16 int32 to 16 int16 in order.
__m256i narrow(__m256i a, __m256i b) noexcept { return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xD8); }
void store_int8(std::int8_t *p, F x) noexcept {
  const __m256i words = narrow(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i *>(p), bytes);
}

I magnitude_bits(F x) noexcept {
  const __m256i mask = _mm256_set1_epi32(0x7FFFFFFF);
  return {_mm256_and_si256(_mm256_castps_si256(x.a), mask), _mm256_and_si256(_mm256_castps_si256(x.b), mask)};
}
I max(I x, I y) noexcept { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
std::int32_t reduce_max(I x) noexcept {
  const __m256i eight = _mm256_max_epi32(x.a, x.b);
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
}

// A 16-entry table is two registers: permutevar looks at the low three bits of an index, bit 3 picks the register.
struct Nf4Values {
  __m256 low;
  __m256 high;
};
Nf4Values nf4_values() noexcept { return {_mm256_loadu_ps(kNf4), _mm256_loadu_ps(kNf4 + 8)}; }
// `bit3` holds bit 3 of each index as its sign bit.
__m256 look_up(Nf4Values values, __m256i index, __m256i bit3) noexcept {
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(values.low, index), _mm256_permutevar8x32_ps(values.high, index),
                          _mm256_castsi256_ps(bit3));
}
void nf4_unpack(Nf4Values values, const std::uint8_t *p, F &even, F &odd) noexcept {
  const __m256i a = _mm256_cvtepu8_epi32(load8(p));
  const __m256i b = _mm256_cvtepu8_epi32(load8(p + 8));
  even.a = look_up(values, _mm256_srli_epi32(a, 4), _mm256_slli_epi32(a, 24));
  even.b = look_up(values, _mm256_srli_epi32(b, 4), _mm256_slli_epi32(b, 24));
  odd.a = look_up(values, a, _mm256_slli_epi32(a, 28));
  odd.b = look_up(values, b, _mm256_slli_epi32(b, 28));
}
void store_pairs(float *p, __m256 even, __m256 odd) noexcept {
  const __m256 low = _mm256_unpacklo_ps(even, odd);
  const __m256 high = _mm256_unpackhi_ps(even, odd);
  _mm256_storeu_ps(p, _mm256_permute2f128_ps(low, high, 0x20));
  _mm256_storeu_ps(p + 8, _mm256_permute2f128_ps(low, high, 0x31));
}
void store_interleaved(float *p, F even, F odd) noexcept {
  store_pairs(p, even.a, odd.a);
  store_pairs(p + 16, even.b, odd.b);
}

// Binary search over the 15 midpoints: level k's table is indexed by the k bits found so far.
struct Nf4Search {
  Nf4Values values;
  __m256 level0;
  __m256 level1;
  __m256 level2;
  __m256 level3;
};
constexpr float midpoint(int code) noexcept { return 0.5F * (kNf4[code] + kNf4[code + 1]); }
Nf4Search nf4_search() noexcept {
  return {nf4_values(), _mm256_set1_ps(midpoint(7)), _mm256_setr_ps(midpoint(3), midpoint(11), 0, 0, 0, 0, 0, 0),
          _mm256_setr_ps(midpoint(1), midpoint(5), midpoint(9), midpoint(13), 0, 0, 0, 0),
          _mm256_setr_ps(midpoint(0), midpoint(2), midpoint(4), midpoint(6), midpoint(8), midpoint(10), midpoint(12),
                         midpoint(14))};
}
__m256i search_step(__m256i code, __m256 x, __m256 level) noexcept {
  const __m256 above = _mm256_cmp_ps(x, _mm256_permutevar8x32_ps(level, code), _CMP_GT_OQ);
  return _mm256_sub_epi32(_mm256_add_epi32(code, code), _mm256_castps_si256(above));
}
__m256i nearest(const Nf4Search &search, __m256 x) noexcept {
  __m256i code = _mm256_srli_epi32(_mm256_castps_si256(_mm256_cmp_ps(x, search.level0, _CMP_GT_OQ)), 31);
  code = search_step(code, x, search.level1);
  code = search_step(code, x, search.level2);
  return search_step(code, x, search.level3);
}
I nf4_nearest(const Nf4Search &search, F x) noexcept { return {nearest(search, x.a), nearest(search, x.b)}; }
F nf4_value(const Nf4Search &search, I code) noexcept {
  return {look_up(search.values, code.a, _mm256_slli_epi32(code.a, 28)),
          look_up(search.values, code.b, _mm256_slli_epi32(code.b, 28))};
}
void store_nibbles(std::uint8_t *p, const I code[4]) noexcept {
  const __m256i weights = _mm256_set1_epi32(0x00010010);  // even * 16 + odd
  __m256i bytes[4];
  for (int i = 0; i < 4; ++i) bytes[i] = _mm256_madd_epi16(narrow(code[i].a, code[i].b), weights);
  const __m256i packed =
      _mm256_packus_epi16(_mm256_packs_epi32(bytes[0], bytes[1]), _mm256_packs_epi32(bytes[2], bytes[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm256_permutevar8x32_epi32(packed, order));
}

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
