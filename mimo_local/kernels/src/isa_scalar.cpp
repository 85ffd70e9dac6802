// The reference: every operation of generic.inc one lane at a time, on any CPU. All other tables must equal this one
// bit for bit. Its fused multiply-add is computed in double precision, because the C library's own costs a function
// call and, on CPUs without the instruction, a change of rounding mode per element.
#include <cstdint>
#include <cstring>

#include "internal.h"

namespace mimo {
namespace {
namespace scalar {

constexpr const char *kName = "scalar";

#include "ops_scalar.inc"
#define MIMO_BYTES "bytes_scalar.inc"
#define MIMO_DOT "dot_scalar.inc"
#define MIMO_PANELS "panels_scalar.inc"
#include "generic.inc"

}  // namespace scalar
}  // namespace

const mimo_table *scalar_table() noexcept { return &scalar::kTable; }

}  // namespace mimo
