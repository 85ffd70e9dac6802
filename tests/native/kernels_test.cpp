// Standalone checks of the kernel library, built with AddressSanitizer and UndefinedBehaviorSanitizer by
// tests/test_kernels.py: every table against scalar bit for bit (AVX-512 through avx512_emulation.h), on heap blocks of
// the exact size, so that one byte read or written outside them ends the program.
// Usage: kernels_test CHECK [ARGUMENT]; exit status 0 = passed. Without arguments: lists the checks.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../mimo_local/kernels/src/isa_scalar.cpp"  // its helpers are tested too

namespace {

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

std::vector<const mimo_table *> fast_tables() {
  std::vector<const mimo_table *> tables{mimo::avx512_table()};  // emulated: runs anywhere
  if (const mimo_table *avx2 = mimo_get_table("avx2")) tables.push_back(avx2);
  return tables;
}

Exact<float> normal(std::size_t n, unsigned seed, float scale = 1.0F) {
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

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

// fp16 scales of all magnitudes, subnormals included, but no NaN or infinity.
Exact<std::uint16_t> half_scales(std::size_t n, unsigned seed) {
  Exact<std::uint16_t> scales = bits<std::uint16_t>(n, seed);
  for (std::size_t i = 0; i < n; ++i) {
    if ((scales[i] & 0x7C00) == 0x7C00) scales[i] &= 0x83FF;
  }
  return scales;
}

constexpr std::int64_t kShapesN[] = {1, 3, 4, 5, 17, 64};
constexpr std::int64_t kShapesK[] = {1, 7, 15, 16, 17, 63, 64, 65, 128, 192, 576};
constexpr std::int64_t kRows[] = {1, 2, 3, 4, 5, 7, 8, 9, 65};

void check_matmul() {
  unsigned seed = 0;
  for (const std::int64_t N : kShapesN) {
    for (const std::int64_t K : kShapesK) {
      for (const std::int64_t T : kRows) {
        if (N > 17 && T > 5) continue;
        ++seed;
        const std::int64_t ldx = K + seed % 3;
        const std::int64_t ldy = N + seed % 2;
        Exact<float> x = normal(size((T - 1) * ldx + K), seed);
        Exact<std::int8_t> int8 = bits<std::int8_t>(size(N * K), seed);
        Exact<float> scales = normal(size(N), seed + 1);
        Exact<std::uint16_t> bf16 = bits<std::uint16_t>(size(N * K), seed);
        for (std::size_t i = 0; i < size(N * K); ++i) bf16[i] &= 0xBFFF;  // finite: magnitudes below 2
        Exact<std::uint8_t> nf4 = bits<std::uint8_t>(size(N * K / 2), seed);
        Exact<std::uint16_t> halves = half_scales(size(N * K / 64), seed);
        const auto product = [&](const mimo_table *table, int format) {
          Exact<float> y(size((T - 1) * ldy + N));
          const std::int32_t status =
              format == 0   ? mimo_int8_matmul(table, x.get(), ldx, T, int8.get(), scales.get(), N, K, y.get(), ldy)
              : format == 1 ? mimo_bf16_matmul(table, x.get(), ldx, T, bf16.get(), N, K, y.get(), ldy)
                            : mimo_nf4_matmul(table, x.get(), ldx, T, nf4.get(), halves.get(), N, K, y.get(), ldy);
          REQUIRE(status == MIMO_OK, "status %d", status);
          return y;
        };
        for (int format = 0; format < (K % 64 == 0 ? 3 : 2); ++format) {
          const Exact<float> expected = product(mimo::scalar_table(), format);
          for (const mimo_table *table : fast_tables()) {
            REQUIRE(product(table, format) == expected, "%s format %d N %ld K %ld T %ld", table->name, format,
                    static_cast<long>(N), static_cast<long>(K), static_cast<long>(T));
          }
        }
      }
    }
  }
}

// Weights of every kind a tensor can hold: usual, zeros, subnormal, beyond fp16, near the largest float, on midpoints.
Exact<float> mixed_weights(std::int64_t N, std::int64_t K, unsigned seed) {
  Exact<float> w = normal(size(N * K), seed, 0.02F);
  const float scales[] = {1.0F, 0.0F, 1e-40F, 1e-8F, 1e6F, 5e36F, 3e-5F};
  for (std::int64_t i = 0; i < N * K; ++i) w[size(i)] *= scales[size(i / 64 % 7)];
  for (std::int64_t i = 0; i < N * K; i += 97) {
    w[size(i)] = 0.5F * (mimo::kNf4[i % 15] + mimo::kNf4[i % 15 + 1]);
  }
  if (N * K > 70) w[70] = std::numeric_limits<float>::max();
  return w;
}

void check_quantize() {
  for (const std::int64_t N : kShapesN) {
    for (const std::int64_t K : kShapesK) {
      Exact<float> w = mixed_weights(N, K, static_cast<unsigned>(N * 1000 + K));
      for (int search = 0; search < 2; ++search) {
        const auto int8 = [&](const mimo_table *table, Exact<std::int8_t> &codes, Exact<float> &scales) {
          const std::int32_t status =
              mimo_int8_quantize(table, w.get(), N, K, codes.get(), scales.get(), search, nullptr);
          REQUIRE(status == MIMO_OK, "status %d", status);
          Exact<float> out(size(N * K));
          REQUIRE(mimo_int8_dequantize(table, codes.get(), scales.get(), N, K, out.get()) == MIMO_OK, "int8");
          return out;
        };
        Exact<std::int8_t> codes(size(N * K));
        Exact<float> scales(size(N));
        const Exact<float> back = int8(mimo::scalar_table(), codes, scales);
        for (const mimo_table *table : fast_tables()) {
          Exact<std::int8_t> codes2(size(N * K));
          Exact<float> scales2(size(N));
          const Exact<float> back2 = int8(table, codes2, scales2);
          REQUIRE(codes == codes2 && scales == scales2 && back == back2, "%s int8 N %ld K %ld search %d", table->name,
                  static_cast<long>(N), static_cast<long>(K), search);
        }
        if (K % 64 != 0) continue;
        const auto nf4 = [&](const mimo_table *table, Exact<std::uint8_t> &packed, Exact<std::uint16_t> &halves) {
          std::int64_t clamped = -1;
          const std::int32_t status =
              mimo_nf4_quantize(table, w.get(), N, K, packed.get(), halves.get(), search, &clamped);
          REQUIRE(status == (clamped > 0 ? MIMO_CLAMPED : MIMO_OK), "status %d", status);
          Exact<float> out(size(N * K));
          REQUIRE(mimo_nf4_dequantize(table, packed.get(), halves.get(), N, K, out.get()) == MIMO_OK, "nf4");
          return out;
        };
        Exact<std::uint8_t> packed(size(N * K / 2));
        Exact<std::uint16_t> halves(size(N * K / 64));
        const Exact<float> nf4_back = nf4(mimo::scalar_table(), packed, halves);
        for (const mimo_table *table : fast_tables()) {
          Exact<std::uint8_t> packed2(size(N * K / 2));
          Exact<std::uint16_t> halves2(size(N * K / 64));
          const Exact<float> nf4_back2 = nf4(table, packed2, halves2);
          REQUIRE(packed == packed2 && halves == halves2 && nf4_back == nf4_back2, "%s nf4 N %ld K %ld search %d",
                  table->name, static_cast<long>(N), static_cast<long>(K), search);
        }
      }
    }
  }
}

void check_scalar_fma() {
  std::mt19937_64 random(7);
  const auto any_float = [&] {
    std::uint32_t pattern = static_cast<std::uint32_t>(random());
    if (random() % 4 == 0) pattern = (pattern & 0x807FFFFFU) | (120U + pattern % 16U) << 23;  // near 1: cancellation
    return __builtin_bit_cast(float, pattern);
  };
  for (int i = 0; i < 3000000; ++i) {
    const float a = any_float();
    const float b = any_float();
    float c = any_float();
    if (i % 3 == 0) c = -(a * b);                                   // what is left is the rounding error
    if (i % 7 == 0) c = std::nextafter(-(a * b), any_float());
    const float expected = std::fma(a, b, c);
    const float got = mimo::scalar::fma1(a, b, c);
    REQUIRE((std::isnan(expected) && std::isnan(got)) || std::memcmp(&expected, &got, 4) == 0,
            "fma(%a, %a, %a) = %a, not %a", static_cast<double>(a), static_cast<double>(b), static_cast<double>(c),
            static_cast<double>(expected), static_cast<double>(got));
  }
}

void check_halves() {
  for (unsigned h = 0; h < 0x7C00; ++h) {
    const float value = mimo::scalar::half_to_float(static_cast<std::uint16_t>(h));
    const double exact = h < 1024 ? std::ldexp(h, -24) : std::ldexp(1024 + h % 1024, static_cast<int>(h / 1024) - 25);
    REQUIRE(static_cast<double>(value) == exact, "half %x", h);
    REQUIRE(mimo::scalar::half_to_float(static_cast<std::uint16_t>(h | 0x8000)) == -value, "half -%x", h);
    REQUIRE(mimo::scalar::float_to_half(value) == h, "half %x does not return", h);
    if (h == 0x7BFF) continue;
    const float next = mimo::scalar::half_to_float(static_cast<std::uint16_t>(h + 1));
    const float middle = 0.5F * (value + next);
    REQUIRE(mimo::scalar::float_to_half(middle) == h + h % 2, "tie after %x", h);
    REQUIRE(mimo::scalar::float_to_half(std::nextafter(middle, 0.0F)) == h, "below the tie after %x", h);
    REQUIRE(mimo::scalar::float_to_half(std::nextafter(middle, 1e6F)) == h + 1, "above the tie after %x", h);
  }
  REQUIRE(mimo::scalar::float_to_half(65519.9F) == 0x7BFF, "last finite");
  REQUIRE(mimo::scalar::float_to_half(65520.0F) == 0x7C00, "first infinite");
  REQUIRE(std::isinf(mimo::scalar::half_to_float(0x7C00)) && std::isnan(mimo::scalar::half_to_float(0x7E00)), "inf");
}

// The same bits with 1 to 5 threads, with callers in parallel, and whatever the caller's rounding mode is.
void check_threads() {
  const std::int64_t N = 700;
  const std::int64_t K = 1024;
  const std::int64_t T = 2;
  Exact<float> x = normal(size(T * K), 1);
  Exact<std::uint8_t> codes = bits<std::uint8_t>(size(N * K / 2), 2);
  Exact<std::uint16_t> scales = half_scales(size(N * K / 64), 3);
  const mimo_table *table = mimo_get_table(nullptr);
  const auto product = [&] {
    Exact<float> y(size(T * N));
    REQUIRE(mimo_nf4_matmul(table, x.get(), K, T, codes.get(), scales.get(), N, K, y.get(), N) == MIMO_OK, "status");
    return y;
  };
  REQUIRE(mimo_set_threads(0) == MIMO_E_ARGUMENT && mimo_set_threads(257) == MIMO_E_ARGUMENT, "limits");
  REQUIRE(mimo_set_threads(1) == MIMO_OK, "1");
  const Exact<float> expected = product();
  for (const int threads : {2, 3, 5, 1, 4}) {
    REQUIRE(mimo_set_threads(threads) == MIMO_OK && mimo_threads() == threads, "%d", threads);
    for (int i = 0; i < 20; ++i) REQUIRE(product() == expected, "%d threads", threads);
  }
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&, i] {
      for (int j = 0; j < 20; ++j) wrong += product() == expected ? 0 : 1;
      if (i == 0) mimo_set_threads(2);
    });
  }
  for (std::thread &caller : callers) caller.join();
  REQUIRE(wrong == 0, "%d of 80 concurrent calls differ", wrong.load());
  std::fesetround(FE_UPWARD);
  const Exact<float> upward = product();
  REQUIRE(std::fegetround() == FE_UPWARD, "the caller's rounding mode is given back");
  std::fesetround(FE_TONEAREST);
  REQUIRE(upward == expected, "rounding mode leaks into the result");
}

// Without sanitizers' thread bookkeeping in the way: plain fork, the child multiplies with its own threads.
void check_fork() {
  const std::int64_t N = 700;
  const std::int64_t K = 1024;
  Exact<float> x = normal(size(K), 1);
  Exact<std::int8_t> codes = bits<std::int8_t>(size(N * K), 2);
  Exact<float> scales = normal(size(N), 3);
  const auto product = [&] {
    Exact<float> y(size(N));
    mimo_int8_matmul(mimo_get_table(nullptr), x.get(), K, 1, codes.get(), scales.get(), N, K, y.get(), N);
    return y;
  };
  mimo_set_threads(3);
  const Exact<float> expected = product();
  for (int i = 0; i < 3; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      bool same = mimo_threads() == 3;
      for (int j = 0; j < 5; ++j) same = same && product() == expected;
      _exit(same ? 0 : 1);
    }
    int status = -1;
    REQUIRE(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0, "child %d", status);
    REQUIRE(product() == expected, "parent after fork");
  }
}

void check_arguments() {
  const mimo_table *table = mimo_get_table(nullptr);
  Exact<float> x(64, 0);
  Exact<float> y(64, 0);
  Exact<std::uint8_t> codes(32, 0);
  Exact<std::uint16_t> scales(1, 0);
  const auto call = [&](const mimo_table *t, const float *xp, std::int64_t ldx, std::int64_t T, std::int64_t N,
                        std::int64_t K, std::int64_t ldy) {
    return mimo_nf4_matmul(t, xp, ldx, T, codes.get(), scales.get(), N, K, y.get(), ldy);
  };
  std::memset(x.get(), 0, x.bytes());
  scales[0] = 0;
  REQUIRE(call(table, x.get(), 64, 1, 1, 64, 1) == MIMO_OK, "good call");
  REQUIRE(call(nullptr, x.get(), 64, 1, 1, 64, 1) == MIMO_E_ARGUMENT, "no table");
  REQUIRE(call(table, nullptr, 64, 1, 1, 64, 1) == MIMO_E_ARGUMENT, "no x");
  REQUIRE(call(table, x.get(), 63, 1, 1, 64, 1) == MIMO_E_ARGUMENT, "ldx");
  REQUIRE(call(table, x.get(), 64, -1, 1, 64, 1) == MIMO_E_ARGUMENT, "T");
  REQUIRE(call(table, x.get(), 64, 1, -1, 64, 1) == MIMO_E_ARGUMENT, "N");
  REQUIRE(call(table, x.get(), 64, 1, 1, 0, 1) == MIMO_E_ARGUMENT, "K 0");
  REQUIRE(call(table, x.get(), 64, 1, 1, 32, 1) == MIMO_E_ARGUMENT, "K 32");
  REQUIRE(call(table, x.get(), 64, 1, 1, 64, 0) == MIMO_E_ARGUMENT, "ldy");
  REQUIRE(call(table, x.get(), 64, 1, std::int64_t{1} << 58, 64, std::int64_t{1} << 58) == MIMO_E_ARGUMENT, "N * K");
  REQUIRE(call(table, nullptr, 64, 0, 1, 64, 1) == MIMO_OK, "nothing to do");
  const auto odd = reinterpret_cast<const float *>(reinterpret_cast<const char *>(x.get()) + 1);
  REQUIRE(call(table, odd, 64, 1, 1, 64, 1) == MIMO_E_ARGUMENT, "misaligned x");
  REQUIRE(mimo_get_table("avx1024") == nullptr, "unknown table");
}

// NaN and infinity in any column are found, and the first row that holds one is named, with several threads too.
void check_not_finite() {
  const std::int64_t N = 300;
  const std::int64_t K = 192;
  std::vector<const mimo_table *> tables = fast_tables();
  tables.push_back(mimo::scalar_table());
  mimo_set_threads(3);
  for (const mimo_table *table : tables) {
    for (const float bad : {std::nanf(""), -std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
      for (const std::int64_t column : {0, 15, 16, 63, 64, 191}) {
        Exact<float> w = normal(size(N * K), 5);
        w[size(123 * K + column)] = bad;
        w[size(299 * K + column)] = bad;
        Exact<std::uint8_t> nf4(size(N * K / 2));
        Exact<std::uint16_t> halves(size(N * K / 64));
        Exact<std::int8_t> int8(size(N * K));
        Exact<float> scales(size(N));
        std::int64_t row = -1;
        REQUIRE(mimo_nf4_quantize(table, w.get(), N, K, nf4.get(), halves.get(), 0, &row) == MIMO_E_NOT_FINITE, "nf4");
        REQUIRE(row == 123, "row %ld", static_cast<long>(row));
        row = -1;
        const std::int32_t status = mimo_int8_quantize(table, w.get(), N, K, int8.get(), scales.get(), 0, &row);
        REQUIRE(status == MIMO_E_NOT_FINITE, "int8");
        REQUIRE(row == 123, "row %ld", static_cast<long>(row));
      }
    }
  }
}

}  // namespace

int main(int argc, char **argv) {
  const std::map<std::string, void (*)()> checks = {
      {"matmul", check_matmul},   {"quantize", check_quantize},   {"scalar_fma", check_scalar_fma},
      {"halves", check_halves},   {"threads", check_threads},     {"fork", check_fork},
      {"arguments", check_arguments}, {"not_finite", check_not_finite},
  };
  const std::string wish = argc > 1 ? argv[1] : "";
  if (wish == "cgroup") {  // prints the CPU limit read from the files under a folder
    std::printf("%d\n", mimo::cgroup_cpu_limit(argc > 2 ? argv[2] : ""));
    return 0;
  }
  const auto check = checks.find(wish);
  if (check == checks.end()) {
    for (const auto &[name, function] : checks) std::printf("%s\n", name.c_str());
    return 2;
  }
  check->second();
  return 0;
}
