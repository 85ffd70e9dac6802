// mimo_moe and mimo_route: every table, any cut of the work, the edges of the contract.
#include <algorithm>
#include <cmath>

#include "check.h"

namespace {

// n mlps in one format, every matrix in blocks of its exact size.
struct Experts {
  Experts(std::int64_t format, std::int64_t n, std::int64_t D, std::int64_t width) : D(D), width(width) {
    for (std::int64_t e = 0; e < n; ++e) {
      mlps.push_back({stored(format, width, D), stored(format, width, D), stored(format, D, width)});
    }
  }

  mimo_matrix stored(std::int64_t format, std::int64_t rows, std::int64_t cols) {
    ++seed;
    const float spread = 1.0F / std::sqrt(static_cast<float>(cols));
    if (format == MIMO_NF4 || format == MIMO_MXFP4) {
      bytes.push_back(bits<std::uint8_t>(size(rows * cols / 2), seed));
      if (format == MIMO_MXFP4) {
        bytes.emplace_back(size(rows * cols / 32));
        std::memset(bytes.back().get(), 122, bytes.back().bytes());
        return matrix(format, bytes[bytes.size() - 2].get(), bytes.back().get(), rows, cols);
      }
      halves.emplace_back(size(rows * cols / 64));
      for (std::size_t i = 0; i < halves.back().bytes() / 2; ++i) halves.back()[i] = 0x2800;  // 2^-5
      return matrix(format, bytes.back().get(), halves.back().get(), rows, cols);
    }
    if (format == MIMO_INT8) {
      bytes.push_back(bits<std::uint8_t>(size(rows * cols), seed));
      floats.push_back(normal(size(rows), seed, spread / 64));
      return matrix(format, bytes.back().get(), floats.back().get(), rows, cols);
    }
    if (format == MIMO_BF16) {
      const Exact<float> wide = normal(size(rows * cols), seed, spread);
      halves.emplace_back(size(rows * cols));
      for (std::size_t i = 0; i < halves.back().bytes() / 2; ++i) {
        std::uint32_t word;
        std::memcpy(&word, const_cast<Exact<float> &>(wide).get() + i, 4);
        halves.back()[i] = static_cast<std::uint16_t>(word >> 16);
      }
      return matrix(format, halves.back().get(), nullptr, rows, cols);
    }
    floats.push_back(normal(size(rows * cols), seed, spread));
    return matrix(format, floats.back().get(), nullptr, rows, cols);
  }

  std::int64_t D;
  std::int64_t width;
  unsigned seed = 0;
  std::vector<mimo_mlp> mlps;
  std::vector<Exact<std::uint8_t>> bytes;
  std::vector<Exact<std::uint16_t>> halves;
  std::vector<Exact<float>> floats;
};

struct Step {
  Step(std::int64_t T, std::int64_t K, std::int64_t n, std::int64_t D, unsigned seed)
      : T(T), K(K), ldx(D + seed % 3), x(normal(size((T - 1) * ldx + D), seed)), ids(size(T * K)),
        weights(normal(size(T * K), seed + 1)) {
    std::mt19937 random(seed);
    std::vector<std::int32_t> all(size(n));
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::int32_t>(i);
    for (std::int64_t t = 0; t < T; ++t) {
      std::shuffle(all.begin(), all.end(), random);
      for (std::int64_t k = 0; k < K; ++k) ids[size(t * K + k)] = random() % 8 == 0 ? -1 : all[size(k)];
    }
  }

  std::int64_t T;
  std::int64_t K;
  std::int64_t ldx;
  Exact<float> x;
  Exact<std::int32_t> ids;
  Exact<float> weights;
};

Exact<float> run(const mimo_table *table, Experts &experts, Step &step, std::int64_t most_pairs = 0,
                 std::int64_t row = -1) {
  const std::int64_t T = row < 0 ? step.T : 1;
  const std::int64_t from = std::max<std::int64_t>(row, 0);
  Exact<float> y(size(T * experts.D));
  const mimo::Mixture call{table, experts.mlps.data(), static_cast<std::int64_t>(experts.mlps.size()),
                           step.x.get() + from * step.ldx, step.ldx, T, step.ids.get() + from * step.K,
                           step.weights.get() + from * step.K, step.K, y.get(), experts.D, false, 0};
  if (most_pairs > 0) {
    REQUIRE(mimo::mix(call, most_pairs), "mix");
    return y;
  }
  const std::int32_t status = mimo_moe(table, call.mlps, call.n_mlps, call.x, call.ldx, T, call.ids, call.weights,
                                       call.K, call.y, call.ldy, 0);
  REQUIRE(status == MIMO_OK, "status %d", status);
  return y;
}

constexpr std::int64_t kFormats[] = {MIMO_NF4, MIMO_MXFP4, MIMO_INT8, MIMO_BF16, MIMO_F32};

// Rows alone, rows in company, on every table: the same bits up to kExactRows; beyond, the same for any threads.
MIMO_CHECK(moe) {
  for (const std::int64_t format : kFormats) {
    Experts experts(format, 5, 64, 128);
    for (const std::int64_t T : {1, 8, 19}) {
      for (const std::int64_t K : {1, 4}) {
        Step step(T, K, 5, experts.D, static_cast<unsigned>(T * 10 + K));
        mimo_set_threads(1);
        const Exact<float> expected = run(mimo::scalar_table(), experts, step);
        for (std::int64_t t = 0; t < T && T <= mimo::kExactRows; ++t) {
          Exact<float> alone = run(mimo::scalar_table(), experts, step, 0, t);
          REQUIRE(std::memcmp(alone.get(), const_cast<Exact<float> &>(expected).get() + t * experts.D,
                              alone.bytes()) == 0,
                  "format %d row %d of %d", static_cast<int>(format), static_cast<int>(t), static_cast<int>(T));
        }
        for (const mimo_table *table : fast_tables()) {
          mimo_set_threads(1);
          const Exact<float> one = run(table, experts, step);
          if (T <= mimo::kExactRows) REQUIRE(one == expected, "%s format %ld T %ld", table->name, format, T);
          mimo_set_threads(3);
          REQUIRE(run(table, experts, step) == one, "%s format %ld T %ld threads", table->name, format, T);
        }
      }
    }
  }
}

// However few pairs are held at once, the rows' sums keep their order. 700 rows cut an expert's rows in two groups.
MIMO_CHECK(moe_waves) {
  const mimo_table *table = mimo_get_table(nullptr);
  Experts experts(MIMO_INT8, 6, 64, 64);
  for (const std::int64_t T : {8, 70, 700}) {
    Step step(T, 3, 6, experts.D, 5);
    mimo_set_threads(1);
    const Exact<float> expected = run(table, experts, step);
    for (const int threads : {1, 2, 5}) {
      mimo_set_threads(threads);
      REQUIRE(run(table, experts, step) == expected, "%d threads", threads);
      if (T > mimo::kExactRows) continue;  // the bound cuts groups too, and small ones may be multiplied another way
      for (const std::int64_t most : {1, 4, 7, 20}) {
        REQUIRE(run(table, experts, step, most) == expected, "%d pairs at once", static_cast<int>(most));
      }
    }
    Exact<float> cut = run(table, experts, step, 64);
    double error = 0;
    double all = 0;
    for (std::size_t i = 0; i < size(T * experts.D); ++i) {
      const double there = const_cast<Exact<float> &>(expected)[i];
      error += (cut[i] - there) * (cut[i] - there);
      all += there * there;
    }
    REQUIRE(error <= 1e-3 * all, "waves of 64: %g of %g", error, all);
  }
}

// Panels made of prepared rows: the same bits as rows, so that only the handling of panels is looked at.
const mimo_table *rows_table = nullptr;
constexpr std::int64_t kScratch = 1000;
std::int64_t rows_panels_from(std::int64_t) noexcept { return 9; }
std::int64_t rows_panels_bytes(std::int64_t format, std::int64_t T, std::int64_t K) noexcept {
  return T * rows_table->row_bytes(format, K);
}
void rows_prepare_panels(std::int64_t format, const float *x, std::int64_t ldx, const std::int32_t *index,
                         std::int64_t T, std::int64_t K, std::int64_t t0, std::int64_t t1, void *out) noexcept {
  REQUIRE(t0 % 16 == 0 && (t1 % 16 == 0 || t1 == T) && t1 <= T, "rows %ld to %ld of %ld", t0, t1, T);
  for (std::int64_t t = t0; t < t1; ++t) {
    rows_table->prepare_row(format, x + (index != nullptr ? index[t] : t) * ldx, K,
                            static_cast<unsigned char *>(out) + t * rows_table->row_bytes(format, K));
  }
}
std::int64_t rows_panels_scratch(std::int64_t, std::int64_t) noexcept { return kScratch; }
void rows_multiply_panels(const mimo::PanelsJob &job, std::int64_t n0, std::int64_t n1, void *memory) noexcept {
  REQUIRE(n0 % mimo::kPanelGrain == 0 && reinterpret_cast<std::uintptr_t>(memory) % 64 == 0, "row %ld", n0);
  std::memset(memory, 0xFF, kScratch);
  for (std::int64_t t = 0; t < job.T; ++t) {
    const void *x = static_cast<const unsigned char *>(job.x) + t * rows_table->row_bytes(job.w->format, job.w->cols);
    float *y = job.y + t * job.ldy;
    rows_table->multiply_rows({job.w, 1, &x, &y, false}, n0, n1);
  }
}

MIMO_CHECK(moe_panels) {
  rows_table = mimo_get_table(nullptr);
  mimo_table table = *rows_table;
  table.panels_from = rows_panels_from;
  table.panels_bytes = rows_panels_bytes;
  table.prepare_panels = rows_prepare_panels;
  table.panels_scratch = rows_panels_scratch;
  table.multiply_panels = rows_multiply_panels;
  mimo_table rows = *rows_table;
  rows.panels_from = [](std::int64_t) noexcept { return std::int64_t{1} << 60; };
  for (const std::int64_t format : kFormats) {
    Experts experts(format, 4, 64, 128);
    for (const std::int64_t T : {7, 25, 100, 1200}) {
      if (T > 100 && format != MIMO_INT8) continue;
      Step step(T, 2, 4, experts.D, static_cast<unsigned>(T));
      mimo_set_threads(1);
      const Exact<float> expected = run(&rows, experts, step);
      for (const int threads : {1, 3}) {
        mimo_set_threads(threads);
        REQUIRE(run(&table, experts, step) == expected, "format %ld T %ld, %d threads", format, T, threads);
        REQUIRE(run(&table, experts, step, 64) == expected, "format %ld T %ld, waves of 64", format, T);
      }
    }
  }
}

MIMO_CHECK(moe_arguments) {
  const mimo_table *table = mimo_get_table(nullptr);
  Experts experts(MIMO_F32, 3, 8, 4);
  Step step(2, 2, 3, 8, 3);
  for (std::size_t i = 0; i < 4; ++i) step.ids[i] = static_cast<std::int32_t>(i % 2);
  Exact<float> y(16);
  const auto call = [&](std::int64_t n, std::int64_t ldx, std::int64_t T, std::int64_t K, std::int64_t ldy) {
    return mimo_moe(table, experts.mlps.data(), n, step.x.get(), ldx, T, step.ids.get(), step.weights.get(), K, y.get(),
                    ldy, 0);
  };
  REQUIRE(call(3, 8, 2, 2, 8) == MIMO_OK, "good call");
  REQUIRE(call(3, 8, 0, 2, 8) == MIMO_OK, "no rows");
  REQUIRE(call(1, 8, 2, 2, 8) == MIMO_E_ARGUMENT, "an id beyond the mlps");
  REQUIRE(call(0, 8, 2, 2, 8) == MIMO_E_ARGUMENT, "no mlps");
  REQUIRE(call(3, 7, 2, 2, 8) == MIMO_E_ARGUMENT, "ldx");
  REQUIRE(call(3, 8, -1, 2, 8) == MIMO_E_ARGUMENT, "T");
  REQUIRE(call(3, 8, 2, 0, 8) == MIMO_E_ARGUMENT, "K");
  REQUIRE(call(3, 8, 2, 2, 7) == MIMO_E_ARGUMENT, "ldy");
  REQUIRE(mimo_moe(nullptr, experts.mlps.data(), 3, step.x.get(), 8, 2, step.ids.get(), nullptr, 2, y.get(), 8, 0) ==
              MIMO_E_ARGUMENT, "no table");
  REQUIRE(mimo_moe(table, experts.mlps.data(), 3, step.x.get(), 8, 2, nullptr, nullptr, 2, y.get(), 8, 0) ==
              MIMO_E_ARGUMENT, "no ids, K 2");
  REQUIRE(mimo_moe(table, experts.mlps.data(), 3, step.x.get(), 8, 2, nullptr, nullptr, 1, y.get(), 8, 0) == MIMO_OK,
          "no ids: all to the first");
  step.ids[0] = -2;
  REQUIRE(call(3, 8, 2, 2, 8) == MIMO_E_ARGUMENT, "id -2");
  step.ids[0] = 0;
  for (mimo_matrix mimo_mlp::*part : {&mimo_mlp::gate, &mimo_mlp::up, &mimo_mlp::down}) {
    mimo_matrix &w = experts.mlps[1].*part;
    const mimo_matrix good = w;
    ++w.rows;
    REQUIRE(call(3, 8, 2, 2, 8) == MIMO_E_ARGUMENT, "rows");
    w = good;
    --w.cols;
    REQUIRE(call(3, 8, 2, 2, 8) == MIMO_E_ARGUMENT, "cols");
    w = good;
    w.codes = nullptr;
    REQUIRE(call(3, 8, 2, 2, 8) == MIMO_E_ARGUMENT, "no codes");
    w = good;
    w.format = 77;
    REQUIRE(call(3, 8, 2, 2, 8) == MIMO_E_ARGUMENT, "format");
    w = good;
  }
  experts.mlps[2] = {};
  REQUIRE(call(3, 8, 2, 2, 8) == MIMO_OK, "an mlp that nobody chose may be empty");
  for (std::size_t i = 0; i < 4; ++i) step.ids[i] = -1;
  REQUIRE(call(3, 8, 2, 2, 8) == MIMO_OK, "nobody chosen");
  for (std::size_t i = 0; i < 16; ++i) REQUIRE(y[i] == 0.0F, "y is cleared");
}

// Written from the definition: all candidates ranked by a stable sort.
void expected_route(const mimo_router &r, const float *x, std::vector<std::int32_t> &ids) {
  std::vector<float> election(size(r.E));
  for (std::int64_t e = 0; e < r.E; ++e) {
    double sum = 0;
    for (std::int64_t d = 0; d < r.D; ++d) sum += static_cast<double>(x[d]) * r.weight[e * r.D + d];
    election[size(e)] = static_cast<float>(1 / (1 + std::exp(-sum))) + r.bias[e];
  }
  const std::int64_t each = r.E / r.n_group;
  std::vector<std::pair<float, std::int64_t>> groups;
  for (std::int64_t g = 0; g < r.n_group; ++g) {
    std::vector<float> in(election.begin() + g * each, election.begin() + (g + 1) * each);
    std::sort(in.rbegin(), in.rend());
    groups.emplace_back(in[0] + in[1], g);
  }
  const auto better = [](const auto &a, const auto &b) { return a.first > b.first; };
  std::stable_sort(groups.begin(), groups.end(), better);
  groups.resize(size(r.n_group == 1 ? 1 : r.topk_group));
  std::sort(groups.begin(), groups.end(), [](const auto &a, const auto &b) { return a.second < b.second; });
  std::vector<std::pair<float, std::int32_t>> all;
  for (const auto &[strength, g] : groups) {
    for (std::int64_t e = g * each; e < (g + 1) * each; ++e) {
      all.emplace_back(election[size(e)], static_cast<std::int32_t>(e));
    }
  }
  std::stable_sort(all.begin(), all.end(), better);
  ids.clear();
  for (std::int64_t k = 0; k < r.K; ++k) ids.push_back(all[size(k)].second);
  std::sort(ids.begin(), ids.end());
}

MIMO_CHECK(route) {
  const std::int64_t E = 24;
  const std::int64_t D = 40;
  Exact<float> x = normal(size(33 * D), 1);
  Exact<float> weight = normal(size(E * D), 2, 0.1F);
  Exact<float> bias = normal(size(E), 3, 0.1F);
  for (std::int64_t d = 0; d < D; ++d) weight[size(5 * D + d)] = weight[size(4 * D + d)] = weight[size(9 * D + d)];
  bias[4] = bias[5] = bias[9] = 0.5F;  // three equal candidates, among the best
  for (const mimo_router &shape : {mimo_router{weight.get(), bias.get(), E, D, 2, 1, 1, 1, 1.0F, 0.0F},
                                   mimo_router{weight.get(), bias.get(), E, D, 24, 1, 1, 0, 2.5F, 0.0F},
                                   mimo_router{weight.get(), bias.get(), E, D, 5, 4, 2, 1, 1.0F, 0.0F}}) {
    for (const std::int64_t T : {1, 8, 33}) {
      mimo_set_threads(1);
      Exact<std::int32_t> ids(size(T * shape.K));
      Exact<float> weights(size(T * shape.K));
      REQUIRE(mimo_route(mimo::scalar_table(), &shape, x.get(), D, T, ids.get(), weights.get()) == MIMO_OK, "route");
      std::vector<std::int32_t> expected;
      for (std::int64_t t = 0; t < T; ++t) {
        expected_route(shape, x.get() + t * D, expected);
        for (std::int64_t k = 0; k < shape.K; ++k) REQUIRE(ids[size(t * shape.K + k)] == expected[size(k)], "row");
      }
      mimo_set_threads(3);
      for (const mimo_table *table : fast_tables()) {
        Exact<std::int32_t> again(size(T * shape.K));
        Exact<float> same(size(T * shape.K));
        REQUIRE(mimo_route(table, &shape, x.get(), D, T, again.get(), same.get()) == MIMO_OK, "route");
        if (T <= mimo::kExactRows) REQUIRE(again == ids && same == weights, "%s", table->name);
      }
    }
  }
  mimo_router bad{weight.get(), bias.get(), E, D, 5, 4, 2, 1, 1.0F, 0.0F};
  Exact<std::int32_t> ids(5);
  Exact<float> weights(5);
  const auto call = [&] { return mimo_route(mimo::scalar_table(), &bad, x.get(), D, 1, ids.get(), weights.get()); };
  REQUIRE(call() == MIMO_OK, "good");
  bad.K = 13;
  REQUIRE(call() == MIMO_E_ARGUMENT, "more than the chosen groups hold");
  bad.K = 25;
  bad.n_group = 1;
  REQUIRE(call() == MIMO_E_ARGUMENT, "more than there are");
  bad.K = 5;
  bad.n_group = 5;
  REQUIRE(call() == MIMO_E_ARGUMENT, "uneven groups");
  bad.n_group = 24;
  REQUIRE(call() == MIMO_E_ARGUMENT, "groups of one");
  bad.n_group = 1;
  bad.bias = nullptr;
  REQUIRE(call() == MIMO_E_ARGUMENT, "no bias");
  bad.bias = bias.get();
  for (std::int64_t d = 0; d < D; ++d) x[size(d)] = std::numeric_limits<float>::quiet_NaN();
  REQUIRE(call() == MIMO_OK && ids[0] == 0 && ids[4] == 4 && std::isnan(weights[0]), "NaN");
}

}  // namespace
