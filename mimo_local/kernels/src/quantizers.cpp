// mimo_quantize, mimo_quantize_fp8, mimo_dequantize: check the arguments, split the rows over the pool. Baseline code
// only.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

#include "internal.h"

namespace mimo {
namespace {

constexpr std::int64_t kPieceElements = 1 << 15;   // weights of a piece of work
constexpr std::int64_t kCachedElements = 1 << 21;  // 8 MiB of floats: about what a core finds in its caches again

std::int64_t grain_for(std::int64_t K) noexcept { return std::max<std::int64_t>(1, kPieceElements / K); }

// Where the weights come from when they are not floats yet.
struct Fp8Source {
  WidenFp8Row widen;
  const std::uint8_t *w;
  const float *grid;
  const std::int32_t *row_of;
  std::int64_t block;
};

struct QuantizeCall {
  QuantizeRows rows;
  QuantizeJob job;
  std::int64_t code_bytes;  // of a row
  std::int64_t scale_bytes;
  const Fp8Source *fp8;  // or null
  std::atomic<std::int64_t> clamped;
  std::atomic<std::int64_t> bad_row;
};

void note(QuantizeCall &call, const QuantizeResult &result) noexcept {
  if (result.clamped > 0) call.clamped.fetch_add(result.clamped, std::memory_order_relaxed);
  if (result.bad_row < 0) return;
  std::int64_t first = call.bad_row.load(std::memory_order_relaxed);
  while ((first < 0 || result.bad_row < first) &&
         !call.bad_row.compare_exchange_weak(first, result.bad_row, std::memory_order_relaxed)) {
  }
}

void run_quantize(void *context, std::int64_t begin, std::int64_t end, void *) noexcept {
  QuantizeCall &call = *static_cast<QuantizeCall *>(context);
  note(call, call.rows(call.job, begin, end));
}

void run_quantize_fp8(void *context, std::int64_t begin, std::int64_t end, void *memory) noexcept {
  QuantizeCall &call = *static_cast<QuantizeCall *>(context);
  const Fp8Source &fp8 = *call.fp8;
  const std::int64_t K = call.job.K;
  float *row = static_cast<float *>(memory);
  for (std::int64_t n = begin; n < end; ++n) {
    const float *scales = fp8.grid + fp8.row_of[n] * ((K - 1) / fp8.block + 1);
    fp8.widen(fp8.w + n * K, K, scales, fp8.block, row);
    const QuantizeJob job{row, K, static_cast<unsigned char *>(call.job.codes) + n * call.code_bytes,
                          static_cast<unsigned char *>(call.job.scales) + n * call.scale_bytes, call.job.search,
                          call.job.importance};
    QuantizeResult result = call.rows(job, 0, 1);
    if (result.bad_row == 0) result.bad_row = n;
    note(call, result);
  }
}

std::int32_t quantize(const mimo_table &table, const mimo_matrix &out, const float *w, const Fp8Source *fp8, bool search,
                      const float *importance, std::int64_t *info) noexcept {
  if (info != nullptr) *info = 0;
  const bool nibbles = out.format != MIMO_INT8;
  const QuantizeRows rows = out.format == MIMO_NF4     ? table.nf4_quantize
                            : out.format == MIMO_MXFP4 ? table.mxfp4_quantize
                                                       : table.int8_quantize;
  // The contract of the entries is that these are written to; a mimo_matrix only reads.
  const QuantizeJob job{w, out.cols, const_cast<void *>(out.codes), const_cast<void *>(out.scales), search,
                        importance};
  const std::int64_t code_bytes = nibbles ? out.cols / 2 : out.cols;
  const std::int64_t scale_bytes = stored_row_bytes(out.format, out.cols) - code_bytes;
  try {
    QuantizeCall call{rows, job, code_bytes, scale_bytes, fp8, {0}, {-1}};
    if (fp8 == nullptr) {
      parallel_for(out.rows, grain_for(out.cols), run_quantize, &call);
    } else {
      parallel_for(out.rows, grain_for(out.cols), run_quantize_fp8, &call, out.cols * 4);
    }
    const std::int64_t bad = call.bad_row.load();
    const std::int64_t clamped = call.clamped.load();
    if (info != nullptr) *info = bad >= 0 ? bad : clamped;
    if (bad >= 0) return MIMO_E_NOT_FINITE;
    return clamped > 0 ? MIMO_CLAMPED : MIMO_OK;
  } catch (const std::bad_alloc &) {
    return MIMO_E_MEMORY;
  } catch (...) {
    return MIMO_E_INTERNAL;
  }
}

struct FeedbackCall {
  FeedbackRows rows;
  FeedbackJob job;
  std::atomic<std::int64_t> bad_row;
};

void run_feedback(void *context, std::int64_t begin, std::int64_t end, void *) noexcept {
  FeedbackCall &call = *static_cast<FeedbackCall *>(context);
  const std::int64_t bad = call.rows(call.job, begin, end).bad_row;
  if (bad >= 0) call.bad_row.store(bad, std::memory_order_relaxed);
}

bool quantized(std::int64_t format) noexcept {
  return format == MIMO_NF4 || format == MIMO_MXFP4 || format == MIMO_INT8;
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
                      void *scales, int32_t search, const float *importance, int64_t *info) noexcept {
  const mimo_matrix out{codes, scales, N, K, format};
  if (table == nullptr || !mimo::quantized(format) || !mimo::sensible_matrix(out)) return MIMO_E_ARGUMENT;
  if (importance != nullptr && !mimo::usable(importance, 4)) return MIMO_E_ARGUMENT;
  if (N > 0 && !mimo::usable(w, 4)) return MIMO_E_ARGUMENT;
  return mimo::quantize(*table, out, w, nullptr, search != 0, importance, info);
}

int32_t mimo_quantize_fp8(const mimo_table *table, int64_t format, const void *w, const float *grid, int64_t G,
                          const int32_t *row_of, int64_t block, int64_t N, int64_t K, void *codes, void *scales,
                          int32_t search, const float *importance, int64_t *info) noexcept {
  const mimo_matrix out{codes, scales, N, K, format};
  if (table == nullptr || !mimo::quantized(format) || !mimo::sensible_matrix(out)) return MIMO_E_ARGUMENT;
  if (importance != nullptr && !mimo::usable(importance, 4)) return MIMO_E_ARGUMENT;
  const bool there = mimo::usable(w, 1) && mimo::usable(grid, 4) && mimo::usable(row_of, 4);
  if (block <= 0 || (N > 0 && !there)) return MIMO_E_ARGUMENT;
  for (std::int64_t n = 0; n < N; ++n) {
    if (row_of[n] < 0 || row_of[n] >= G) return MIMO_E_ARGUMENT;
  }
  const std::int64_t width = std::min(block, (K + 15) / 16 * 16);
  const mimo::Fp8Source source{table->widen_fp8_row, static_cast<const std::uint8_t *>(w), grid, row_of, width};
  return mimo::quantize(*table, out, nullptr, &source, search != 0, importance, info);
}

int32_t mimo_nf4_feedback(const mimo_table *table, const float *w, int64_t ldw, const float *u, int64_t ldu, int64_t N,
                          void *codes, int64_t code_pitch, void *scales, int64_t scale_pitch,
                          float *lost) noexcept {
  constexpr std::int64_t kWidth = 64;
  if (table == nullptr || N < 0 || ldw < kWidth || ldu < kWidth || code_pitch < 0 || scale_pitch % 2 != 0) {
    return MIMO_E_ARGUMENT;
  }
  const bool there = mimo::usable(w, 4) && mimo::usable(codes, 1) && mimo::usable(scales, 2) && mimo::usable(lost, 4);
  if (!mimo::usable(u, 4) || (N > 0 && !there)) return MIMO_E_ARGUMENT;
  float upper[kWidth * kWidth] = {};
  float inverse[kWidth];
  float importance[kWidth];
  for (std::int64_t j = 0; j < kWidth; ++j) {
    const float diagonal = u[j * ldu + j];
    if (!(diagonal > 0.0F)) return MIMO_E_ARGUMENT;
    inverse[j] = 1.0F / diagonal;
    importance[j] = inverse[j] * inverse[j];
    for (std::int64_t k = j + 1; k < kWidth; ++k) upper[j * kWidth + k] = u[j * ldu + k];
  }
  try {
    const mimo::FeedbackJob job{w,     ldw,        upper,  inverse,     importance,
                                codes, code_pitch, scales, scale_pitch, lost};
    mimo::FeedbackCall call{table->nf4_feedback, job, {-1}};
    mimo::parallel_for(N, mimo::grain_for(kWidth), mimo::run_feedback, &call);
    return call.bad_row.load() >= 0 ? MIMO_E_NOT_FINITE : MIMO_OK;
  } catch (const std::bad_alloc &) {
    return MIMO_E_MEMORY;
  } catch (...) {
    return MIMO_E_INTERNAL;
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
