// mimo_matmul: prepares the rows of x, chooses between rows and panels, splits the rows of W over the pool.
// Baseline code only.
#include <algorithm>
#include <cstdint>
#include <new>

#include "internal.h"

namespace mimo {
namespace {

constexpr std::int64_t kPieceBytes = 1 << 15;  // weight bytes of a piece of work: a few microseconds of one core
constexpr std::int64_t kPanelRowsAtOnce = 512;  // rows of x prepared together: bounds the scratch memory

struct RowsCall {
  const mimo_table *table;
  RowsJob job;
};

void run_rows(void *context, std::int64_t begin, std::int64_t end, void *) noexcept {
  const RowsCall &call = *static_cast<const RowsCall *>(context);
  call.table->multiply_rows(call.job, begin, end);
}

struct PanelsCall {
  const mimo_table *table;
  PanelsJob job;
  const float *x;
  std::int64_t ldx;
  void *prepared;
};

void run_prepare(void *context, std::int64_t begin, std::int64_t end, void *) noexcept {
  const PanelsCall &call = *static_cast<const PanelsCall *>(context);
  call.table->prepare_panels(call.job.w->format, call.x, call.ldx, nullptr, call.job.T, call.job.w->cols, begin, end,
                             call.prepared);
}

void run_panels(void *context, std::int64_t begin, std::int64_t end, void *memory) noexcept {
  const PanelsCall &call = *static_cast<const PanelsCall *>(context);
  call.table->multiply_panels(call.job, begin, end, memory);
}

std::int64_t grain_for(std::int64_t row_bytes) noexcept {
  return std::max<std::int64_t>(4, kPieceBytes / std::max<std::int64_t>(row_bytes, 1) / 4 * 4);
}

void by_rows(const mimo_table &table, const mimo_matrix &w, const float *x, std::int64_t ldx, std::int64_t T, float *y,
             std::int64_t ldy) {
  const std::int64_t bytes = table.row_bytes(w.format, w.cols);
  auto *memory = static_cast<unsigned char *>(scratch(kSlotX, bytes * std::min(T, kExactRows)));
  for (std::int64_t t = 0; t < T; t += kExactRows) {
    const std::int64_t now = std::min(T - t, kExactRows);
    const void *rows[kExactRows];
    float *outs[kExactRows];
    for (std::int64_t i = 0; i < now; ++i) {
      rows[i] = memory + i * bytes;
      outs[i] = y + (t + i) * ldy;
      table.prepare_row(w.format, x + (t + i) * ldx, w.cols, memory + i * bytes);
    }
    RowsCall call{&table, {&w, now, rows, outs}};
    parallel_for(w.rows, grain_for(stored_row_bytes(w.format, w.cols)), run_rows, &call);
  }
}

void by_panels(const mimo_table &table, const mimo_matrix &w, const float *x, std::int64_t ldx, std::int64_t T,
               float *y, std::int64_t ldy) {
  for (std::int64_t t = 0; t < T; t += kPanelRowsAtOnce) {
    const std::int64_t now = std::min(T - t, kPanelRowsAtOnce);
    void *prepared = scratch(kSlotX, table.panels_bytes(w.format, now, w.cols));
    PanelsCall call{&table, {&w, now, prepared, y + t * ldy, ldy}, x + t * ldx, ldx, prepared};
    parallel_for(now, 16, run_prepare, &call);
    parallel_for(w.rows, kPanelGrain, run_panels, &call, table.panels_scratch(w.format, w.cols));
  }
}

}  // namespace

void multiply(const mimo_table &table, const mimo_matrix &w, const float *x, std::int64_t ldx, std::int64_t T, float *y,
              std::int64_t ldy) {
  if (T == 0 || w.rows == 0) return;
  if (T >= table.panels_from(w.format)) {
    by_panels(table, w, x, ldx, T, y, ldy);
  } else {
    by_rows(table, w, x, ldx, T, y, ldy);
  }
}

}  // namespace mimo

extern "C" {

int32_t mimo_matmul(const mimo_table *table, const mimo_matrix *w, const float *x, int64_t ldx, int64_t T, float *y,
                    int64_t ldy) noexcept {
  if (table == nullptr || w == nullptr || !mimo::sensible_matrix(*w)) return MIMO_E_ARGUMENT;
  if (!mimo::sensible(T, w->cols) || ldy < w->rows) return MIMO_E_ARGUMENT;
  if (T == 0 || w->rows == 0) return MIMO_OK;
  if (!mimo::sensible_rows(x, ldx, T, w->cols) || !mimo::sensible_rows(y, ldy, T, w->rows)) return MIMO_E_ARGUMENT;
  try {
    mimo::multiply(*table, *w, x, ldx, T, y, ldy);
    return MIMO_OK;
  } catch (const std::bad_alloc &) {
    return MIMO_E_MEMORY;
  } catch (...) {
    return MIMO_E_INTERNAL;
  }
}

}  // extern "C"
