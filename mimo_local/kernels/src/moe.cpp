// mimo_moe: all experts a step has chosen, in one call. Baseline code only.
//
// The pairs (row of x, expert) are sorted by expert into groups: an expert's weights are read once for all its rows. A
// call is one list of items from one counter, in an order in which every item waits only for items before it:
//   x        prepare rows of x for the products
//   middle   rows of one expert's gate and up, and silu(gate) * up of them
//   hidden   prepare those products as rows for down (in small groups, whoever finishes the middle last does)
//   down     output columns [n0, n1) of all experts in ascending order, added into y
// No barriers: who is through with the middle starts on down for the experts that are ready. An item in work belongs to
// a running thread, so waiting for one ends. y needs neither atomics nor a second pass, and its bits depend neither on
// the number of threads nor on how the work was split.
#include "moe.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

namespace mimo {
namespace {

// A long step is done in waves of experts, so that what is between the products stays within this: 6900 pairs of the
// real model's experts (all of a step of 512 rows), 1100 of its dense layer.
constexpr std::int64_t kWaveBytes = 96 << 20;
constexpr std::int64_t kMostWavePairs = 8192;
constexpr std::int64_t kAlone = 1 << 16;  // weight bytes x rows from which waking the others pays
constexpr std::int64_t kMostMlps = 1 << 20;
constexpr std::int64_t kMostRows = std::int64_t{1} << 31;

void wait_for(const std::atomic<std::int64_t> &left) noexcept {
  for (int i = 0; left.load(std::memory_order_acquire) != 0; ++i) relax(i);
}

mimo_matrix rows_of(const mimo_matrix &w, std::int64_t n0, std::int64_t n1) noexcept {
  const std::int64_t code = w.format == MIMO_F32 ? 8 : w.format == MIMO_BF16 ? 4 : w.format == MIMO_INT8 ? 2 : 1;
  const std::int64_t scale = w.format == MIMO_INT8 ? 4 : w.cols / 32;  // NF4: two bytes per 64, MXFP4: one per 32
  mimo_matrix part = w;
  part.codes = static_cast<const unsigned char *>(w.codes) + n0 * (w.cols * code / 2);
  if (w.scales != nullptr) part.scales = static_cast<const unsigned char *>(w.scales) + n0 * scale;
  part.rows = n1 - n0;
  return part;
}

// out[i * ldo + n - n0] = row i of `in` times row n of w; next: RowsJob::next.
void product(const mimo_table &table, const mimo_matrix &w, const Input &in, std::int64_t count, std::int64_t n0,
             std::int64_t n1, float *out, std::int64_t ldo, void *memory, const mimo_matrix &next) noexcept {
  const mimo_matrix part = rows_of(w, n0, n1);
  if (in.panels) {
    const PanelsJob job{&part, count, in.at, out, ldo};
    table.multiply_panels(job, 0, part.rows, memory);
    return;
  }
  for (std::int64_t i = 0; i < count; i += kExactRows) {
    const std::int64_t now = std::min(count - i, kExactRows);
    const void *rows[kExactRows];
    float *outs[kExactRows];
    for (std::int64_t j = 0; j < now; ++j) {
      rows[j] = in.at + (in.index != nullptr ? in.index[i + j] : i + j) * in.stride;
      outs[j] = out + (i + j) * ldo;
    }
    const RowsJob job{&part, now, rows, outs, reads_in_order(), i + now < count ? &part : &next};
    table.multiply_rows(job, 0, part.rows);
  }
}

// The rows of gate or down that an item begins with, or of the wave's last item.
mimo_matrix first_rows(const Wave &wave, std::int64_t item) noexcept {
  const std::int64_t middle = wave.x_items;
  const std::int64_t hidden = middle + (wave.g1 - wave.g0) * wave.middle_blocks;
  const std::int64_t down = hidden + wave.hidden_items;
  if (item < hidden) {
    const mimo_matrix &gate = wave.plan->group[wave.g0 + (item - middle) / wave.middle_blocks].mlp->gate;
    return rows_of(gate, (item - middle) % wave.middle_blocks * wave.middle_rows, gate.rows);
  }
  const mimo_matrix &first = wave.plan->group[wave.g0].mlp->down;
  return rows_of(first, wave.down_at[std::clamp<std::int64_t>(item - down, 0, wave.down_blocks - 1)], first.rows);
}

// ---- the four kinds of items ----------------------------------------------------------------------------------------

void prepare(const mimo_table &table, const Input &in, const float *x, std::int64_t ldx, const std::int32_t *index,
             std::int64_t count, std::int64_t K, std::int64_t t0, std::int64_t t1) noexcept {
  if (in.panels) {
    table.prepare_panels(in.format, x, ldx, index, count, K, t0, t1, in.at);
    return;
  }
  for (std::int64_t t = t0; t < t1; ++t) {
    table.prepare_row(in.format, x + (index != nullptr ? index[t] : t) * ldx, K, in.at + t * in.stride);
  }
}

void x_item(Wave &wave, std::int64_t item) noexcept {
  const Mixture &call = *wave.call;
  const std::int64_t D = call.D;
  if (wave.shared_x) {
    const std::int64_t f = item / call.T;
    const std::int64_t t = item % call.T;
    call.table->prepare_row(wave.formats[f], call.x + t * call.ldx, D, wave.shared[f] + t * wave.shared_bytes[f]);
    wave.shared_left.fetch_sub(1, std::memory_order_release);
    return;
  }
  Group &group = wave.plan->group[wave.plan->slab[item]];
  const std::int64_t t0 = (item - group.slab) * kSlab;
  const std::int64_t t1 = std::min(t0 + kSlab, group.count);
  const std::int32_t *index = wave.plan->row + group.first;
  prepare(*call.table, group.gate, call.x, call.ldx, index, group.count, D, t0, t1);
  if (group.up.at != group.gate.at) {
    prepare(*call.table, group.up, call.x, call.ldx, index, group.count, D, t0, t1);
  }
  group.own_x_left.fetch_sub(1, std::memory_order_release);
}

void prepare_hidden(Wave &wave, Group &group, std::int64_t t0, std::int64_t t1) noexcept {
  const float *hidden = wave.hidden + (group.first - wave.first_pair) * wave.width;
  prepare(*wave.call->table, group.down, hidden, wave.width, nullptr, group.count, wave.width, t0, t1);
  group.hidden_left.fetch_sub(1, std::memory_order_release);
}

void middle_item(Wave &wave, std::int64_t item, float *memory) noexcept {
  const mimo_table &table = *wave.call->table;
  Group &group = wave.plan->group[wave.g0 + item / wave.middle_blocks];
  const std::int64_t n0 = item % wave.middle_blocks * wave.middle_rows;
  const std::int64_t n1 = std::min(n0 + wave.middle_rows, wave.width);
  const std::int64_t n = n1 - n0;
  float *up = memory + group.count * n;
  wait_for(*group.x_left);
  product(table, group.mlp->gate, group.gate, group.count, n0, n1, memory, n, memory + wave.floats,
          rows_of(group.mlp->up, n0, n1));
  product(table, group.mlp->up, group.up, group.count, n0, n1, up, n, memory + wave.floats,
          first_rows(wave, wave.x_items + item + mimo_threads()));
  float *hidden = wave.hidden + (group.first - wave.first_pair) * wave.width + n0;
  for (std::int64_t i = 0; i < group.count; ++i) {
    table.swiglu(memory + i * n, up + i * n, n, hidden + i * wave.width);
  }
  if (group.middle_left.fetch_sub(1, std::memory_order_acq_rel) == 1 && group.count <= kSlab) {
    prepare_hidden(wave, group, 0, group.count);
  }
}

void hidden_item(Wave &wave, std::int64_t item) noexcept {
  Group &group = wave.plan->group[wave.plan->slab[item]];
  if (group.count <= kSlab) return;
  const std::int64_t t0 = (item - group.slab) * kSlab;
  wait_for(group.middle_left);
  prepare_hidden(wave, group, t0, std::min(t0 + kSlab, group.count));
}

void down_item(Wave &wave, std::int64_t item, float *memory) noexcept {
  const Mixture &call = *wave.call;
  const std::int64_t n0 = wave.down_at[item];
  const std::int64_t n1 = wave.down_at[item + 1];
  const std::int64_t n = n1 - n0;
  const std::int64_t down = wave.x_items + (wave.g1 - wave.g0) * wave.middle_blocks + wave.hidden_items;
  const mimo_matrix after = first_rows(wave, down + item + mimo_threads());
  for (std::int64_t t = 0; wave.clear && t < call.T; ++t) std::fill_n(call.y + t * call.ldy + n0, n, 0.0F);
  for (std::int64_t g = wave.g0; g < wave.g1; ++g) {
    Group &group = wave.plan->group[g];
    wait_for(group.hidden_left);
    const mimo_matrix next = g + 1 < wave.g1 ? rows_of(wave.plan->group[g + 1].mlp->down, n0, n1) : after;
    product(*call.table, group.mlp->down, group.down, group.count, n0, n1, memory, n, memory + wave.floats, next);
    for (std::int64_t i = 0; i < group.count; ++i) {
      const std::int64_t pair = group.first + i;
      call.table->add_scaled(memory + i * n, wave.plan->weight[pair], n, call.y + wave.plan->row[pair] * call.ldy + n0);
    }
  }
}

void run_items(void *context, std::int64_t begin, std::int64_t end, void *memory) noexcept {
  Wave &wave = *static_cast<Wave *>(context);
  auto *floats = static_cast<float *>(memory);
  const std::int64_t middle = wave.x_items;
  const std::int64_t hidden = middle + (wave.g1 - wave.g0) * wave.middle_blocks;
  const std::int64_t down = hidden + wave.hidden_items;
  for (std::int64_t item = begin; item < end; ++item) {
    if (item < middle) {
      x_item(wave, item);
    } else if (item < hidden) {
      middle_item(wave, item - middle, floats);
    } else if (item < down) {
      hidden_item(wave, item - hidden);
    } else {
      down_item(wave, item - down, floats);
    }
  }
}

void run_wave(Wave &wave) {
  lay_out(wave);
  const std::int64_t items =
      wave.x_items + (wave.g1 - wave.g0) * wave.middle_blocks + wave.hidden_items + wave.down_blocks;
  const mimo_mlp &mlp = *wave.plan->group[wave.g0].mlp;
  const Group &last = wave.plan->group[wave.g1 - 1];
  const std::int64_t pairs = last.first + last.count - wave.first_pair;
  const bool alone = 3 * wave.width * stored_row_bytes(mlp.gate.format, wave.call->D) * pairs < kAlone;
  parallel_for(items, alone ? items : 1, run_items, &wave, worker_memory(wave));
}

void clear(const Mixture &call) noexcept {
  for (std::int64_t t = 0; t < call.T; ++t) std::fill_n(call.y + t * call.ldy, call.D, 0.0F);
}

// The mlp that says what shapes all have: the first one used.
const mimo_mlp *first_used(const Mixture &call) noexcept {
  if (call.ids == nullptr) return call.mlps;
  for (std::int64_t i = 0; i < call.T * call.K; ++i) {
    if (call.ids[i] >= 0) return call.mlps + call.ids[i];
  }
  return call.mlps;
}

bool fits(const mimo_mlp &mlp, std::int64_t width, std::int64_t D) noexcept {
  const auto is = [](const mimo_matrix &w, std::int64_t rows, std::int64_t cols) {
    return w.rows == rows && w.cols == cols && sensible_matrix(w);
  };
  return is(mlp.gate, width, D) && is(mlp.up, width, D) && is(mlp.down, D, width);
}

bool sensible_call(const Mixture &call) noexcept {
  if (call.n_mlps < 1 || call.n_mlps > kMostMlps || !usable(call.mlps, alignof(mimo_mlp))) return false;
  if (!sensible(call.T, call.K) || call.T > kMostRows) return false;
  if (call.ids == nullptr ? call.K != 1 : !usable(call.ids, alignof(std::int32_t))) return false;
  if (call.weights != nullptr && !usable(call.weights, alignof(float))) return false;
  const std::int64_t entries = call.ids == nullptr ? 0 : call.T * call.K;
  for (std::int64_t i = 0; i < entries; ++i) {
    if (call.ids[i] < -1 || call.ids[i] >= call.n_mlps) return false;
  }
  const std::int64_t D = first_used(call)->gate.cols;
  return sensible_rows(call.x, call.ldx, call.T, D) && sensible_rows(call.y, call.ldy, call.T, D);
}

}  // namespace

bool mix(Mixture call, std::int64_t most_pairs) {
  const mimo_mlp &shape = *first_used(call);
  call.D = shape.gate.cols;
  const std::int64_t width = shape.gate.rows;
  const std::int64_t per_pair = 4 * width + call.table->row_bytes(shape.gate.format, call.D) +
                                call.table->row_bytes(shape.down.format, width);
  if (most_pairs == 0) most_pairs = std::clamp(kWaveBytes / per_pair, kGroupRows, kMostWavePairs);
  const Plan plan = make_plan(call, std::min(kGroupRows, most_pairs));
  for (std::int64_t g = 0; g < plan.groups; ++g) {
    if (!fits(*plan.group[g].mlp, width, call.D)) return false;
  }
  if (plan.groups == 0 && !call.accumulate) clear(call);
  for (std::int64_t g0 = 0; g0 < plan.groups;) {
    std::int64_t g1 = g0 + 1;
    const std::int64_t from = plan.group[g0].first;
    while (g1 < plan.groups && plan.group[g1].first + plan.group[g1].count - from <= most_pairs) ++g1;
    Wave wave{};
    wave.call = &call;
    wave.plan = &plan;
    wave.g0 = g0;
    wave.g1 = g1;
    wave.width = width;
    wave.first_pair = from;
    wave.shared_x = call.T <= kExactRows;
    wave.clear = g0 == 0 && !call.accumulate;
    run_wave(wave);
    g0 = g1;
  }
  return true;
}

}  // namespace mimo

extern "C" {

int32_t mimo_moe(const mimo_table *table, const mimo_mlp *mlps, int64_t n_mlps, const float *x, int64_t ldx, int64_t T,
                 const int32_t *ids, const float *weights, int64_t K, float *y, int64_t ldy,
                 int32_t accumulate) noexcept {
  if (table == nullptr || T < 0 || K < 1) return MIMO_E_ARGUMENT;
  if (T == 0) return MIMO_OK;
  const mimo::Mixture call{table, mlps, n_mlps, x, ldx, T, ids, weights, K, y, ldy, accumulate != 0, 0};
  if (!mimo::sensible_call(call)) return MIMO_E_ARGUMENT;
  try {
    return mimo::mix(call, 0) ? MIMO_OK : MIMO_E_ARGUMENT;
  } catch (const std::bad_alloc &) {
    return MIMO_E_MEMORY;
  } catch (...) {
    return MIMO_E_INTERNAL;
  }
}

int32_t mimo_combine(const mimo_table *table, const float *parts, const int32_t *ids, const float *weights, int64_t T,
                     int64_t K, int64_t D, float *y, int64_t ldy) noexcept {
  if (table == nullptr || T < 0 || K < 1 || D < 1 || ldy < D) return MIMO_E_ARGUMENT;
  if (T == 0) return MIMO_OK;
  if (!mimo::sensible(T, K) || T > mimo::kMostRows || !mimo::sensible(T * K, D)) return MIMO_E_ARGUMENT;
  if (!mimo::usable(parts, alignof(float)) || !mimo::usable(ids, alignof(std::int32_t))) return MIMO_E_ARGUMENT;
  if (!mimo::usable(weights, alignof(float)) || !mimo::sensible_rows(y, ldy, T, D)) return MIMO_E_ARGUMENT;
  for (std::int64_t t = 0; t < T; ++t) {
    std::fill_n(y + t * ldy, D, 0.0F);
    for (std::int64_t i = t * K; i < (t + 1) * K; ++i) {
      if (ids[i] >= 0) table->add_scaled(parts + i * D, weights[i], D, y + t * ldy);
    }
  }
  return MIMO_OK;
}

}  // extern "C"
