// What the entries ask of their arguments, and the memory a calling thread keeps. Baseline code only.
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <new>

#include "internal.h"

namespace mimo {
namespace {

constexpr std::int64_t kMostElements = std::numeric_limits<std::int64_t>::max() / 16;

class Scratch {
 public:
  Scratch() noexcept = default;
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;

  void *at_least(std::size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = 0;
      memory_ = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return memory_;
  }

 private:
  void *memory_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace

bool usable(const void *p, std::size_t alignment) noexcept {
  return p != nullptr && reinterpret_cast<std::uintptr_t>(p) % alignment == 0;
}

bool sensible(std::int64_t rows, std::int64_t columns) noexcept {
  return rows >= 0 && columns > 0 && (rows == 0 || columns <= kMostElements / rows);
}

bool sensible_rows(const float *p, std::int64_t pitch, std::int64_t T, std::int64_t columns) noexcept {
  return T >= 0 && columns > 0 && pitch >= columns && sensible(T, pitch) && (T == 0 || usable(p, alignof(float)));
}

bool sensible_matrix(const mimo_matrix &w) noexcept {
  if (!sensible(w.rows, w.cols)) return false;
  const bool any = w.rows > 0;
  switch (w.format) {
    case MIMO_NF4:
      return w.cols % kBlock == 0 && (!any || (usable(w.codes, 1) && usable(w.scales, 2)));
    case MIMO_MXFP4:
      return w.cols % kBlock == 0 && (!any || (usable(w.codes, 1) && usable(w.scales, 1)));
    case MIMO_INT8:
      return !any || (usable(w.codes, 1) && usable(w.scales, 4));
    case MIMO_BF16:
      return !any || usable(w.codes, 2);
    case MIMO_F32:
      return !any || usable(w.codes, 4);
    default:
      return false;
  }
}

std::int64_t stored_row_bytes(std::int64_t format, std::int64_t cols) noexcept {
  switch (format) {
    case MIMO_NF4:
      return cols / 2 + cols / 32;
    case MIMO_MXFP4:
      return cols / 2 + cols / 32;
    case MIMO_INT8:
      return cols + 4;
    case MIMO_BF16:
      return cols * 2;
    default:
      return cols * 4;
  }
}

void *scratch(Slot slot, std::int64_t bytes) {
  static thread_local Scratch slots[kSlots];
  return slots[slot].at_least(static_cast<std::size_t>(bytes));
}

}  // namespace mimo
