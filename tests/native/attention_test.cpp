// What lies between the products, and attention: every table against scalar, scalar against double precision.
#include "check.h"

// The scalar text once more under its own name, to look at single functions.
namespace mimo::probe {
#include "ops_scalar.inc"
#include "elementwise.inc"
}  // namespace mimo::probe

namespace {

constexpr std::int64_t kColumns[] = {1, 2, 15, 16, 17, 33, 64, 65, 100, 192, 300};

float below1(float x) {
  float out[16];
  mimo::probe::store(out, mimo::probe::exp_below(mimo::probe::splat(x)));
  return out[7];
}

float exp1(float x) {
  float out[16];
  mimo::probe::store(out, mimo::probe::exp(mimo::probe::splat(x)));
  return out[3];
}

// Error in units of the last place of the exact result (of the smallest subnormal below the normal range).
double error_of_exp(float x) {
  const double exact = std::exp(static_cast<double>(x));
  const int exponent = std::max(std::ilogb(exact), -126) - 23;
  return std::fabs(static_cast<double>(exp1(x)) - exact) / std::ldexp(1.0, exponent);
}

MIMO_CHECK(exponential) {
  const float infinity = std::numeric_limits<float>::infinity();
  REQUIRE(exp1(-infinity) == 0.0F && exp1(-3e38F) == 0.0F && exp1(-1e4F) == 0.0F, "large negatives");
  REQUIRE(exp1(infinity) == infinity && exp1(3e38F) == infinity, "large positives");
  REQUIRE(exp1(0.0F) == 1.0F && exp1(-0.0F) == 1.0F, "one");
  REQUIRE(std::isnan(exp1(std::numeric_limits<float>::quiet_NaN())), "NaN");
  REQUIRE(exp1(88.72283F) < infinity && exp1(88.73F) == infinity, "the last finite power");
  REQUIRE(exp1(-103.0F) > 0.0F, "subnormals");
  std::mt19937 random(5);
  double worst = 0.0;
  const auto look = [&](float x) {
    const double error = error_of_exp(x);
    REQUIRE(error <= 2.0, "exp(%a) is %g ulp off", static_cast<double>(x), error);
    worst = std::max(worst, error);
  };
  for (int i = 0; i < 200000; ++i) look(std::uniform_real_distribution<float>(-104.0F, 88.72F)(random));
  for (int i = 0; i < 50000; ++i) look(std::uniform_real_distribution<float>(-1.0F, 1.0F)(random));
  for (int n = -149; n < 128; ++n) {  // where the reduced argument changes sides
    const float edge = static_cast<float>((n + 0.5) * 0.6931471805599453);
    for (const float x : {edge, std::nextafter(edge, -1e9F), std::nextafter(edge, 1e9F)}) look(x);
  }
  for (int i = 0; i < 100000; ++i) {
    const float x = std::uniform_real_distribution<float>(-87.0F, 0.0F)(random);
    const double exact = std::exp(static_cast<double>(x));
    REQUIRE(std::fabs(static_cast<double>(below1(x)) - exact) <= 2.5e-7 * exact, "exp_below(%a)", static_cast<double>(x));
  }
  REQUIRE(below1(0.0F) == 1.0F && below1(-87.01F) == 0.0F && below1(-infinity) == 0.0F, "exp_below at its ends");
  for (const std::uint32_t nan : {0x7FC00000U, 0xFFC00001U, 0x7FFFFFFFU, 0xFFC001FFU}) {
    REQUIRE(std::isnan(below1(__builtin_bit_cast(float, nan))), "exp_below of NaN %x", nan);
  }
  std::printf("exp: %.2f ulp at worst\n", worst);
}

// All functions on rows of n columns, results one after the other.
Exact<float> all_rows(const mimo_table &table, std::int64_t n, unsigned seed) {
  const std::size_t width = size(n);
  Exact<float> x = normal(3 * (width + 2), seed, 20.0F);
  Exact<float> y = normal(width, seed + 1);
  Exact<float> out(8 * width);
  if (seed % 2 == 0) x[0] = -1e30F;
  std::size_t at = 0;
  {
    Exact<float> normed(3 * width);
    table.rms_norm_rows(x.get(), n + 2, 3, n, y.get(), 1e-5F, normed.get(), n);
    std::memcpy(out.get(), normed.get(), normed.bytes());
    at += 3 * width;
  }
  table.swiglu(x.get(), y.get(), n, out.get() + at);
  table.sigmoid_row(x.get(), n, out.get() + at + width);
  std::memcpy(out.get() + at + 2 * width, y.get(), y.bytes());
  table.add_scaled(x.get(), 0.37F, n, out.get() + at + 2 * width);
  table.scale_row(x.get(), 0.707F, n, out.get() + at + 3 * width);
  Exact<std::uint16_t> short_row(width);
  table.scale_row_bf16(x.get(), 0.707F, n, short_row.get());
  for (std::size_t i = 0; i < width; ++i) out[at + 4 * width + i] = static_cast<float>(short_row[i]);
  return out;
}

MIMO_CHECK(elementwise) {
  const mimo_table &scalar = *mimo::scalar_table();
  for (const std::int64_t n : kColumns) {
    const std::size_t width = size(n);
    const Exact<float> expected = all_rows(scalar, n, static_cast<unsigned>(n));
    for (const mimo_table *table : fast_tables()) {
      REQUIRE(all_rows(*table, n, static_cast<unsigned>(n)) == expected, "%s, %d columns", table->name,
              static_cast<int>(n));
    }
    Exact<float> x = normal(3 * (width + 2), static_cast<unsigned>(n), 20.0F);
    if (n % 2 == 0) x[0] = -1e30F;
    Exact<float> y = normal(width, static_cast<unsigned>(n) + 1);
    Exact<float> normed(width);
    scalar.rms_norm_rows(x.get() + n + 2, n + 2, 1, n, y.get(), 1e-5F, normed.get(), n);
    double squares = 0.0;
    for (std::size_t i = 0; i < width; ++i) squares += std::pow(static_cast<double>(x[width + 2 + i]), 2.0);
    const double factor = 1.0 / std::sqrt(squares / static_cast<double>(n) + 1e-5);
    Exact<float> mixed(width);
    scalar.swiglu(x.get(), y.get(), n, mixed.get());
    for (std::size_t i = 0; i < width; ++i) {
      const double exact = static_cast<double>(y[i]) * static_cast<double>(x[width + 2 + i]) * factor;
      REQUIRE(std::fabs(static_cast<double>(normed[i]) - exact) <= 1e-6 * std::fabs(exact), "norm, column %d",
              static_cast<int>(i));
      const double g = static_cast<double>(x[i]);
      const double silu = g / (1.0 + std::exp(-g)) * static_cast<double>(y[i]);
      REQUIRE(std::fabs(static_cast<double>(mixed[i]) - silu) <= 1e-6 * std::fabs(silu) + 1e-30, "swiglu of %g", g);
    }
  }
}

MIMO_CHECK(rotation) {
  for (const std::int64_t rotary : {0, 2, 6, 32, 34, 64, 96}) {
    const std::int64_t dim = rotary + 3;
    const std::int64_t heads = 3;
    Exact<float> angle = normal(size(rotary) + 1, 3);
    Exact<float> cos(size(rotary));
    Exact<float> sin(size(rotary));
    for (std::int64_t i = 0; i < rotary; ++i) {
      const std::int64_t pair = i % (rotary / 2);
      cos[size(i)] = std::cos(angle[size(pair)]);
      sin[size(i)] = (i < rotary / 2 ? -1.0F : 1.0F) * std::sin(angle[size(pair)]);
    }
    const Exact<float> before = normal(size(heads * dim), 4);
    const auto turned = [&](const mimo_table &table) {
      Exact<float> x = normal(size(heads * dim), 4);
      table.rotate_row(x.get(), heads, dim, rotary, cos.get(), sin.get());
      return x;
    };
    Exact<float> x = turned(*mimo::scalar_table());
    Exact<float> plain = normal(size(heads * dim), 4);
    for (std::int64_t h = 0; h < heads; ++h) {
      for (std::int64_t i = 0; i < dim; ++i) {
        const std::int64_t other = i < rotary / 2 ? i + rotary / 2 : i - rotary / 2;
        const double exact = i >= rotary ? static_cast<double>(plain[size(h * dim + i)])
                                         : static_cast<double>(plain[size(h * dim + i)]) * static_cast<double>(cos[size(i)]) +
                                               static_cast<double>(plain[size(h * dim + other)]) * static_cast<double>(sin[size(i)]);
        REQUIRE(std::fabs(static_cast<double>(x[size(h * dim + i)]) - exact) <= 1e-6, "dim %d", static_cast<int>(i));
      }
    }
    for (const mimo_table *table : fast_tables()) REQUIRE(turned(*table) == x, "%s", table->name);
  }
}

MIMO_CHECK(bf16_rows) {
  const float infinity = std::numeric_limits<float>::infinity();
  const float values[] = {1.0F, -1.0F, 0x1.01p0F, 0x1.03p0F, 0x1.010002p0F, 3.4e38F, infinity, -infinity, 0x1p-140F,
                          -0.0F, 0x1.ffp0F, 0x1.fep0F};
  const std::uint16_t expected[] = {0x3F80, 0xBF80, 0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x7F80, 0xFF80, 0x0000,
                                    0x8000, 0x4000, 0x3FFF};
  std::vector<const mimo_table *> tables = fast_tables();
  tables.push_back(mimo::scalar_table());
  for (const mimo_table *table : tables) {
    for (std::size_t i = 0; i < std::size(values); ++i) {
      std::uint16_t out[16];
      const std::vector<float> row(16, values[i]);
      table->scale_row_bf16(row.data(), 1.0F, 16, out);
      REQUIRE(out[5] == expected[i] || (values[i] == 0x1p-140F && out[5] == 0x0000), "%s: %a gives %x", table->name,
              static_cast<double>(values[i]), static_cast<unsigned>(out[5]));
    }
    std::uint16_t out[1];
    const float nan = std::numeric_limits<float>::quiet_NaN();
    table->scale_row_bf16(&nan, 1.0F, 1, out);
    REQUIRE((out[0] & 0x7FFF) > 0x7F80, "%s: NaN gives %x", table->name, static_cast<unsigned>(out[0]));
  }
}

// Rows with NaN, infinity, nothing, the least and the largest numbers, in heads of odd sizes.
MIMO_CHECK(int8_heads) {
  const float infinity = std::numeric_limits<float>::infinity();
  const float odd[] = {0.0F, 1e-38F, 3e38F, infinity, -infinity, std::numeric_limits<float>::quiet_NaN()};
  for (const std::int64_t dim : kColumns) {
    const std::int64_t heads = 7;
    const std::size_t n = size(heads * dim);
    Exact<float> x = normal(n, static_cast<unsigned>(dim), 3.0F);
    for (std::size_t h = 0; h < std::size(odd); ++h) {
      for (std::size_t d = 0; d < size(dim); d += h < 2 ? 1 : 3) x[h * size(dim) + d] = odd[h];
    }
    const auto coded = [&](const mimo_table &table, Exact<std::int8_t> &codes) {
      Exact<float> scales(size(heads));
      table.quantize_heads(x.get(), 0.707F, heads, dim, codes.get(), scales.get());
      return scales;
    };
    Exact<std::int8_t> codes(n);
    Exact<float> scales = coded(*mimo::scalar_table(), codes);
    for (std::size_t h = 0; h < size(heads); ++h) {
      const float scale = scales[h];
      if (h >= 3 && h < 6) {
        REQUIRE(std::isnan(scale), "head %d of %d dims", static_cast<int>(h), static_cast<int>(dim));
        continue;
      }
      for (std::size_t d = 0; d < size(dim); ++d) {
        const double exact = 0.707 * static_cast<double>(x[h * size(dim) + d]);
        const double error = exact - static_cast<double>(codes[h * size(dim) + d]) * static_cast<double>(scale);
        REQUIRE(std::fabs(error) <= 0.5001 * static_cast<double>(scale) + 1e-30, "head %d", static_cast<int>(h));
      }
    }
    for (const mimo_table *table : fast_tables()) {
      Exact<std::int8_t> others(n);
      Exact<float> found = coded(*table, others);
      for (std::size_t h = 0; h < size(heads); ++h) {
        if (std::isnan(scales[h])) found[h] = scales[h];  // which NaN is not specified
      }
      REQUIRE(found == scales && others == codes, "%s, %d dims", table->name, static_cast<int>(dim));
    }
  }
}

struct Shape {
  std::int64_t T;
  std::int64_t old;  // positions before the step
  std::int64_t shared;
  std::int64_t kv_heads;
  std::int64_t dk;
  std::int64_t dv;
  std::int64_t first;
  std::int64_t window;
};

// T 1..8, between and beyond 64: the three ways keys are cut; odd dims, windows, steps that begin within 16 keys; few
// tiles, which read values in place, and many, which unpack them.
constexpr Shape kShapes[] = {
    {1, 0, 1, 1, 1, 1, 0, 0},      {1, 300, 16, 2, 192, 128, 0, 0}, {1, 1100, 3, 1, 17, 33, 5, 0},
    {1, 127, 8, 1, 64, 64, 0, 128}, {4, 600, 5, 2, 15, 31, 250, 0},  {8, 260, 16, 1, 24, 16, 1, 128},
    {3, 700, 2, 3, 8, 48, 0, 500},  {12, 2100, 7, 1, 16, 16, 0, 0},  {70, 190, 3, 2, 33, 40, 17, 0},
    {90, 130, 8, 1, 20, 17, 3, 33}, {66, 3, 9, 1, 7, 5, 0, 2000},   {2, 290, 8, 1, 192, 128, 40, 129},
    {3, 500, 16, 1, 32, 80, 0, 0},
};

Exact<float> attended(const mimo_table &table, const Shape &s, std::int64_t kind, bool with_sink, bool &alone_is_same) {
  const std::int64_t heads = s.shared * s.kv_heads;
  const std::int64_t keys = s.old + s.T;
  Exact<float> q = normal(size(s.T * heads * s.dk), 1, 2.0F);
  Exact<float> k = normal(size(keys * s.kv_heads * s.dk), 2);
  Exact<float> v = normal(size(keys * s.kv_heads * s.dv), 3);
  Exact<std::uint16_t> short_k(size(keys * s.kv_heads * s.dk));
  Exact<std::uint16_t> short_v(size(keys * s.kv_heads * s.dv));
  table.scale_row_bf16(k.get(), 1.0F, keys * s.kv_heads * s.dk, short_k.get());
  table.scale_row_bf16(v.get(), 1.0F, keys * s.kv_heads * s.dv, short_v.get());
  Exact<std::int8_t> byte_k(size(keys * s.kv_heads * s.dk));
  Exact<std::int8_t> byte_v(size(keys * s.kv_heads * s.dv));
  Exact<float> k_scales(size(keys * s.kv_heads));
  Exact<float> v_scales(size(keys * s.kv_heads));
  table.quantize_heads(k.get(), 1.0F, keys * s.kv_heads, s.dk, byte_k.get(), k_scales.get());
  table.quantize_heads(v.get(), 1.0F, keys * s.kv_heads, s.dv, byte_v.get(), v_scales.get());
  Exact<float> sink = normal(size(heads), 4, 3.0F);
  Exact<float> out(size(s.T * heads * s.dv));
  const mimo_heads facts{heads, s.kv_heads, s.dk, s.dv, s.window, with_sink ? sink.get() : nullptr, kind};
  void *const stored_k[] = {k.get(), short_k.get(), byte_k.get()};
  void *const stored_v[] = {v.get(), short_v.get(), byte_v.get()};
  mimo_kv kv{stored_k[kind], stored_v[kind], k_scales.get(), v_scales.get(), s.first, s.first + s.old, s.T};
  REQUIRE(mimo_attend(&table, &facts, q.get(), heads * s.dk, &kv, 1, out.get(), heads * s.dv) == MIMO_OK, "refused");
  // The last row as a step of its own.
  Exact<float> last(size(heads * s.dv));
  kv.start += s.T - 1;
  kv.T = 1;
  REQUIRE(mimo_attend(&table, &facts, q.get() + (s.T - 1) * heads * s.dk, heads * s.dk, &kv, 1, last.get(),
                      heads * s.dv) == MIMO_OK, "refused");
  alone_is_same = std::memcmp(last.get(), out.get() + (s.T - 1) * heads * s.dv, last.bytes()) == 0;
  return out;
}

MIMO_CHECK(attention) {
  for (const Shape &s : kShapes) {
    for (int how = 0; how < 6; ++how) {
      bool alone = false;
      const Exact<float> expected = attended(*mimo::scalar_table(), s, how % 3, how >= 3, alone);
      REQUIRE(alone || s.T > MIMO_EXACT_ROWS, "T %d: the last row depends on the others", static_cast<int>(s.T));
      for (const mimo_table *table : fast_tables()) {
        bool same = false;
        REQUIRE(attended(*table, s, how % 3, how >= 3, same) == expected, "%s, T %d, %d keys before",
                table->name, static_cast<int>(s.T), static_cast<int>(s.old));
        REQUIRE(same == alone, "%s", table->name);
      }
    }
  }
}

}  // namespace
