// mimo_matmul: every table against scalar, bit for bit.
#include "check.h"

namespace {

MIMO_CHECK(matmul) {
  unsigned seed = 0;
  for (const std::int64_t N : kShapesN) {
    for (const std::int64_t K : kShapesK) {
      for (const std::int64_t T : kRows) {
        if (N > 17 && T > 5) continue;
        ++seed;
        const std::int64_t ldx = K + seed % 3;
        const std::int64_t ldy = N + seed % 2;
        Exact<float> x = normal(size((T - 1) * ldx + K), seed);
        Exact<std::int8_t> int8 = bits<std::int8_t>(size(N * K), seed);
        Exact<float> scales = normal(size(N), seed + 1);
        Exact<std::uint16_t> bf16 = bits<std::uint16_t>(size(N * K), seed);
        for (std::size_t i = 0; i < size(N * K); ++i) bf16[i] &= 0xBFFF;  // finite: magnitudes below 2
        Exact<std::uint8_t> nf4 = bits<std::uint8_t>(size(N * K / 2), seed);
        Exact<std::uint16_t> halves = half_scales(size(N * K / 64), seed);
        const auto product = [&](const mimo_table *table, int format) {
          Exact<float> y(size((T - 1) * ldy + N));
          const mimo_matrix w = format == 0   ? matrix(MIMO_INT8, int8.get(), scales.get(), N, K)
                                : format == 1 ? matrix(MIMO_BF16, bf16.get(), nullptr, N, K)
                                              : matrix(MIMO_NF4, nf4.get(), halves.get(), N, K);
          const std::int32_t status =
              mimo_matmul(table, &w, x.get(), ldx, T, y.get(), ldy);
          REQUIRE(status == MIMO_OK, "status %d", status);
          return y;
        };
        for (int format = 0; format < (K % 64 == 0 ? 3 : 2); ++format) {
          const Exact<float> expected = product(mimo::scalar_table(), format);
          for (const mimo_table *table : fast_tables()) {
            REQUIRE(product(table, format) == expected, "%s format %d N %ld K %ld T %ld", table->name, format,
                    static_cast<long>(N), static_cast<long>(K), static_cast<long>(T));
          }
        }
      }
    }
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
