// Attention and norms.
#include "internal.h"

extern "C" {

int32_t mimo_attend(const mimo_table *, const mimo_heads *, const float *, int64_t, const mimo_kv *, int64_t, float *,
                    int64_t) noexcept { return MIMO_E_ARGUMENT; }

int32_t mimo_rms_norm(const mimo_table *, const float *, int64_t, int64_t, int64_t, const float *, float, float *, int64_t) noexcept { return MIMO_E_ARGUMENT; }

}  // extern "C"
