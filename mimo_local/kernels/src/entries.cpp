// The C entry points: check the arguments, prepare what all instruction sets share, split the rows over the pool.
// Baseline code only.
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#include "internal.h"

namespace mimo {
namespace {

constexpr std::int64_t kMostElements = std::numeric_limits<std::int64_t>::max() / 16;
constexpr std::int64_t kRowsAtOnce = 64;       // rows of x prepared together: bounds the scratch memory
constexpr std::int64_t kPieceBytes = 1 << 15;  // weight bytes of a piece of work: a few microseconds of one core

bool aligned(const void *p, std::size_t to) noexcept { return reinterpret_cast<std::uintptr_t>(p) % to == 0; }

bool usable(const void *p, std::size_t to) noexcept { return p != nullptr && aligned(p, to); }

// A matrix of rows x columns elements that exists in memory: sizes not negative, product in range.
bool sensible(std::int64_t rows, std::int64_t columns) noexcept {
  return rows >= 0 && columns > 0 && (rows == 0 || columns <= kMostElements / rows);
}

// Memory of one calling thread that lives until the thread ends, so that a decode step allocates nothing.
class Scratch {
 public:
  Scratch() noexcept = default;
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;

  float *floats(std::int64_t n) {
    const std::size_t bytes = (static_cast<std::size_t>(n) * sizeof(float) + 63) / 64 * 64;
    if (bytes > size_) {
      std::free(memory_);
      size_ = 0;
      memory_ = std::aligned_alloc(64, bytes);
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<float *>(memory_);
  }

 private:
  void *memory_ = nullptr;
  std::size_t size_ = 0;
};

// Rows of x with zeros up to a whole number of lanes.
void copy_padded(const float *x, std::int64_t ldx, std::int64_t T, std::int64_t K, float *out, std::int64_t pitch) {
  for (std::int64_t t = 0; t < T; ++t) {
    float *row = out + t * pitch;
    std::memcpy(row, x + t * ldx, static_cast<std::size_t>(K) * sizeof(float));
    for (std::int64_t k = K; k < pitch; ++k) row[k] = 0.0F;
  }
}

// Rows of x with the even columns of every 32 before the odd ones.
void copy_even_odd(const float *x, std::int64_t ldx, std::int64_t T, std::int64_t K, float *out, std::int64_t pitch) {
  for (std::int64_t t = 0; t < T; ++t) {
    for (std::int64_t k = 0; k < K; k += 32) {
      const float *in = x + t * ldx + k;
      float *to = out + t * pitch + k;
      for (int i = 0; i < 16; ++i) {
        to[i] = in[2 * i];
        to[16 + i] = in[2 * i + 1];
      }
    }
  }
}

std::int64_t grain_for(std::int64_t row_bytes) noexcept {
  const std::int64_t rows = kPieceBytes / (row_bytes > 0 ? row_bytes : 1);
  return rows < 4 ? 4 : rows / 4 * 4;
}

struct MatmulCall {
  MatmulRows rows;
  MatmulJob job;
};

void run_matmul(void *context, std::int64_t begin, std::int64_t end) noexcept {
  const MatmulCall &call = *static_cast<const MatmulCall *>(context);
  call.rows(call.job, begin, end);
}

using Prepare = void (*)(const float *x, std::int64_t ldx, std::int64_t T, std::int64_t K, float *out,
                         std::int64_t pitch);

// `job` holds everything but x, pitch and T.
std::int32_t matmul(MatmulRows rows, Prepare prepare, const float *x, std::int64_t ldx, std::int64_t T, MatmulJob job,
                    std::int64_t row_bytes) noexcept {
  if (T == 0 || job.N == 0) return MIMO_OK;
  try {
    static thread_local Scratch scratch;
    const std::int64_t pitch = (job.K + kLanes - 1) / kLanes * kLanes;
    float *y = job.y;
    for (std::int64_t t = 0; t < T; t += kRowsAtOnce) {
      const std::int64_t now = T - t < kRowsAtOnce ? T - t : kRowsAtOnce;
      float *copy = scratch.floats(now * pitch);
      prepare(x + t * ldx, ldx, now, job.K, copy, pitch);
      job.x = copy;
      job.pitch = pitch;
      job.T = now;
      job.y = y + t * job.ldy;
      MatmulCall call{rows, job};
      parallel_for(job.N, grain_for(row_bytes * ((now + 3) / 4)), run_matmul, &call);
    }
    return MIMO_OK;
  } catch (const std::bad_alloc &) {
    return MIMO_E_MEMORY;
  } catch (...) {
    return MIMO_E_INTERNAL;
  }
}

bool sensible_product(const mimo_table *table, const float *x, std::int64_t ldx, std::int64_t T, std::int64_t N,
                      std::int64_t K, const float *y, std::int64_t ldy) noexcept {
  if (table == nullptr || T < 0 || !sensible(N, K) || ldx < K || ldy < N) return false;
  if (!sensible(T, ldx) || (ldy > 0 && !sensible(T, ldy))) return false;
  return (T == 0 || N == 0) || (usable(x, 4) && usable(y, 4));
}

struct QuantizeCall {
  QuantizeRows rows;
  QuantizeJob job;
  std::atomic<std::int64_t> clamped;
  std::atomic<std::int64_t> bad_row;
};

void run_quantize(void *context, std::int64_t begin, std::int64_t end) noexcept {
  QuantizeCall &call = *static_cast<QuantizeCall *>(context);
  const QuantizeResult result = call.rows(call.job, begin, end);
  call.clamped.fetch_add(result.clamped, std::memory_order_relaxed);
  if (result.bad_row < 0) return;
  std::int64_t first = call.bad_row.load(std::memory_order_relaxed);
  while ((first < 0 || result.bad_row < first) &&
         !call.bad_row.compare_exchange_weak(first, result.bad_row, std::memory_order_relaxed)) {
  }
}

std::int32_t quantize(QuantizeRows rows, const QuantizeJob &job, std::int64_t N, std::int64_t *info) noexcept {
  if (info != nullptr) *info = 0;
  try {
    QuantizeCall call{rows, job, {0}, {-1}};
    parallel_for(N, grain_for(job.K), run_quantize, &call);
    const std::int64_t bad = call.bad_row.load();
    const std::int64_t clamped = call.clamped.load();
    if (info != nullptr) *info = bad >= 0 ? bad : clamped;
    if (bad >= 0) return MIMO_E_NOT_FINITE;
    return clamped > 0 ? MIMO_CLAMPED : MIMO_OK;
  } catch (...) {
    return MIMO_E_INTERNAL;
  }
}

struct DequantizeCall {
  DequantizeRows rows;
  DequantizeJob job;
};

void run_dequantize(void *context, std::int64_t begin, std::int64_t end) noexcept {
  const DequantizeCall &call = *static_cast<const DequantizeCall *>(context);
  call.rows(call.job, begin, end);
}

std::int32_t dequantize(DequantizeRows rows, const DequantizeJob &job, std::int64_t N) noexcept {
  try {
    DequantizeCall call{rows, job};
    parallel_for(N, grain_for(job.K), run_dequantize, &call);
    return MIMO_OK;
  } catch (...) {
    return MIMO_E_INTERNAL;
  }
}

// Either there are no rows, or the pointers can be used.
bool usable_weights(std::int64_t N, const void *codes, const void *scales, std::size_t scale_size) noexcept {
  return N == 0 || (codes != nullptr && usable(scales, scale_size));
}

bool usable_floats(std::int64_t N, const float *p) noexcept { return N == 0 || usable(p, 4); }

}  // namespace
}  // namespace mimo

extern "C" {

int32_t mimo_nf4_matmul(const mimo_table *table, const float *x, int64_t ldx, int64_t T, const uint8_t *codes,
                        const uint16_t *scales, int64_t N, int64_t K, float *y, int64_t ldy) noexcept {
  if (!mimo::sensible_product(table, x, ldx, T, N, K, y, ldy) || K % mimo::kBlock != 0 ||
      !mimo::usable_weights(N, codes, scales, 2)) {
    return MIMO_E_ARGUMENT;
  }
  const mimo::MatmulJob job{nullptr, 0, 0, codes, scales, N, K, y, ldy};
  return mimo::matmul(table->nf4_matmul, mimo::copy_even_odd, x, ldx, T, job, K / 2);
}

int32_t mimo_int8_matmul(const mimo_table *table, const float *x, int64_t ldx, int64_t T, const int8_t *codes,
                         const float *scales, int64_t N, int64_t K, float *y, int64_t ldy) noexcept {
  if (!mimo::sensible_product(table, x, ldx, T, N, K, y, ldy) || !mimo::usable_weights(N, codes, scales, 4)) {
    return MIMO_E_ARGUMENT;
  }
  const mimo::MatmulJob job{nullptr, 0, 0, codes, scales, N, K, y, ldy};
  return mimo::matmul(table->int8_matmul, mimo::copy_padded, x, ldx, T, job, K);
}

int32_t mimo_bf16_matmul(const mimo_table *table, const float *x, int64_t ldx, int64_t T, const uint16_t *weight,
                         int64_t N, int64_t K, float *y, int64_t ldy) noexcept {
  if (!mimo::sensible_product(table, x, ldx, T, N, K, y, ldy) || (N > 0 && !mimo::usable(weight, 2))) {
    return MIMO_E_ARGUMENT;
  }
  const mimo::MatmulJob job{nullptr, 0, 0, weight, nullptr, N, K, y, ldy};
  return mimo::matmul(table->bf16_matmul, mimo::copy_padded, x, ldx, T, job, 2 * K);
}

int32_t mimo_nf4_quantize(const mimo_table *table, const float *w, int64_t N, int64_t K, uint8_t *codes,
                          uint16_t *scales, int32_t search, int64_t *info) noexcept {
  if (table == nullptr || !mimo::sensible(N, K) || K % mimo::kBlock != 0 ||
      !mimo::usable_weights(N, codes, scales, 2) || !mimo::usable_floats(N, w)) {
    return MIMO_E_ARGUMENT;
  }
  return mimo::quantize(table->nf4_quantize, {w, K, codes, scales, search != 0}, N, info);
}

int32_t mimo_int8_quantize(const mimo_table *table, const float *w, int64_t N, int64_t K, int8_t *codes,
                           float *scales, int32_t search, int64_t *info) noexcept {
  if (table == nullptr || !mimo::sensible(N, K) || !mimo::usable_weights(N, codes, scales, 4) ||
      !mimo::usable_floats(N, w)) {
    return MIMO_E_ARGUMENT;
  }
  return mimo::quantize(table->int8_quantize, {w, K, codes, scales, search != 0}, N, info);
}

int32_t mimo_nf4_dequantize(const mimo_table *table, const uint8_t *codes, const uint16_t *scales, int64_t N,
                            int64_t K, float *out) noexcept {
  if (table == nullptr || !mimo::sensible(N, K) || K % mimo::kBlock != 0 ||
      !mimo::usable_weights(N, codes, scales, 2) || !mimo::usable_floats(N, out)) {
    return MIMO_E_ARGUMENT;
  }
  return mimo::dequantize(table->nf4_dequantize, {codes, scales, K, out}, N);
}

int32_t mimo_int8_dequantize(const mimo_table *table, const int8_t *codes, const float *scales, int64_t N, int64_t K,
                             float *out) noexcept {
  if (table == nullptr || !mimo::sensible(N, K) || !mimo::usable_weights(N, codes, scales, 4) ||
      !mimo::usable_floats(N, out)) {
    return MIMO_E_ARGUMENT;
  }
  return mimo::dequantize(table->int8_dequantize, {codes, scales, K, out}, N);
}

}  // extern "C"
