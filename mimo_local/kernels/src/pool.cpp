// The threads: a pool that hands out ranges of work. No SIMD here.
//
// A job is published by opening `state_`; workers that come in time enter by counting themselves into it, the caller
// works too, closes the job when no work is left, and waits only for those who entered. A worker that wakes late, or
// that the scheduler keeps away, is never waited for. Idle workers spin for 50 microseconds, because the next matrix
// of a layer usually comes at once, and then sleep, because spinning steals the cores from everyone else.
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "internal.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mimo {
namespace {

// How long a worker spins before it sleeps. Between the calls of a decode step lie 5 to 50 microseconds; a worker that
// sleeps joins 60 to 90 late (a virtual machine; 1 to 3 while it spins). Measured with 12 microseconds of work and gaps
// of 5 to 50, 2 threads: no worker in time with 0, nearly every one with 50 (6.2 instead of 12.1 microseconds a job).
constexpr double kSpinSeconds = 50e-6;
constexpr int kCalibration = 200;  // pauses timed to learn how long one takes: 40 cycles on one CPU, 140 on another
constexpr int kMostSpins = 1 << 16;
constexpr int kMostPauses = 2000;  // 40 to 100 microseconds: no item of a running thread takes much longer

void pause() noexcept {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Pauses that take about kSpinSeconds.
int count_spins() noexcept {
  double least = 1.0;
  for (int trial = 0; trial < 3; ++trial) {  // the shortest: the others were interrupted
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kCalibration; ++i) pause();
    least = std::min(least, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return static_cast<int>(std::clamp(kSpinSeconds * kCalibration / std::max(least, 1e-9), 1.0, double{kMostSpins}));
}

int spins() noexcept {
  static const int count = count_spins();
  return count;
}

}  // namespace

void relax(int i) noexcept {
  if (i < kMostPauses) {
    pause();
  } else {
    std::this_thread::yield();
  }
}

namespace {

// ---- the pool -------------------------------------------------------------------------------------------------------

// Rounding mode and denormal handling are per-thread settings a host program may have changed; results may not depend
// on which thread computes a row.
class PlainFloats {
 public:
#if defined(__x86_64__)
  PlainFloats() noexcept : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~PlainFloats() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  PlainFloats() noexcept {}
  ~PlainFloats() {}
#endif

 public:
  PlainFloats(const PlainFloats &) = delete;
  PlainFloats &operator=(const PlainFloats &) = delete;
};

class Pool {
 public:
  explicit Pool(int threads) noexcept : threads_(threads), spins_(spins()) {}

  void run(std::int64_t n, std::int64_t grain, Range fn, void *context, std::int64_t memory_bytes) {
    const std::lock_guard<std::mutex> turn(turn_);
    if (!started_) start();
    if (memory_bytes > 0) reserve(memory_bytes);
    keep_apart();
    fn_ = fn;
    context_ = context;
    n_ = n;
    grain_ = grain;
    next_.store(0, std::memory_order_relaxed);
    const std::uint32_t before = state_.load(std::memory_order_relaxed);
    state_.store(((before & kTurns) + kTurn) | kOpen, std::memory_order_seq_cst);
    turns_.fetch_add(1, std::memory_order_seq_cst);
    turns_.notify_all();
    work(0);
    std::uint32_t state = state_.fetch_and(~kOpen, std::memory_order_acq_rel) & ~kOpen;
    for (int i = 0; (state & kInside) != 0; ++i) {
      if (i < spins_) {
        pause();
      } else {
        state_.wait(state, std::memory_order_acquire);
      }
      state = state_.load(std::memory_order_acquire);
    }
  }

  int threads() noexcept { return threads_.load(std::memory_order_relaxed); }

  void set_threads(int n) {
    const std::lock_guard<std::mutex> turn(turn_);
    stop();
    threads_.store(n, std::memory_order_relaxed);
  }

  // Around fork(): no job may be half done in the child's copy of memory.
  void hold() { turn_.lock(); }
  void release() { turn_.unlock(); }

 private:
  static constexpr std::uint32_t kInside = 0x7FFF;  // workers in the job
  static constexpr std::uint32_t kOpen = 0x8000;    // more may enter
  static constexpr std::uint32_t kTurn = 0x10000;   // number of the job, wrapping
  static constexpr std::uint32_t kTurns = 0xFFFF0000;

  // Memory for every worker, kept for the next job.
  void reserve(std::int64_t bytes) {
    const std::int64_t each = (bytes + 4095) / 4096 * 4096;
    const std::size_t whole = static_cast<std::size_t>(each) * static_cast<std::size_t>(threads_.load());
    if (whole > memory_size_) {
      std::free(memory_);
      memory_size_ = 0;
      memory_ = static_cast<unsigned char *>(std::aligned_alloc(4096, whole));
      if (memory_ == nullptr) throw std::bad_alloc();
      memory_size_ = whole;
    }
    memory_each_ = each;
  }

  void work(int worker) noexcept {
    const PlainFloats plain;
    void *memory = memory_ + worker * memory_each_;
    for (;;) {
      const std::int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
      if (begin >= n_) return;
      fn_(context_, begin, std::min(n_, begin + grain_), memory);
    }
  }

  bool enter() noexcept {
    std::uint32_t state = state_.load(std::memory_order_acquire);
    while ((state & kOpen) != 0) {
      if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) return true;
    }
    return false;
  }

  void leave() noexcept {
    const std::uint32_t before = state_.fetch_sub(1, std::memory_order_acq_rel);
    if ((before & kOpen) == 0 && (before & kInside) == 1) state_.notify_one();
  }

  void serve(int worker, std::uint32_t seen) noexcept {
    for (;;) {
      for (int i = 0; i < spins_ && turns_.load(std::memory_order_acquire) == seen; ++i) pause();
      turns_.wait(seen, std::memory_order_acquire);
      seen = turns_.load(std::memory_order_acquire);
      if (stopping_.load(std::memory_order_acquire)) return;
      if (enter()) {
        work(worker);
        leave();
      }
    }
  }

  // Starts as many workers as the system grants; the caller is always one more.
  void start() noexcept {
    started_ = true;
    stopping_.store(false, std::memory_order_relaxed);
    const int wanted = threads_.load(std::memory_order_relaxed) - 1;
    if (wanted < 1) return;
    // Signals belong to the program's own threads.
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      homes_.assign(static_cast<std::size_t>(wanted) + 1, 0);
      home_of_.assign(CPU_SETSIZE, -1);
      pinned_ = worker_homes(wanted + 1, homes_.data(), home_of_.data(), CPU_SETSIZE);
      const std::uint32_t seen = turns_.load(std::memory_order_relaxed);
      for (int i = 0; i < wanted; ++i) {
        workers_.emplace_back([this, i, seen] { serve(i + 1, seen); });
        const std::string name = "mimo-kernel-" + std::to_string(i + 1);
        pthread_setname_np(workers_.back().native_handle(), name.substr(0, 15).c_str());
        if (pinned_) pin(workers_.back(), homes_[static_cast<std::size_t>(i) + 1]);
      }
    } catch (...) {  // no more threads to be had: the ones there are do the work
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void stop() {
    stopping_.store(true, std::memory_order_release);
    turns_.fetch_add(1, std::memory_order_seq_cst);
    turns_.notify_all();
    for (std::thread &worker : workers_) worker.join();
    workers_.clear();
    started_ = false;
  }

  // The caller is not ours to pin. Where it has moved to a worker's core the two share it, and the scheduler leaves it
  // so for seconds (seen: half the speed of two threads): that worker gets the core the caller has left.
  void keep_apart() noexcept {
    if (!pinned_) return;
    const int cpu = sched_getcpu();
    const int home = cpu < 0 || cpu >= CPU_SETSIZE ? -1 : home_of_[static_cast<std::size_t>(cpu)];
    if (home < 0 || home == homes_[0]) return;
    for (std::size_t i = 0; i < workers_.size(); ++i) {
      if (homes_[i + 1] != home) continue;
      std::swap(homes_[0], homes_[i + 1]);
      pin(workers_[i], homes_[i + 1]);
    }
  }

  static void pin(std::thread &worker, int cpu) noexcept {
    if (cpu >= CPU_SETSIZE) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(worker.native_handle(), sizeof set, &set);
  }

  std::mutex turn_;  // one job at a time
  bool started_ = false;
  std::vector<std::thread> workers_;
  bool pinned_ = false;
  std::vector<int> homes_;    // CPUs: the caller's, then the workers'
  std::vector<int> home_of_;  // by CPU: the home on the same core, -1: none
  std::atomic<int> threads_;
  const int spins_;
  std::atomic<bool> stopping_{false};
  Range fn_ = nullptr;
  void *context_ = nullptr;
  std::int64_t n_ = 0;
  std::int64_t grain_ = 1;
  unsigned char *memory_ = nullptr;
  std::size_t memory_size_ = 0;
  std::int64_t memory_each_ = 0;
  alignas(64) std::atomic<std::int64_t> next_{0};
  alignas(64) std::atomic<std::uint32_t> state_{0};
  alignas(64) std::atomic<std::uint32_t> turns_{0};
};

// Never destroyed: workers may still sleep in it when the process exits.
std::atomic<Pool *> the_pool{nullptr};

void before_fork() { the_pool.load()->hold(); }
void after_fork_in_parent() { the_pool.load()->release(); }
// The child has only the thread that forked. It leaves the old pool, whose threads do not exist here, and gets its own.
void after_fork_in_child() { the_pool.store(new Pool(the_pool.load()->threads())); }

Pool &pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    the_pool.store(new Pool(mimo_default_threads()));
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
  });
  return *the_pool.load(std::memory_order_acquire);
}

}  // namespace

void parallel_for(std::int64_t n, std::int64_t grain, Range fn, void *context, std::int64_t memory_bytes) {
  if (n <= 0) return;
  if (n <= grain || mimo_threads() <= 1) {
    void *memory = memory_bytes > 0 ? scratch(kSlotAlone, memory_bytes) : nullptr;
    const PlainFloats plain;
    const std::int64_t piece = memory_bytes > 0 ? grain : n;
    for (std::int64_t i = 0; i < n; i += piece) fn(context, i, std::min(n, i + piece), memory);
    return;
  }
  pool().run(n, grain, fn, context, memory_bytes);
}

}  // namespace mimo

extern "C" {

int32_t mimo_threads(void) noexcept {
  try {
    return mimo::pool().threads();
  } catch (...) {
    return 1;
  }
}

int32_t mimo_set_threads(int32_t n) noexcept {
  if (n < 1 || n > mimo::kMostThreads) return MIMO_E_ARGUMENT;
  try {
    mimo::pool().set_threads(n);
    return MIMO_OK;
  } catch (...) {
    return MIMO_E_INTERNAL;
  }
}

}  // extern "C"
