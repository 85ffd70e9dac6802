// AMX's int8 tiles by their published definition, so that tests can run the amx table on any CPU and under sanitizers.
// Included by isa_amx.cpp when MIMO_EMULATION is defined. A tile instruction without a configuration ends the program,
// as it would on a CPU, and so does a configuration a CPU would refuse.
#ifndef AMX_EMULATION_H
#define AMX_EMULATION_H

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "avx512_emulation.h"

static __m512i _mm512_mulhrs_epi16(__m512i a, __m512i b) {
  auto x = emu_as<std::int16_t>(a);
  const auto y = emu_as<std::int16_t>(b);
  for (int i = 0; i < 32; ++i) x.v[i] = static_cast<std::int16_t>((x.v[i] * y.v[i] + 0x4000) >> 15);
  return emu_back(x);
}

struct EmulatedTiles {
  bool configured = false;
  std::uint16_t bytes[8] = {};
  std::uint8_t rows[8] = {};
  std::uint8_t data[8][16][64] = {};

  void need(int tile) const {
    if (!configured || tile < 0 || tile > 7 || rows[tile] == 0) std::abort();
  }
};
static thread_local EmulatedTiles emu_tiles;

template <class Config>
static void tile_configure(const Config &config) noexcept {
  static_assert(sizeof(Config) == 64);
  std::uint8_t raw[64];
  std::memcpy(raw, &config, sizeof raw);
  if (raw[0] != 1 || raw[1] != 0) std::abort();
  for (int i = 2; i < 16; ++i) {
    if (raw[i] != 0) std::abort();
  }
  emu_tiles = EmulatedTiles{};
  emu_tiles.configured = true;
  for (int i = 0; i < 8; ++i) {
    emu_tiles.bytes[i] = static_cast<std::uint16_t>(raw[16 + 2 * i] | raw[17 + 2 * i] << 8);
    emu_tiles.rows[i] = raw[48 + i];
    if (emu_tiles.bytes[i] > 64 || emu_tiles.rows[i] > 16 || (emu_tiles.bytes[i] == 0) != (emu_tiles.rows[i] == 0)) std::abort();
  }
}
static void tile_release() noexcept { emu_tiles = EmulatedTiles{}; }

template <int kTile>
static void tile_zero() noexcept {
  emu_tiles.need(kTile);
  std::memset(emu_tiles.data[kTile], 0, sizeof emu_tiles.data[kTile]);
}
template <int kTile>
static void tile_load(const void *p) noexcept {
  tile_zero<kTile>();
  for (int m = 0; m < emu_tiles.rows[kTile]; ++m) {
    std::memcpy(emu_tiles.data[kTile][m], static_cast<const char *>(p) + 64 * m, emu_tiles.bytes[kTile]);
  }
}
template <int kTile>
static void tile_store(void *p) noexcept {
  emu_tiles.need(kTile);
  for (int m = 0; m < emu_tiles.rows[kTile]; ++m) {
    std::memcpy(static_cast<char *>(p) + 64 * m, emu_tiles.data[kTile][m], emu_tiles.bytes[kTile]);
  }
}
template <int kSums, int kA, int kB>
static void tile_dot() noexcept {
  static_assert(kSums != kA && kSums != kB && kA != kB);
  EmulatedTiles &t = emu_tiles;
  t.need(kSums);
  t.need(kA);
  t.need(kB);
  if (t.rows[kA] != t.rows[kSums] || t.bytes[kB] != t.bytes[kSums] || t.rows[kB] * 4 != t.bytes[kA]) std::abort();
  for (int m = 0; m < t.rows[kSums]; ++m) {
    for (int n = 0; n < t.bytes[kSums] / 4; ++n) {
      std::int32_t sum = 0;
      std::memcpy(&sum, t.data[kSums][m] + 4 * n, sizeof sum);
      for (int k = 0; k < t.bytes[kA]; ++k) {
        sum += static_cast<std::int8_t>(t.data[kA][m][k]) * static_cast<std::int8_t>(t.data[kB][k / 4][4 * n + k % 4]);
      }
      std::memcpy(t.data[kSums][m] + 4 * n, &sum, sizeof sum);
    }
  }
}

#endif
