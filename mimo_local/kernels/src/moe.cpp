// The experts of a layer.
#include "internal.h"

extern "C" {

int32_t mimo_moe(const mimo_table *, const mimo_mlp *, int64_t, const float *, int64_t, int64_t, const int32_t *,
                 const float *, int64_t, float *, int64_t, int32_t) noexcept { return MIMO_E_ARGUMENT; }

}  // extern "C"
