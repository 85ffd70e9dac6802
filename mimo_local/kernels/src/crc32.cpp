// zlib's CRC-32, sixteen bytes a step through sixteen tables ("slicing"). It checks what was written to and read from
// disk: some gigabytes a second are enough, so there is no carry-less multiplication here.
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>

#include "mimo.h"

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

}  // namespace

extern "C" uint32_t mimo_crc32(const void *data, size_t n, uint32_t seed) noexcept {
  static_assert(std::endian::native == std::endian::little, "words are read lowest byte first");
  std::uint32_t crc = ~seed;
  const auto *p = static_cast<const unsigned char *>(data);
  if (p == nullptr) return seed;
  for (; n >= 16; n -= 16, p += 16) {
    std::uint32_t words[4];
    std::memcpy(words, p, sizeof words);
    crc = fold(words[0] ^ crc, 12) ^ fold(words[1], 8) ^ fold(words[2], 4) ^ fold(words[3], 0);
  }
  for (; n > 0; --n, ++p) crc = crc >> 8 ^ kTables[0][(crc ^ *p) & 0xFF];
  return ~crc;
}
