// The intrinsics isa_avx512.cpp uses, written as plain loops from their published definitions, so that the file's
// logic can be tested on CPUs without AVX-512 and under sanitizers. Included by isa_avx512.cpp in place of immintrin.h
// when MIMO_AVX512_EMULATION is defined. Only what is used is here; nothing is shared with the scalar table.
#ifndef AVX512_EMULATION_H
#define AVX512_EMULATION_H

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

struct __m512 {
  float v[16];
};
struct __m512i {
  std::int32_t v[16];
};
struct __m256i {
  std::uint8_t b[32];
};
struct __m128i {
  std::uint8_t b[16];
};
using __mmask16 = std::uint16_t;
using __mmask64 = std::uint64_t;

enum { _MM_FROUND_TO_NEAREST_INT = 0, _MM_FROUND_NO_EXC = 8, _CMP_GT_OQ = 30, _CMP_UNORD_Q = 3, _CMP_NLT_UQ = 5 };

// ---- half precision (F16C) ------------------------------------------------------------------------------------------

static float _cvtsh_ss(unsigned short h) {
  const int exponent = h >> 10 & 31;
  const int fraction = h & 1023;
  float magnitude = 0;
  if (exponent == 31) {
    magnitude = fraction != 0 ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  }
  return (h & 0x8000) != 0 ? -magnitude : magnitude;
}

// By search: the nearest of all finite halves, ties to the even pattern. Positive values only.
static unsigned short _cvtss_sh(float x, int) {
  if (x >= 65520.0F) return 0x7C00;
  int low = 0;
  int high = 0x7BFF;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (_cvtsh_ss(static_cast<unsigned short>(middle)) <= x ? low : high) = middle;
  }
  const double below = static_cast<double>(x) - static_cast<double>(_cvtsh_ss(static_cast<unsigned short>(low)));
  const double above = static_cast<double>(_cvtsh_ss(static_cast<unsigned short>(high))) - static_cast<double>(x);
  if (below == above) return static_cast<unsigned short>(low % 2 == 0 ? low : high);
  return static_cast<unsigned short>(below < above ? low : high);
}

// ---- memory ---------------------------------------------------------------------------------------------------------

template <class Register, class Memory>
static Register emu_load(const Memory *p) {
  Register r;
  std::memcpy(&r, static_cast<const void *>(p), sizeof r);
  return r;
}
static __m512 _mm512_loadu_ps(const void *p) { return emu_load<__m512>(static_cast<const char *>(p)); }
static __m512i _mm512_loadu_si512(const void *p) { return emu_load<__m512i>(static_cast<const char *>(p)); }
static void _mm512_storeu_ps(void *p, __m512 a) { std::memcpy(p, &a, sizeof a); }
static __m128i _mm_loadu_si128(const __m128i *p) { return emu_load<__m128i>(p); }
static __m256i _mm256_loadu_si256(const __m256i *p) { return emu_load<__m256i>(p); }
static void _mm_storeu_si128(__m128i *p, __m128i a) { std::memcpy(static_cast<void *>(p), &a, sizeof a); }

// ---- lane by lane ---------------------------------------------------------------------------------------------------

#define EMU_EACH(Type, expression)                      \
  Type r;                                               \
  for (int i = 0; i < 16; ++i) r.v[i] = (expression);   \
  return r

static __m512 _mm512_set1_ps(float s) { EMU_EACH(__m512, s); }
static __m512 _mm512_setzero_ps() { return _mm512_set1_ps(0.0F); }
static __m512i _mm512_set1_epi32(int s) { EMU_EACH(__m512i, s); }
static __m512i _mm512_setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h, int j, int k, int l, int m,
                                 int n, int o, int p, int q) {
  return {{a, b, c, d, e, f, g, h, j, k, l, m, n, o, p, q}};
}
static __m512 _mm512_add_ps(__m512 a, __m512 b) { EMU_EACH(__m512, a.v[i] + b.v[i]); }
static __m512 _mm512_mul_ps(__m512 a, __m512 b) { EMU_EACH(__m512, a.v[i] * b.v[i]); }
static __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) { EMU_EACH(__m512, std::fma(a.v[i], b.v[i], c.v[i])); }
static __m512 _mm512_min_ps(__m512 a, __m512 b) { EMU_EACH(__m512, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
static __m512 _mm512_max_ps(__m512 a, __m512 b) { EMU_EACH(__m512, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
static __m512 _mm512_roundscale_ps(__m512 a, int) { EMU_EACH(__m512, std::nearbyint(a.v[i])); }
static __m512i _mm512_cvtps_epi32(__m512 a) { EMU_EACH(__m512i, static_cast<std::int32_t>(std::nearbyint(a.v[i]))); }
static __m512 _mm512_cvtepi32_ps(__m512i a) { EMU_EACH(__m512, static_cast<float>(a.v[i])); }
static std::int32_t emu_wrap(std::int32_t a, std::int32_t b) {
  return static_cast<std::int32_t>(static_cast<std::uint32_t>(a) + static_cast<std::uint32_t>(b));
}
static __m512i _mm512_add_epi32(__m512i a, __m512i b) { EMU_EACH(__m512i, emu_wrap(a.v[i], b.v[i])); }
static __m512i _mm512_max_epi32(__m512i a, __m512i b) { EMU_EACH(__m512i, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
static __m512i _mm512_max_epu32(__m512i a, __m512i b) {
  EMU_EACH(__m512i, static_cast<std::uint32_t>(a.v[i]) > static_cast<std::uint32_t>(b.v[i]) ? a.v[i] : b.v[i]);
}
static __m512i _mm512_mask_or_epi32(__m512i src, __mmask16 m, __m512i a, __m512i b) {
  EMU_EACH(__m512i, (m >> i & 1) != 0 ? a.v[i] | b.v[i] : src.v[i]);
}
static __m512i _mm512_xor_si512(__m512i a, __m512i b) { EMU_EACH(__m512i, a.v[i] ^ b.v[i]); }
static __m512i _mm512_and_si512(__m512i a, __m512i b) { EMU_EACH(__m512i, a.v[i] & b.v[i]); }
static __m512i _mm512_or_si512(__m512i a, __m512i b) { EMU_EACH(__m512i, a.v[i] | b.v[i]); }
static __m512i _mm512_slli_epi32(__m512i a, unsigned n) {
  EMU_EACH(__m512i, static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v[i]) << n));
}
static __m512i _mm512_srli_epi32(__m512i a, unsigned n) {
  EMU_EACH(__m512i, static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v[i]) >> n));
}
static __m512i _mm512_cvtepu8_epi32(__m128i a) { EMU_EACH(__m512i, a.b[i]); }
static __m512i _mm512_cvtepi8_epi32(__m128i a) { EMU_EACH(__m512i, static_cast<std::int8_t>(a.b[i])); }
static __m512i _mm512_cvtepu16_epi32(__m256i a) { EMU_EACH(__m512i, a.b[2 * i] | a.b[2 * i + 1] << 8); }
static __m128i _mm512_cvtepi32_epi8(__m512i a) {
  __m128i r;
  for (int i = 0; i < 16; ++i) r.b[i] = static_cast<std::uint8_t>(a.v[i]);
  return r;
}
static __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int how) {
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) {
    const bool unordered = std::isnan(a.v[i]) || std::isnan(b.v[i]);
    const bool is = how == _CMP_GT_OQ    ? a.v[i] > b.v[i]
                    : how == _CMP_NLT_UQ ? !(a.v[i] < b.v[i])
                                         : unordered;
    mask |= (is ? 1U : 0U) << i;
  }
  return static_cast<__mmask16>(mask);
}

static __m512 _mm512_castsi512_ps(__m512i a) { return emu_load<__m512>(&a); }
static __m512i _mm512_castps_si512(__m512 a) { return emu_load<__m512i>(&a); }

// ---- elementwise and attention --------------------------------------------------------------------------------------

static __m512 _mm512_sub_ps(__m512 a, __m512 b) { EMU_EACH(__m512, a.v[i] - b.v[i]); }
static __m512 _mm512_div_ps(__m512 a, __m512 b) { EMU_EACH(__m512, a.v[i] / b.v[i]); }
static __m512i _mm512_mask_set1_epi32(__m512i src, __mmask16 m, int s) {
  EMU_EACH(__m512i, (m >> i & 1) != 0 ? s : src.v[i]);
}
static __m256i _mm512_cvtepi32_epi16(__m512i a) {
  __m256i r;
  for (int i = 0; i < 16; ++i) {
    r.b[2 * i] = static_cast<std::uint8_t>(a.v[i]);
    r.b[2 * i + 1] = static_cast<std::uint8_t>(a.v[i] >> 8);
  }
  return r;
}
static __m512 _mm512_mask_mov_ps(__m512 src, __mmask16 m, __m512 a) {
  EMU_EACH(__m512, (m >> i & 1) != 0 ? a.v[i] : src.v[i]);
}
static __m512 _mm512_maskz_mov_ps(__mmask16 m, __m512 a) { EMU_EACH(__m512, (m >> i & 1) != 0 ? a.v[i] : 0.0F); }
static __m512i _mm512_castsi128_si512(__m128i a) {
  __m512i r = {};
  std::memcpy(&r, &a, sizeof a);
  return r;
}
static __m512i _mm512_inserti32x4(__m512i a, __m128i b, int quarter) {
  std::memcpy(a.v + 4 * quarter, &b, sizeof b);
  return a;
}
// Within each group of four lanes: the low or the high two of both, alternating.
static __m512i emu_unpack32(__m512i a, __m512i b, int from) {
  EMU_EACH(__m512i, (i % 2 == 0 ? a : b).v[i / 4 * 4 + from + i % 4 / 2]);
}
static __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) { return emu_unpack32(a, b, 0); }
static __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) { return emu_unpack32(a, b, 2); }
static __m512i emu_unpack64(__m512i a, __m512i b, int from) {
  EMU_EACH(__m512i, (i % 4 < 2 ? a : b).v[i / 4 * 4 + from + i % 2]);
}
static __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) { return emu_unpack64(a, b, 0); }
static __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) { return emu_unpack64(a, b, 2); }
static void _mm256_storeu_si256(__m256i *p, __m256i a) { std::memcpy(static_cast<void *>(p), &a, sizeof a); }

// ---- 64-bit lanes, casts --------------------------------------------------------------------------------------------

static float _mm512_cvtss_f32(__m512 a) { return a.v[0]; }

// ---- across lanes ---------------------------------------------------------------------------------------------------

static __m512 _mm512_permutexvar_ps(__m512i index, __m512 a) { EMU_EACH(__m512, a.v[index.v[i] & 15]); }
static __m512 _mm512_permutex2var_ps(__m512 a, __m512i index, __m512 b) {
  EMU_EACH(__m512, (index.v[i] & 16) != 0 ? b.v[index.v[i] & 15] : a.v[index.v[i] & 15]);
}
// Groups of four lanes: results 0 and 1 from a, 2 and 3 from b, two bits of `pick` each.
static __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int pick) {
  EMU_EACH(__m512, (i < 8 ? a : b).v[(pick >> i / 4 * 2 & 3) * 4 + i % 4]);
}
// Within each group of four lanes.
static __m512 _mm512_permute_ps(__m512 a, int pick) { EMU_EACH(__m512, a.v[i / 4 * 4 + (pick >> i % 4 * 2 & 3)]); }
static int _mm512_reduce_max_epi32(__m512i a) {
  int most = a.v[0];
  for (const int v : a.v) most = v > most ? v : most;
  return most;
}

// ---- bytes and words, for the products of decode.inc ------------------------------------------------------------------

#define EMU_BYTES(expression)                                 \
  std::uint8_t x[64];                                         \
  std::uint8_t y[64];                                         \
  std::uint8_t out[64];                                       \
  std::memcpy(x, &a, sizeof x);                               \
  std::memcpy(y, &b, sizeof y);                               \
  for (int i = 0; i < 64; ++i) out[i] = (expression);         \
  return emu_load<__m512i>(out)

static void _mm512_storeu_si512(void *p, __m512i a) { std::memcpy(p, &a, sizeof a); }
static __m512i _mm512_maskz_loadu_epi8(__mmask64 m, const void *p) {
  std::uint8_t bytes[64] = {};
  for (int i = 0; i < 64; ++i) {
    if ((m >> i & 1) != 0) bytes[i] = static_cast<const std::uint8_t *>(p)[i];
  }
  return emu_load<__m512i>(bytes);
}
// AMX's panels use it, which are compiled apart.
[[maybe_unused]] static __m512i _mm512_set1_epi64(long long s) {
  __m512i r;
  for (int i = 0; i < 8; ++i) std::memcpy(&r.v[2 * i], &s, 8);
  return r;
}
static __m512i _mm512_setzero_si512() { return __m512i{}; }
static __m512i _mm512_set1_epi8(int s) {
  __m512i r;
  std::memset(static_cast<void *>(&r), s, sizeof r);
  return r;
}
static __m512i _mm512_broadcast_i32x4(__m128i a) {
  __m512i r;
  for (int i = 0; i < 4; ++i) std::memcpy(&r.v[4 * i], &a, 16);
  return r;
}
static __m512i _mm512_sub_epi32(__m512i a, __m512i b) { EMU_EACH(__m512i, a.v[i] - b.v[i]); }
static __mmask16 _mm512_cmpeq_epi32_mask(__m512i a, __m512i b) {
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= (a.v[i] == b.v[i] ? 1U : 0U) << i;
  return static_cast<__mmask16>(mask);
}
// Within each 16 bytes; an index with its highest bit set gives 0.
static __m512i _mm512_shuffle_epi8(__m512i a, __m512i b) {
  EMU_BYTES((y[i] & 0x80) != 0 ? std::uint8_t{0} : x[i / 16 * 16 + (y[i] & 15)]);
}
static __m512i _mm512_srli_epi16(__m512i a, unsigned n) {
  std::uint16_t words[32];
  std::memcpy(words, &a, sizeof words);
  for (std::uint16_t &word : words) word = static_cast<std::uint16_t>(word >> n);
  return emu_load<__m512i>(words);
}
static __m256i _mm512_cvtepi16_epi8(__m512i a) {
  std::uint8_t bytes[64];
  std::memcpy(bytes, &a, sizeof bytes);
  __m256i r;
  for (int i = 0; i < 32; ++i) r.b[i] = bytes[2 * i];
  return r;
}
static __m512 _mm512_cvtph_ps(__m256i a) {
  EMU_EACH(__m512, _cvtsh_ss(static_cast<unsigned short>(a.b[2 * i] | a.b[2 * i + 1] << 8)));
}
// sum + products of four unsigned and signed bytes in each lane.
static __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  std::uint8_t x[64];
  std::int8_t y[64];
  std::memcpy(x, &a, sizeof x);
  std::memcpy(y, &b, sizeof y);
  for (int i = 0; i < 64; ++i) sum.v[i / 4] += x[i] * y[i];
  return sum;
}
static __m512 _mm512_mask3_fmadd_ps(__m512 a, __m512 b, __m512 c, __mmask16 m) {
  EMU_EACH(__m512, (m >> i & 1) != 0 ? std::fma(a.v[i], b.v[i], c.v[i]) : c.v[i]);
}

// ---- for panels -------------------------------------------------------------------------------------------------------

// Within each group of four lanes.
static __m128i _mm_setr_epi8(char a, char b, char c, char d, char e, char f, char g, char h, char j, char k, char l, char m,
                             char n, char o, char p, char q) {
  const char bytes[16] = {a, b, c, d, e, f, g, h, j, k, l, m, n, o, p, q};
  return emu_load<__m128i>(bytes);
}
static __m128i _mm_shuffle_epi8(__m128i a, __m128i pick) {
  __m128i r;
  for (int i = 0; i < 16; ++i) r.b[i] = (pick.b[i] & 0x80) != 0 ? std::uint8_t{0} : a.b[pick.b[i] & 15];
  return r;
}

#undef EMU_BYTES
// ---- bytes and words (AVX-512 BW) -----------------------------------------------------------------------------------

using __mmask32 = std::uint32_t;

// A register seen as lanes of another type, and back.
template <class Lane>
struct EmuLanes {
  static constexpr int kCount = static_cast<int>(64 / sizeof(Lane));
  Lane v[kCount];
};
template <class Lane>
static EmuLanes<Lane> emu_as(__m512i a) {
  EmuLanes<Lane> lanes;
  std::memcpy(&lanes, &a, sizeof lanes);
  return lanes;
}
template <class Lane>
static __m512i emu_back(const EmuLanes<Lane> &lanes) {
  __m512i r;
  std::memcpy(&r, &lanes, sizeof r);
  return r;
}
// f(lane of a, lane of b), converted to a lane.
template <class Lane, class Function>
static __m512i emu_zip(__m512i a, __m512i b, Function f) {
  EmuLanes<Lane> x = emu_as<Lane>(a);
  const EmuLanes<Lane> y = emu_as<Lane>(b);
  for (int i = 0; i < x.kCount; ++i) x.v[i] = static_cast<Lane>(f(x.v[i], y.v[i]));
  return emu_back(x);
}
static int emu_saturate(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

static __m512i _mm512_set1_epi16(short s) {
  return emu_zip<std::int16_t>({}, {}, [s](int, int) { return s; });
}
static __m512i _mm512_sub_epi16(__m512i a, __m512i b) {
  return emu_zip<std::int16_t>(a, b, [](int x, int y) { return x - y; });
}
static __m512i _mm512_sub_epi8(__m512i a, __m512i b) {
  return emu_zip<std::int8_t>(a, b, [](int x, int y) { return x - y; });
}
static __m512i _mm512_min_epu8(__m512i a, __m512i b) {
  return emu_zip<std::uint8_t>(a, b, [](int x, int y) { return x < y ? x : y; });
}
static __m512i _mm512_abs_epi16(__m512i a) {
  return emu_zip<std::int16_t>(a, a, [](int x, int) { return x < 0 ? -x : x; });
}
static __m512i _mm512_abs_epi8(__m512i a) {
  return emu_zip<std::int8_t>(a, a, [](int x, int) { return x < 0 ? -x : x; });
}
static __m512i _mm512_dpwssd_epi32(__m512i sum, __m512i a, __m512i b) {
  const auto x = emu_as<std::int16_t>(a);
  const auto y = emu_as<std::int16_t>(b);
  for (int i = 0; i < 32; ++i) sum.v[i / 2] += x.v[i] * y.v[i];
  return sum;
}
static __m512i _mm512_slli_epi16(__m512i a, unsigned n) {
  return emu_zip<std::int16_t>(a, a, [n](int x, int) { return x << n; });
}
static __m512i _mm512_cvtepi8_epi16(__m256i a) {
  std::int16_t words[32];
  for (int i = 0; i < 32; ++i) words[i] = static_cast<std::int8_t>(a.b[i]);
  return emu_load<__m512i>(words);
}
static __m128i _mm_unpacklo_epi8(__m128i a, __m128i b) {
  __m128i r;
  for (int i = 0; i < 16; ++i) r.b[i] = (i % 2 == 0 ? a : b).b[i / 2];
  return r;
}
static __m128i _mm_unpackhi_epi8(__m128i a, __m128i b) {
  __m128i r;
  for (int i = 0; i < 16; ++i) r.b[i] = (i % 2 == 0 ? a : b).b[8 + i / 2];
  return r;
}
static __m256i _mm256_set_m128i(__m128i high, __m128i low) {
  __m256i r;
  std::memcpy(r.b, low.b, 16);
  std::memcpy(r.b + 16, high.b, 16);
  return r;
}
static __m512i _mm512_srai_epi16(__m512i a, unsigned n) {
  return emu_zip<std::int16_t>(a, a, [n](int x, int) { return x >> n; });
}
static __mmask32 _mm512_cmpgt_epi16_mask(__m512i a, __m512i b) {
  const auto x = emu_as<std::int16_t>(a);
  const auto y = emu_as<std::int16_t>(b);
  __mmask32 mask = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if (x.v[i] > y.v[i]) mask |= 1U << i;
  }
  return mask;
}
static __m512i _mm512_movm_epi16(__mmask32 mask) {
  EmuLanes<std::int16_t> r;
  for (int i = 0; i < 32; ++i) r.v[i] = (mask >> i & 1) != 0 ? -1 : 0;
  return emu_back(r);
}
// Packing and unpacking work in each group of 16 bytes by itself.
static __m512i _mm512_packs_epi32(__m512i a, __m512i b) {
  EmuLanes<std::int16_t> r;
  for (int i = 0; i < 32; ++i) {
    const int from = i / 8 * 4 + i % 4;
    r.v[i] = static_cast<std::int16_t>(emu_saturate((i % 8 < 4 ? a : b).v[from], -32768, 32767));
  }
  return emu_back(r);
}
static __m512i _mm512_packs_epi16(__m512i a, __m512i b) {
  const auto x = emu_as<std::int16_t>(a);
  const auto y = emu_as<std::int16_t>(b);
  EmuLanes<std::int8_t> r;
  for (int i = 0; i < 64; ++i) {
    const int from = i / 16 * 8 + i % 8;
    r.v[i] = static_cast<std::int8_t>(emu_saturate((i % 16 < 8 ? x : y).v[from], -128, 127));
  }
  return emu_back(r);
}
template <class Lane>
static __m512i emu_unpack(__m512i a, __m512i b, int high) {
  const auto x = emu_as<Lane>(a);
  const auto y = emu_as<Lane>(b);
  EmuLanes<Lane> r;
  const int group = r.kCount / 4;
  for (int i = 0; i < r.kCount; ++i) {
    r.v[i] = (i % 2 == 0 ? x : y).v[i / group * group + high * group / 2 + i % group / 2];
  }
  return emu_back(r);
}
static __m512i _mm512_unpacklo_epi8(__m512i a, __m512i b) { return emu_unpack<std::int8_t>(a, b, 0); }
static __m512i _mm512_unpackhi_epi8(__m512i a, __m512i b) { return emu_unpack<std::int8_t>(a, b, 1); }
static __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) { return emu_unpack<std::int16_t>(a, b, 0); }
static __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) { return emu_unpack<std::int16_t>(a, b, 1); }
static __m512i _mm512_maddubs_epi16(__m512i a, __m512i b) {
  const auto x = emu_as<std::uint8_t>(a);
  const auto y = emu_as<std::int8_t>(b);
  EmuLanes<std::int16_t> r;
  for (int i = 0; i < 32; ++i) {
    const int sum = x.v[2 * i] * y.v[2 * i] + x.v[2 * i + 1] * y.v[2 * i + 1];
    r.v[i] = static_cast<std::int16_t>(emu_saturate(sum, -32768, 32767));
  }
  return emu_back(r);
}
static __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
  const auto x = emu_as<std::int16_t>(a);
  const auto y = emu_as<std::int16_t>(b);
  __m512i r;
  for (int i = 0; i < 16; ++i) r.v[i] = x.v[2 * i] * y.v[2 * i] + x.v[2 * i + 1] * y.v[2 * i + 1];
  return r;
}
static __m512i _mm512_permutexvar_epi16(__m512i index, __m512i a) {
  const auto x = emu_as<std::int16_t>(a);
  auto r = emu_as<std::int16_t>(index);
  for (int i = 0; i < 32; ++i) r.v[i] = x.v[r.v[i] & 31];
  return emu_back(r);
}
static __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int pick) {
  __m512i r;
  for (int i = 0; i < 16; ++i) r.v[i] = (i < 8 ? a : b).v[(pick >> i / 4 * 2 & 3) * 4 + i % 4];
  return r;
}
static int _mm512_reduce_add_epi32(__m512i a) {
  int sum = 0;
  for (const int v : a.v) sum += v;
  return sum;
}
static int _mm512_reduce_min_epi32(__m512i a) {
  int least = a.v[0];
  for (const int v : a.v) least = v < least ? v : least;
  return least;
}
static void _mm512_stream_ps(void *p, __m512 a) { std::memcpy(p, &a, sizeof a); }
#define _mm_sfence emu_sfence  // clang has a function of that name of its own
static void emu_sfence() {}

#undef EMU_EACH

#endif
