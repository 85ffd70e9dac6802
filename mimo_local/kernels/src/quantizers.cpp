// mimo_quantize and mimo_dequantize: check the arguments, split the rows over the pool. Baseline code only.
#include <algorithm>
#include <atomic>
#include <cstdint>

#include "internal.h"

namespace mimo {
namespace {

constexpr std::int64_t kPieceElements = 1 << 15;   // weights of a piece of work
constexpr std::int64_t kCachedElements = 1 << 21;  // 8 MiB of floats: about what a core finds in its caches again

std::int64_t grain_for(std::int64_t K) noexcept { return std::max<std::int64_t>(1, kPieceElements / K); }

struct QuantizeCall {
  QuantizeRows rows;
  QuantizeJob job;
  std::atomic<std::int64_t> clamped;
  std::atomic<std::int64_t> bad_row;
};

void run_quantize(void *context, std::int64_t begin, std::int64_t end, void *) noexcept {
  QuantizeCall &call = *static_cast<QuantizeCall *>(context);
  const QuantizeResult result = call.rows(call.job, begin, end);
  call.clamped.fetch_add(result.clamped, std::memory_order_relaxed);
  if (result.bad_row < 0) return;
  std::int64_t first = call.bad_row.load(std::memory_order_relaxed);
  while ((first < 0 || result.bad_row < first) &&
         !call.bad_row.compare_exchange_weak(first, result.bad_row, std::memory_order_relaxed)) {
  }
}

std::int32_t quantize(QuantizeRows rows, const QuantizeJob &job, std::int64_t N, std::int64_t *info) noexcept {
  if (info != nullptr) *info = 0;
  try {
    QuantizeCall call{rows, job, {0}, {-1}};
    parallel_for(N, grain_for(job.K), run_quantize, &call);
    const std::int64_t bad = call.bad_row.load();
    const std::int64_t clamped = call.clamped.load();
    if (info != nullptr) *info = bad >= 0 ? bad : clamped;
    if (bad >= 0) return MIMO_E_NOT_FINITE;
    return clamped > 0 ? MIMO_CLAMPED : MIMO_OK;
  } catch (...) {
    return MIMO_E_INTERNAL;
  }
}

struct DequantizeCall {
  DequantizeRows rows;
  DequantizeJob job;
};

void run_dequantize(void *context, std::int64_t begin, std::int64_t end, void *) noexcept {
  const DequantizeCall &call = *static_cast<const DequantizeCall *>(context);
  call.rows(call.job, begin, end);
}

std::int32_t dequantize(DequantizeRows rows, const DequantizeJob &job, std::int64_t N) noexcept {
  try {
    DequantizeCall call{rows, job};
    parallel_for(N, grain_for(job.K), run_dequantize, &call);
    return MIMO_OK;
  } catch (...) {
    return MIMO_E_INTERNAL;
  }
}

// Whether writing around the caches is possible and worth it: whoever reads the output next finds it in them if it is
// small. A cache line must not be written in two parts: rows are whole lines.
bool beyond_caches(const mimo_matrix &w, const float *out) noexcept {
  return w.cols % 16 == 0 && reinterpret_cast<std::uintptr_t>(out) % 64 == 0 && w.rows > kCachedElements / w.cols;
}

}  // namespace
}  // namespace mimo

extern "C" {

int32_t mimo_quantize(const mimo_table *table, int64_t format, const float *w, int64_t N, int64_t K, void *codes,
                      void *scales, int32_t search, int64_t *info) noexcept {
  const mimo_matrix out{codes, scales, N, K, format};
  if (table == nullptr || !mimo::sensible_matrix(out) || (N > 0 && !mimo::usable(w, 4))) return MIMO_E_ARGUMENT;
  const mimo::QuantizeJob job{w, K, codes, scales, search != 0};
  switch (format) {
    case MIMO_NF4:
      return mimo::quantize(table->nf4_quantize, job, N, info);
    case MIMO_MXFP4:
      return mimo::quantize(table->mxfp4_quantize, job, N, info);
    case MIMO_INT8:
      return mimo::quantize(table->int8_quantize, job, N, info);
    default:
      return MIMO_E_ARGUMENT;
  }
}

int32_t mimo_dequantize(const mimo_table *table, const mimo_matrix *w, float *out) noexcept {
  if (table == nullptr || w == nullptr || !mimo::sensible_matrix(*w)) return MIMO_E_ARGUMENT;
  if (w->rows > 0 && !mimo::usable(out, 4)) return MIMO_E_ARGUMENT;
  const mimo::DequantizeJob job{w->codes, w->scales, w->cols, out, mimo::beyond_caches(*w, out)};
  switch (w->format) {
    case MIMO_NF4:
      return mimo::dequantize(table->nf4_dequantize, job, w->rows);
    case MIMO_MXFP4:
      return mimo::dequantize(table->mxfp4_dequantize, job, w->rows);
    case MIMO_INT8:
      return mimo::dequantize(table->int8_dequantize, job, w->rows);
    default:
      return MIMO_E_ARGUMENT;
  }
}

}  // extern "C"
