// Planning of mimo_moe: which pairs belong together, where their values lie, how the work is cut. Baseline code only.
#include "moe.h"

#include <algorithm>
#include <cstdint>
#include <new>

namespace mimo {
namespace {

constexpr std::int64_t kUnit = 16;             // rows of W: two of the groups that are walked side by side (decode.inc)
constexpr std::int64_t kLeastPiece = 1 << 14;  // weight bytes of an item: below, taking it costs as much as doing it
// Rows run through memory, and every new run costs half a microsecond: one row of the real model's experts took 3 % less
// with 8 MiB than with 2 where two cores read twice what one reads (1 % with one thread), and as much where they do not.
constexpr std::int64_t kMostPiece = 1 << 23;
constexpr std::int64_t kMostPanels = 1 << 21;  // panels compute, and keep their results in the cache
constexpr std::int64_t kLongRun = 128;          // rows of down that are read on end even where all experts' are more
constexpr std::int64_t kMostResults = 1 << 15;  // products of an item, as floats a quarter of a second-level cache
constexpr std::int64_t kShares = 4;             // items per thread at least, as far as the others allow

std::int64_t rounded(std::int64_t bytes) noexcept { return (bytes + 63) / 64 * 64; }

// Takes pieces of one block of memory, or only adds them up.
class Arena {
 public:
  explicit Arena(void *memory) noexcept : memory_(static_cast<unsigned char *>(memory)) {}
  template <class T = unsigned char>
  T *take(std::int64_t n) noexcept {
    unsigned char *at = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += rounded(n * static_cast<std::int64_t>(sizeof(T)));
    return reinterpret_cast<T *>(at);
  }
  std::int64_t used() const noexcept { return used_; }

 private:
  unsigned char *memory_;
  std::int64_t used_ = 0;
};

Input make_input(const mimo_table &table, const mimo_matrix &w, std::int64_t count, Arena &arena) noexcept {
  Input input{w.format, count >= table.panels_from(w.format), nullptr, 0, nullptr};
  if (input.panels) {
    input.at = arena.take(table.panels_bytes(w.format, count, w.cols));
  } else {
    input.stride = table.row_bytes(w.format, w.cols);
    input.at = arena.take(count * input.stride);
  }
  return input;
}

// Up to kExactRows rows: each is prepared once per format, for all the groups it is in.
Input shared_input(Wave &wave, const mimo_matrix &w, const std::int32_t *index, Arena &arena) noexcept {
  std::int64_t f = 0;
  while (f < wave.n_formats && wave.formats[f] != w.format) ++f;
  if (f == wave.n_formats) {
    wave.formats[f] = w.format;
    wave.shared_bytes[f] = wave.call->table->row_bytes(w.format, w.cols);
    wave.shared[f] = arena.take(wave.call->T * wave.shared_bytes[f]);
    ++wave.n_formats;
  }
  return {w.format, false, wave.shared[f], wave.shared_bytes[f], index};
}

// Where everything of a wave lies. Called twice: to learn how much memory that takes, and with it.
std::int64_t place(Wave &wave, void *memory) noexcept {
  const mimo_table &table = *wave.call->table;
  Arena arena(memory);
  wave.n_formats = 0;
  const Group *last = wave.plan->group + wave.g1 - 1;
  wave.down_at = arena.take<std::int64_t>(wave.call->D / kUnit + 2);
  wave.hidden = arena.take<float>((last->first + last->count - wave.first_pair) * wave.width);
  for (std::int64_t g = wave.g0; g < wave.g1; ++g) {
    Group &group = wave.plan->group[g];
    const mimo_mlp &mlp = *group.mlp;
    if (wave.shared_x) {
      const std::int32_t *index = wave.plan->row + group.first;
      group.gate = shared_input(wave, mlp.gate, index, arena);
      group.up = shared_input(wave, mlp.up, index, arena);
    } else {
      group.gate = make_input(table, mlp.gate, group.count, arena);
      group.up = mlp.up.format == mlp.gate.format ? group.gate : make_input(table, mlp.up, group.count, arena);
    }
    group.down = make_input(table, mlp.down, group.count, arena);
  }
  return arena.used();
}

// Rows of W in an item, the largest of down's included: as many as kMostPiece bytes, unless the threads would then
// have too few items or their results leave the cache.
std::int64_t item_rows(std::int64_t rows, std::int64_t all_rows, std::int64_t row_bytes, std::int64_t count,
                       std::int64_t unit) noexcept {
  const std::int64_t piece = unit == kPanelGrain ? kMostPanels : kMostPiece;
  const std::int64_t fair = std::max(all_rows / (mimo_threads() * kShares), kLeastPiece / row_bytes);
  const std::int64_t most = std::min(piece / row_bytes, kMostResults / count);
  const std::int64_t n = std::max<std::int64_t>(std::min(fair, most), 1);
  const std::int64_t blocks = (rows + n - 1) / n;
  return ((rows + blocks - 1) / blocks + unit - 1) / unit * unit;
}

// Output columns in pieces that get smaller, so that all threads finish together: nothing comes after them.
void cut_down(Wave &wave, std::int64_t row_bytes, std::int64_t most, std::int64_t unit) noexcept {
  const std::int64_t D = wave.call->D;
  const std::int64_t least = std::max<std::int64_t>(kLeastPiece / row_bytes / unit, 1) * unit;
  wave.down_blocks = 0;
  for (std::int64_t n = 0; n < D; ++wave.down_blocks) {
    const std::int64_t part = (D - n) / (mimo_threads() * 2) / unit * unit;
    wave.down_at[wave.down_blocks] = n;
    n += std::clamp(part, least, std::max(least, most));
  }
  wave.down_at[wave.down_blocks] = D;
}

void cut(Wave &wave) noexcept {
  std::int64_t middle = 0;  // weight bytes per row, of all groups
  std::int64_t down = 0;
  std::int64_t most = 0;
  bool panels = false;
  wave.slabs = 0;
  for (std::int64_t g = wave.g0; g < wave.g1; ++g) {
    Group &group = wave.plan->group[g];
    const mimo_mlp &mlp = *group.mlp;
    middle += stored_row_bytes(mlp.gate.format, mlp.gate.cols) + stored_row_bytes(mlp.up.format, mlp.up.cols);
    down += stored_row_bytes(mlp.down.format, mlp.down.cols);
    most = std::max(most, group.count);
    panels = panels || group.gate.panels || group.up.panels || group.down.panels;
    group.slab = wave.slabs;
    const std::int64_t slabs = (group.count + kSlab - 1) / kSlab;
    std::fill_n(wave.plan->slab + wave.slabs, slabs, static_cast<std::int32_t>(g));
    wave.slabs += slabs;
    group.own_x_left.store(slabs, std::memory_order_relaxed);
    group.hidden_left.store(slabs, std::memory_order_relaxed);
    group.x_left = wave.shared_x ? &wave.shared_left : &group.own_x_left;
  }
  const std::int64_t unit = panels ? kPanelGrain : kUnit;
  const std::int64_t groups = wave.g1 - wave.g0;
  wave.hidden_items = most > kSlab ? wave.slabs : 0;
  wave.x_items = wave.shared_x ? wave.n_formats * wave.call->T : wave.slabs;
  wave.shared_left.store(wave.x_items, std::memory_order_relaxed);
  wave.middle_rows = item_rows(wave.width, wave.width * groups, middle / groups, most, unit);
  wave.middle_blocks = (wave.width + wave.middle_rows - 1) / wave.middle_rows;
  const std::int64_t run = std::max(down / groups, std::min(down, kMostPanels / kLongRun));
  const std::int64_t down_rows = item_rows(wave.call->D, wave.call->D, run, most, unit);
  cut_down(wave, down, down_rows, unit);
  wave.floats = rounded(most * std::max(2 * wave.middle_rows, std::max(down_rows, kLeastPiece / down + unit)));
  for (std::int64_t g = wave.g0; g < wave.g1; ++g) {
    wave.plan->group[g].middle_left.store(wave.middle_blocks, std::memory_order_relaxed);
  }
}

}  // namespace

// Pairs sorted by expert, then by row; cut into groups of up to `most`.
Plan make_plan(const Mixture &call, std::int64_t most) {
  const std::int64_t entries = call.T * call.K;
  const auto lay_out = [&](void *memory, Plan &plan, std::int64_t *&start) {
    Arena arena(memory);
    start = arena.take<std::int64_t>(call.n_mlps + 1);
    plan.row = arena.take<std::int32_t>(entries);
    plan.weight = arena.take<float>(entries);
    plan.slab = arena.take<std::int32_t>(entries);
    plan.group = arena.take<Group>(std::min(entries, call.n_mlps + entries / most));
    return arena.used();
  };
  Plan plan;
  std::int64_t *start = nullptr;
  lay_out(scratch(kSlotPlan, lay_out(nullptr, plan, start)), plan, start);
  std::fill_n(start, call.n_mlps + 1, 0);
  for (std::int64_t i = 0; i < entries; ++i) {
    if (call.ids == nullptr || call.ids[i] >= 0) ++start[(call.ids == nullptr ? 0 : call.ids[i]) + 1];
  }
  for (std::int64_t e = 0; e < call.n_mlps; ++e) {
    const std::int64_t pairs = start[e + 1];
    for (std::int64_t done = 0; done < pairs; done += most) {
      Group *group = new (plan.group + plan.groups++) Group();
      group->mlp = call.mlps + e;
      group->first = start[e] + done;
      group->count = std::min(most, pairs - done);
    }
    start[e + 1] += start[e];
  }
  plan.pairs = start[call.n_mlps];
  for (std::int64_t i = 0; i < entries; ++i) {
    const std::int32_t e = call.ids == nullptr ? 0 : call.ids[i];
    if (e < 0) continue;
    const std::int64_t p = start[e]++;
    plan.row[p] = static_cast<std::int32_t>(i / call.K);
    plan.weight[p] = call.weights == nullptr ? 1.0F : call.weights[i];
  }
  return plan;
}

void lay_out(Wave &wave) {
  place(wave, scratch(kSlotHidden, place(wave, nullptr)));
  cut(wave);
}

std::int64_t worker_memory(const Wave &wave) noexcept {
  const mimo_table &table = *wave.call->table;
  std::int64_t most = 0;
  for (std::int64_t g = wave.g0; g < wave.g1; ++g) {
    const Group &group = wave.plan->group[g];
    const std::int64_t D = wave.call->D;
    if (group.gate.panels) most = std::max(most, table.panels_scratch(group.gate.format, D));
    if (group.up.panels) most = std::max(most, table.panels_scratch(group.up.format, D));
    if (group.down.panels) most = std::max(most, table.panels_scratch(group.down.format, wave.width));
  }
  return wave.floats * 4 + most;
}

}  // namespace mimo
