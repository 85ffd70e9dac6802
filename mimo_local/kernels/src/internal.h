// What the translation units of the library share: the table of one instruction set, the NF4 code, the pool.
// Contains no function bodies: an inline function here would be compiled once per instruction set and the linker
// would keep any one of them, possibly one an older CPU cannot run.
#ifndef MIMO_INTERNAL_H
#define MIMO_INTERNAL_H

#include <cstdint>

#include "mimo.h"

namespace mimo {

inline constexpr std::int64_t kBlock = 64;  // weights that share one NF4 scale
inline constexpr std::int64_t kLanes = 16;  // partial sums per dot product, on every instruction set

// Quantiles of the normal distribution scaled to [-1, 1], the data type of the QLoRA paper, as bitsandbytes rounds it.
inline constexpr float kNf4[16] = {
    -1.0F,
    -0.6961928009986877F,
    -0.5250730514526367F,
    -0.39491748809814453F,
    -0.28444138169288635F,
    -0.18477343022823334F,
    -0.09105003625154495F,
    0.0F,
    0.07958029955625534F,
    0.16093020141124725F,
    0.24611230194568634F,
    0.33791524171829224F,
    0.44070982933044434F,
    0.5626170039176941F,
    0.7229568362236023F,
    1.0F,
};

// Rows [n0, n1) of W times all T rows of x. `x` is the prepared copy made by entries.cpp: row pitch `pitch`, zeros from
// K up to the pitch; for NF4 the even columns of every 32 come first, then the odd ones (the order nibbles unpack in).
struct MatmulJob {
  const float *x;
  std::int64_t pitch;
  std::int64_t T;
  const void *codes;
  const void *scales;
  std::int64_t N;
  std::int64_t K;
  float *y;
  std::int64_t ldy;
};

struct QuantizeJob {
  const float *w;
  std::int64_t K;
  void *codes;
  void *scales;
  bool search;
};

// What one call of a quantiser saw in its rows.
struct QuantizeResult {
  std::int64_t clamped;  // blocks whose scale did not fit fp16
  std::int64_t bad_row;  // first row with NaN or infinity, or -1
};

struct DequantizeJob {
  const void *codes;
  const void *scales;
  std::int64_t K;
  float *out;
};

using MatmulRows = void (*)(const MatmulJob &, std::int64_t n0, std::int64_t n1) noexcept;
using QuantizeRows = QuantizeResult (*)(const QuantizeJob &, std::int64_t n0, std::int64_t n1) noexcept;
using DequantizeRows = void (*)(const DequantizeJob &, std::int64_t n0, std::int64_t n1) noexcept;

// Each returns its table, or nullptr where the file was compiled for another architecture.
const mimo_table *scalar_table() noexcept;
const mimo_table *avx2_table() noexcept;
const mimo_table *avx512_table() noexcept;

// Threads this process may keep busy, from files under `root` ("" in production): see pool.cpp.
int cgroup_cpu_limit(const char *root) noexcept;
int usable_cores() noexcept;

using Range = void (*)(void *context, std::int64_t begin, std::int64_t end) noexcept;

// Calls fn on [0, n) cut into pieces of `grain` (the last may be shorter), on up to mimo_threads() threads at once.
void parallel_for(std::int64_t n, std::int64_t grain, Range fn, void *context);

}  // namespace mimo

struct mimo_table {
  const char *name;
  mimo::MatmulRows nf4_matmul;
  mimo::MatmulRows int8_matmul;
  mimo::MatmulRows bf16_matmul;
  mimo::QuantizeRows nf4_quantize;
  mimo::QuantizeRows int8_quantize;
  mimo::DequantizeRows nf4_dequantize;
  mimo::DequantizeRows int8_dequantize;
};

#endif
