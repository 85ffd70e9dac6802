// What the machine can do: mimo_read_limit, mimo_product_limit. Baseline code only.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <new>

#include "internal.h"

namespace mimo {
namespace {

constexpr std::int64_t kUnit = 1024;   // bytes: 16 streams of a cache line
constexpr std::int64_t kPiece = 4096;  // units, 4 MiB: half a millisecond of one core, so that all end together
constexpr std::int64_t kRounds = 1 << 14;
constexpr std::int64_t kMostMilliseconds = 10000;

double now() noexcept {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct ReadCall {
  const mimo_table *table;
  const unsigned char *data;
  std::int64_t streams;
  std::atomic<std::uint32_t> sum{0};
};

void run_read(void *context, std::int64_t begin, std::int64_t end, void *) noexcept {
  ReadCall &call = *static_cast<ReadCall *>(context);
  // parallel_for hands out everything at once where there is one thread: the pieces are the same then.
  for (; begin < end; begin += kPiece) {
    const std::int64_t units = std::min(kPiece, end - begin);
    call.sum.fetch_xor(call.table->read_streams(call.data + begin * kUnit, units * kUnit, call.streams),
                       std::memory_order_relaxed);
  }
}

// The multiply-adds that the panels of this table really use: other instructions may be faster or slower.
void run_product(void *context, std::int64_t begin, std::int64_t end, void *) noexcept {
  const mimo_table &table = *static_cast<const mimo_table *>(context);
  for (; begin < end; ++begin) table.panel_peak(kRounds);
}

void products(const mimo_table &table, std::int64_t milliseconds, double *operations, double *seconds) {
  double start = now();
  double done = 0;
  std::int64_t pieces = 0;
  for (; now() - start < 2e-3; ++pieces) done += table.panel_peak(kRounds);  // alone, to find out how much work that is
  const double piece = (now() - start) / static_cast<double>(pieces);
  const double wanted = 1e-3 * static_cast<double>(milliseconds) * mimo_threads() / piece;
  const std::int64_t n = std::max<std::int64_t>(1, static_cast<std::int64_t>(wanted));
  start = now();
  parallel_for(n, 1, run_product, const_cast<mimo_table *>(&table));
  *seconds = now() - start;
  *operations = done / static_cast<double>(pieces) * static_cast<double>(n);
}

}  // namespace
}  // namespace mimo

extern "C" {

int32_t mimo_read_limit(const mimo_table *table, const void *data, int64_t n, int64_t streams,
                        double *seconds) noexcept {
  const bool known = streams == 1 || streams == 4 || streams == 8 || streams == 16;
  if (table == nullptr || seconds == nullptr || !known || n < 0 || n % mimo::kUnit != 0) return MIMO_E_ARGUMENT;
  if (n > 0 && data == nullptr) return MIMO_E_ARGUMENT;
  try {
    mimo::ReadCall call{table, static_cast<const unsigned char *>(data), streams};
    const double start = mimo::now();
    mimo::parallel_for(n / mimo::kUnit, mimo::kPiece, mimo::run_read, &call);
    *seconds = mimo::now() - start;
    return MIMO_OK;
  } catch (const std::bad_alloc &) {
    return MIMO_E_MEMORY;
  } catch (...) {
    return MIMO_E_INTERNAL;
  }
}

int32_t mimo_product_limit(const mimo_table *table, int64_t milliseconds, double *operations,
                           double *seconds) noexcept {
  if (table == nullptr || operations == nullptr || seconds == nullptr) return MIMO_E_ARGUMENT;
  if (milliseconds < 1 || milliseconds > mimo::kMostMilliseconds) return MIMO_E_ARGUMENT;
  try {
    mimo::products(*table, milliseconds, operations, seconds);
    return MIMO_OK;
  } catch (const std::bad_alloc &) {
    return MIMO_E_MEMORY;
  } catch (...) {
    return MIMO_E_INTERNAL;
  }
}

}  // extern "C"
