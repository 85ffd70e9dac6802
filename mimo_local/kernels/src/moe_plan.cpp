// Planning of mimo_moe: which pairs belong together, where their values lie, how the work is cut. Baseline code only.
#include "moe.h"

#include <algorithm>
#include <cstdint>
#include <new>

namespace mimo {
namespace {

constexpr std::int64_t kLeastPiece = 1 << 14;  // weight bytes of an item: below, taking it costs as much as doing it
constexpr std::int64_t kMostPiece = 1 << 18;   // above, the last one is waited for
constexpr std::int64_t kPieces = 16;           // items per thread and stage, as far as the two allow

std::int64_t rounded(std::int64_t bytes) noexcept { return (bytes + 63) / 64 * 64; }

// Takes pieces of one block of memory, or only adds them up.
class Pieces {
 public:
  explicit Pieces(void *memory) noexcept : memory_(static_cast<unsigned char *>(memory)) {}
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

Input make_input(const mimo_table &table, const mimo_matrix &w, std::int64_t count, Pieces &pieces) noexcept {
  Input input{w.format, count >= table.panels_from(w.format), nullptr, 0, nullptr};
  if (input.panels) {
    input.at = pieces.take(table.panels_bytes(w.format, count, w.cols));
  } else {
    input.stride = table.row_bytes(w.format, w.cols);
    input.at = pieces.take(count * input.stride);
  }
  return input;
}

// Up to kExactRows rows: each is prepared once per format, for all the groups it is in.
Input shared_input(Wave &wave, const mimo_matrix &w, const std::int32_t *index, Pieces &pieces) noexcept {
  std::int64_t f = 0;
  while (f < wave.n_formats && wave.formats[f] != w.format) ++f;
  if (f == wave.n_formats) {
    wave.formats[f] = w.format;
    wave.shared_bytes[f] = wave.call->table->row_bytes(w.format, w.cols);
    wave.shared[f] = pieces.take(wave.call->T * wave.shared_bytes[f]);
    ++wave.n_formats;
  }
  return {w.format, false, wave.shared[f], wave.shared_bytes[f], index};
}

// Where everything of a wave lies. Called twice: to learn how much memory that takes, and with it.
std::int64_t place(Wave &wave, void *memory) noexcept {
  const mimo_table &table = *wave.call->table;
  Pieces pieces(memory);
  wave.n_formats = 0;
  const Group *last = wave.plan->group + wave.g1 - 1;
  wave.hidden = pieces.take<float>((last->first + last->count - wave.first_pair) * wave.width);
  for (std::int64_t g = wave.g0; g < wave.g1; ++g) {
    Group &group = wave.plan->group[g];
    const mimo_mlp &mlp = *group.mlp;
    if (wave.shared_x) {
      const std::int32_t *index = wave.plan->row + group.first;
      group.gate = shared_input(wave, mlp.gate, index, pieces);
      group.up = shared_input(wave, mlp.up, index, pieces);
    } else {
      group.gate = make_input(table, mlp.gate, group.count, pieces);
      group.up = mlp.up.format == mlp.gate.format ? group.gate : make_input(table, mlp.up, group.count, pieces);
    }
    group.down = make_input(table, mlp.down, group.count, pieces);
  }
  return pieces.used();
}

// Rows of W per item: bytes of about a piece, whole panels where there are any.
std::int64_t item_rows(std::int64_t rows, std::int64_t row_bytes, std::int64_t all_bytes, std::int64_t unit) noexcept {
  const std::int64_t fair = all_bytes / (mimo_threads() * kPieces);
  const std::int64_t piece = std::clamp(fair, kLeastPiece, kMostPiece);
  const std::int64_t n = std::max(unit, piece / std::max<std::int64_t>(row_bytes, 1) / unit * unit);
  return std::min(n, rounded(rows));
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
  const std::int64_t unit = panels ? kPanelGrain : 16;
  const std::int64_t groups = wave.g1 - wave.g0;
  wave.x_items = wave.shared_x ? wave.n_formats * wave.call->T : wave.slabs;
  wave.shared_left.store(wave.x_items, std::memory_order_relaxed);
  wave.middle_rows = item_rows(wave.width, middle / groups, middle * wave.width, unit);
  wave.middle_blocks = (wave.width + wave.middle_rows - 1) / wave.middle_rows;
  wave.down_rows = item_rows(wave.call->D, down, down * wave.call->D, unit);
  wave.down_blocks = (wave.call->D + wave.down_rows - 1) / wave.down_rows;
  wave.floats = rounded(std::max(2 * most * wave.middle_rows, most * wave.down_rows));
  for (std::int64_t g = wave.g0; g < wave.g1; ++g) {
    wave.plan->group[g].middle_left.store(wave.middle_blocks, std::memory_order_relaxed);
  }
}

}  // namespace

// Pairs sorted by expert, then by row; cut into groups of up to `most`.
Plan make_plan(const Mixture &call, std::int64_t most) {
  const std::int64_t entries = call.T * call.K;
  const auto lay_out = [&](void *memory, Plan &plan, std::int64_t *&start) {
    Pieces pieces(memory);
    start = pieces.take<std::int64_t>(call.n_mlps + 1);
    plan.row = pieces.take<std::int32_t>(entries);
    plan.weight = pieces.take<float>(entries);
    plan.slab = pieces.take<std::int32_t>(entries);
    plan.group = pieces.take<Group>(std::min(entries, call.n_mlps + entries / most));
    return pieces.used();
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
