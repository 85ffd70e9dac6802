// Quantisers and dequantisers: every table against scalar, bit for bit.
#include "check.h"

namespace {

// Weights of every kind a tensor can hold: usual, zeros, subnormal, beyond fp16, near the largest float, on ties.
Exact<float> mixed_weights(std::int64_t N, std::int64_t K, unsigned seed) {
  Exact<float> w = normal(size(N * K), seed, 0.02F);
  const float scales[] = {1.0F, 0.0F, 1e-40F, 1e-8F, 1e6F, 5e36F, 3e-5F};
  for (std::int64_t i = 0; i < N * K; ++i) w[size(i)] *= scales[size(i / 64 % 7)];
  for (std::int64_t i = 0; i < N * K; i += 97) {
    w[size(i)] = 0.5F * (mimo::kNf4[i % 15] + mimo::kNf4[i % 15 + 1]);
  }
  for (std::int64_t i = 0; i < N * K; i += 89) w[size(i)] = 0.125F * static_cast<float>(i % 97 - 48);
  if (N * K > 70) w[70] = std::numeric_limits<float>::max();
  return w;
}

std::size_t scale_bytes(std::int64_t format, std::int64_t N, std::int64_t K) {
  return size(format == MIMO_NF4 ? N * K / 64 * 2 : format == MIMO_MXFP4 ? N * K / 32 : N * 4);
}

struct Stored {
  Exact<unsigned char> codes;
  Exact<unsigned char> scales;
  Exact<float> back;
  bool operator==(const Stored &other) const {
    return codes == other.codes && scales == other.scales && back == other.back;
  }
};

Stored through(const mimo_table *table, std::int64_t format, Exact<float> &w, std::int64_t N, std::int64_t K, int search) {
  // Two or four bytes into their blocks: as little aligned as the contract allows.
  Stored s{Exact<unsigned char>(size(format == MIMO_INT8 ? N * K : N * K / 2)),
           Exact<unsigned char>(scale_bytes(format, N, K), format == MIMO_INT8 ? 4 : 2), Exact<float>(size(N * K))};
  std::int64_t clamped = -1;
  const std::int32_t status = mimo_quantize(table, format, w.get(), N, K, s.codes.get(), s.scales.get(), search, nullptr, &clamped);
  REQUIRE(status == (clamped > 0 ? MIMO_CLAMPED : MIMO_OK), "%s status %d", table->name, status);
  REQUIRE(clamped == 0 || format == MIMO_NF4, "%ld", static_cast<long>(clamped));
  const mimo_matrix stored = matrix(format, s.codes.get(), s.scales.get(), N, K);
  REQUIRE(mimo_dequantize(table, &stored, s.back.get()) == MIMO_OK, "%s", table->name);
  return s;
}

MIMO_CHECK(quantize) {
  for (const std::int64_t N : kShapesN) {
    for (const std::int64_t K : kShapesK) {
      Exact<float> w = mixed_weights(N, K, static_cast<unsigned>(N * 1000 + K));
      for (const std::int64_t format : {MIMO_NF4, MIMO_MXFP4, MIMO_INT8}) {
        if (format != MIMO_INT8 && K % 64 != 0) continue;
        for (int search = 0; search < 2; ++search) {
          const Stored expected = through(mimo::scalar_table(), format, w, N, K, search);
          for (const mimo_table *table : fast_tables()) {
            REQUIRE(through(table, format, w, N, K, search) == expected, "%s format %ld N %ld K %ld search %d", table->name,
                    static_cast<long>(format), static_cast<long>(N), static_cast<long>(K), search);
          }
        }
      }
    }
  }
}

// Every code beside every scale byte of MXFP4, and every fp16 scale of NF4 but NaN and infinity.
MIMO_CHECK(dequantize) {
  const std::int64_t N = 256;
  const std::int64_t K = 64;
  Exact<std::uint8_t> codes = bits<std::uint8_t>(size(N * K / 2), 1);
  for (std::int64_t i = 0; i < 256; ++i) codes[size(i)] = static_cast<std::uint8_t>(i);
  Exact<std::uint8_t> bytes(size(N * K / 32));
  for (std::int64_t i = 0; i < N * 2; ++i) bytes[size(i)] = static_cast<std::uint8_t>(i / 2 == 255 ? 254 : i / 2);
  Exact<std::uint16_t> halves = half_scales(size(N * K / 64), 2);
  for (const mimo_matrix &w :
       {matrix(MIMO_NF4, codes.get(), halves.get(), N, K), matrix(MIMO_MXFP4, codes.get(), bytes.get(), N, K)}) {
    Exact<float> expected(size(N * K));
    REQUIRE(mimo_dequantize(mimo::scalar_table(), &w, expected.get()) == MIMO_OK, "scalar");
    if (w.format == MIMO_MXFP4) {
      for (std::int64_t i = 0; i < N * K; ++i) {
        const int nibble = codes[size(i / 2)] >> (i % 2 == 0 ? 4 : 0) & 15;
        const double value = std::ldexp(static_cast<double>(mimo::kE2m1[nibble]), bytes[size(i / 32)] - 127);
        REQUIRE(expected[size(i)] == static_cast<float>(value), "%ld", static_cast<long>(i));
      }
    }
    for (const mimo_table *table : fast_tables()) {
      Exact<float> out(size(N * K));
      REQUIRE(mimo_dequantize(table, &w, out.get()) == MIMO_OK, "%s", table->name);
      REQUIRE(out == expected, "%s format %ld", table->name, static_cast<long>(w.format));
    }
  }
  bytes[3] = 255;  // NaN
  const mimo_matrix w = matrix(MIMO_MXFP4, codes.get(), bytes.get(), N, K);
  Exact<float> out(size(N * K));
  REQUIRE(mimo_dequantize(mimo::scalar_table(), &w, out.get()) == MIMO_OK, "scalar");
  for (int i = 64; i < 128; ++i) REQUIRE(std::isnan(out[size(i)]) == (i >= 96), "%d", i);
}

// Outputs beyond the caches are written another way, where they are aligned.
MIMO_CHECK(dequantize_large) {
  const std::int64_t N = 2050;
  const std::int64_t K = 1024;
  Exact<std::uint8_t> codes = bits<std::uint8_t>(size(N * K), 3);
  Exact<std::uint16_t> halves = half_scales(size(N * K / 64), 4);
  Exact<std::uint8_t> bytes = bits<std::uint8_t>(size(N * K / 32), 5);
  for (std::int64_t i = 0; i < N * K / 32; ++i) bytes[size(i)] %= 250;
  Exact<float> scales = normal(size(N), 6);
  const std::unique_ptr<float, void (*)(void *)> aligned(
      static_cast<float *>(std::aligned_alloc(64, size(N * K) * sizeof(float))), std::free);
  Exact<float> apart(size(N * K));
  for (const mimo_matrix &w :
       {matrix(MIMO_NF4, codes.get(), halves.get(), N, K), matrix(MIMO_MXFP4, codes.get(), bytes.get(), N, K),
        matrix(MIMO_INT8, codes.get(), scales.get(), N, K)}) {
    for (const mimo_table *table : fast_tables()) {
      std::memset(aligned.get(), 0xA5, size(N * K) * sizeof(float));
      REQUIRE(mimo_dequantize(table, &w, aligned.get()) == MIMO_OK, "%s", table->name);
      REQUIRE(mimo_dequantize(mimo::scalar_table(), &w, apart.get()) == MIMO_OK, "scalar");
      REQUIRE(std::memcmp(aligned.get(), apart.get(), apart.bytes()) == 0, "%s format %ld", table->name,
              static_cast<long>(w.format));
    }
  }
}

// NaN and infinity in any column are found, and the first row that holds one is named, with several threads too.
MIMO_CHECK(not_finite) {
  const std::int64_t N = 300;
  const std::int64_t K = 192;
  std::vector<const mimo_table *> tables = fast_tables();
  tables.push_back(mimo::scalar_table());
  mimo_set_threads(3);
  Exact<std::uint8_t> codes(size(N * K));
  Exact<float> scales(size(N * K / 32));
  for (const mimo_table *table : tables) {
    for (const float bad : {std::nanf(""), -std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
      for (const std::int64_t column : {0, 15, 16, 63, 64, 191}) {
        Exact<float> w = normal(size(N * K), 5);
        w[size(123 * K + column)] = bad;
        w[size(299 * K + column)] = bad;
        for (const std::int64_t format : {MIMO_NF4, MIMO_MXFP4, MIMO_INT8}) {
          std::int64_t row = -1;
          const std::int32_t status = mimo_quantize(table, format, w.get(), N, K, codes.get(), scales.get(), 0, nullptr, &row);
          REQUIRE(status == MIMO_E_NOT_FINITE, "%s format %ld", table->name, static_cast<long>(format));
          REQUIRE(row == 123, "row %ld", static_cast<long>(row));
        }
      }
    }
  }
}

double fp8_value(std::uint8_t code) {
  const int exponent = code >> 3 & 15;
  const int fraction = code & 7;
  const double magnitude = exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, exponent - 10);
  return (code & 0x80) != 0 ? -magnitude : magnitude;
}

// FP8 with its grid gives what its values give as floats, on every table, whatever the blocks.
MIMO_CHECK(quantize_fp8) {
  std::vector<const mimo_table *> tables = fast_tables();
  tables.push_back(mimo::scalar_table());
  for (const std::int64_t K : kShapesK) {
    for (const std::int64_t block : {std::int64_t{1}, std::int64_t{16}, std::int64_t{50}, std::int64_t{128},
                                     std::numeric_limits<std::int64_t>::max()}) {
      const std::int64_t N = 9;
      const std::int64_t G = 3;
      const std::int64_t columns = (K - 1) / block + 1;
      Exact<std::uint8_t> codes = bits<std::uint8_t>(size(N * K), static_cast<unsigned>(K));
      Exact<float> grid = normal(size(G * columns), 7, 0.01F);
      Exact<std::int32_t> row_of(size(N));
      Exact<float> w(size(N * K));
      for (std::int64_t n = 0; n < N; ++n) {
        row_of[size(n)] = static_cast<std::int32_t>(n * 2 % G);
        for (std::int64_t k = 0; k < K; ++k) {
          std::uint8_t &code = codes[size(n * K + k)];
          if ((code & 0x7F) == 0x7F) code = 0x80;
          const auto value = static_cast<float>(fp8_value(code));
          w[size(n * K + k)] = value * grid[size(row_of[size(n)] * columns + k / block)];
        }
      }
      for (const std::int64_t format : {MIMO_NF4, MIMO_MXFP4, MIMO_INT8}) {
        if (format != MIMO_INT8 && K % 64 != 0) continue;
        const std::size_t code_bytes = size(format == MIMO_INT8 ? N * K : N * K / 2);
        Exact<unsigned char> expected(code_bytes);
        Exact<unsigned char> expected_scales(scale_bytes(format, N, K), 4);
        REQUIRE(mimo_quantize(mimo::scalar_table(), format, w.get(), N, K, expected.get(), expected_scales.get(), 1,
                              nullptr, nullptr) == MIMO_OK,
                "K %ld", static_cast<long>(K));
        for (const mimo_table *table : tables) {
          Exact<unsigned char> out(code_bytes);
          Exact<unsigned char> scales(scale_bytes(format, N, K), 4);
          REQUIRE(mimo_quantize_fp8(table, format, codes.get(), grid.get(), G, row_of.get(), block, N, K, out.get(),
                                    scales.get(), 1, nullptr, nullptr) == MIMO_OK,
                  "%s K %ld", table->name, static_cast<long>(K));
          REQUIRE(out == expected && scales == expected_scales, "%s format %ld K %ld block %ld", table->name,
                  static_cast<long>(format), static_cast<long>(K), static_cast<long>(block));
        }
      }
      // NaN is found, the first row that holds one named; an index outside the grid is refused.
      codes[size(5 * K + K / 2)] = 0xFF;
      codes[size(7 * K)] = 0x7F;
      Exact<unsigned char> out(size(N * K));
      Exact<float> scales(size(N));
      for (const mimo_table *table : tables) {
        std::int64_t row = -1;
        REQUIRE(mimo_quantize_fp8(table, MIMO_INT8, codes.get(), grid.get(), G, row_of.get(), block, N, K, out.get(),
                                  scales.get(), 0, nullptr, &row) == MIMO_E_NOT_FINITE && row == 5,
                "%s row %ld", table->name, static_cast<long>(row));
        REQUIRE(mimo_quantize_fp8(table, MIMO_INT8, codes.get(), grid.get(), G - 1, row_of.get(), block, N, K,
                                  out.get(), scales.get(), 0, nullptr, nullptr) == MIMO_E_ARGUMENT,
                "%s", table->name);
      }
    }
  }
}

}  // namespace
