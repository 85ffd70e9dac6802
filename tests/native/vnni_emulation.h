// AVX-VNNI's dot product of bytes by its published definition, so that tests can run the avx_vnni table on any CPU with
// AVX2. Included by isa_avx_vnni.cpp when MIMO_EMULATION is defined; no intrinsics, so that it needs no target region.
#ifndef VNNI_EMULATION_H
#define VNNI_EMULATION_H

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// sum + products of four unsigned and signed bytes in each int32 lane.
#define MIMO_EMULATED_DOT_BYTES                                                         \
  __m256i dot_bytes(__m256i sum, __m256i u, __m256i s) noexcept {                       \
    std::int32_t lanes[8];                                                              \
    std::uint8_t a[32];                                                                 \
    std::int8_t b[32];                                                                  \
    std::memcpy(lanes, &sum, sizeof lanes);                                             \
    std::memcpy(a, &u, sizeof a);                                                       \
    std::memcpy(b, &s, sizeof b);                                                       \
    for (int i = 0; i < 32; ++i) lanes[i / 4] += a[i] * b[i];                           \
    std::memcpy(&sum, lanes, sizeof lanes);                                             \
    return sum;                                                                         \
  }                                                                                     \
  /* sum + products of two signed 16-bit numbers in each int32 lane. */                 \
  __m256i dot_words(__m256i sum, __m256i x, __m256i y) noexcept {                       \
    std::int32_t lanes[8];                                                              \
    std::int16_t a[16];                                                                 \
    std::int16_t b[16];                                                                 \
    std::memcpy(lanes, &sum, sizeof lanes);                                             \
    std::memcpy(a, &x, sizeof a);                                                       \
    std::memcpy(b, &y, sizeof b);                                                       \
    for (int i = 0; i < 16; ++i) lanes[i / 2] += a[i] * b[i];                           \
    std::memcpy(&sum, lanes, sizeof lanes);                                             \
    return sum;                                                                         \
  }

#endif
