// Products of many rows: every table against plain loops over what its panels_*.inc says it computes, bit for bit, in
// odd shapes and with what is not finite; and that a row does not depend on its company.
#include "check.h"

#include <algorithm>

namespace {

// A stored matrix of random bits in exactly sized memory.
struct Stored {
  Stored(std::int64_t format, std::int64_t N, std::int64_t K, unsigned seed)
      : codes(size(N * K * code_bits(format) / 8), 64), scales(size(scale_bytes(format, N, K)), 64) {
    std::mt19937 random(seed);
    for (std::size_t i = 0; i < codes.bytes(); ++i) codes[i] = static_cast<std::uint8_t>(random());
    if (format == MIMO_BF16 || format == MIMO_F32) {  // finite: clear the exponent's highest bit
      const std::size_t each = format == MIMO_BF16 ? 2 : 4;
      for (std::size_t i = each - 1; i < codes.bytes(); i += each) codes[i] &= 0xBF;
    }
    if (format == MIMO_NF4) {
      Exact<std::uint16_t> halves = half_scales(size(N * K / 64), seed);
      const std::size_t row = size(K / 64);
      std::fill(halves.get(), halves.get() + row, std::uint16_t{0});
      if (N > 3) halves[row * 3] = 0x7C00;                        // infinity
      for (std::size_t i = row; i < halves.bytes() / 2; i += 3) halves[i] = static_cast<std::uint16_t>(0x2400 + i % 999);
      std::memcpy(scales.get(), halves.get(), halves.bytes());
    } else if (format == MIMO_MXFP4) {
      for (std::size_t i = 0; i < scales.bytes(); ++i) {
        scales[i] = static_cast<std::uint8_t>(i % 5 == 0 ? random() % 255 : 110 + random() % 16);
      }
      std::fill(scales.get(), scales.get() + K / 32, std::uint8_t{0});  // denormal
      if (N > 3) scales[size(3 * K / 32)] = 255;
    } else if (format == MIMO_INT8) {
      Exact<float> floats = normal(size(N), seed);
      std::memcpy(scales.get(), floats.get(), floats.bytes());
    }
    w = matrix(format, codes.get(), scales.get(), N, K);
  }
  static std::int64_t code_bits(std::int64_t format) {
    return format <= MIMO_MXFP4 ? 4 : format == MIMO_INT8 ? 8 : format == MIMO_BF16 ? 16 : 32;
  }
  static std::int64_t scale_bytes(std::int64_t format, std::int64_t N, std::int64_t K) {
    return format <= MIMO_MXFP4 ? N * K / 32 : format == MIMO_INT8 ? 4 * N : 0;
  }
  Exact<std::uint8_t> codes;
  Exact<std::uint8_t> scales;
  mimo_matrix w;
};

// ---- the reference ----------------------------------------------------------------------------------------------------

constexpr double kE2m1[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6};
const float kNan = std::numeric_limits<float>::quiet_NaN();

float nearest_even(float x) { return std::nearbyint(x); }
int nibble(const mimo_matrix &w, std::int64_t n, std::int64_t k) {
  const int byte = static_cast<const std::uint8_t *>(w.codes)[(n * w.cols + k) / 2];
  return k % 2 == 0 ? byte >> 4 : byte & 15;
}
int byte_code(const mimo_matrix &w, std::int64_t n, std::int64_t k) {
  return static_cast<const std::int8_t *>(w.codes)[n * w.cols + k];
}
float half_value(std::uint16_t h) {
  const double magnitude = (h & 0x7FFF) < 1024 ? std::ldexp(h & 1023, -24)
                                               : std::ldexp(1024 + (h & 1023), (h >> 10 & 31) - 25);
  if ((h & 0x7C00) == 0x7C00) return (h & 1023) != 0 ? kNan : (h >> 15 != 0 ? -1 : 1) * std::numeric_limits<float>::infinity();
  return static_cast<float>(h >> 15 != 0 ? -magnitude : magnitude);
}
float nf4_scale(const mimo_matrix &w, std::int64_t n, std::int64_t block) {
  return half_value(static_cast<const std::uint16_t *>(w.scales)[n * w.cols / 64 + block]);
}
int mxfp4_exponent(const mimo_matrix &w, std::int64_t n, std::int64_t block) {
  return static_cast<const std::uint8_t *>(w.scales)[n * w.cols / 32 + block];
}
float int8_scale(const mimo_matrix &w, std::int64_t n) { return static_cast<const float *>(w.scales)[n]; }

// Codes of a block of x and its scale.
struct Coded {
  std::vector<int> codes;
  float scale;
};
Coded coded(const float *x, std::int64_t count, float most) {
  float largest = 0.0F;
  bool finite = true;
  for (std::int64_t i = 0; i < count; ++i) {
    finite = finite && std::isfinite(x[i]);
    largest = std::max(largest, std::abs(x[i]));
  }
  Coded block{std::vector<int>(size(count)), 0.0F};
  if (!finite) block.scale = kNan;
  if (!finite || largest < 1e-30F) return block;
  const float inverse = most / largest;
  for (std::int64_t i = 0; i < count; ++i) block.codes[size(i)] = static_cast<int>(nearest_even(x[i] * inverse));
  block.scale = largest * (1.0F / most);
  return block;
}

// panels_pairs.inc: a weight as int16, and what the row is multiplied by in the end.
struct Pairs {
  explicit Pairs(const mimo_matrix &matrix_) : w(matrix_) {}
  void row(std::int64_t n) {
    if (w.format == MIMO_NF4) {
      largest = 0.0F;
      for (std::int64_t b = 0; b < w.cols / 64; ++b) {
        const float s = std::abs(nf4_scale(w, n, b));
        largest = std::isfinite(s) ? std::max(largest, s) : kNan;
        if (std::isnan(largest)) break;
      }
      inverse = largest > 0.0F ? 4096.0F / largest : 0.0F;
      finish = largest * (32768.0F / 32767.0F / 4096.0F);
    } else if (w.format == MIMO_MXFP4) {
      exponent = 0;
      for (std::int64_t b = 0; b < w.cols / 32; ++b) exponent = std::max(exponent, mxfp4_exponent(w, n, b));
      finish = exponent == 255 ? kNan : static_cast<float>(std::ldexp(1.0, exponent - 127 - 9));
    } else {
      finish = int8_scale(w, n);
    }
  }
  int weight(std::int64_t n, std::int64_t k) const {
    if (w.format == MIMO_INT8) return byte_code(w, n, k);
    if (std::isnan(finish)) return 0;
    int value = 0;
    int factor = 0;
    if (w.format == MIMO_NF4) {
      value = static_cast<int>(std::lround(mimo::kNf4[nibble(w, n, k)] * 32767.0F));
      factor = static_cast<int>(nearest_even(nf4_scale(w, n, k / 64) * inverse));
    } else {
      value = static_cast<int>(kE2m1[nibble(w, n, k)] * 1024);
      const int below = exponent - mxfp4_exponent(w, n, k / 32);
      factor = below < 15 ? 0x4000 >> below : 0;
    }
    return (value * factor + 0x4000) >> 15;
  }
  float product(std::int64_t n, const float *x) {
    row(n);
    float sum = 0.0F;
    for (std::int64_t k = 0; k < w.cols; k += 256) {
      const std::int64_t count = std::min<std::int64_t>(256, w.cols - k);
      const Coded block = coded(x + k, count, 2047.0F);
      std::int32_t dot = 0;
      for (std::int64_t i = 0; i < count; ++i) dot += weight(n, k + i) * block.codes[size(i)];
      sum = std::fma(static_cast<float>(dot), block.scale, sum);
    }
    return sum * finish;
  }
  mimo_matrix w;
  float largest = 0.0F;
  float inverse = 0.0F;
  float finish = 0.0F;
  int exponent = 0;
};

// panels_bytes.inc
struct Bytes {
  explicit Bytes(const mimo_matrix &matrix_) : w(matrix_) {}
  int weight(std::int64_t n, std::int64_t k) const {
    if (w.format == MIMO_INT8) return byte_code(w, n, k);
    const double value = w.format == MIMO_NF4 ? static_cast<double>(mimo::kNf4[nibble(w, n, k)]) * 112.08
                                              : kE2m1[nibble(w, n, k)] * 2;
    return static_cast<int>(std::lround(value));
  }
  float scale(std::int64_t n, std::int64_t k) const {
    if (w.format == MIMO_NF4) return nf4_scale(w, n, k / 64) * (1.0F / 112.08F);
    const int exponent = mxfp4_exponent(w, n, k / 32);
    return exponent == 255 ? kNan : static_cast<float>(std::ldexp(0.5, exponent - 127));
  }
  float product(std::int64_t n, const float *x) const {
    const std::int64_t step = w.format == MIMO_MXFP4 ? 32 : 64;
    float sum = 0.0F;
    for (std::int64_t k = 0; k < w.cols; k += step) {
      const std::int64_t begin = k / 64 * 64;
      const Coded block = coded(x + begin, std::min<std::int64_t>(64, w.cols - begin), 127.0F);
      std::int32_t dot = 0;
      for (std::int64_t i = k; i < std::min(k + step, w.cols); ++i) {
        dot += weight(n, i) * block.codes[size(i - begin)];
      }
      const float part = static_cast<float>(dot);
      sum = std::fma(w.format == MIMO_INT8 ? part : part * scale(n, k), block.scale, sum);
    }
    return w.format == MIMO_INT8 ? sum * int8_scale(w, n) : sum;
  }
  mimo_matrix w;
};

// panels_amx.inc
struct Tiles {
  explicit Tiles(const mimo_matrix &matrix_) : w(matrix_) {}
  // What the blocks of a slice are measured by, and the scale of their weights.
  void slice(std::int64_t n, std::int64_t k0, std::int64_t k1) {
    largest = 0.0F;
    exponent = 0;
    if (w.format == MIMO_NF4) {
      for (std::int64_t k = k0; k < k1 && !std::isnan(largest); k += 64) {
        const float s = std::abs(nf4_scale(w, n, k / 64));
        largest = std::isfinite(s) ? std::max(largest, s) : kNan;
      }
      scale = largest * (1.0F / 127.0F);
    } else if (w.format == MIMO_MXFP4) {
      for (std::int64_t k = k0; k < k1; k += 32) exponent = std::max(exponent, mxfp4_exponent(w, n, k / 32));
      scale = exponent == 255 ? kNan : static_cast<float>(std::ldexp(1.0 / 16, exponent - 127));
    } else {
      scale = int8_scale(w, n);
    }
  }
  int weight(std::int64_t n, std::int64_t k) const {
    if (w.format == MIMO_INT8) return byte_code(w, n, k);
    if (std::isnan(scale) || (w.format == MIMO_NF4 && largest == 0.0F)) return 0;
    if (w.format == MIMO_NF4) {
      const int value = static_cast<int>(std::lround(mimo::kNf4[nibble(w, n, k)] * 2032.0F));
      const int ratio = static_cast<int>(nearest_even(nf4_scale(w, n, k / 64) * (2048.0F / largest)));
      return (value * ratio + 0x4000) >> 15;
    }
    const int below = exponent - mxfp4_exponent(w, n, k / 32);
    return (static_cast<int>(kE2m1[nibble(w, n, k)] * 256) * (below < 12 ? 2048 >> below : 0) + 0x4000) >> 15;
  }
  float product(std::int64_t n, const float *x) {
    float sum = 0.0F;
    for (std::int64_t k = 0; k < w.cols; k += 128) {
      const std::int64_t count = std::min<std::int64_t>(128, w.cols - k);
      const Coded block = coded(x + k, count, 127.0F);
      slice(n, k / 256 * 256, std::min(k / 256 * 256 + 256, w.cols));
      std::int32_t dot = 0;
      for (std::int64_t i = 0; i < count; ++i) dot += weight(n, k + i) * block.codes[size(i)];
      sum = std::fma(static_cast<float>(dot), block.scale * scale, sum);
    }
    return sum;
  }
  mimo_matrix w;
  float largest = 0.0F;
  float scale = 0.0F;
  int exponent = 0;
};

// panels_floats.inc
float plain_product(const mimo_matrix &w, std::int64_t n, const float *x) {
  float total = 0.0F;
  for (std::int64_t k = 0; k < w.cols; k += 128) {
    float sum = 0.0F;
    for (std::int64_t i = k; i < std::min(k + 128, w.cols); ++i) {
      float weight = 0.0F;
      if (w.format == MIMO_F32) {
        weight = static_cast<const float *>(w.codes)[n * w.cols + i];
      } else {
        const std::uint32_t bits = static_cast<const std::uint16_t *>(w.codes)[n * w.cols + i];
        weight = __builtin_bit_cast(float, bits << 16);
      }
      sum = std::fma(x[i], weight, sum);
    }
    total = total + sum;
  }
  return total;
}

float reference(const mimo_table *table, const mimo_matrix &w, std::int64_t n, const float *x) {
  const std::string name = table->name;
  if (w.format == MIMO_BF16 || w.format == MIMO_F32) return plain_product(w, n, x);
  if (name == "scalar" || name == "avx2") return Pairs(w).product(n, x);
  if (name == "amx") return Tiles(w).product(n, x);
  return Bytes(w).product(n, x);
}

// Every table, AMX's tiles emulated.
std::vector<const mimo_table *> panel_tables() {
  std::vector<const mimo_table *> tables = fast_tables();
  tables.push_back(mimo::amx_table());
  tables.push_back(mimo::scalar_table());
  return tables;
}

// ---- calls ------------------------------------------------------------------------------------------------------------

struct Aligned {
  explicit Aligned(std::int64_t bytes) : data(std::aligned_alloc(64, size((bytes + 63) / 64 * 64 + 64))) {}
  ~Aligned() { std::free(data); }
  Aligned(const Aligned &) = delete;
  Aligned &operator=(const Aligned &) = delete;
  void *data;
};

// x prepared in two pieces, W in pieces of `grain` rows; index as prepare_panels takes it.
Exact<float> product(const mimo_table *table, const mimo_matrix &w, const float *x, std::int64_t ldx,
                     const std::int32_t *index, std::int64_t T, std::int64_t grain) {
  const std::int64_t ldy = w.rows + 1;
  Exact<float> y(size((T - 1) * ldy + w.rows));
  const Aligned prepared(table->panels_bytes(w.format, T, w.cols));
  const std::int64_t middle = std::min<std::int64_t>(T, 16);
  table->prepare_panels(w.format, x, ldx, index, T, w.cols, middle, T, prepared.data);
  table->prepare_panels(w.format, x, ldx, index, T, w.cols, 0, middle, prepared.data);
  const Aligned scratch(table->panels_scratch(w.format, w.cols));
  const mimo::PanelsJob job{&w, T, prepared.data, y.get(), ldy};
  for (std::int64_t n = 0; n < w.rows; n += grain) {
    table->multiply_panels(job, n, std::min(n + grain, w.rows), scratch.data);
  }
  return y;
}

bool equal(float a, float b) { return (std::isnan(a) && std::isnan(b)) || std::memcmp(&a, &b, sizeof a) == 0; }

struct Shape {
  std::int64_t N;
  std::int64_t K;
  std::int64_t T;
};
// Odd ends of everything: groups of 16 rows, work items of 64, slices of 128 to 512 columns, blocks of 64, tiles of 6.
constexpr Shape kBlocked[] = {{1, 64, 1},    {16, 64, 9},   {17, 128, 6},  {65, 192, 7},   {33, 256, 17}, {130, 320, 5},
                              {15, 512, 12}, {31, 576, 16}, {47, 640, 33}, {20, 1088, 10}, {5, 64, 261},  {64, 2112, 2}};
constexpr Shape kAny[] = {{1, 1, 9},   {3, 7, 6},    {17, 15, 5},  {16, 17, 7},   {65, 63, 4},  {33, 65, 16},
                          {18, 127, 9}, {5, 255, 10}, {31, 257, 3}, {70, 513, 17}, {9, 1100, 8}, {64, 520, 2}};

void check_format(std::int64_t format) {
  const std::vector<const mimo_table *> tables = panel_tables();
  unsigned seed = 0;
  for (const Shape &shape : format <= MIMO_MXFP4 ? kBlocked : kAny) {
    ++seed;
    const std::int64_t ldx = shape.K + seed % 3;
    const std::int64_t rows = shape.T + 3;  // of x in memory, taken in another order
    Exact<float> x = normal(size((rows - 1) * ldx + shape.K), seed);
    x[size(seed * 7 % shape.K)] *= 1000.0F;
    const float odd[] = {0.0F, 1e-45F, 0.9e-30F, 1.1e-30F, 1e-20F, 1e30F, kNan, std::numeric_limits<float>::infinity()};
    for (std::int64_t t = 0; t < std::min<std::int64_t>(rows, 8) && shape.T > 4; ++t) {
      for (std::int64_t k = 0; k < std::min<std::int64_t>(shape.K, 64); ++k) {
        x[size(t * ldx + k)] = odd[t] * static_cast<float>(k % 3 - 1);
      }
    }
    Exact<std::int32_t> index(size(shape.T));
    for (std::int64_t t = 0; t < shape.T; ++t) index[size(t)] = static_cast<std::int32_t>((t * 5 + 1) % rows);
    Stored stored(format, shape.N, shape.K, seed);
    for (const mimo_table *table : tables) {
      Exact<float> y = product(table, stored.w, x.get(), ldx, index.get(), shape.T, seed % 2 == 0 ? 64 : 128);
      for (std::int64_t t = 0; t < shape.T; ++t) {
        const float *row = x.get() + index[size(t)] * ldx;
        for (std::int64_t n = 0; n < shape.N; ++n) {
          const float expected = reference(table, stored.w, n, row);
          const float found = y[size(t * (shape.N + 1) + n)];
          REQUIRE(equal(found, expected), "%s format %ld N %ld K %ld T %ld: y[%ld][%ld] = %a, not %a", table->name,
                  static_cast<long>(format), static_cast<long>(shape.N), static_cast<long>(shape.K),
                  static_cast<long>(shape.T), static_cast<long>(t), static_cast<long>(n), static_cast<double>(found),
                  static_cast<double>(expected));
        }
      }
    }
  }
}

MIMO_CHECK(panels_nf4) { check_format(MIMO_NF4); }
MIMO_CHECK(panels_mxfp4) { check_format(MIMO_MXFP4); }
MIMO_CHECK(panels_int8) { check_format(MIMO_INT8); }
MIMO_CHECK(panels_plain) {
  check_format(MIMO_BF16);
  check_format(MIMO_F32);
}

// Without an index rows follow each other; alone a row is what it is in company.
MIMO_CHECK(panels_company) {
  const std::int64_t N = 21;
  const std::int64_t K = 320;
  const std::int64_t T = 19;
  Exact<float> x = normal(size(T * K), 4);
  for (std::int64_t format = MIMO_NF4; format <= MIMO_F32; ++format) {
    Stored stored(format, N, K, 8);
    for (const mimo_table *table : panel_tables()) {
      Exact<float> together = product(table, stored.w, x.get(), K, nullptr, T, 64);
      for (std::int64_t t = 0; t < T; ++t) {
        Exact<float> alone = product(table, stored.w, x.get() + t * K, K, nullptr, 1, 64);
        for (std::int64_t n = 0; n < N; ++n) {
          REQUIRE(equal(alone[size(n)], together[size(t * (N + 1) + n)]), "%s format %ld row %ld", table->name,
                  static_cast<long>(format), static_cast<long>(t));
        }
      }
    }
  }
}

// The largest sums there can be: every weight and every x at its end, same signs and opposite ones.
MIMO_CHECK(panels_ends) {
  const std::int64_t K = 576;
  const std::int64_t N = 16;
  Exact<float> x(size(2 * K));
  for (std::int64_t k = 0; k < K; ++k) {
    x[size(k)] = -3.0F;
    x[size(K + k)] = k % 2 == 0 ? 3.0F : -3.0F;
  }
  for (const std::int64_t format : {MIMO_NF4, MIMO_MXFP4, MIMO_INT8}) {
    Stored stored(format, N, K, 1);
    const int lowest = format == MIMO_NF4 ? 0x00 : format == MIMO_MXFP4 ? 0xFF : 0x80;
    std::memset(stored.codes.get(), lowest, stored.codes.bytes());
    for (std::size_t i = 0; i < stored.scales.bytes(); ++i) {
      stored.scales[i] = format == MIMO_MXFP4 ? 127 : i % 2 != 0 && format == MIMO_NF4 ? 0x3C : 0;
    }
    for (std::int64_t n = 0; n < N && format == MIMO_INT8; ++n) {
      const float one = 1.0F;
      std::memcpy(stored.scales.get() + 4 * n, &one, sizeof one);
    }
    const float weight = format == MIMO_NF4 ? -1.0F : format == MIMO_MXFP4 ? -6.0F : -128.0F;
    for (const mimo_table *table : panel_tables()) {
      Exact<float> y = product(table, stored.w, x.get(), K, nullptr, 2, 64);
      const float expected = weight * -3.0F * static_cast<float>(K);
      REQUIRE(std::abs(y[0] - expected) <= 1e-3F * expected, "%s format %ld: %g, not %g", table->name,
              static_cast<long>(format), static_cast<double>(y[0]), static_cast<double>(expected));
      REQUIRE(std::abs(y[size(N + 1)]) <= 1e-3F * expected, "%s format %ld", table->name, static_cast<long>(format));
    }
  }
}

MIMO_CHECK(panels_peak) {
  for (const mimo_table *table : panel_tables()) {
    const double one = table->panel_peak(1);
    REQUIRE(one >= 2.0 * 16 && table->panel_peak(10) == 10 * one, "%s", table->name);
  }
}

}  // namespace
