// What the native checks share. Each *_test.cpp registers its checks with MIMO_CHECK(name) { ... }; main.cpp runs one.
// Buffers are heap blocks of the exact size: with AddressSanitizer, one byte read or written outside them ends the
// program. Instruction sets this CPU lacks are emulated (MIMO_EMULATION).
#ifndef MIMO_TESTS_CHECK_H
#define MIMO_TESTS_CHECK_H

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "internal.h"

#define REQUIRE(condition, ...)                                        \
  do {                                                                 \
    if (!(condition)) {                                                \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);      \
      std::printf(__VA_ARGS__);                                        \
      std::printf("\n");                                               \
      std::exit(1);                                                    \
    }                                                                  \
  } while (false)

// n elements at the end of a heap block, `skew` elements into it: exactly sized and not more aligned than T is.
template <class T>
class Exact {
 public:
  explicit Exact(std::size_t n, std::size_t skew = 1) : n_(n), block_(new T[n + skew]), data_(block_.get() + skew) {
    std::memset(static_cast<void *>(block_.get()), 0xA5, (n + skew) * sizeof(T));
  }
  T *get() { return data_; }
  T &operator[](std::size_t i) { return data_[i]; }
  std::size_t bytes() const { return n_ * sizeof(T); }
  bool operator==(const Exact &other) const {
    return n_ == other.n_ && std::memcmp(data_, other.data_, bytes()) == 0;
  }

 private:
  std::size_t n_;
  std::unique_ptr<T[]> block_;
  T *data_;
};

// Every table but scalar that can run here.
inline std::vector<const mimo_table *> fast_tables() {
  std::vector<const mimo_table *> tables{mimo::avx512_table()};  // emulated: runs anywhere
  if (const mimo_table *avx2 = mimo_get_table("avx2")) {
    tables.push_back(avx2);
    tables.push_back(mimo::avx_vnni_table());  // AVX2 and one emulated instruction
  }
  return tables;
}

inline Exact<float> normal(std::size_t n, unsigned seed, float scale = 1.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> draw(0.0F, scale);
  Exact<float> values(n);
  for (std::size_t i = 0; i < n; ++i) values[i] = draw(random);
  return values;
}

template <class T>
Exact<T> bits(std::size_t n, unsigned seed) {
  std::mt19937 random(seed);
  Exact<T> values(n);
  for (std::size_t i = 0; i < n; ++i) values[i] = static_cast<T>(random());
  return values;
}

inline std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

// fp16 scales of all magnitudes, subnormals included, but no NaN or infinity.
inline Exact<std::uint16_t> half_scales(std::size_t n, unsigned seed) {
  Exact<std::uint16_t> scales = bits<std::uint16_t>(n, seed);
  for (std::size_t i = 0; i < n; ++i) {
    if ((scales[i] & 0x7C00) == 0x7C00) scales[i] &= 0x83FF;
  }
  return scales;
}

inline mimo_matrix matrix(std::int64_t format, const void *codes, const void *scales, std::int64_t rows,
                          std::int64_t cols) {
  return {codes, scales, rows, cols, format};
}

inline constexpr std::int64_t kShapesN[] = {1, 3, 4, 5, 17, 64};
inline constexpr std::int64_t kShapesK[] = {1, 7, 15, 16, 17, 63, 64, 65, 128, 192, 576};
inline constexpr std::int64_t kRows[] = {1, 2, 3, 4, 5, 7, 8, 9, 65};

using Check = void (*)();

inline std::map<std::string, Check> &checks() {
  static std::map<std::string, Check> all;
  return all;
}

#define MIMO_CHECK(name)                                                       \
  static void check_##name();                                                  \
  static const bool registered_##name = checks().emplace(#name, check_##name).second; \
  static void check_##name()

#endif
