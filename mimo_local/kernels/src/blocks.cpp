// One call per half a layer.
#include "internal.h"

extern "C" {

int32_t mimo_attention(const mimo_table *, const mimo_attention_block *, float *, int64_t, const float *, const float *,
                       const mimo_kv *, int64_t, float *) noexcept { return MIMO_E_ARGUMENT; }

int32_t mimo_mixture(const mimo_table *, const mimo_mlp_block *, float *, int64_t, float *) noexcept { return MIMO_E_ARGUMENT; }

}  // extern "C"
