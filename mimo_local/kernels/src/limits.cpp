// What the machine can do.
#include "internal.h"

extern "C" {

int32_t mimo_read_limit(const mimo_table *, const void *, int64_t, int64_t, double *) noexcept { return MIMO_E_ARGUMENT; }

int32_t mimo_product_limit(const mimo_table *, int64_t, double *, double *) noexcept { return MIMO_E_ARGUMENT; }

}  // extern "C"
