// mimo_route: which experts a row goes to, and how much each counts. Baseline code only.
//
// A score is the sigmoid of a float32 product; score + bias stands for election. With groups, only the experts of the
// best groups do, by the sum of their two best. Of equal candidates the lower number wins, as in a stable sort
// (torch.topk promises no order); NaN beats every number, so that it is seen and not passed over.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <new>

#include "internal.h"

namespace mimo {
namespace {

constexpr std::int64_t kMostExperts = 1 << 16;  // ids of one row are held as int32, and E * D must mean something
constexpr std::int64_t kRowsAtOnce = 1024;      // rows whose scores are held: 1 MiB with 256 experts
constexpr std::int64_t kGrain = 16;             // rows elected by one thread at a time, some microseconds each

struct Routing {
  const mimo_table *table;
  const mimo_router *router;
  float *scores;  // (rows, E), and behind them the rows' work areas
  std::int32_t *ids;
  float *weights;
};

bool beats(float a, float b) noexcept { return a > b || (std::isnan(a) && !std::isnan(b)); }

// The numbers of the k best of values[begin, end), best first, joined to the `have` already in best.
void take_best(const float *values, std::int64_t begin, std::int64_t end, std::int64_t k, std::int64_t &have,
               std::int32_t *best) noexcept {
  for (std::int64_t i = begin; i < end; ++i) {
    if (have == k && !beats(values[i], values[best[k - 1]])) continue;
    std::int64_t at = have < k ? have++ : k - 1;
    for (; at > 0 && beats(values[i], values[best[at - 1]]); --at) best[at] = best[at - 1];
    best[at] = static_cast<std::int32_t>(i);
  }
}

// Groups in ascending order, so that among equals the lower expert is met first.
void best_groups(const mimo_router &router, const float *election, float *strength, std::int32_t *chosen) noexcept {
  const std::int64_t size = router.E / router.n_group;
  for (std::int64_t g = 0; g < router.n_group; ++g) {
    std::int32_t two[2];
    std::int64_t have = 0;
    take_best(election, g * size, (g + 1) * size, 2, have, two);
    strength[g] = election[two[0]] + election[two[1]];
  }
  std::int64_t have = 0;
  take_best(strength, 0, router.n_group, router.topk_group, have, chosen);
  std::sort(chosen, chosen + router.topk_group);
}

// work: E + n_group floats and n_group ids.
void elect(const mimo_router &router, const float *score, float *work, std::int32_t *ids, float *weights) noexcept {
  float *election = work;
  for (std::int64_t e = 0; e < router.E; ++e) election[e] = score[e] + router.bias[e];
  std::int64_t have = 0;
  if (router.n_group == 1) {
    take_best(election, 0, router.E, router.K, have, ids);
  } else {
    float *strength = work + router.E;
    auto *chosen = reinterpret_cast<std::int32_t *>(strength + router.n_group);
    best_groups(router, election, strength, chosen);
    const std::int64_t size = router.E / router.n_group;
    for (std::int64_t g = 0; g < router.topk_group; ++g) {
      take_best(election, chosen[g] * size, (chosen[g] + 1) * size, router.K, have, ids);
    }
  }
  std::sort(ids, ids + router.K);
  float sum = 0.0F;
  for (std::int64_t k = 0; k < router.K; ++k) sum += score[ids[k]];
  for (std::int64_t k = 0; k < router.K; ++k) {
    float weight = score[ids[k]];
    if (router.norm != 0) weight /= sum + 1e-20F;
    weights[k] = weight * router.scale;
  }
}

void run_elect(void *context, std::int64_t begin, std::int64_t end, void *memory) noexcept {
  const Routing &routing = *static_cast<const Routing *>(context);
  const mimo_router &router = *routing.router;
  for (std::int64_t t = begin; t < end; ++t) {
    float *score = routing.scores + t * router.E;
    routing.table->sigmoid_row(score, router.E, score);
    elect(router, score, static_cast<float *>(memory), routing.ids + t * router.K, routing.weights + t * router.K);
  }
}

void route(const mimo_table &table, const mimo_router &router, const float *x, std::int64_t ldx, std::int64_t T,
           std::int32_t *ids, float *weights) {
  const mimo_matrix w{router.weight, nullptr, router.E, router.D, MIMO_F32};
  const std::int64_t work = 4 * (router.E + 2 * router.n_group);
  for (std::int64_t t = 0; t < T; t += kRowsAtOnce) {
    const std::int64_t now = std::min(T - t, kRowsAtOnce);
    auto *scores = static_cast<float *>(scratch(kSlotPlan, now * router.E * 4));
    multiply(table, w, x + t * ldx, ldx, now, scores, router.E);
    Routing routing{&table, &router, scores, ids + t * router.K, weights + t * router.K};
    parallel_for(now, kGrain, run_elect, &routing, work);
  }
}

bool sensible_router(const mimo_router &r) noexcept {
  if (r.E < 1 || r.E > kMostExperts || !sensible(r.E, r.D) || r.K < 1 || r.K > r.E || r.n_group < 1) return false;
  if (!usable(r.weight, alignof(float)) || !usable(r.bias, alignof(float))) return false;
  if (r.n_group == 1) return true;
  const std::int64_t size = r.E / r.n_group;
  return r.E % r.n_group == 0 && size >= 2 && r.topk_group >= 1 && r.topk_group <= r.n_group &&
         r.topk_group * size >= r.K;
}

}  // namespace
}  // namespace mimo

extern "C" {

int32_t mimo_route(const mimo_table *table, const mimo_router *router, const float *x, int64_t ldx, int64_t T,
                   int32_t *ids, float *weights) noexcept {
  if (table == nullptr || router == nullptr || !mimo::sensible_router(*router)) return MIMO_E_ARGUMENT;
  if (!mimo::sensible_rows(x, ldx, T, router->D) || !mimo::sensible(T, router->E)) return MIMO_E_ARGUMENT;
  if (T == 0) return MIMO_OK;
  if (!mimo::usable(ids, alignof(int32_t)) || !mimo::usable(weights, alignof(float))) return MIMO_E_ARGUMENT;
  try {
    mimo::route(*table, *router, x, ldx, T, ids, weights);
    return MIMO_OK;
  } catch (const std::bad_alloc &) {
    return MIMO_E_MEMORY;
  } catch (...) {
    return MIMO_E_INTERNAL;
  }
}

}  // extern "C"
