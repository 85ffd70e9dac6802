// mimo_matmul: prepares the rows of x, chooses between rows and panels, splits the rows of W over the pool.
// Baseline code only.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <new>

#include "internal.h"

namespace mimo {
namespace {

constexpr std::int64_t kPanelRowsAtOnce = 512;  // rows of x prepared together: bounds the scratch memory
constexpr std::int64_t kRowsAtOnce = 64;        // the same for the rows path
constexpr std::int64_t kGroup = 8;              // rows of W the rows path walks side by side
constexpr std::int64_t kSmallPiece = 1 << 15;   // bytes of the last pieces of work: 2 to 4 microseconds of one core
constexpr std::int64_t kCachedPiece = 1 << 17;  // bytes of weights that stay in a second-level cache beside x

// The rows of W in pieces that get smaller: large ones first, because prefetching runs on within a piece, small ones
// last, so that all threads finish together. Each is a 2 * threads-th part of what is left, in whole groups.
class Pieces {
 public:
  Pieces(std::int64_t rows, std::int64_t row_bytes, std::int64_t threads, std::int64_t most_bytes) noexcept {
    const std::int64_t bytes = std::max<std::int64_t>(row_bytes, 1);
    const std::int64_t least = groups(kSmallPiece / bytes);
    const std::int64_t most = std::max(groups(most_bytes / bytes), groups(rows / kMost * 2));
    while (at_[count_] < rows) {
      const std::int64_t left = rows - at_[count_];
      const std::int64_t part = std::min(most, std::max(least, groups(left / (2 * threads))));
      at_[count_ + 1] = count_ + 1 == kMost ? rows : std::min(rows, at_[count_] + part);
      ++count_;
    }
  }
  std::int64_t count() const noexcept { return count_; }
  std::int64_t begin(std::int64_t piece) const noexcept { return at_[piece]; }
  std::int64_t end(std::int64_t piece) const noexcept { return at_[piece + 1]; }

 private:
  static constexpr std::int64_t kMost = 2048;
  static std::int64_t groups(std::int64_t rows) noexcept {
    return std::max<std::int64_t>((rows + kGroup - 1) / kGroup, 1) * kGroup;
  }
  std::int64_t count_ = 0;
  std::int64_t at_[kMost + 1] = {};
};

struct RowsCall {
  const mimo_table *table;
  const mimo_matrix *w;
  const Pieces *pieces;
  std::int64_t T;
  const void *const *x;
  float *const *y;
};

struct PrepareCall {
  const mimo_table *table;
  std::int64_t format;
  const float *x;
  std::int64_t ldx;
  std::int64_t K;
  unsigned char *prepared;
  std::int64_t bytes;
};

void run_prepare_rows(void *context, std::int64_t begin, std::int64_t end, void *) noexcept {
  const PrepareCall &call = *static_cast<const PrepareCall *>(context);
  for (std::int64_t t = begin; t < end; ++t) {
    call.table->prepare_row(call.format, call.x + t * call.ldx, call.K, call.prepared + t * call.bytes);
  }
}

// All rows of x pass over a piece before the next one is read.
void run_rows(void *context, std::int64_t begin, std::int64_t end, void *) noexcept {
  const RowsCall &call = *static_cast<const RowsCall *>(context);
  for (std::int64_t piece = begin; piece < end; ++piece) {
    for (std::int64_t t = 0; t < call.T; t += kExactRows) {
      const RowsJob job{call.w, std::min(call.T - t, kExactRows), call.x + t, call.y + t, reads_in_order()};
      call.table->multiply_rows(job, call.pieces->begin(piece), call.pieces->end(piece));
    }
  }
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

void by_rows(const mimo_table &table, const mimo_matrix &w, const float *x, std::int64_t ldx, std::int64_t T, float *y,
             std::int64_t ldy) {
  const std::int64_t bytes = table.row_bytes(w.format, w.cols);
  auto *memory = static_cast<unsigned char *>(scratch(kSlotX, bytes * std::min(T, kRowsAtOnce)));
  const std::int64_t whole = std::numeric_limits<std::int64_t>::max();
  const Pieces pieces(w.rows, stored_row_bytes(w.format, w.cols), mimo_threads(),
                      T > kExactRows ? kCachedPiece : whole);
  for (std::int64_t t = 0; t < T; t += kRowsAtOnce) {
    const std::int64_t now = std::min(T - t, kRowsAtOnce);
    const void *rows[kRowsAtOnce];
    float *outs[kRowsAtOnce];
    for (std::int64_t i = 0; i < now; ++i) {
      rows[i] = memory + i * bytes;
      outs[i] = y + (t + i) * ldy;
    }
    // Up to kExactRows rows on this thread: a microsecond each, less than waking another one costs.
    PrepareCall prepare{&table, w.format, x + t * ldx, ldx, w.cols, memory, bytes};
    parallel_for(now, kExactRows, run_prepare_rows, &prepare);
    RowsCall call{&table, &w, &pieces, now, rows, outs};
    parallel_for(pieces.count(), 1, run_rows, &call);
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
