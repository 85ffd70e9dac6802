// Who is chosen.
#include "internal.h"

extern "C" {

int32_t mimo_route(const mimo_table *, const mimo_router *, const float *, int64_t, int64_t, int32_t *, float *) noexcept { return MIMO_E_ARGUMENT; }

}  // extern "C"
