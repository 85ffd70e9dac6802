// What moe.cpp and moe_plan.cpp share: a step's pairs (row of x, mlp) in groups, and how their work is cut into items.
// No function bodies here.
#ifndef MIMO_MOE_H
#define MIMO_MOE_H

#include <atomic>
#include <cstdint>

#include "internal.h"

namespace mimo {

constexpr std::int64_t kGroupRows = 512;  // pairs of one expert that are multiplied together: bounds a worker's memory
constexpr std::int64_t kSlab = 16;        // pairs prepared together (prepare_panels cuts there)

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
  std::int64_t hidden_items;  // 0: who is last with a group's middle prepares its one slab
  std::int64_t down_blocks;
  std::int64_t *down_at;      // where they begin, and D
  std::int64_t floats;       // of a worker's own memory; panels' scratch follows
  bool clear;                // y is overwritten
  alignas(64) std::atomic<std::int64_t> shared_left;
};

// The groups of a call, cut at `most` pairs. Memory of kSlotPlan. Throws std::bad_alloc.
Plan make_plan(const Mixture &call, std::int64_t most);
// Lays out the memory of a wave whose call, plan, groups, width and first_pair are set, and cuts its items. Memory of
// kSlotHidden. Throws std::bad_alloc.
void lay_out(Wave &wave);
// Bytes a worker needs.
std::int64_t worker_memory(const Wave &wave) noexcept;

}  // namespace mimo

#endif
