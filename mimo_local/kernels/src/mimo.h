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
 *   Results     A bit of an output depends on the inputs of its own row only: not on the instruction set, the number of
 *               threads, T, or the rows that ride along. (Which NaN appears, if one does, is not specified.)
 *               The order of operations that makes it so is written down in generic.inc.
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
#define MIMO_ABI_VERSION 1

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

/* The table for `name` ("scalar", "avx2", "avx512"), or NULL if this CPU or its operating system cannot run it.
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

/* y[t*ldy + n] = sum_k x[t*ldx + k] * W[n, k], t < T, n < N, k < K; x and y float32, ldx >= K, ldy >= N (elements).
 * T and N may be 0. All in float32 with fused multiply-add.
 *
 * NF4   K % 64 == 0. codes (N, K/2) bytes: element 2i of a row in the HIGH nibble of byte i. scales (N, K/64) fp16.
 *       W[n, k] = nf4[code] * scales[n, k / 64], nf4 = the 16 float32 values of bitsandbytes.
 * INT8  codes (N, K) int8, scales (N) float32. W[n, k] = codes[n, k] * scales[n].
 * BF16  weight (N, K) bfloat16. */
MIMO_API int32_t mimo_nf4_matmul(const mimo_table *table, const float *x, int64_t ldx, int64_t T, const uint8_t *codes,
                                 const uint16_t *scales, int64_t N, int64_t K, float *y, int64_t ldy) MIMO_NOEXCEPT;
MIMO_API int32_t mimo_int8_matmul(const mimo_table *table, const float *x, int64_t ldx, int64_t T, const int8_t *codes,
                                  const float *scales, int64_t N, int64_t K, float *y, int64_t ldy) MIMO_NOEXCEPT;
MIMO_API int32_t mimo_bf16_matmul(const mimo_table *table, const float *x, int64_t ldx, int64_t T,
                                  const uint16_t *weight, int64_t N, int64_t K, float *y, int64_t ldy) MIMO_NOEXCEPT;

/* w (N, K) float32, contiguous -> codes and scales as above. search == 0: scale from the largest magnitude.
 * search != 0: of several scales around it the one with the least squared error, per block (NF4) or row (INT8);
 * never worse than search == 0. Blocks of zeros get scale 0. info: see mimo_status; may be NULL. */
MIMO_API int32_t mimo_nf4_quantize(const mimo_table *table, const float *w, int64_t N, int64_t K, uint8_t *codes,
                                   uint16_t *scales, int32_t search, int64_t *info) MIMO_NOEXCEPT;
MIMO_API int32_t mimo_int8_quantize(const mimo_table *table, const float *w, int64_t N, int64_t K, int8_t *codes,
                                    float *scales, int32_t search, int64_t *info) MIMO_NOEXCEPT;

/* codes and scales as above -> out (N, K) float32, contiguous. */
MIMO_API int32_t mimo_nf4_dequantize(const mimo_table *table, const uint8_t *codes, const uint16_t *scales, int64_t N,
                                     int64_t K, float *out) MIMO_NOEXCEPT;
MIMO_API int32_t mimo_int8_dequantize(const mimo_table *table, const int8_t *codes, const float *scales, int64_t N,
                                      int64_t K, float *out) MIMO_NOEXCEPT;

/* CRC-32 of zlib and gzip (reflected 0x04C11DB7). seed: 0, or the value of the bytes before. On the caller alone. */
MIMO_API uint32_t mimo_crc32(const void *data, size_t n, uint32_t seed) MIMO_NOEXCEPT;

#ifdef __cplusplus
}
#endif

#endif
