// 512-bit tables for x86-64 CPUs with AVX-512 F, BW, DQ and VL (and AVX2, FMA, F16C): one register is the 16 lanes.
// With MIMO_AVX512_EMULATION the same text is compiled against plain loops, so that tests can run it on any CPU.
#include <cstdint>

#include "internal.h"

#if defined(MIMO_AVX512_EMULATION)
#include "avx512_emulation.h"
#elif defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// gcc 12's own header passes deliberately undefined registers and is warned about for it (gcc bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

#if defined(MIMO_AVX512_EMULATION) || defined(__x86_64__)

// From here on, and only here, the compiler may use these instructions. No header may be included below this line
// except generic.inc, whose code lives in the unnamed namespace.
#if defined(MIMO_AVX512_EMULATION)
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace mimo {
namespace {
namespace avx512 {

constexpr const char *kName = "avx512";

struct F {
  __m512 v;
};
struct I {
  __m512i v;
};

float half_to_float(std::uint16_t h) noexcept { return _cvtsh_ss(h); }
std::uint16_t float_to_half(float value) noexcept {
  return static_cast<std::uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
}

F zero() noexcept { return {_mm512_setzero_ps()}; }
F splat(float s) noexcept { return {_mm512_set1_ps(s)}; }
F load(const float *p) noexcept { return {_mm512_loadu_ps(p)}; }
void store(float *p, F x) noexcept { _mm512_storeu_ps(p, x.v); }
F mul(F x, F y) noexcept { return {_mm512_mul_ps(x.v, y.v)}; }
F fma(F x, F y, F z) noexcept { return {_mm512_fmadd_ps(x.v, y.v, z.v)}; }
float reduce(F x) noexcept {
  __m512 s = _mm512_add_ps(x.v, _mm512_shuffle_f32x4(x.v, x.v, 0x4E));
  s = _mm512_add_ps(s, _mm512_shuffle_f32x4(s, s, 0xB1));
  s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4E));
  return _mm512_cvtss_f32(_mm512_add_ps(s, _mm512_permute_ps(s, 0xB1)));
}
F clamp(F x, float limit) noexcept {
  return {_mm512_min_ps(_mm512_max_ps(x.v, _mm512_set1_ps(-limit)), _mm512_set1_ps(limit))};
}
F round_even(F x) noexcept { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

__m512i load_bytes(const std::uint8_t *p) noexcept {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
F widen_int8(const std::int8_t *p) noexcept {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))))};
}
F widen_bf16(const std::uint16_t *p) noexcept {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16))};
}
void store_int8(std::int8_t *p, F x) noexcept {
  _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v)));
}

I magnitude_bits(F x) noexcept { return {_mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7FFFFFFF))}; }
I max(I x, I y) noexcept { return {_mm512_max_epi32(x.v, y.v)}; }
std::int32_t reduce_max(I x) noexcept { return _mm512_reduce_max_epi32(x.v); }

// permutexvar looks at the low four bits of an index only: the low nibble needs no mask.
struct Nf4Values {
  __m512 v;
};
Nf4Values nf4_values() noexcept { return {_mm512_loadu_ps(kNf4)}; }
void nf4_unpack(Nf4Values values, const std::uint8_t *p, F &even, F &odd) noexcept {
  const __m512i bytes = load_bytes(p);
  even.v = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), values.v);
  odd.v = _mm512_permutexvar_ps(bytes, values.v);
}
void store_interleaved(float *p, F even, F odd) noexcept {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  _mm512_storeu_ps(p, _mm512_permutex2var_ps(even.v, low, odd.v));
  _mm512_storeu_ps(p + 16, _mm512_permutex2var_ps(even.v, high, odd.v));
}

// Binary search over the 15 midpoints: level k's table is indexed by the k bits found so far.
struct Nf4Search {
  __m512 values;
  __m512 level0;
  __m512 level1;
  __m512 level2;
  __m512 level3;
};
constexpr float midpoint(int code) noexcept { return 0.5F * (kNf4[code] + kNf4[code + 1]); }
constexpr float kLevel1[16] = {midpoint(3), midpoint(11)};
constexpr float kLevel2[16] = {midpoint(1), midpoint(5), midpoint(9), midpoint(13)};
constexpr float kLevel3[16] = {midpoint(0), midpoint(2),  midpoint(4),  midpoint(6),
                               midpoint(8), midpoint(10), midpoint(12), midpoint(14)};
Nf4Search nf4_search() noexcept {
  return {_mm512_loadu_ps(kNf4), _mm512_set1_ps(midpoint(7)), _mm512_loadu_ps(kLevel1), _mm512_loadu_ps(kLevel2),
          _mm512_loadu_ps(kLevel3)};
}
__m512i search_step(__m512i code, __m512 x, __m512 level) noexcept {
  const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(code, level), _CMP_GT_OQ);
  const __m512i twice = _mm512_add_epi32(code, code);
  return _mm512_mask_add_epi32(twice, above, twice, _mm512_set1_epi32(1));
}
I nf4_nearest(const Nf4Search &search, F x) noexcept {
  __m512i code = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(x.v, search.level0, _CMP_GT_OQ), 1);
  code = search_step(code, x.v, search.level1);
  code = search_step(code, x.v, search.level2);
  return {search_step(code, x.v, search.level3)};
}
F nf4_value(const Nf4Search &search, I code) noexcept { return {_mm512_permutexvar_ps(code.v, search.values)}; }
// Codes are int32, so a 64-bit lane holds an even column and the odd one after it.
void store_nibbles(std::uint8_t *p, const I code[4]) noexcept {
  for (int i = 0; i < 4; ++i) {
    const __m512i pair = _mm512_or_si512(_mm512_slli_epi64(code[i].v, 4), _mm512_srli_epi64(code[i].v, 32));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(p + 8 * i), _mm512_cvtepi64_epi8(pair));
  }
}

#include "generic.inc"

}  // namespace avx512
}  // namespace

const mimo_table *avx512_table() noexcept { return &avx512::kTable; }

}  // namespace mimo

#if defined(MIMO_AVX512_EMULATION)
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
