/* C ABI of libmimo_kernels: quantized matrix products, quantisers and a checksum for CPUs.
 *
 * Knows bytes, pointers and integers; nothing of files, tensors or models. Called by mimo_local/kernels/__init__.py
 * through ctypes, and by tests/native. Everything not declared here is hidden.
 *
 * Rules that hold for every entry below
 *   Ownership   The caller owns all memory. The library keeps no pointer after it returns.
 *   Alignment   The element's own (float 4, fp16/bf16 2, bytes 1). Nothing outside the stated shapes is touched.
 *   Aliasing    Outputs overlap neither inputs nor each other.
 *   Threads     Any thread may call at any time; calls that use the pool take turns. A call returns when its work is
 *               done. Usable in a child after fork(): the child starts its own threads when it first needs them.
 *   Errors      Negative status, and the outputs are then unspecified. No C++ exception leaves the library.
 *   Results     A bit of an output depends on the inputs of its own row only: not on the number of threads, nor, in a
 *               step of up to MIMO_EXACT_ROWS rows, on T or the rows that ride along or the instruction set. Longer
 *               steps may take another path (mimo_matmul). The order of operations that makes it so is written down
 *               in the .inc files. (Which NaN appears, if one does, is not specified.)
 */
#ifndef MIMO_H
#define MIMO_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define MIMO_API __attribute__((visibility("default")))
#else
#define MIMO_API
#endif

#ifdef __cplusplus
#define MIMO_NOEXCEPT noexcept
extern "C" {
#else
#define MIMO_NOEXCEPT
#endif

/* Raise with every change of this file that an older caller could notice. */
#define MIMO_ABI_VERSION 5

enum mimo_status {
  MIMO_OK = 0,
  MIMO_CLAMPED = 1,         /* a block's largest weight is beyond fp16: its scale is 65504, *info counts such blocks */
  MIMO_E_ARGUMENT = -1,     /* null or misaligned pointer, negative or impossible size, unknown table */
  MIMO_E_MEMORY = -2,       /* no memory for scratch */
  MIMO_E_NOT_FINITE = -3,   /* NaN or infinity among the weights; *info is the first such row */
  MIMO_E_INTERNAL = -4      /* a bug: an exception was caught at the border */
};

/* One instruction set's functions. Opaque, constant, never freed. */
typedef struct mimo_table mimo_table;

MIMO_API int32_t mimo_abi_version(void) MIMO_NOEXCEPT;

/* The table for `name` ("scalar", "avx2", "avx_vnni", "avx512"), or NULL if this CPU or its operating system cannot run it.
 * NULL as name: the best one, lowered by the environment variable MIMO_ISA as it was when first asked. */
MIMO_API const mimo_table *mimo_get_table(const char *name) MIMO_NOEXCEPT;
MIMO_API const char *mimo_table_name(const mimo_table *table) MIMO_NOEXCEPT;

/* What became of MIMO_ISA if it was not simply obeyed (unknown name, an instruction set this CPU lacks), else "". */
MIMO_API const char *mimo_isa_note(void) MIMO_NOEXCEPT;

/* Threads a call may use, the caller included. Default: min(physical cores in the affinity mask, cgroup CPU quota). */
MIMO_API int32_t mimo_threads(void) MIMO_NOEXCEPT;
MIMO_API int32_t mimo_default_threads(void) MIMO_NOEXCEPT;
/* 1..256; waits for running calls. */
MIMO_API int32_t mimo_set_threads(int32_t n) MIMO_NOEXCEPT;

/* Rows of a step up to which every row is computed as if it were alone. */
#define MIMO_EXACT_ROWS 8

enum mimo_format {
  MIMO_NF4 = 0,   /* cols % 64 == 0. codes (rows, cols/2) bytes: element 2i of a row in the HIGH nibble of byte i.
                     scales (rows, cols/64) fp16. W[n, k] = nf4[code] * scales[n, k / 64]: bitsandbytes' 16 values */
  MIMO_MXFP4 = 1, /* cols % 64 == 0. codes as NF4, an E2M1 value each. scales (rows, cols/32) bytes, E8M0:
                     W[n, k] = e2m1[code] * 2^(scales[n, k / 32] - 127); 255 is NaN */
  MIMO_INT8 = 2,  /* codes (rows, cols) int8, scales (rows) float32. W[n, k] = codes[n, k] * scales[n] */
  MIMO_BF16 = 3,  /* codes (rows, cols) bfloat16, no scales */
  MIMO_F32 = 4    /* codes (rows, cols) float32, no scales */
};

/* A stored matrix W (rows, cols), contiguous. */
typedef struct mimo_matrix {
  const void *codes;
  const void *scales; /* NULL where the format has none */
  int64_t rows;
  int64_t cols;
  int64_t format; /* enum mimo_format */
} mimo_matrix;

/* y[t*ldy + n] = sum_k x[t*ldx + k] * W[n, k], t < T, n < rows, k < cols; x and y float32, ldx >= cols, ldy >= rows
 * (elements). T and rows may be 0. BF16 and F32 are multiplied in float32. NF4, MXFP4 and INT8 meet x rounded to int8
 * with one scale per 64 columns (decode.inc); from a number of rows on that depends on the instruction set, never
 * below MIMO_EXACT_ROWS + 1, weights are unpacked once for all rows (panels.inc states the rounding). */
MIMO_API int32_t mimo_matmul(const mimo_table *table, const mimo_matrix *w, const float *x, int64_t ldx, int64_t T,
                             float *y, int64_t ldy) MIMO_NOEXCEPT;

/* down(silu(gate x) * up x): gate and up (I, D), down (D, I). */
typedef struct mimo_mlp {
  mimo_matrix gate;
  mimo_matrix up;
  mimo_matrix down;
} mimo_mlp;

/* y[t] (+)= sum_j weights[t*K + j] * mlp[ids[t*K + j]](x[t]), x (T, D) and y (T, D) float32 with row pitches ldx, ldy.
 * ids (T, K) int32: -1 leaves the entry out, others < n_mlps and no id twice in a row; NULL, with K = 1: all 0. weights
 * NULL: all 1. All mlps have the shapes of the first one that is used (mlps[0] if none is), their formats may differ;
 * those nobody chose are not looked at. A row adds its experts in ascending order of id. accumulate != 0 adds to y, else
 * y is overwritten. An mlp's weights are read once per call for every 512 of its rows. */
MIMO_API int32_t mimo_moe(const mimo_table *table, const mimo_mlp *mlps, int64_t n_mlps, const float *x, int64_t ldx,
                          int64_t T, const int32_t *ids, const float *weights, int64_t K, float *y, int64_t ldy,
                          int32_t accumulate) MIMO_NOEXCEPT;

/* y[t] = sum_k weights[t*K + k] * parts[t*K + k] over the k with ids[t*K + k] >= 0, in ascending k: what mimo_moe does
 * with its experts' results, for callers that have them one by one. parts (T*K, D), ids and weights (T, K), y (T, D)
 * with row pitch ldy. On the caller alone. */
MIMO_API int32_t mimo_combine(const mimo_table *table, const float *parts, const int32_t *ids, const float *weights,
                              int64_t T, int64_t K, int64_t D, float *y, int64_t ldy) MIMO_NOEXCEPT;

/* Which experts a row goes to (sigmoid scores, an election bias, optional groups). */
typedef struct mimo_router {
  const float *weight; /* (E, D) */
  const float *bias;   /* (E): takes part in the election only */
  int64_t E;
  int64_t D;
  int64_t K;           /* chosen per row */
  int64_t n_group;     /* E % n_group == 0; 1: no groups */
  int64_t topk_group;
  int64_t norm;        /* != 0: the K weights are divided by their sum + 1e-20 */
  float scale;         /* and then multiplied by this */
  float reserved;
} mimo_router;

/* x (T, D) -> ids (T, K) int32 in ascending order, weights (T, K). Of equal candidates the lower id is elected, NaN before
 * every number. With groups, only the topk_group groups with the greatest sums of their two best candidates stand for
 * election: a group has two experts at least, the chosen ones K together. */
MIMO_API int32_t mimo_route(const mimo_table *table, const mimo_router *router, const float *x, int64_t ldx, int64_t T,
                            int32_t *ids, float *weights) MIMO_NOEXCEPT;

enum mimo_kv_type {
  MIMO_KV_F32 = 0,
  MIMO_KV_BF16 = 1,
  MIMO_KV_INT8 = 2 /* codes from -127 to 127 times a float32 scale of the row and head, its largest magnitude / 127 */
};

/* Keys and values of one sequence in one layer: row s is position first + s. k rows (G, dk), v rows (G, dv). */
typedef struct mimo_kv {
  void *k;
  void *v;
  float *k_scales; /* INT8: rows (G), else not looked at */
  float *v_scales;
  int64_t first;
  int64_t start; /* position of this step's first row of the sequence, start >= first */
  int64_t T;     /* its number of rows in this step: positions start .. start + T, already in k and v */
} mimo_kv;

typedef struct mimo_heads {
  int64_t heads;    /* query heads H, H % G == 0: query head a uses key/value head a / (H / G) */
  int64_t kv_heads; /* G */
  int64_t dk;
  int64_t dv;
  int64_t window;    /* a query sees the last `window` positions, its own included; 0: all */
  const float *sink; /* (H) logits that join the denominator, or NULL */
  int64_t kv_type;   /* enum mimo_kv_type of k and v */
} mimo_heads;

/* Causal attention: q (T, H, dk) float32 with row pitch ldq -> out (T, H, dv) with row pitch ldo; scores are scaled by
 * dk^-0.5; softmax in float32. T = sum of the sequences' T, their rows follow each other. INT8 keys meet queries, and
 * INT8 values shares, of 16 bits (attention8.inc). */
MIMO_API int32_t mimo_attend(const mimo_table *table, const mimo_heads *heads, const float *q, int64_t ldq,
                             const mimo_kv *sequences, int64_t n_sequences, float *out, int64_t ldo) MIMO_NOEXCEPT;

/* y[t] = weight * x[t] / sqrt(mean(x[t]^2) + eps), x (T, D), weight (D). y may be x. */
MIMO_API int32_t mimo_rms_norm(const mimo_table *table, const float *x, int64_t ldx, int64_t T, int64_t D,
                               const float *weight, float eps, float *y, int64_t ldy) MIMO_NOEXCEPT;

/* One attention block: x[t] += out(attend(rope(qkv(rms_norm(x[t]))))). The new rows' keys and values are written into
 * the sequences' k and v, from row start - first on. */
typedef struct mimo_attention_block {
  mimo_heads heads;
  mimo_matrix qkv;   /* (H*dk + G*dk + G*dv, D) */
  mimo_matrix out;   /* (D, H*dv) */
  const float *norm; /* (D) */
  float eps;
  float value_scale; /* the values are multiplied by it */
  int64_t rotary;    /* leading dims of a head that are rotated: dim i with i + rotary/2 */
} mimo_attention_block;

/* x (T, D) float32, contiguous, in place. cos, sin (T, rotary) of the rows' positions, sin's first half negated. delta
 * != NULL (T, D): the block's output goes there and x stays. */
MIMO_API int32_t mimo_attention(const mimo_table *table, const mimo_attention_block *block, float *x, int64_t T,
                                const float *cos, const float *sin, const mimo_kv *sequences, int64_t n_sequences,
                                float *delta) MIMO_NOEXCEPT;

/* One mixture or dense block: x[t] += moe(rms_norm(x[t])). router NULL: mlps[0] for every row. */
typedef struct mimo_mlp_block {
  const float *norm; /* (D) */
  const mimo_mlp *mlps;
  int64_t n_mlps;
  const mimo_router *router;
  float eps;
  float reserved;
} mimo_mlp_block;

/* As mimo_attention. */
MIMO_API int32_t mimo_mixture(const mimo_table *table, const mimo_mlp_block *block, float *x, int64_t T,
                              float *delta) MIMO_NOEXCEPT;

/* One layer: an attention block, then a mixture or dense one. rope: which of the call's `ropes` its heads turn by. */
typedef struct mimo_layer {
  const mimo_attention_block *attention;
  const mimo_mlp_block *mlp;
  int64_t rope;
} mimo_layer;

typedef struct mimo_rope {
  const float *cos; /* (T, rotary), as for mimo_attention */
  const float *sin;
} mimo_rope;

/* mimo_attention and mimo_mixture of n_layers layers in turn, x (T, D) in place: what lies between two calls from an
 * interpreter is longer than a small model's products. sequences (n_layers, n_sequences). On an error some layers are
 * done already. */
MIMO_API int32_t mimo_layers(const mimo_table *table, const mimo_layer *layers, int64_t n_layers, float *x, int64_t T,
                             const mimo_rope *ropes, int64_t n_ropes, const mimo_kv *sequences,
                             int64_t n_sequences) MIMO_NOEXCEPT;

/* w (N, K) float32, contiguous -> codes and scales of a NF4, MXFP4 or INT8 matrix. search == 0: scale from the largest
 * magnitude. search != 0: of several scales around it the one with the least squared error, per block or row; never
 * worse than search == 0 but for the rounding of the following. A code is the one nearest to the weight after 4-bit
 * formats rounded weight / scale to a multiple of 1/32767 (NF4) or 1/2048 (MXFP4, ties to the even code; bfloat16
 * weights are hardly touched by it). importance: how much each of the K columns matters, finite, 0 or more, or NULL;
 * with it and search the error of a NF4 block is weighted, no block's is then larger than without, and scales may be
 * negative. Other formats don't look at it. Blocks of zeros get scale 0 (MXFP4: 2^-127, others 2^-116 at least). info: see
 * mimo_status; may be NULL. */
MIMO_API int32_t mimo_quantize(const mimo_table *table, int64_t format, const float *w, int64_t N, int64_t K,
                               void *codes, void *scales, int32_t search, const float *importance,
                               int64_t *info) MIMO_NOEXCEPT;

/* As mimo_quantize, for a checkpoint's FP8: w (N, K) E4M3 (no infinity, 0x7F and 0xFF are NaN), contiguous; weight
 * (n, k) is its code's value times grid[row_of[n]][k / block], one rounding. grid (G, ceil(K / block)) float32; row_of (N)
 * from 0 to G - 1. No float32 copy of w is made beyond a row per thread. */
MIMO_API int32_t mimo_quantize_fp8(const mimo_table *table, int64_t format, const void *w, const float *grid, int64_t G,
                                   const int32_t *row_of, int64_t block, int64_t N, int64_t K, void *codes, void *scales,
                                   int32_t search, const float *importance, int64_t *info) MIMO_NOEXCEPT;

/* NF4 codes of one block of 64 columns of N rows, chosen column by column, each later one making up for what the earlier
 * ones lost. w: the block's first weight, rows ldw apart. u (64, 64), rows ldu apart: the block on the diagonal of the
 * upper Cholesky factor of the inverse of the inputs' second moments; its diagonal is positive, below it nothing is read.
 * codes, scales: of the block in the first row; bytes from row to row. lost (N, 64): what the columns behind the block
 * are to make up for; lost @ (u right of the block) is to be subtracted from them. */
MIMO_API int32_t mimo_nf4_feedback(const mimo_table *table, const float *w, int64_t ldw, const float *u, int64_t ldu,
                                   int64_t N, void *codes, int64_t code_pitch, void *scales, int64_t scale_pitch,
                                   float *lost) MIMO_NOEXCEPT;

/* W -> out (rows, cols) float32, contiguous. */
MIMO_API int32_t mimo_dequantize(const mimo_table *table, const mimo_matrix *w, float *out) MIMO_NOEXCEPT;

/* What this machine can do, for `mimo bench`; both use all of the pool's threads.
 * Reads n bytes once, in `streams` interleaved streams per thread with prefetch; *seconds: the time taken. streams is
 * 1, 4, 8 or 16, n a multiple of 1024. */
MIMO_API int32_t mimo_read_limit(const mimo_table *table, const void *data, int64_t n, int64_t streams,
                                 double *seconds) MIMO_NOEXCEPT;
/* The multiply-adds of this table's panels (products of many rows), from registers only, for about that long.
 * *operations: two per multiply-add. */
MIMO_API int32_t mimo_product_limit(const mimo_table *table, int64_t milliseconds, double *operations,
                                    double *seconds) MIMO_NOEXCEPT;

/* CRC-32 of zlib and gzip (reflected 0x04C11DB7). seed: 0, or the value of the bytes before. On the caller alone. */
MIMO_API uint32_t mimo_crc32(const void *data, size_t n, uint32_t seed) MIMO_NOEXCEPT;

#ifdef __cplusplus
}
#endif

#endif
