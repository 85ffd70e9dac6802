// The scalar helpers everything else is compared with.
#include "../../mimo_local/kernels/src/isa_scalar.cpp"
#include "check.h"

namespace {

MIMO_CHECK(scalar_fma) {
  std::mt19937_64 random(7);
  const auto any_float = [&] {
    std::uint32_t pattern = static_cast<std::uint32_t>(random());
    if (random() % 4 == 0) pattern = (pattern & 0x807FFFFFU) | (120U + pattern % 16U) << 23;  // near 1: cancellation
    return __builtin_bit_cast(float, pattern);
  };
  for (int i = 0; i < 3000000; ++i) {
    const float a = any_float();
    const float b = any_float();
    float c = any_float();
    if (i % 3 == 0) c = -(a * b);                                   // what is left is the rounding error
    if (i % 7 == 0) c = std::nextafter(-(a * b), any_float());
    const float expected = std::fma(a, b, c);
    const float got = mimo::scalar::fma1(a, b, c);
    REQUIRE((std::isnan(expected) && std::isnan(got)) || std::memcmp(&expected, &got, 4) == 0,
            "fma(%a, %a, %a) = %a, not %a", static_cast<double>(a), static_cast<double>(b), static_cast<double>(c),
            static_cast<double>(expected), static_cast<double>(got));
  }
}

MIMO_CHECK(halves) {
  for (unsigned h = 0; h < 0x7C00; ++h) {
    const float value = mimo::scalar::half_to_float(static_cast<std::uint16_t>(h));
    const double exact = h < 1024 ? std::ldexp(h, -24) : std::ldexp(1024 + h % 1024, static_cast<int>(h / 1024) - 25);
    REQUIRE(static_cast<double>(value) == exact, "half %x", h);
    REQUIRE(mimo::scalar::half_to_float(static_cast<std::uint16_t>(h | 0x8000)) == -value, "half -%x", h);
    REQUIRE(mimo::scalar::float_to_half(value) == h, "half %x does not return", h);
    if (h == 0x7BFF) continue;
    const float next = mimo::scalar::half_to_float(static_cast<std::uint16_t>(h + 1));
    const float middle = 0.5F * (value + next);
    REQUIRE(mimo::scalar::float_to_half(middle) == h + h % 2, "tie after %x", h);
    REQUIRE(mimo::scalar::float_to_half(std::nextafter(middle, 0.0F)) == h, "below the tie after %x", h);
    REQUIRE(mimo::scalar::float_to_half(std::nextafter(middle, 1e6F)) == h + 1, "above the tie after %x", h);
  }
  REQUIRE(mimo::scalar::float_to_half(65519.9F) == 0x7BFF, "last finite");
  REQUIRE(mimo::scalar::float_to_half(65520.0F) == 0x7C00, "first infinite");
  REQUIRE(std::isinf(mimo::scalar::half_to_float(0x7C00)) && std::isnan(mimo::scalar::half_to_float(0x7E00)), "inf");
}

}  // namespace
