// Everything of avx512 but the panels of NF4, MXFP4 and INT8, which use the int8 tiles of AMX (Sapphire Rapids on).
// With MIMO_EMULATION the same text is compiled against plain loops, so that tests can run it on any CPU.
// This has not run on a CPU with AMX: its logic is tested emulated, its instructions assembled. A prototype of the same
// design reached 0.53, 0.96 and 1.02 TOPS with 16, 64 and 256 rows on two cores of a Sapphire Rapids virtual machine.
#include <cstdint>

#include "internal.h"

// Of what it shares with avx512 it uses a part.
#pragma GCC diagnostic ignored "-Wunused-function"
#if defined(MIMO_EMULATION)
#include "avx512_emulation.h"
#include "amx_emulation.h"
#elif defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// gcc 12's own header passes deliberately undefined registers and is warned about for it (gcc bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

#if defined(MIMO_EMULATION) || defined(__x86_64__)

// From here on, and only here, the compiler may use these instructions. No header may be included below this line.
#if defined(MIMO_EMULATION)
#elif defined(__clang__)
#pragma clang attribute push(                                                                                \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,amx-tile,amx-int8"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,amx-tile,amx-int8")
#endif

namespace mimo {
namespace {
namespace amx {

#include "ops_avx512.inc"
#include "dot_avx512.inc"
#include "panels_avx512.inc"
#include "tiles_amx.inc"
#include "panels_amx.inc"

mimo_table make_table() noexcept {
  mimo_table table = *avx512_table();
  table.name = "amx";
  table.panels_from = panels_from;
  table.panels_bytes = panels_bytes;
  table.prepare_panels = prepare_panels;
  table.panels_scratch = panels_scratch;
  table.multiply_panels = multiply_panels;
  table.panel_peak = panel_peak;
  return table;
}

}  // namespace amx
}  // namespace

const mimo_table *amx_table() noexcept {
  static const mimo_table table = amx::make_table();
  return &table;
}

}  // namespace mimo

#if defined(MIMO_EMULATION)
#elif defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace mimo {
const mimo_table *amx_table() noexcept { return nullptr; }
}  // namespace mimo

#endif
