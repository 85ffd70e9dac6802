// Quantisers and dequantisers: every table against scalar, bit for bit.
#include "check.h"

namespace {

// Weights of every kind a tensor can hold: usual, zeros, subnormal, beyond fp16, near the largest float, on midpoints.
Exact<float> mixed_weights(std::int64_t N, std::int64_t K, unsigned seed) {
  Exact<float> w = normal(size(N * K), seed, 0.02F);
  const float scales[] = {1.0F, 0.0F, 1e-40F, 1e-8F, 1e6F, 5e36F, 3e-5F};
  for (std::int64_t i = 0; i < N * K; ++i) w[size(i)] *= scales[size(i / 64 % 7)];
  for (std::int64_t i = 0; i < N * K; i += 97) {
    w[size(i)] = 0.5F * (mimo::kNf4[i % 15] + mimo::kNf4[i % 15 + 1]);
  }
  if (N * K > 70) w[70] = std::numeric_limits<float>::max();
  return w;
}

MIMO_CHECK(quantize) {
  for (const std::int64_t N : kShapesN) {
    for (const std::int64_t K : kShapesK) {
      Exact<float> w = mixed_weights(N, K, static_cast<unsigned>(N * 1000 + K));
      for (int search = 0; search < 2; ++search) {
        const auto int8 = [&](const mimo_table *table, Exact<std::int8_t> &codes, Exact<float> &scales) {
          const std::int32_t status =
              mimo_quantize(table, MIMO_INT8, w.get(), N, K, codes.get(), scales.get(), search, nullptr);
          REQUIRE(status == MIMO_OK, "status %d", status);
          Exact<float> out(size(N * K));
          const mimo_matrix stored = matrix(MIMO_INT8, codes.get(), scales.get(), N, K);
          REQUIRE(mimo_dequantize(table, &stored, out.get()) == MIMO_OK, "int8");
          return out;
        };
        Exact<std::int8_t> codes(size(N * K));
        Exact<float> scales(size(N));
        const Exact<float> back = int8(mimo::scalar_table(), codes, scales);
        for (const mimo_table *table : fast_tables()) {
          Exact<std::int8_t> codes2(size(N * K));
          Exact<float> scales2(size(N));
          const Exact<float> back2 = int8(table, codes2, scales2);
          REQUIRE(codes == codes2 && scales == scales2 && back == back2, "%s int8 N %ld K %ld search %d", table->name,
                  static_cast<long>(N), static_cast<long>(K), search);
        }
        if (K % 64 != 0) continue;
        const auto nf4 = [&](const mimo_table *table, Exact<std::uint8_t> &packed, Exact<std::uint16_t> &halves) {
          std::int64_t clamped = -1;
          const std::int32_t status =
              mimo_quantize(table, MIMO_NF4, w.get(), N, K, packed.get(), halves.get(), search, &clamped);
          REQUIRE(status == (clamped > 0 ? MIMO_CLAMPED : MIMO_OK), "status %d", status);
          Exact<float> out(size(N * K));
          const mimo_matrix stored = matrix(MIMO_NF4, packed.get(), halves.get(), N, K);
          REQUIRE(mimo_dequantize(table, &stored, out.get()) == MIMO_OK, "nf4");
          return out;
        };
        Exact<std::uint8_t> packed(size(N * K / 2));
        Exact<std::uint16_t> halves(size(N * K / 64));
        const Exact<float> nf4_back = nf4(mimo::scalar_table(), packed, halves);
        for (const mimo_table *table : fast_tables()) {
          Exact<std::uint8_t> packed2(size(N * K / 2));
          Exact<std::uint16_t> halves2(size(N * K / 64));
          const Exact<float> nf4_back2 = nf4(table, packed2, halves2);
          REQUIRE(packed == packed2 && halves == halves2 && nf4_back == nf4_back2, "%s nf4 N %ld K %ld search %d",
                  table->name, static_cast<long>(N), static_cast<long>(K), search);
        }
      }
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
  for (const mimo_table *table : tables) {
    for (const float bad : {std::nanf(""), -std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
      for (const std::int64_t column : {0, 15, 16, 63, 64, 191}) {
        Exact<float> w = normal(size(N * K), 5);
        w[size(123 * K + column)] = bad;
        w[size(299 * K + column)] = bad;
        Exact<std::uint8_t> nf4(size(N * K / 2));
        Exact<std::uint16_t> halves(size(N * K / 64));
        Exact<std::int8_t> int8(size(N * K));
        Exact<float> scales(size(N));
        std::int64_t row = -1;
        REQUIRE(mimo_quantize(table, MIMO_NF4, w.get(), N, K, nf4.get(), halves.get(), 0, &row) == MIMO_E_NOT_FINITE, "nf4");
        REQUIRE(row == 123, "row %ld", static_cast<long>(row));
        row = -1;
        const std::int32_t status = mimo_quantize(table, MIMO_INT8, w.get(), N, K, int8.get(), scales.get(), 0, &row);
        REQUIRE(status == MIMO_E_NOT_FINITE, "int8");
        REQUIRE(row == 123, "row %ld", static_cast<long>(row));
      }
    }
  }
}

}  // namespace
