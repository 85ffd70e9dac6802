// The reference: every operation of generic.inc one lane at a time, on any CPU. All other tables must equal this one
// bit for bit. Its fused multiply-add is computed in double precision, because the C library's own costs a function
// call and, on CPUs without the instruction, a change of rounding mode per element.
#include <cstdint>
#include <cstring>

#include "internal.h"

namespace mimo {
namespace {
namespace scalar {

constexpr const char *kName = "scalar";

struct F {
  float v[16];
};
struct I {
  std::int32_t v[16];
};
struct Nf4Values {};
struct Nf4Search {};

// a * b + c with one rounding. The product of two floats is exact in double; the sum is made exact by rounding it to
// odd (last bit set when something was cut off), after which rounding to float cannot double-round.
float fma1(float a, float b, float c) noexcept {
  const double product = static_cast<double>(a) * static_cast<double>(b);
  const double addend = static_cast<double>(c);
  double sum = product + addend;
  const double back = sum - product;
  const double lost = (product - (sum - back)) + (addend - back);
  std::uint64_t bits = __builtin_bit_cast(std::uint64_t, sum);
  if ((lost > 0.0 || lost < 0.0) && (bits & 1) == 0) {
    bits = (lost > 0.0) == (sum > 0.0) ? bits + 1 : bits - 1;
    sum = __builtin_bit_cast(double, bits);
  }
  return static_cast<float>(sum);
}

float half_to_float(std::uint16_t h) noexcept {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000U) << 16;
  const std::uint32_t exponent = (h >> 10) & 0x1FU;
  const std::uint32_t fraction = h & 0x3FFU;
  if (exponent == 0) {  // zero and subnormals: fraction * 2^-24, exact
    const float magnitude = static_cast<float>(fraction) * 0x1p-24F;
    return sign != 0 ? -magnitude : magnitude;
  }
  const std::uint32_t rebased = exponent == 31 ? 255U : exponent + 112U;
  return __builtin_bit_cast(float, sign | rebased << 23 | fraction << 13);
}

// Rounds to nearest even; from 65520 up the result is infinity. Positive finite values only.
std::uint16_t float_to_half(float value) noexcept {
  if (value >= 65520.0F) return 0x7C00;
  if (value < 0x1p-14F) {  // subnormal: adding 0.5 rounds at the right bit, 2^-24
    const float rounded = value + 0.5F;
    return static_cast<std::uint16_t>(__builtin_bit_cast(std::uint32_t, rounded) - 0x3F000000U);
  }
  const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, value);
  const std::uint32_t rounded = bits + 0xFFFU + ((bits >> 13) & 1U);
  return static_cast<std::uint16_t>((rounded - (112U << 23)) >> 13);
}

F zero() noexcept { return F{}; }
F splat(float s) noexcept {
  F r;
  for (float &v : r.v) v = s;
  return r;
}
F load(const float *p) noexcept {
  F r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
void store(float *p, F a) noexcept { std::memcpy(p, a.v, sizeof a.v); }
F mul(F a, F b) noexcept {
  for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] * b.v[i];
  return a;
}
F fma(F a, F b, F c) noexcept {
  for (int i = 0; i < 16; ++i) c.v[i] = fma1(a.v[i], b.v[i], c.v[i]);
  return c;
}
float reduce(F a) noexcept {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] = a.v[i] + a.v[i + width];
  }
  return a.v[0];
}
F clamp(F a, float limit) noexcept {
  for (float &v : a.v) v = v < -limit ? -limit : (v > limit ? limit : v);
  return a;
}
// To the nearest integer, ties to even, for magnitudes below 2^22: the sum leaves no bits for a fraction.
F round_even(F a) noexcept {
  for (float &v : a.v) v = (v + 0x1.8p23F) - 0x1.8p23F;
  return a;
}

F widen_int8(const std::int8_t *p) noexcept {
  F r;
  for (int i = 0; i < 16; ++i) r.v[i] = static_cast<float>(p[i]);
  return r;
}
F widen_bf16(const std::uint16_t *p) noexcept {
  F r;
  for (int i = 0; i < 16; ++i) r.v[i] = __builtin_bit_cast(float, static_cast<std::uint32_t>(p[i]) << 16);
  return r;
}
void store_int8(std::int8_t *p, F a) noexcept {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<std::int8_t>(a.v[i]);
}

I magnitude_bits(F a) noexcept {
  I r;
  for (int i = 0; i < 16; ++i) r.v[i] = __builtin_bit_cast(std::int32_t, a.v[i]) & 0x7FFFFFFF;
  return r;
}
I max(I a, I b) noexcept {
  for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
std::int32_t reduce_max(I a) noexcept {
  std::int32_t most = a.v[0];
  for (const std::int32_t v : a.v) most = v > most ? v : most;
  return most;
}

Nf4Values nf4_values() noexcept { return {}; }
void nf4_unpack(Nf4Values, const std::uint8_t *p, F &even, F &odd) noexcept {
  for (int i = 0; i < 16; ++i) {
    even.v[i] = kNf4[p[i] >> 4];
    odd.v[i] = kNf4[p[i] & 15];
  }
}
void store_interleaved(float *p, F even, F odd) noexcept {
  for (int i = 0; i < 16; ++i) {
    p[2 * i] = even.v[i];
    p[2 * i + 1] = odd.v[i];
  }
}

Nf4Search nf4_search() noexcept { return {}; }
// Number of midpoints below the value: a value on a midpoint gets the lower code.
I nf4_nearest(Nf4Search, F a) noexcept {
  I r = {};
  for (int code = 0; code < 15; ++code) {
    const float midpoint = 0.5F * (kNf4[code] + kNf4[code + 1]);
    for (int i = 0; i < 16; ++i) r.v[i] += a.v[i] > midpoint ? 1 : 0;
  }
  return r;
}
F nf4_value(Nf4Search, I code) noexcept {
  F r;
  for (int i = 0; i < 16; ++i) r.v[i] = kNf4[code.v[i]];
  return r;
}
void store_nibbles(std::uint8_t *p, const I code[4]) noexcept {
  for (int i = 0; i < 32; ++i) {
    p[i] = static_cast<std::uint8_t>(code[i / 8].v[2 * i % 16] << 4 | code[i / 8].v[2 * i % 16 + 1]);
  }
}

#include "generic.inc"

}  // namespace scalar
}  // namespace

const mimo_table *scalar_table() noexcept { return &scalar::kTable; }

}  // namespace mimo
