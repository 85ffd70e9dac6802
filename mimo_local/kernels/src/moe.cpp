// mimo_moe: all experts a step has chosen, in one call. Baseline code only.
//
// The pairs (row of x, expert) are sorted by expert into groups: an expert's weights are read once for all its rows. A
// call is one list of items from one counter, in an order in which every item waits only for items before it:
//   x        prepare rows of x for the products
//   middle   rows of one expert's gate and up, and silu(gate) * up of them
//   hidden   prepare those products as rows for down
//   down     output columns [n0, n1) of all experts in ascending order, added into y
// No barriers: who is through with the middle starts on down for the experts that are ready. An item in work belongs to
// a running thread, so waiting for one ends. y needs neither atomics nor a second pass, and its bits depend neither on
// the number of threads nor on how the work was split.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

#include "internal.h"

namespace mimo {
namespace {

constexpr std::int64_t kGroupRows = 512;  // pairs of one expert that are multiplied together: bounds a worker's memory
constexpr std::int64_t kSlab = 16;        // pairs prepared together (prepare_panels cuts there)
constexpr std::int64_t kWaveBytes = 96 << 20;
constexpr std::int64_t kMostWavePairs = 8192;
constexpr std::int64_t kLeastPiece = 1 << 14;  // weight bytes of an item: below, taking it costs as much as doing it
constexpr std::int64_t kMostPiece = 1 << 18;   // above, the last one is waited for
constexpr std::int64_t kPieces = 16;           // items per thread and stage, as far as the two allow
constexpr std::int64_t kAlone = 1 << 16;       // weight bytes x rows from which waking the others pays
constexpr std::int64_t kMostMlps = 1 << 20;
constexpr std::int64_t kMostRows = std::int64_t{1} << 31;

// Rows that stand ready for products with matrices of one format.
struct Input {
  std::int64_t format;
  bool panels;
  unsigned char *at;
  std::int64_t stride;         // rows: bytes from one to the next
  const std::int32_t *index;   // rows: where pair i's is, or NULL: at i
};

struct Group {
  const mimo_mlp *mlp;
  std::int64_t first;  // pairs [first, first + count) of the plan
  std::int64_t count;
  std::int64_t slab;   // its first slab in the wave
  Input gate;
  Input up;
  Input down;
  std::atomic<std::int64_t> *x_left;  // items of a stage not yet done
  alignas(64) std::atomic<std::int64_t> own_x_left;
  std::atomic<std::int64_t> middle_left;
  std::atomic<std::int64_t> hidden_left;
};

struct Plan {
  std::int64_t pairs = 0;
  std::int64_t groups = 0;
  std::int32_t *row;    // of x, by pair
  float *weight;
  Group *group;
  std::int32_t *slab;   // group of every slab of a wave
};

// Groups [g0, g1) of a plan, and how their work is cut.
struct Wave {
  const Mixture *call;
  const Plan *plan;
  std::int64_t g0;
  std::int64_t g1;
  std::int64_t width;        // I
  float *hidden;             // (pairs of the wave, I)
  std::int64_t first_pair;
  bool shared_x;             // x items are single rows that all groups share
  std::int64_t formats[5];   // shared: the formats to prepare
  std::int64_t n_formats;
  unsigned char *shared[5];
  std::int64_t shared_bytes[5];
  std::int64_t x_items;
  std::int64_t slabs;
  std::int64_t middle_rows;  // rows of gate and up per item
  std::int64_t middle_blocks;
  std::int64_t down_rows;
  std::int64_t down_blocks;
  std::int64_t floats;       // of a worker's own memory; panels' scratch follows
  bool clear;                // y is overwritten
  alignas(64) std::atomic<std::int64_t> shared_left;
};

void wait_for(const std::atomic<std::int64_t> &left) noexcept {
  for (int i = 0; left.load(std::memory_order_acquire) != 0; ++i) relax(i);
}

std::int64_t rounded(std::int64_t bytes) noexcept { return (bytes + 63) / 64 * 64; }

mimo_matrix rows_of(const mimo_matrix &w, std::int64_t n0, std::int64_t n1) noexcept {
  const std::int64_t code = w.format == MIMO_F32 ? 8 : w.format == MIMO_BF16 ? 4 : w.format == MIMO_INT8 ? 2 : 1;
  const std::int64_t scale = w.format == MIMO_INT8 ? 4 : w.cols / 32;  // NF4: two bytes per 64, MXFP4: one per 32
  mimo_matrix part = w;
  part.codes = static_cast<const unsigned char *>(w.codes) + n0 * (w.cols * code / 2);
  if (w.scales != nullptr) part.scales = static_cast<const unsigned char *>(w.scales) + n0 * scale;
  part.rows = n1 - n0;
  return part;
}

// out[i * ldo + n - n0] = row i of `in` times row n of w.
void product(const mimo_table &table, const mimo_matrix &w, const Input &in, std::int64_t count, std::int64_t n0,
             std::int64_t n1, float *out, std::int64_t ldo, void *memory) noexcept {
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
    const RowsJob job{&part, now, rows, outs};
    table.multiply_rows(job, 0, part.rows);
  }
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

void middle_item(Wave &wave, std::int64_t item, float *memory) noexcept {
  const mimo_table &table = *wave.call->table;
  Group &group = wave.plan->group[wave.g0 + item / wave.middle_blocks];
  const std::int64_t n0 = item % wave.middle_blocks * wave.middle_rows;
  const std::int64_t n1 = std::min(n0 + wave.middle_rows, wave.width);
  const std::int64_t n = n1 - n0;
  float *up = memory + group.count * n;
  wait_for(*group.x_left);
  product(table, group.mlp->gate, group.gate, group.count, n0, n1, memory, n, memory + wave.floats);
  product(table, group.mlp->up, group.up, group.count, n0, n1, up, n, memory + wave.floats);
  float *hidden = wave.hidden + (group.first - wave.first_pair) * wave.width + n0;
  for (std::int64_t i = 0; i < group.count; ++i) {
    table.swiglu(memory + i * n, up + i * n, n, hidden + i * wave.width);
  }
  group.middle_left.fetch_sub(1, std::memory_order_release);
}

void hidden_item(Wave &wave, std::int64_t item) noexcept {
  Group &group = wave.plan->group[wave.plan->slab[item]];
  const std::int64_t t0 = (item - group.slab) * kSlab;
  const std::int64_t t1 = std::min(t0 + kSlab, group.count);
  const float *hidden = wave.hidden + (group.first - wave.first_pair) * wave.width;
  wait_for(group.middle_left);
  prepare(*wave.call->table, group.down, hidden, wave.width, nullptr, group.count, wave.width, t0, t1);
  group.hidden_left.fetch_sub(1, std::memory_order_release);
}

void down_item(Wave &wave, std::int64_t item, float *memory) noexcept {
  const Mixture &call = *wave.call;
  const std::int64_t n0 = item * wave.down_rows;
  const std::int64_t n1 = std::min(n0 + wave.down_rows, call.D);
  const std::int64_t n = n1 - n0;
  for (std::int64_t t = 0; wave.clear && t < call.T; ++t) std::fill_n(call.y + t * call.ldy + n0, n, 0.0F);
  for (std::int64_t g = wave.g0; g < wave.g1; ++g) {
    Group &group = wave.plan->group[g];
    wait_for(group.hidden_left);
    product(*call.table, group.mlp->down, group.down, group.count, n0, n1, memory, n, memory + wave.floats);
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
  const std::int64_t down = hidden + wave.slabs;
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

// ---- planning -------------------------------------------------------------------------------------------------------

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

std::int64_t panels_memory(const Wave &wave) noexcept {
  const mimo_table &table = *wave.call->table;
  std::int64_t most = 0;
  for (std::int64_t g = wave.g0; g < wave.g1; ++g) {
    const Group &group = wave.plan->group[g];
    const std::int64_t D = wave.call->D;
    if (group.gate.panels) most = std::max(most, table.panels_scratch(group.gate.format, D));
    if (group.up.panels) most = std::max(most, table.panels_scratch(group.up.format, D));
    if (group.down.panels) most = std::max(most, table.panels_scratch(group.down.format, wave.width));
  }
  return most;
}

void run_wave(Wave &wave) {
  place(wave, scratch(kSlotHidden, place(wave, nullptr)));
  cut(wave);
  const std::int64_t items =
      wave.x_items + (wave.g1 - wave.g0) * wave.middle_blocks + wave.slabs + wave.down_blocks;
  const mimo_mlp &mlp = *wave.plan->group[wave.g0].mlp;
  const Group &last = wave.plan->group[wave.g1 - 1];
  const std::int64_t pairs = last.first + last.count - wave.first_pair;
  const bool alone = 3 * wave.width * stored_row_bytes(mlp.gate.format, wave.call->D) * pairs < kAlone;
  parallel_for(items, alone ? items : 1, run_items, &wave, wave.floats * 4 + panels_memory(wave));
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

}  // extern "C"
