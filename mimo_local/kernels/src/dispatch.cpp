// Which instruction set to use: asks the CPU and the operating system once. MIMO_ISA may lower the choice, never raise
// it. Baseline code only.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "internal.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace mimo {
namespace {

enum Level : int { kScalar, kAvx2, kAvxVnni, kAvx512, kAmx };
constexpr int kLevels = 5;
constexpr const char *kNames[kLevels] = {"scalar", "avx2", "avx_vnni", "avx512", "amx"};

#if defined(__x86_64__)

// XCR0: which registers the operating system saves on a context switch. Without its bits the instructions fault.
std::uint64_t saved_state() noexcept {
  std::uint32_t low = 0;
  std::uint32_t high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<std::uint64_t>(high) << 32 | low;
}

// Tiles are 8 KB more to save per thread, so Linux (5.16 on) lets a process use them only once it has asked, all its
// threads at once. It refuses where it does not know them or where a thread's signal stack is too small to hold them.
bool tiles_granted() noexcept {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // its bit in XCR0
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Bit l is set if level l runs here. Not a chain: there are CPUs with AVX-512 VNNI and no AVX-VNNI, and the reverse.
unsigned detect() noexcept {
  constexpr unsigned kNone = 1U << kScalar;
  std::uint32_t a = 0;
  std::uint32_t b = 0;
  std::uint32_t c = 0;
  std::uint32_t d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return kNone;
  constexpr std::uint32_t kFma = 1U << 12;
  constexpr std::uint32_t kOsXsave = 1U << 27;
  constexpr std::uint32_t kAvx = 1U << 28;
  constexpr std::uint32_t kF16c = 1U << 29;
  constexpr std::uint32_t kFirst = kFma | kOsXsave | kAvx | kF16c;
  if ((c & kFirst) != kFirst) return kNone;
  const std::uint64_t state = saved_state();
  constexpr std::uint64_t kYmm = 0x6;         // XMM and upper halves of YMM
  constexpr std::uint64_t kZmm = 0xE6;        // and mask registers, upper halves of ZMM, ZMM16..31
  if ((state & kYmm) != kYmm) return kNone;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return kNone;
  constexpr std::uint32_t kAvx2Bit = 1U << 5;
  if ((b & kAvx2Bit) == 0) return kNone;
  unsigned found = kNone | 1U << kAvx2;
  constexpr std::uint32_t kF = 1U << 16;
  constexpr std::uint32_t kDq = 1U << 17;
  constexpr std::uint32_t kBw = 1U << 30;
  constexpr std::uint32_t kVl = 1U << 31;
  constexpr std::uint32_t k512 = kF | kDq | kBw | kVl;
  constexpr std::uint32_t kVnni512 = 1U << 11;
  constexpr std::uint32_t kTiles = 1U << 24 | 1U << 25;      // of edx: AMX-TILE, AMX-INT8
  constexpr std::uint64_t kTileState = std::uint64_t{3} << 17;  // configuration, data
  if ((b & k512) == k512 && (c & kVnni512) != 0 && (state & kZmm) == kZmm) {
    found |= 1U << kAvx512;
    if ((d & kTiles) == kTiles && (state & kTileState) == kTileState && tiles_granted()) found |= 1U << kAmx;
  }
  constexpr std::uint32_t kVnni = 1U << 4;
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & kVnni) != 0) found |= 1U << kAvxVnni;
  return found;
}

// An AMD CPU of family 0x1A (Zen 5) or later.
bool zen5() noexcept {
  std::uint32_t a = 0;
  std::uint32_t name[3] = {};
  if (__get_cpuid(0, &a, &name[0], &name[2], &name[1]) == 0) return false;
  if (std::memcmp(name, "AuthenticAMD", sizeof name) != 0) return false;
  std::uint32_t b = 0;
  std::uint32_t c = 0;
  std::uint32_t d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return false;
  return (a >> 8 & 0xF) + (a >> 20 & 0xFF) >= 0x1A;
}

#else

unsigned detect() noexcept { return 1U << kScalar; }
bool zen5() noexcept { return false; }

#endif

struct Choice {
  unsigned found;
  Level used;
  std::string note;
};

int level_of(const char *name) noexcept {
  for (int i = 0; i < kLevels; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) return i;
  }
  return -1;
}

Level best_of(unsigned found) noexcept {
  int best = kScalar;
  for (int i = 0; i < kLevels; ++i) {
    if ((found >> i & 1U) != 0) best = i;
  }
  return static_cast<Level>(best);
}

Choice choose() {
  const unsigned found = detect();
  const Level best = best_of(found);
  Choice choice{found, best, {}};
  const char *wish = std::getenv("MIMO_ISA");
  if (wish == nullptr || *wish == '\0') return choice;
  const std::string wished = std::string(wish).substr(0, 32);
  const int level = level_of(wish);
  if (level < 0) {
    choice.note = "MIMO_ISA=" + wished + " is none of scalar, avx2, avx_vnni, avx512, amx; using " + kNames[best];
  } else if ((found >> level & 1U) == 0) {
    choice.note = "MIMO_ISA=" + wished + " is more than this CPU has; using " + kNames[best];
  } else {
    choice.used = static_cast<Level>(level);
  }
  return choice;
}

const Choice &chosen() {
  static const Choice choice = choose();
  return choice;
}

const mimo_table *table_of(Level level) noexcept {
  switch (level) {
    case kAmx:
      return amx_table();
    case kAvx512:
      return avx512_table();
    case kAvxVnni:
      return avx_vnni_table();
    case kAvx2:
      return avx2_table();
    default:
      return scalar_table();
  }
}

}  // namespace

// Zen 5's prefetchers follow one long run and are disturbed by software prefetches into eight: 8 rows side by side read
// at 71 % of the limit, in order at 95 %. On a Sapphire Rapids server one stream reads at 68 % of its limit and eight at
// all of it; a Zen 3 was tuned for eight as well.
bool reads_in_order() noexcept {
  static const bool answer = zen5();
  return answer;
}

}  // namespace mimo

extern "C" {

int32_t mimo_abi_version(void) noexcept { return MIMO_ABI_VERSION; }

const mimo_table *mimo_get_table(const char *name) noexcept {
  try {
    const mimo::Choice &choice = mimo::chosen();
    if (name == nullptr) return mimo::table_of(choice.used);
    const int level = mimo::level_of(name);
    if (level < 0 || (choice.found >> level & 1U) == 0) return nullptr;
    return mimo::table_of(static_cast<mimo::Level>(level));
  } catch (...) {
    return nullptr;
  }
}

const char *mimo_table_name(const mimo_table *table) noexcept { return table == nullptr ? "" : table->name; }

const char *mimo_isa_note(void) noexcept {
  try {
    return mimo::chosen().note.c_str();
  } catch (...) {
    return "";
  }
}

}  // extern "C"
