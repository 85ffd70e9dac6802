// Threads, callers in parallel, fork.
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <chrono>
#include <thread>

#include "check.h"

namespace {

// The same bits with 1 to 5 threads, with callers in parallel, and whatever the caller's rounding mode is.
MIMO_CHECK(threads) {
  const std::int64_t N = 700;
  const std::int64_t K = 1024;
  const std::int64_t T = 2;
  Exact<float> x = normal(size(T * K), 1);
  Exact<std::uint8_t> codes = bits<std::uint8_t>(size(N * K / 2), 2);
  Exact<std::uint16_t> scales = half_scales(size(N * K / 64), 3);
  const mimo_matrix w = matrix(MIMO_NF4, codes.get(), scales.get(), N, K);
  const mimo_table *table = mimo_get_table(nullptr);
  const auto product = [&] {
    Exact<float> y(size(T * N));
    REQUIRE(mimo_matmul(table, &w, x.get(), K, T, y.get(), N) == MIMO_OK, "status");
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

// Every index once, in pieces no longer than the grain where there is memory, which nobody else has meanwhile.
struct Pieces {
  std::vector<std::atomic<int>> seen;
  std::int64_t grain;
  std::int64_t memory_bytes;
};

void run_pieces(void *context, std::int64_t begin, std::int64_t end, void *memory) noexcept {
  Pieces &pieces = *static_cast<Pieces *>(context);
  auto *mine = static_cast<unsigned char *>(memory);
  if (pieces.memory_bytes > 0) {
    REQUIRE(end - begin <= pieces.grain && reinterpret_cast<std::uintptr_t>(mine) % 64 == 0, "piece");
    std::memset(mine, static_cast<int>(begin % 256), size(pieces.memory_bytes));
  }
  for (std::int64_t i = begin; i < end; ++i) pieces.seen[size(i)].fetch_add(1);
  std::this_thread::yield();
  for (std::int64_t i = 0; i < pieces.memory_bytes; ++i) REQUIRE(mine[i] == begin % 256, "shared memory");
}

MIMO_CHECK(pieces) {
  for (const int threads : {1, 2, 5}) {
    mimo_set_threads(threads);
    for (const std::int64_t n : {0, 1, 7, 64, 1000}) {
      for (const std::int64_t grain : {1, 8, 5000}) {
        for (const std::int64_t memory_bytes : {0, 100, 10000}) {
          Pieces pieces{std::vector<std::atomic<int>>(size(n)), grain, memory_bytes};
          mimo::parallel_for(n, grain, run_pieces, &pieces, memory_bytes);
          for (std::atomic<int> &seen : pieces.seen) REQUIRE(seen == 1, "%d times", seen.load());
        }
      }
    }
  }
}

// A caller that has moved to a worker's core is not left to share it.
MIMO_CHECK(homes) {
  cpu_set_t all;
  REQUIRE(sched_getaffinity(0, sizeof all, &all) == 0, "affinity");
  const int cores = mimo::usable_cores();
  std::vector<int> homes(size(cores));
  std::vector<int> home_of(CPU_SETSIZE, -1);
  mimo_set_threads(cores);
  if (cores < 2 || !mimo::worker_homes(cores, homes.data(), home_of.data(), CPU_SETSIZE)) return;
  struct Seen {
    std::atomic<int> inside{0};
    std::atomic<bool> late{false};
    int wanted = 0;
    std::vector<std::atomic<int>> threads_on = std::vector<std::atomic<int>>(CPU_SETSIZE);
  };
  for (int turn = 0; turn < 3; ++turn) {
    for (const int home : homes) {
      Seen seen;
      seen.wanted = cores;
      mimo::parallel_for(cores, 1, [](void *, std::int64_t, std::int64_t, void *) noexcept {}, nullptr);  // start
      cpu_set_t one;
      CPU_ZERO(&one);
      CPU_SET(home, &one);
      REQUIRE(sched_setaffinity(0, sizeof one, &one) == 0, "CPU %d", home);
      mimo::parallel_for(
          cores, 1,
          [](void *context, std::int64_t, std::int64_t, void *) noexcept {
            Seen &here = *static_cast<Seen *>(context);
            ++here.inside;
            const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(1);
            while (here.inside < here.wanted && std::chrono::steady_clock::now() < until) std::this_thread::yield();
            if (here.inside < here.wanted) here.late = true;  // the system has kept a thread away
            ++here.threads_on[size(sched_getcpu())];
          },
          &seen);
      REQUIRE(sched_setaffinity(0, sizeof all, &all) == 0, "affinity");
      if (seen.late) continue;
      for (const std::atomic<int> &threads : seen.threads_on) REQUIRE(threads <= 1, "%d on one CPU", threads.load());
    }
  }
}

// Without sanitizers' thread bookkeeping in the way: plain fork, the child multiplies with its own threads.
MIMO_CHECK(fork) {
  const std::int64_t N = 700;
  const std::int64_t K = 1024;
  Exact<float> x = normal(size(K), 1);
  Exact<std::int8_t> codes = bits<std::int8_t>(size(N * K), 2);
  Exact<float> scales = normal(size(N), 3);
  const auto product = [&] {
    Exact<float> y(size(N));
    const mimo_matrix w = matrix(MIMO_INT8, codes.get(), scales.get(), N, K);
    mimo_matmul(mimo_get_table(nullptr), &w, x.get(), K, 1, y.get(), N);
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

}  // namespace
