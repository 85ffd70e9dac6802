// Attention and norms: what the entries ask of their arguments, and how attention is cut into pieces of work. A unit is
// up to kAttendRows query rows of one sequence that share a key/value head. In steps of few rows its keys are cut too,
// into parts of kShortPart positions, so that every core has work with 4 heads and one row; whoever finishes the last
// part of a unit merges them, in ascending order. Parts lie at multiples of their length, whoever computes them: no
// result depends on the threads, and none of a row in a step of up to kExactRows on the others. Baseline code only.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>

#include "internal.h"

namespace mimo {
namespace {

constexpr std::int64_t kNormPiece = 1 << 16;  // floats of a piece of work: a few microseconds of one core

constexpr std::int64_t kShortPart = 2 * kAttendKeys;
constexpr std::int64_t kMiddlePart = 8 * kAttendKeys;
constexpr std::int64_t kMiddleRows = 64;            // up to so many rows of a sequence, units alone are too few
constexpr std::int64_t kWhole = std::int64_t{1} << 62;
constexpr std::int64_t kNarrow = 4 * kAttendKeys;   // windows up to this are not cut
constexpr std::int64_t kAlone = 1 << 19;            // multiply-adds below which other threads cost more than they give

struct Unit {
  const mimo_kv *sequence;
  const float *q;  // of the sequence's first row
  float *out;
  std::int64_t head;
  std::int64_t row0;  // first of its rows, counted (row of the sequence, query head of the group)
  std::int64_t rows;
  std::int64_t low;  // positions any of them sees
  std::int64_t high;
  std::int64_t part;      // positions of a part
  std::int64_t parts;
  float *state;           // of its parts, or nullptr: one part, kept by the worker
  std::atomic<std::int64_t> left;  // jobs not done yet
};

struct Job {
  Unit *unit;
  std::int64_t begin;  // parts [begin, end) of the unit
  std::int64_t end;
};

struct Call {
  const mimo_table *table;
  const mimo_heads *heads;
  std::int64_t ldq;
  std::int64_t ldo;
  float scale;
  Job *jobs;
  std::int64_t n_jobs;
  unsigned char *memory;  // of the only worker where no other is asked, or nullptr
};

std::int64_t up16(std::int64_t n) noexcept { return (n + 15) / 16 * 16; }
std::int64_t state_pitch(std::int64_t dv) noexcept {
  return (dv + kAttendColumns - 1) / kAttendColumns * kAttendColumns;
}

// The memory of a worker, cut up.
struct Desk {
  float *q;
  std::int64_t *low;
  std::int64_t *high;
  float *sink;
  float **to;
  float *state;
  std::int32_t *codes;  // of the queries, INT8
  float *scales;
  void *rest;
};
std::int64_t code_pitch(const mimo_heads &heads) noexcept {
  return heads.kv_type == MIMO_KV_INT8 ? (heads.dk + 3) / 4 * 2 : 0;
}
std::int64_t state_floats(std::int64_t rows, std::int64_t dv) noexcept {
  return 2 * up16(rows) + rows * state_pitch(dv);
}
Desk desk_at(unsigned char *memory, std::int64_t rows, const mimo_heads &heads) noexcept {
  Desk desk;
  desk.q = reinterpret_cast<float *>(memory);
  desk.state = desk.q + up16(rows * heads.dk);
  desk.sink = desk.state + up16(state_floats(rows, heads.dv));
  desk.low = reinterpret_cast<std::int64_t *>(desk.sink + up16(rows));
  desk.high = desk.low + up16(rows);
  desk.to = reinterpret_cast<float **>(desk.high + up16(rows));
  desk.scales = reinterpret_cast<float *>(desk.to + up16(rows));
  desk.codes = reinterpret_cast<std::int32_t *>(desk.scales + up16(rows));
  desk.rest = desk.codes + up16(rows * code_pitch(heads));
  return desk;
}
std::int64_t desk_bytes(const mimo_table &table, std::int64_t rows, const mimo_heads &heads) noexcept {
  const std::int64_t floats = up16(rows * heads.dk) + up16(state_floats(rows, heads.dv)) + up16(rows);
  const std::int64_t codes = up16(rows) + up16(rows * code_pitch(heads));
  return 4 * (floats + codes) + 3 * 8 * up16(rows) + table.attend_memory(rows, heads.dk);
}

// Part i of a unit, `rows` and `dv` as in its state: most, total and out of all parts lie in three blocks.
AttendState part_of(float *state, std::int64_t parts, std::int64_t rows, std::int64_t dv, std::int64_t i) noexcept {
  const std::int64_t sums = up16(rows);
  return {state + i * sums, state + (parts + i) * sums, state + 2 * parts * sums + i * rows * state_pitch(dv)};
}

void clear(const AttendState &state, std::int64_t rows, std::int64_t dv) noexcept {
  std::fill_n(state.most, up16(rows), kAttendNothing);
  std::fill_n(state.total, up16(rows), 0.0F);
  std::fill_n(state.out, rows * state_pitch(dv), 0.0F);
}

std::int64_t number_bytes(const mimo_heads &heads) noexcept {
  return heads.kv_type == MIMO_KV_INT8 ? 1 : heads.kv_type == MIMO_KV_BF16 ? 2 : 4;
}

// Scaled queries and what each row sees, into the desk.
AttendJob prepare(const Call &call, const Job &job, const Desk &desk) noexcept {
  const Unit &unit = *job.unit;
  const mimo_heads &heads = *call.heads;
  const mimo_kv &kv = *unit.sequence;
  const std::int64_t shared = heads.heads / heads.kv_heads;
  for (std::int64_t r = 0; r < unit.rows;) {
    const std::int64_t t = (unit.row0 + r) / shared;
    const std::int64_t h = (unit.row0 + r) % shared;
    const std::int64_t n = std::min(shared - h, unit.rows - r);
    const float *q = unit.q + t * call.ldq + (unit.head * shared + h) * heads.dk;
    call.table->scale_row(q, call.scale, n * heads.dk, desk.q + r * heads.dk);
    const std::int64_t high = kv.start + t + 1;
    std::fill_n(desk.low + r, n, heads.window > 0 ? std::max(kv.first, high - heads.window) : kv.first);
    std::fill_n(desk.high + r, n, high);
    r += n;
  }
  const bool codes = heads.kv_type == MIMO_KV_INT8;
  if (codes) call.table->attend_queries(desk.q, unit.rows, heads.dk, desk.codes, desk.scales);
  const std::int64_t bytes = number_bytes(heads);
  const auto *k = static_cast<const unsigned char *>(kv.k) + unit.head * heads.dk * bytes;
  const auto *v = static_cast<const unsigned char *>(kv.v) + unit.head * heads.dv * bytes;
  const std::int64_t last = unit.low / unit.part + job.end;  // part after the job's
  const std::int64_t until = job.end == unit.parts ? unit.high : last * unit.part;
  return {k, v, heads.kv_heads * heads.dk, heads.kv_heads * heads.dv, kv.first, kv.start + kv.T, until, heads.dk, heads.dv,
          heads.kv_type, codes ? kv.k_scales + unit.head : nullptr, codes ? kv.v_scales + unit.head : nullptr,
          heads.kv_heads, unit.rows, desk.q, desk.codes, desk.scales, desk.low, desk.high};
}

void finish(const Call &call, const Unit &unit, const Desk &desk, float *state) noexcept {
  const mimo_heads &heads = *call.heads;
  const std::int64_t shared = heads.heads / heads.kv_heads;
  std::fill_n(desk.sink, up16(unit.rows), -std::numeric_limits<float>::infinity());
  for (std::int64_t r = 0; r < unit.rows; ++r) {
    const std::int64_t t = (unit.row0 + r) / shared;
    const std::int64_t head = unit.head * shared + (unit.row0 + r) % shared;
    if (heads.sink != nullptr) desk.sink[r] = heads.sink[head];
    desk.to[r] = unit.out + t * call.ldo + head * heads.dv;
  }
  const AttendState first = part_of(state, unit.parts, unit.rows, heads.dv, 0);
  call.table->attend_finish(
      {unit.rows, unit.parts, heads.dv, first.most, first.total, first.out, desk.sink, desk.to});
}

void run_jobs(void *context, std::int64_t begin, std::int64_t end, void *memory) noexcept {
  const Call &call = *static_cast<const Call *>(context);
  for (std::int64_t j = begin; j < end; ++j) {
    const Job &job = call.jobs[j];
    Unit &unit = *job.unit;
    auto *own = call.memory != nullptr ? call.memory : static_cast<unsigned char *>(memory);
    const Desk desk = desk_at(own, unit.rows, *call.heads);
    const AttendJob work = prepare(call, job, desk);
    float *state = unit.state != nullptr ? unit.state : desk.state;
    const std::int64_t first = unit.low / unit.part;
    for (std::int64_t i = job.begin; i < job.end; ++i) {
      const AttendState part = part_of(state, unit.parts, unit.rows, call.heads->dv, i);
      clear(part, unit.rows, call.heads->dv);
      const std::int64_t from = std::max(unit.low, (first + i) * unit.part);
      const std::int64_t to = std::min(unit.high, from / unit.part * unit.part + unit.part);
      for (std::int64_t base = from / kAttendKeys * kAttendKeys; base < to; base += kAttendKeys) {
        call.table->attend_keys(work, base, part, desk.rest);
      }
    }
    if (unit.left.fetch_sub(1, std::memory_order_acq_rel) == 1) finish(call, unit, desk, state);
  }
}

// Units and jobs of a call; with `units` null it only counts.
struct Plan {
  Unit *units;
  Job *jobs;
  float *states;
  std::int64_t n_units;
  std::int64_t n_jobs;
  std::int64_t n_states;  // floats
  std::int64_t rows;      // of the largest unit
  std::int64_t products;  // multiply-adds of all units, roughly
};

std::int64_t part_length(const mimo_heads &heads, std::int64_t T) noexcept {
  if (heads.window > 0 && heads.window <= kNarrow) return kWhole;
  if (T <= kExactRows) return kShortPart;
  return T <= kMiddleRows ? kMiddlePart : kWhole;
}

// The units of rows [row0, row0 + rows) of all heads. Heads lie side by side in memory: they follow each other.
void plan_rows(const mimo_heads &heads, const mimo_kv &kv, const float *q, float *out, std::int64_t row0,
               std::int64_t rows, std::int64_t parts_per_job, Plan &plan) noexcept {
  const std::int64_t shared = heads.heads / heads.kv_heads;
  const std::int64_t first_t = kv.start + row0 / shared;
  const std::int64_t low = heads.window > 0 ? std::max(kv.first, first_t + 1 - heads.window) : kv.first;
  const std::int64_t high = kv.start + (row0 + rows - 1) / shared + 1;
  const std::int64_t part = part_length(heads, kv.T);
  const std::int64_t parts = (high - 1) / part - low / part + 1;
  const std::int64_t jobs = (parts + parts_per_job - 1) / parts_per_job;
  const std::int64_t floats = parts > 1 ? up16(parts * state_floats(rows, heads.dv)) : 0;
  if (plan.units != nullptr) {
    for (std::int64_t g = 0; g < heads.kv_heads; ++g) {
      float *state = parts > 1 ? plan.states + plan.n_states + g * floats : nullptr;
      Unit *unit = new (plan.units + plan.n_units + g) Unit{&kv,  q,    out,  g,     row0,  rows,
                                                            low,  high, part, parts, state, {jobs}};
      for (std::int64_t j = 0; j < jobs; ++j) {
        plan.jobs[plan.n_jobs + j * heads.kv_heads + g] = {unit, j * parts_per_job,
                                                           std::min(parts, (j + 1) * parts_per_job)};
      }
    }
  }
  plan.n_units += heads.kv_heads;
  plan.n_jobs += heads.kv_heads * jobs;
  plan.n_states += heads.kv_heads * floats;
  plan.rows = std::max(plan.rows, rows);
  const std::int64_t seen = heads.window > 0 ? std::min(heads.window, high - low) : high - low;
  plan.products += heads.kv_heads * rows * seen * (heads.dk + heads.dv);
}

// Late rows see most: they come first, so that the last piece of work is a small one.
void plan_all(const mimo_heads &heads, const mimo_kv *sequences, std::int64_t n, const float *q, std::int64_t ldq,
              float *out, std::int64_t ldo, std::int64_t parts_per_job, Plan &plan) noexcept {
  plan.n_units = plan.n_jobs = plan.n_states = plan.rows = plan.products = 0;
  std::int64_t t = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const mimo_kv &kv = sequences[i];
    const std::int64_t rows = kv.T * (heads.heads / heads.kv_heads);
    const std::int64_t units = (rows + kAttendRows - 1) / kAttendRows;
    for (std::int64_t u = units - 1; u >= 0; --u) {
      const std::int64_t row0 = u * kAttendRows;
      plan_rows(heads, kv, q + t * ldq, out + t * ldo, row0, std::min(kAttendRows, rows - row0), parts_per_job, plan);
    }
    t += kv.T;
  }
}

}  // namespace

void attend(const mimo_table &table, const mimo_heads &heads, const float *q, std::int64_t ldq,
            const mimo_kv *sequences, std::int64_t n_sequences, float *out, std::int64_t ldo) {
  Plan plan{};
  plan_all(heads, sequences, n_sequences, q, ldq, out, ldo, 1, plan);
  if (plan.n_units == 0) return;
  // Several parts to a job spare preparing the queries again, as long as every thread gets some eight jobs.
  const std::int64_t parts_per_job = std::clamp<std::int64_t>(plan.n_jobs / (8 * mimo_threads()), 1, 4);
  const bool alone = plan.products < kAlone;
  const std::int64_t desk = desk_bytes(table, plan.rows, heads);
  const std::int64_t unit_bytes = (plan.n_units * static_cast<std::int64_t>(sizeof(Unit)) + 63) / 64 * 64;
  const std::int64_t job_bytes = (plan.n_jobs * static_cast<std::int64_t>(sizeof(Job)) + 63) / 64 * 64;
  auto *memory = static_cast<unsigned char *>(
      scratch(kSlotAttend, unit_bytes + job_bytes + 4 * plan.n_states + (alone ? desk : 0)));
  plan.units = reinterpret_cast<Unit *>(memory);
  plan.jobs = reinterpret_cast<Job *>(memory + unit_bytes);
  plan.states = reinterpret_cast<float *>(memory + unit_bytes + job_bytes);
  unsigned char *own = alone ? reinterpret_cast<unsigned char *>(plan.states + plan.n_states) : nullptr;
  plan_all(heads, sequences, n_sequences, q, ldq, out, ldo, parts_per_job, plan);
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(heads.dk)));
  Call call{&table, &heads, ldq, ldo, scale, plan.jobs, plan.n_jobs, own};
  parallel_for(plan.n_jobs, alone ? plan.n_jobs : 1, run_jobs, &call, alone ? 0 : desk);
}

bool usable_kv(const mimo_heads &heads, const mimo_kv &kv) noexcept {
  const auto alignment = static_cast<std::size_t>(number_bytes(heads));
  if (heads.kv_type < MIMO_KV_F32 || heads.kv_type > MIMO_KV_INT8) return false;
  if (!usable(kv.k, alignment) || !usable(kv.v, alignment)) return false;
  return heads.kv_type != MIMO_KV_INT8 || (usable(kv.k_scales, 4) && usable(kv.v_scales, 4));
}

bool sensible_heads(const mimo_heads &heads, const mimo_kv *sequences, std::int64_t n_sequences) noexcept {
  if (heads.kv_heads <= 0 || heads.heads <= 0 || heads.heads % heads.kv_heads != 0 || heads.window < 0) return false;
  if (!sensible(heads.heads, heads.dk) || !sensible(heads.heads, heads.dv)) return false;
  if (heads.sink != nullptr && !usable(heads.sink, alignof(float))) return false;
  if (n_sequences < 0 || (n_sequences > 0 && !usable(sequences, alignof(mimo_kv)))) return false;
  std::int64_t T = 0;
  for (std::int64_t i = 0; i < n_sequences; ++i) {
    const mimo_kv &kv = sequences[i];
    if (kv.first < 0 || kv.start < kv.first || kv.T < 0 || kv.start > kWhole - kv.T) return false;
    const std::int64_t stored = kv.start - kv.first + kv.T;
    if (!sensible(stored, heads.kv_heads * std::max(heads.dk, heads.dv))) return false;
    if (kv.T > 0 && !usable_kv(heads, kv)) return false;
    T += kv.T;
    if (!sensible(T, heads.heads * std::max(heads.dk, heads.dv))) return false;
  }
  return true;
}

void rms_norm(const mimo_table &table, const float *x, std::int64_t ldx, std::int64_t T, std::int64_t D,
              const float *weight, float eps, float *y, std::int64_t ldy) {
  struct NormCall {
    const mimo_table *table;
    const float *x;
    std::int64_t ldx;
    std::int64_t D;
    const float *weight;
    float eps;
    float *y;
    std::int64_t ldy;
  };
  NormCall call{&table, x, ldx, D, weight, eps, y, ldy};
  const Range run = [](void *context, std::int64_t begin, std::int64_t end, void *) noexcept {
    const NormCall &c = *static_cast<const NormCall *>(context);
    c.table->rms_norm_rows(c.x + begin * c.ldx, c.ldx, end - begin, c.D, c.weight, c.eps, c.y + begin * c.ldy, c.ldy);
  };
  parallel_for(T, std::max<std::int64_t>(1, kNormPiece / D), run, &call);
}

}  // namespace mimo

extern "C" {

int32_t mimo_attend(const mimo_table *table, const mimo_heads *heads, const float *q, int64_t ldq,
                    const mimo_kv *sequences, int64_t n_sequences, float *out, int64_t ldo) noexcept {
  if (table == nullptr || heads == nullptr || !mimo::sensible_heads(*heads, sequences, n_sequences)) {
    return MIMO_E_ARGUMENT;
  }
  std::int64_t T = 0;
  for (std::int64_t i = 0; i < n_sequences; ++i) T += sequences[i].T;
  if (!mimo::sensible_rows(q, ldq, T, heads->heads * heads->dk) ||
      !mimo::sensible_rows(out, ldo, T, heads->heads * heads->dv)) {
    return MIMO_E_ARGUMENT;
  }
  try {
    mimo::attend(*table, *heads, q, ldq, sequences, n_sequences, out, ldo);
    return MIMO_OK;
  } catch (const std::bad_alloc &) {
    return MIMO_E_MEMORY;
  } catch (...) {
    return MIMO_E_INTERNAL;
  }
}

int32_t mimo_rms_norm(const mimo_table *table, const float *x, int64_t ldx, int64_t T, int64_t D, const float *weight,
                      float eps, float *y, int64_t ldy) noexcept {
  if (table == nullptr || !mimo::sensible_rows(x, ldx, T, D) || !mimo::sensible_rows(y, ldy, T, D) ||
      !mimo::usable(weight, alignof(float))) {
    return MIMO_E_ARGUMENT;
  }
  try {
    mimo::rms_norm(*table, x, ldx, T, D, weight, eps, y, ldy);
    return MIMO_OK;
  } catch (const std::bad_alloc &) {
    return MIMO_E_MEMORY;
  } catch (...) {
    return MIMO_E_INTERNAL;
  }
}

}  // extern "C"
