// mimo_matmul: every table against scalar, bit for bit.
#include "check.h"

namespace {

// A stored matrix of random bits of any format, in exactly sized memory.
struct Stored {
  Stored(std::int64_t format, std::int64_t N, std::int64_t K, unsigned seed)
      : codes(size(stored_code_bytes(format, N * K)), 64), scales(size(scale_bytes(format, N, K)), 64) {
    std::mt19937 random(seed);
    for (std::size_t i = 0; i < codes.bytes(); ++i) codes[i] = static_cast<std::uint8_t>(random());
    if (format == MIMO_BF16 || format == MIMO_F32) {  // finite: clear the exponent's highest bit
      const std::size_t each = format == MIMO_BF16 ? 2 : 4;
      for (std::size_t i = each - 1; i < codes.bytes(); i += each) codes[i] &= 0xBF;
    }
    if (format == MIMO_NF4) {
      Exact<std::uint16_t> halves = half_scales(size(N * K / 64), seed);
      std::memcpy(scales.get(), halves.get(), halves.bytes());
    } else if (format == MIMO_MXFP4) {  // all exponents of float32, the denormal one included, but 2^64 and beyond
      for (std::size_t i = 0; i < scales.bytes(); ++i) scales[i] = static_cast<std::uint8_t>(random() % 191);
    } else if (format == MIMO_INT8) {
      Exact<float> floats = normal(size(N), seed);
      std::memcpy(scales.get(), floats.get(), floats.bytes());
    }
    w = matrix(format, codes.get(), scales.get(), N, K);
  }
  static std::int64_t stored_code_bytes(std::int64_t format, std::int64_t n) {
    return format <= MIMO_MXFP4 ? n / 2 : format == MIMO_INT8 ? n : format == MIMO_BF16 ? 2 * n : 4 * n;
  }
  static std::int64_t scale_bytes(std::int64_t format, std::int64_t N, std::int64_t K) {
    return format <= MIMO_MXFP4 ? N * K / 32 : format == MIMO_INT8 ? 4 * N : 0;
  }
  Exact<std::uint8_t> codes;
  Exact<std::uint8_t> scales;
  mimo_matrix w;
};

Exact<float> product(const mimo_table *table, const mimo_matrix &w, const float *x, std::int64_t ldx, std::int64_t T) {
  const std::int64_t ldy = w.rows + 1;
  Exact<float> y(size((T - 1) * ldy + w.rows));
  const std::int32_t status = mimo_matmul(table, &w, x, ldx, T, y.get(), ldy);
  REQUIRE(status == MIMO_OK, "status %d", status);
  return y;
}

bool same_rows(Exact<float> &a, Exact<float> &b, std::int64_t T, std::int64_t N) {
  for (std::int64_t t = 0; t < T; ++t) {
    if (std::memcmp(a.get() + t * (N + 1), b.get() + t * (N + 1), size(N) * sizeof(float)) != 0) return false;
  }
  return true;
}

// Shapes with odd ends of everything: groups of rows, chunks of 1024 columns, pairs of blocks, lanes.
constexpr std::int64_t kManyK[] = {1, 7, 16, 17, 63, 64, 65, 128, 192, 576, 1024, 1088, 1100, 2112};
constexpr std::int64_t kManyN[] = {1, 3, 8, 17, 65};

// Rows [n0, n1) by one table in one order of reading.
Exact<float> rows_product(const mimo_table *table, const mimo_matrix &w, const float *x, std::int64_t T,
                          std::int64_t n0, std::int64_t n1, bool in_order) {
  const std::int64_t bytes = table->row_bytes(w.format, w.cols);
  std::vector<std::uint8_t> memory(size(T * bytes + 64));
  std::uint8_t *prepared = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64);
  Exact<float> out(size(T * (n1 - n0)));
  std::vector<const void *> rows;
  std::vector<float *> to;
  for (std::int64_t t = 0; t < T; ++t) {
    table->prepare_row(w.format, x + t * w.cols, w.cols, prepared + t * bytes);
    rows.push_back(prepared + t * bytes);
    to.push_back(out.get() + t * (n1 - n0) - n0);
  }
  table->multiply_rows({&w, T, rows.data(), to.data(), in_order}, n0, n1);
  return out;
}

// The order in which the weights are read is this machine's affair: no bit depends on it.
MIMO_CHECK(products_orders) {
  unsigned seed = 0;
  for (const std::int64_t format : {MIMO_NF4, MIMO_MXFP4, MIMO_INT8, MIMO_BF16, MIMO_F32}) {
    for (const std::int64_t K : {64, 192, 2048, 2112, 4224}) {
      const std::int64_t N = 21;
      const Stored stored(format, N, K, ++seed);
      Exact<float> x = normal(size(mimo::kExactRows * K), seed);
      for (std::int64_t T = 1; T <= mimo::kExactRows; ++T) {
        const Exact<float> expected = rows_product(mimo::scalar_table(), stored.w, x.get(), T, 2, N, false);
        for (const mimo_table *table : fast_tables()) {
          for (const bool in_order : {false, true}) {
            REQUIRE(rows_product(table, stored.w, x.get(), T, 2, N, in_order) == expected, "%s format %ld K %ld T %ld %d",
                    table->name, static_cast<long>(format), static_cast<long>(K), static_cast<long>(T), in_order);
          }
        }
      }
    }
  }
}

void every_table_equals_scalar(std::int64_t format) {
  unsigned seed = 0;
  for (const std::int64_t N : kManyN) {
    for (const std::int64_t K : kManyK) {
      if (format <= MIMO_MXFP4 && K % 64 != 0) continue;
      if (N > 8 && K > 1100) continue;
      ++seed;
      const std::int64_t most = mimo::kExactRows;  // longer steps: panels_test.cpp
      const std::int64_t ldx = K + seed % 3;
      Exact<float> x = normal(size((most - 1) * ldx + K), seed);
      x[size(seed % K)] *= 1000.0F;
      Stored stored(format, N, K, seed);
      Exact<float> expected = product(mimo::scalar_table(), stored.w, x.get(), ldx, most);
      for (const mimo_table *table : fast_tables()) {
        for (const std::int64_t T : {1, 2, 3, 4, 5, 6, 7, 8}) {
          Exact<float> found = product(table, stored.w, x.get(), ldx, T);
          REQUIRE(same_rows(found, expected, T, N), "%s format %ld N %ld K %ld T %ld", table->name,
                  static_cast<long>(format), static_cast<long>(N), static_cast<long>(K), static_cast<long>(T));
        }
      }
    }
  }
}

MIMO_CHECK(matmul_nf4) { every_table_equals_scalar(MIMO_NF4); }
MIMO_CHECK(matmul_mxfp4) { every_table_equals_scalar(MIMO_MXFP4); }
MIMO_CHECK(matmul_int8) { every_table_equals_scalar(MIMO_INT8); }
MIMO_CHECK(matmul_plain) {
  every_table_equals_scalar(MIMO_BF16);
  every_table_equals_scalar(MIMO_F32);
}

// Zeros, numbers whose scale or its inverse would leave float32, NaN and infinity: the same codes and scales everywhere,
// and what is not finite reaches every product of its row and no other.
MIMO_CHECK(odd_activations) {
  const float values[] = {0.0F, 1e-45F, 1e-38F, 0.9e-36F, 1.1e-36F, 3e38F, std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()};
  const std::int64_t K = 192;
  const std::int64_t N = 9;
  for (const std::int64_t format : {MIMO_NF4, MIMO_MXFP4, MIMO_INT8}) {
    Stored stored(format, N, K, 5);
    for (std::size_t i = 0; i < stored.scales.bytes(); ++i) {  // 0.5 or so
      stored.scales[i] = format == MIMO_MXFP4 ? 126 : i % 2 == 0 && format == MIMO_NF4 ? 0 : 0x38;
    }
    for (const float value : values) {
      Exact<float> x = normal(size(2 * K), 6);
      for (int i = 64; i < 128; ++i) x[size(i)] = value * static_cast<float>(i % 3 - 1);
      Exact<float> expected = product(mimo::scalar_table(), stored.w, x.get(), K, 2);
      const bool finite = std::isfinite(value);
      for (std::int64_t n = 0; n < N; ++n) {
        if (value < 3e38F) REQUIRE(std::isfinite(expected[size(n)]) == finite, "row %ld", static_cast<long>(n));
        REQUIRE(std::isfinite(expected[size(N + 1 + n)]), "the other row");
      }
      for (const mimo_table *table : fast_tables()) {
        Exact<float> found = product(table, stored.w, x.get(), K, 2);
        for (std::int64_t n = 0; n < N; ++n) {
          const float a = found[size(n)];
          const float b = expected[size(n)];
          REQUIRE((std::isnan(a) && std::isnan(b)) || std::memcmp(&a, &b, 4) == 0, "%s %g", table->name,
                  static_cast<double>(value));
        }
      }
    }
  }
}

// E8M0's two ends: 0 is 2^-127, 255 is NaN.
MIMO_CHECK(e8m0_ends) {
  Exact<float> x(64);
  Exact<std::uint8_t> codes(32);
  Exact<std::uint8_t> scales(2);
  for (int i = 0; i < 64; ++i) x[size(i)] = i == 0 ? 127.0F : 0.0F;  // code 127, scale 1
  std::memset(codes.get(), 0x20, 32);                                 // value 1 in even columns
  std::vector<const mimo_table *> tables = fast_tables();
  tables.push_back(mimo::scalar_table());
  for (const mimo_table *table : tables) {
    const mimo_matrix w = matrix(MIMO_MXFP4, codes.get(), scales.get(), 1, 64);
    scales[0] = 0;
    scales[1] = 127;
    REQUIRE(product(table, w, x.get(), 64, 1)[0] == 127.0F * 0x1p-127F, "%s", table->name);
    scales[1] = 255;
    REQUIRE(std::isnan(product(table, w, x.get(), 64, 1)[0]), "%s", table->name);
  }
}

MIMO_CHECK(arguments) {
  const mimo_table *table = mimo_get_table(nullptr);
  Exact<float> x(64, 0);
  Exact<float> y(64, 0);
  Exact<std::uint8_t> codes(32, 0);
  Exact<std::uint16_t> scales(1, 0);
  const auto call = [&](const mimo_table *t, const float *xp, std::int64_t ldx, std::int64_t T, std::int64_t N,
                        std::int64_t K, std::int64_t ldy) {
    const mimo_matrix w = matrix(MIMO_NF4, codes.get(), scales.get(), N, K);
    return mimo_matmul(t, &w, xp, ldx, T, y.get(), ldy);
  };
  std::memset(x.get(), 0, x.bytes());
  scales[0] = 0;
  REQUIRE(call(table, x.get(), 64, 1, 1, 64, 1) == MIMO_OK, "good call");
  REQUIRE(call(nullptr, x.get(), 64, 1, 1, 64, 1) == MIMO_E_ARGUMENT, "no table");
  REQUIRE(call(table, nullptr, 64, 1, 1, 64, 1) == MIMO_E_ARGUMENT, "no x");
  REQUIRE(call(table, x.get(), 63, 1, 1, 64, 1) == MIMO_E_ARGUMENT, "ldx");
  REQUIRE(call(table, x.get(), 64, -1, 1, 64, 1) == MIMO_E_ARGUMENT, "T");
  REQUIRE(call(table, x.get(), 64, 1, -1, 64, 1) == MIMO_E_ARGUMENT, "N");
  REQUIRE(call(table, x.get(), 64, 1, 1, 0, 1) == MIMO_E_ARGUMENT, "K 0");
  REQUIRE(call(table, x.get(), 64, 1, 1, 32, 1) == MIMO_E_ARGUMENT, "K 32");
  REQUIRE(call(table, x.get(), 64, 1, 1, 64, 0) == MIMO_E_ARGUMENT, "ldy");
  REQUIRE(call(table, x.get(), 64, 1, std::int64_t{1} << 58, 64, std::int64_t{1} << 58) == MIMO_E_ARGUMENT, "N * K");
  REQUIRE(call(table, nullptr, 64, 0, 1, 64, 1) == MIMO_OK, "nothing to do");
  const auto odd = reinterpret_cast<const float *>(reinterpret_cast<const char *>(x.get()) + 1);
  REQUIRE(call(table, odd, 64, 1, 1, 64, 1) == MIMO_E_ARGUMENT, "misaligned x");
  REQUIRE(mimo_get_table("avx1024") == nullptr, "unknown table");
}

}  // namespace
