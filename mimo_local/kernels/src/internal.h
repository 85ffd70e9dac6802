// What the translation units of the library share: the table of one instruction set, the NF4 code, the pool.
// Contains no function bodies: an inline function here would be compiled once per instruction set and the linker
// would keep any one of them, possibly one an older CPU cannot run.
#ifndef MIMO_INTERNAL_H
#define MIMO_INTERNAL_H

#include <cstddef>
#include <cstdint>

#include "mimo.h"

// Before a loop over registers: without it they would live in memory.
#if defined(__clang__)
#define MIMO_UNROLL _Pragma("clang loop unroll(full)")
#else
#define MIMO_UNROLL _Pragma("GCC unroll 16")
#endif

// For functions over arrays of registers: called, they would pass them through memory, at half the speed.
#define MIMO_INLINE [[gnu::always_inline]] inline

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

// FP4 of the OCP microscaling formats: sign, two bits of exponent, one of fraction.
inline constexpr float kE2m1[16] = {0.0F,  0.5F,  1.0F,  1.5F,  2.0F,  3.0F,  4.0F,  6.0F,
                                    -0.0F, -0.5F, -1.0F, -1.5F, -2.0F, -3.0F, -4.0F, -6.0F};

// ---- products -------------------------------------------------------------------------------------------------------
// Two ways to multiply. Rows (decode.inc): 1..kExactRows rows of x at a time, each prepared alone into a block of its
// own, weights used as they are stored. Panels (panels.inc): many rows of x prepared together, weights unpacked once.

inline constexpr std::int64_t kExactRows = MIMO_EXACT_ROWS;
inline constexpr std::int64_t kPanelGrain = 64;  // rows of W that panels are handed out in

// y[t][n] = x[t] . W[n] for n in [n0, n1), t < T <= kExactRows; x[t] as prepare_row made it.
struct RowsJob {
  const mimo_matrix *w;
  std::int64_t T;
  const void *const *x;
  float *const *y;
  bool in_order;  // the order in which the weights are read; no bit of y depends on it
  const mimo_matrix *next = nullptr;  // in order: from whose first row on this thread probably reads after these rows
};
using RowBytes = std::int64_t (*)(std::int64_t format, std::int64_t K) noexcept;  // a multiple of 64
using PrepareRow = void (*)(std::int64_t format, const float *x, std::int64_t K, void *out) noexcept;  // out: 64-aligned
using MultiplyRows = void (*)(const RowsJob &, std::int64_t n0, std::int64_t n1) noexcept;

// What decode.inc asks of an instruction set's own inner loops (dot_*.inc): some rows of W times some rows of x over one
// chunk of columns, added to the sums of the lanes.
inline constexpr std::int64_t kChunk = 2048;          // columns
inline constexpr std::int64_t kChunkScales = kChunk / 32;  // scales of a row of W in a chunk, at most
inline constexpr std::int64_t kTileRows = 8;          // rows of W that are streamed side by side
inline constexpr std::int64_t kAheadInOrder = 8192;  // bytes prefetched ahead where weights are read in order
inline constexpr std::int64_t kTileT = 4;             // rows of x that share one decoding of the weights, at most
inline constexpr std::int64_t kSumsPitch = kExactRows * kLanes;
struct DotTile {
  const unsigned char *w;        // first row's bytes of the chunk
  std::int64_t pitch;            // bytes from row to row of W
  const unsigned char *ahead;    // what to prefetch while these bytes are used
  std::int64_t ahead_row;        // bytes from there to what belongs to the next row of W
  std::int64_t ahead_line;       // and to what belongs to the next 64 bytes of each row
  std::int64_t blocks;           // of 64 columns, the last one perhaps padded
  const std::int8_t *x[kTileT];  // codes of the chunk; its sums follow them where the instruction set keeps such
  const float *x_scales[kTileT];  // INT8: one per block
  const float *scales;            // 4-bit formats: products with those of W, [row of W][row of x][kChunkScales]
  float *sums;                    // [row of W at kSumsPitch][row of x][lane]
};

// y[t * ldy + n] = x[t] . W[n] for n in [n0, n1), t < T; x as prepare_panels made it. n0 % kPanelGrain == 0.
struct PanelsJob {
  const mimo_matrix *w;
  std::int64_t T;
  const void *x;
  float *y;
  std::int64_t ldy;
};
// Fewest rows of x from which panels are the faster way, > kExactRows; a huge number where they never are.
using PanelsFrom = std::int64_t (*)(std::int64_t format) noexcept;
using PanelsBytes = std::int64_t (*)(std::int64_t format, std::int64_t T, std::int64_t K) noexcept;
// Prepares rows [t0, t1) of T, t0 % 16 == 0 and t1 % 16 == 0 or == T; row t of x is x + (index ? index[t] : t) * ldx.
using PreparePanels = void (*)(std::int64_t format, const float *x, std::int64_t ldx, const std::int32_t *index,
                               std::int64_t T, std::int64_t K, std::int64_t t0, std::int64_t t1, void *out) noexcept;
using PanelsScratch = std::int64_t (*)(std::int64_t format, std::int64_t K) noexcept;  // bytes one worker needs
using MultiplyPanels = void (*)(const PanelsJob &, std::int64_t n0, std::int64_t n1, void *scratch) noexcept;
// The multiply-adds of multiply_panels from registers alone; returns the operations done, two per multiply-add.
using PanelPeak = double (*)(std::int64_t iterations) noexcept;

// ---- quantisers -----------------------------------------------------------------------------------------------------

struct QuantizeJob {
  const float *w;
  std::int64_t K;
  void *codes;
  void *scales;
  bool search;
  const float *importance;  // of each column, or null: all the same
};

// One block of 64 columns of every row; importance, inverse (64) and u (64, 64), upper and without its diagonal.
struct FeedbackJob {
  const float *w;
  std::int64_t ldw;
  const float *u;
  const float *inverse;  // of its diagonal
  const float *importance;
  void *codes;
  std::int64_t code_pitch;  // bytes from row to row
  void *scales;
  std::int64_t scale_pitch;
  float *lost;  // (N, 64)
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
  bool past;  // out is larger than the caches and its rows are 64-aligned: written around them
};

using QuantizeRows = QuantizeResult (*)(const QuantizeJob &, std::int64_t n0, std::int64_t n1) noexcept;
using FeedbackRows = QuantizeResult (*)(const FeedbackJob &, std::int64_t n0, std::int64_t n1) noexcept;
using DequantizeRows = void (*)(const DequantizeJob &, std::int64_t n0, std::int64_t n1) noexcept;
// K codes of FP8 -> floats, column k times scales[k / block].
using WidenFp8Row = void (*)(const std::uint8_t *codes, std::int64_t K, const float *scales, std::int64_t block,
                             float *out) noexcept;

// ---- between the products: elementwise.inc --------------------------------------------------------------------------

// y[t] = weight * x[t] / sqrt(mean(x[t]^2) + eps), t < T, D columns; y may be x.
using RmsNormRows = void (*)(const float *x, std::int64_t ldx, std::int64_t T, std::int64_t D, const float *weight,
                             float eps, float *y, std::int64_t ldy) noexcept;
// out = silu(gate) * up, n elements; out may be gate or up.
using Swiglu = void (*)(const float *gate, const float *up, std::int64_t n, float *out) noexcept;
using SigmoidRow = void (*)(const float *x, std::int64_t n, float *y) noexcept;          // y may be x
using AddScaled = void (*)(const float *x, float w, std::int64_t n, float *y) noexcept;  // y += w * x, one rounding
using ScaleRow = void (*)(const float *x, float w, std::int64_t n, float *y) noexcept;   // y = w * x; y may be x
// y = w * x, rounded to nearest even a second time, to bfloat16.
using ScaleRowBf16 = void (*)(const float *x, float w, std::int64_t n, std::uint16_t *y) noexcept;
// y = w * x as codes of MIMO_KV_INT8: x (heads, dim) -> codes (heads, dim), scales (heads).
using QuantizeHeads = void (*)(const float *x, float w, std::int64_t heads, std::int64_t dim, std::int8_t *codes,
                               float *scales) noexcept;
// The first `rotary` dims of each head of one row x (heads, dim); cos, sin (rotary), sin's first half negated.
using RotateRow = void (*)(float *x, std::int64_t heads, std::int64_t dim, std::int64_t rotary, const float *cos,
                           const float *sin) noexcept;

// ---- limits: limits.inc ---------------------------------------------------------------------------------------------

// Reads `bytes` bytes as 1, 4, 8 or 16 streams side by side -> the XOR of their 4-byte words. bytes % 1024 == 0.
using ReadStreams = std::uint32_t (*)(const void *data, std::int64_t bytes, std::int64_t streams) noexcept;
// ---- attention: attention.inc, attention.cpp ------------------------------------------------------------------------

inline constexpr std::int64_t kAttendKeys = 256;  // keys of a step
inline constexpr std::int64_t kAttendColumns = 32;  // value columns that are summed side by side
inline constexpr std::int64_t kAttendRows = 128;  // rows at most: their scores in a step are a quarter of a 512 KB cache

// Some rows of queries of one sequence and the keys and values of the head they use.
struct AttendJob {
  const void *k;  // of position `first`
  const void *v;
  std::int64_t k_pitch;  // elements from one position to the next
  std::int64_t v_pitch;
  std::int64_t first;  // stored are the positions [first, end)
  std::int64_t end;
  std::int64_t until;  // positions from here on will not be asked for by this worker
  std::int64_t dk;
  std::int64_t dv;
  std::int64_t type;           // mimo_kv_type
  const float *k_scales;       // of position `first` and this head, INT8
  const float *v_scales;
  std::int64_t scales_pitch;
  std::int64_t rows;           // 1..kAttendRows
  const float *q;              // (rows, dk), already scaled
  const std::int32_t *q_codes;  // INT8: what attend_queries made of q
  const float *q_scales;
  const std::int64_t *low;    // row r sees the positions [low[r], high[r]), all of them stored
  const std::int64_t *high;
};

// What a row has seen so far: the largest score, the sum of e^(score - most), the values weighted with these. At first
// kAttendNothing, 0 and zeros.
struct AttendState {
  float *most;   // (rows)
  float *total;  // (rows)
  float *out;    // (rows, dv rounded up to kAttendColumns)
};
inline constexpr float kAttendNothing = -0x1.fffffep127F;  // not infinity: the difference of two is to be 0

// States of disjoint keys to the rows' results; `most` and `total` (parts, rows rounded up to 16) are used up.
struct AttendMerge {
  std::int64_t rows;
  std::int64_t parts;
  std::int64_t dv;
  float *most;
  const float *total;
  const float *out;   // (parts, rows, dv rounded up to kAttendColumns)
  const float *sink;  // (rows rounded up to 16), -infinity where there is none
  float *const *to;   // (rows) addresses of dv floats
};

using AttendMemory = std::int64_t (*)(std::int64_t rows, std::int64_t dk) noexcept;  // bytes attend_keys needs
// Goes on over the positions [base, base + kAttendKeys), base a multiple of kAttendKeys.
using AttendKeys = void (*)(const AttendJob &, std::int64_t base, const AttendState &, void *memory) noexcept;
// q (rows, dk) as 16-bit codes, two to an int32: codes (rows, dk rounded up to 4, / 2), scales (rows).
using AttendQueries = void (*)(const float *q, std::int64_t rows, std::int64_t dk, std::int32_t *codes,
                               float *scales) noexcept;
using AttendFinish = void (*)(const AttendMerge &) noexcept;

// ---- tables ---------------------------------------------------------------------------------------------------------

// Each returns its table, or nullptr where the file was compiled for another architecture.
const mimo_table *scalar_table() noexcept;
const mimo_table *avx2_table() noexcept;
const mimo_table *avx_vnni_table() noexcept;
const mimo_table *avx512_table() noexcept;
const mimo_table *amx_table() noexcept;

// dispatch.cpp: whether this CPU reads weights faster in the order of their addresses (RowsJob::in_order).
bool reads_in_order() noexcept;

// ---- what the entries share: checks.cpp -----------------------------------------------------------------------------

bool usable(const void *p, std::size_t alignment) noexcept;  // neither null nor misaligned
// A matrix of rows x columns elements that exists in memory: sizes not negative, columns > 0, product in range.
bool sensible(std::int64_t rows, std::int64_t columns) noexcept;
// T rows of `columns` floats with a pitch: all of the above, and the pitch holds a row.
bool sensible_rows(const float *p, std::int64_t pitch, std::int64_t T, std::int64_t columns) noexcept;
// Known format, columns it can hold, pointers present and aligned.
bool sensible_matrix(const mimo_matrix &w) noexcept;
std::int64_t stored_row_bytes(std::int64_t format, std::int64_t cols) noexcept;  // codes and scales of one row

// Memory of the calling thread that lives until the thread ends, so that a decode step allocates nothing. One block per
// slot; asking again with more bytes loses the old content. 64-aligned. Throws std::bad_alloc.
enum Slot : int {
  kSlotX,
  kSlotHidden,
  kSlotOut,
  kSlotBlock,
  kSlotQkv,
  kSlotAttend,
  kSlotAttended,
  kSlotDelta,
  kSlotKv,
  kSlotIds,
  kSlotWeights,
  kSlotPlan,
  kSlotAlone,
  kSlots
};
void *scratch(Slot slot, std::int64_t bytes);

// y = x W^T by whichever way is faster, arguments already checked: what mimo_matmul does. Throws std::bad_alloc.
void multiply(const mimo_table &table, const mimo_matrix &w, const float *x, std::int64_t ldx, std::int64_t T, float *y,
              std::int64_t ldy);

// What mimo_rms_norm and mimo_attend do, arguments already checked. attention.cpp; they throw std::bad_alloc.
void rms_norm(const mimo_table &table, const float *x, std::int64_t ldx, std::int64_t T, std::int64_t D,
              const float *weight, float eps, float *y, std::int64_t ldy);
bool usable_kv(const mimo_heads &heads, const mimo_kv &kv) noexcept;  // its pointers
bool sensible_heads(const mimo_heads &heads, const mimo_kv *sequences, std::int64_t n_sequences) noexcept;
void attend(const mimo_table &table, const mimo_heads &heads, const float *q, std::int64_t ldq, const mimo_kv *sequences,
            std::int64_t n_sequences, float *out, std::int64_t ldo);

// What mimo_moe was asked, arguments checked but for the mlps. D: filled in by mix.
struct Mixture {
  const mimo_table *table;
  const mimo_mlp *mlps;
  std::int64_t n_mlps;
  const float *x;
  std::int64_t ldx;
  std::int64_t T;
  const std::int32_t *ids;
  const float *weights;
  std::int64_t K;
  float *y;
  std::int64_t ldy;
  bool accumulate;
  std::int64_t D;
};
// most_pairs: (row, mlp) pairs whose hidden values are held at once, 0: as many as are good. false: an mlp of another
// shape or without memory behind it. Uses kSlotPlan and kSlotHidden. Throws std::bad_alloc.
bool mix(Mixture call, std::int64_t most_pairs);

// ---- threads: pool.cpp, cores.cpp ----------------------------------------------------------------------------------

// cores.cpp: threads this process may keep busy, from files under `root` ("" in production).
int cgroup_cpu_limit(const char *root) noexcept;
int usable_cores() noexcept;
inline constexpr int kMostThreads = 256;
// The CPUs that `threads` threads, the caller's first, should be kept on, and for each CPU below n_cpus which of them is
// on its core; false: wherever the system likes.
bool worker_homes(int threads, int *cpus, int *home_of, int n_cpus);

// One turn of a loop that waits for another thread of the pool, the i-th: a pause first, then the core is given away.
void relax(int i) noexcept;

// `memory`: the block of this worker, of the size parallel_for was asked for, 64-aligned; content as others left it.
using Range = void (*)(void *context, std::int64_t begin, std::int64_t end, void *memory) noexcept;

// Calls fn on [0, n) cut into pieces of `grain` (the last may be shorter), on up to mimo_threads() threads at once.
// May be called from inside no fn. Throws std::bad_alloc if there is no memory for the workers.
void parallel_for(std::int64_t n, std::int64_t grain, Range fn, void *context, std::int64_t memory_bytes = 0);

}  // namespace mimo

struct mimo_table {
  const char *name;
  // decode.inc
  mimo::RowBytes row_bytes;
  mimo::PrepareRow prepare_row;
  mimo::MultiplyRows multiply_rows;
  // panels.inc
  mimo::PanelsFrom panels_from;
  mimo::PanelsBytes panels_bytes;
  mimo::PreparePanels prepare_panels;
  mimo::PanelsScratch panels_scratch;
  mimo::MultiplyPanels multiply_panels;
  mimo::PanelPeak panel_peak;
  // quantize.inc
  mimo::QuantizeRows nf4_quantize;
  mimo::FeedbackRows nf4_feedback;
  mimo::QuantizeRows mxfp4_quantize;
  mimo::QuantizeRows int8_quantize;
  mimo::DequantizeRows nf4_dequantize;
  mimo::DequantizeRows mxfp4_dequantize;
  mimo::DequantizeRows int8_dequantize;
  // fp8.inc
  mimo::WidenFp8Row widen_fp8_row;
  // elementwise.inc
  mimo::RmsNormRows rms_norm_rows;
  mimo::Swiglu swiglu;
  mimo::SigmoidRow sigmoid_row;
  mimo::AddScaled add_scaled;
  mimo::ScaleRow scale_row;
  mimo::ScaleRowBf16 scale_row_bf16;
  mimo::QuantizeHeads quantize_heads;
  mimo::RotateRow rotate_row;
  // limits.inc
  mimo::ReadStreams read_streams;
  // attention.inc, attention8.inc
  mimo::AttendMemory attend_memory;
  mimo::AttendQueries attend_queries;
  mimo::AttendKeys attend_keys;
  mimo::AttendFinish attend_finish;
};

#endif
