// Attention and norms: what the entries ask of their arguments and how the work is split. Baseline code only.
#include <algorithm>
#include <cstdint>
#include <new>

#include "internal.h"

namespace mimo {
namespace {

constexpr std::int64_t kNormPiece = 1 << 16;  // floats of a piece of work: a few microseconds of one core

struct NormCall {
  const mimo_table *table;
  const float *x;
  std::int64_t ldx;
  std::int64_t D;
  const float *weight;
  float eps;
  float *y;
  std::int64_t ldy;
};

void run_norm(void *context, std::int64_t begin, std::int64_t end, void *) noexcept {
  const NormCall &call = *static_cast<const NormCall *>(context);
  call.table->rms_norm_rows(call.x + begin * call.ldx, call.ldx, end - begin, call.D, call.weight, call.eps,
                            call.y + begin * call.ldy, call.ldy);
}

}  // namespace

void rms_norm(const mimo_table &table, const float *x, std::int64_t ldx, std::int64_t T, std::int64_t D,
              const float *weight, float eps, float *y, std::int64_t ldy) {
  NormCall call{&table, x, ldx, D, weight, eps, y, ldy};
  parallel_for(T, std::max<std::int64_t>(1, kNormPiece / D), run_norm, &call);
}

void attend(const mimo_table &, const mimo_heads &, const float *, std::int64_t, const mimo_kv *, std::int64_t, float *,
            std::int64_t) {}

}  // namespace mimo

extern "C" {

int32_t mimo_attend(const mimo_table *, const mimo_heads *, const float *, int64_t, const mimo_kv *, int64_t, float *,
                    int64_t) noexcept { return MIMO_E_ARGUMENT; }

int32_t mimo_rms_norm(const mimo_table *table, const float *x, int64_t ldx, int64_t T, int64_t D, const float *weight,
                      float eps, float *y, int64_t ldy) noexcept {
  if (table == nullptr || !mimo::sensible_rows(x, ldx, T, D) || !mimo::sensible_rows(y, ldy, T, D) ||
      !mimo::usable(weight, alignof(float))) {
    return MIMO_E_ARGUMENT;
  }
  try {
    mimo::rms_norm(*table, x, ldx, T, D, weight, eps, y, ldy);
    return MIMO_OK;
  } catch (const std::bad_alloc &) {
    return MIMO_E_MEMORY;
  } catch (...) {
    return MIMO_E_INTERNAL;
  }
}

}  // extern "C"
