// zlib's CRC-32, which checks what was written to and read from disk. Long runs are folded 64 bytes a step by
// carry-less multiplication where the CPU has it; the rest goes sixteen bytes a step through tables.
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>

#include "mimo.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr std::uint32_t kPolynomial = 0xEDB88320;  // 0x04C11DB7, lowest bit first
using Tables = std::array<std::array<std::uint32_t, 256>, 16>;

constexpr Tables make_tables() {
  Tables tables{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 1) != 0 ? crc >> 1 ^ kPolynomial : crc >> 1;
    tables[0][byte] = crc;
  }
  for (std::size_t i = 1; i < 16; ++i) {  // a byte with i zero bytes behind it
    for (std::size_t byte = 0; byte < 256; ++byte) {
      const std::uint32_t crc = tables[i - 1][byte];
      tables[i][byte] = crc >> 8 ^ tables[0][crc & 0xFF];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

// The four bytes of a word that stands `after` bytes before the end of its sixteen.
std::uint32_t fold(std::uint32_t word, std::size_t after) noexcept {
  return kTables[after + 3][word & 0xFF] ^ kTables[after + 2][word >> 8 & 0xFF] ^
         kTables[after + 1][word >> 16 & 0xFF] ^ kTables[after][word >> 24];
}

// Takes n bytes into the register by tables alone.
std::uint32_t by_tables(const unsigned char *p, std::size_t n, std::uint32_t crc) noexcept {
  static_assert(std::endian::native == std::endian::little, "words are read lowest byte first");
  for (; n >= 16; n -= 16, p += 16) {
    std::uint32_t words[4];
    std::memcpy(words, p, sizeof words);
    crc = fold(words[0] ^ crc, 12) ^ fold(words[1], 8) ^ fold(words[2], 4) ^ fold(words[3], 0);
  }
  for (; n > 0; --n, ++p) crc = crc >> 8 ^ kTables[0][(crc ^ *p) & 0xFF];
  return crc;
}

#if defined(__x86_64__)
#define MIMO_CLMUL __attribute__((target("sse2,pclmul")))

// Moves 128 bits of the message forward: the remainder of x^n modulo the polynomial, one constant per half.
MIMO_CLMUL __m128i shift(__m128i x, __m128i constants) noexcept {
  return _mm_xor_si128(_mm_clmulepi64_si128(x, constants, 0x00), _mm_clmulepi64_si128(x, constants, 0x11));
}

MIMO_CLMUL __m128i load(const unsigned char *p) noexcept {
  return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
}

// The first n bytes, n a multiple of 64 and not 0. What is left of them after folding is a message of sixteen bytes with
// the same remainder, which the tables finish.
MIMO_CLMUL std::uint32_t by_folding(const unsigned char *p, std::size_t n, std::uint32_t crc) noexcept {
  const __m128i by64 = _mm_set_epi64x(0x1C6E41596, 0x154442BD4);  // x^(512 - 32), x^(512 + 32), bits reflected
  const __m128i by16 = _mm_set_epi64x(0x0CCAA009E, 0x1751997D0);  // x^(128 - 32), x^(128 + 32)
  __m128i lane[4];
  for (int i = 0; i < 4; ++i) lane[i] = load(p + 16 * i);
  lane[0] = _mm_xor_si128(lane[0], _mm_cvtsi32_si128(static_cast<int>(crc)));
  for (std::size_t done = 64; done < n; done += 64) {
    for (int i = 0; i < 4; ++i) {
      lane[i] = _mm_xor_si128(shift(lane[i], by64), load(p + done + 16 * static_cast<std::size_t>(i)));
    }
  }
  for (int i = 1; i < 4; ++i) lane[i] = _mm_xor_si128(shift(lane[i - 1], by16), lane[i]);
  unsigned char rest[16];
  _mm_storeu_si128(reinterpret_cast<__m128i *>(rest), lane[3]);
  return by_tables(rest, sizeof rest, 0);
}

bool can_fold() noexcept {
  static const bool can = __builtin_cpu_supports("pclmul") != 0;
  return can;
}
#endif

}  // namespace

extern "C" uint32_t mimo_crc32(const void *data, size_t n, uint32_t seed) noexcept {
  const auto *p = static_cast<const unsigned char *>(data);
  if (p == nullptr) return seed;
  std::uint32_t crc = ~seed;
#if defined(__x86_64__)
  if (n >= 256 && can_fold()) {
    const std::size_t whole = n / 64 * 64;
    crc = by_folding(p, whole, crc);
    p += whole;
    n -= whole;
  }
#endif
  return ~by_tables(p, n, crc);
}
