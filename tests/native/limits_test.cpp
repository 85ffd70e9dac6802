// limits.cpp: every byte is read once whatever the streams, and the figures are what the names say.
#include "check.h"

namespace {

void check_table(const mimo_table *table) {
  const std::size_t n = 7 * 1024;
  Exact<std::uint8_t> data = bits<std::uint8_t>(n, 3);
  std::uint32_t expected = 0;
  for (std::size_t i = 0; i < n; i += 4) {
    std::uint32_t word;
    std::memcpy(&word, data.get() + i, sizeof word);
    expected ^= word;
  }
  for (const std::int64_t streams : {1, 4, 8, 16}) {
    const std::uint32_t sum = table->read_streams(data.get(), static_cast<std::int64_t>(n), streams);
    REQUIRE(sum == expected, "%s, %d streams: %08x instead of %08x", table->name, static_cast<int>(streams), sum,
            expected);
  }
  const double products = table->panel_peak(10);
  REQUIRE(products > 0 && table->panel_peak(20) == 2 * products, "%s: %g in 10 rounds", table->name, products);
}

}  // namespace

MIMO_CHECK(limits) {
  check_table(mimo::scalar_table());
  for (const mimo_table *table : fast_tables()) check_table(table);

  const mimo_table *table = mimo_get_table(nullptr);
  Exact<std::uint8_t> data = bits<std::uint8_t>(1 << 20, 4);
  double seconds = -1;
  double operations = -1;
  for (const std::int32_t threads : {1, 3}) {
    REQUIRE(mimo_set_threads(threads) == MIMO_OK, "%d threads", threads);
    REQUIRE(mimo_read_limit(table, data.get(), 1 << 20, 16, &seconds) == MIMO_OK && seconds > 0, "%g", seconds);
    REQUIRE(mimo_product_limit(table, 1, &operations, &seconds) == MIMO_OK, "status");
    REQUIRE(operations > 0 && seconds > 0, "%g in %g", operations, seconds);
  }
  REQUIRE(mimo_read_limit(table, nullptr, 0, 1, &seconds) == MIMO_OK, "nothing to read");
  REQUIRE(mimo_read_limit(table, data.get(), 1000, 16, &seconds) == MIMO_E_ARGUMENT, "no multiple of 1024");
  REQUIRE(mimo_read_limit(table, data.get(), -1024, 16, &seconds) == MIMO_E_ARGUMENT, "negative");
  REQUIRE(mimo_read_limit(table, data.get(), 1024, 3, &seconds) == MIMO_E_ARGUMENT, "3 streams");
  REQUIRE(mimo_read_limit(table, nullptr, 1024, 4, &seconds) == MIMO_E_ARGUMENT, "no data");
  REQUIRE(mimo_read_limit(table, data.get(), 1024, 4, nullptr) == MIMO_E_ARGUMENT, "no place for the time");
  REQUIRE(mimo_read_limit(nullptr, data.get(), 1024, 4, &seconds) == MIMO_E_ARGUMENT, "no table");
  REQUIRE(mimo_product_limit(table, 0, &operations, &seconds) == MIMO_E_ARGUMENT, "no time");
  REQUIRE(mimo_product_limit(table, 1 << 20, &operations, &seconds) == MIMO_E_ARGUMENT, "17 minutes");
  REQUIRE(mimo_product_limit(table, 1, nullptr, &seconds) == MIMO_E_ARGUMENT, "no place for the count");
}
