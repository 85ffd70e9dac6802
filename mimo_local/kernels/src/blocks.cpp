// Half a layer per call, or many layers: what the model does between two residual additions, without a way back to the
// caller. Baseline code only.
#include <algorithm>
#include <cstdint>
#include <new>

#include "internal.h"

namespace mimo {
namespace {

// Rows taken through a block together. Bounds its scratch memory (13 K floats a row for the real model's q, k and v);
// a long step reads the block's weights once per so many rows, which is nothing beside their products.
constexpr std::int64_t kRowsAtOnce = 512;
constexpr std::int64_t kRowGrain = 8;  // rows of norm and rotation handed to a thread

struct AttentionCall {
  const mimo_table *table;
  const mimo_attention_block *block;
  const float *x;
  float *normed;
  float *qkv;
  const float *cos;
  const float *sin;
  const mimo_kv *sequences;  // those of these rows
  std::int64_t n_sequences;

  std::int64_t hidden() const noexcept { return block->qkv.cols; }
  std::int64_t qk_heads() const noexcept { return block->heads.heads + block->heads.kv_heads; }
};

void run_norm(void *context, std::int64_t begin, std::int64_t end, void *) noexcept {
  const AttentionCall &call = *static_cast<const AttentionCall *>(context);
  const std::int64_t D = call.hidden();
  call.table->rms_norm_rows(call.x + begin * D, D, end - begin, D, call.block->norm, call.block->eps,
                            call.normed + begin * D, D);
}

// Row `t` of these rows goes to its sequence's row of keys and values.
void write_kv(const AttentionCall &call, std::int64_t t, const float *k, const float *v) noexcept {
  const mimo_heads &heads = call.block->heads;
  const mimo_kv *sequence = call.sequences;
  std::int64_t row = t;
  for (; row >= sequence->T; ++sequence) row -= sequence->T;
  row += sequence->start - sequence->first;
  const std::int64_t n_k = heads.kv_heads * heads.dk;
  const std::int64_t n_v = heads.kv_heads * heads.dv;
  if (heads.kv_type == MIMO_KV_INT8) {
    const std::int64_t G = heads.kv_heads;
    call.table->quantize_heads(k, 1.0F, G, heads.dk, static_cast<std::int8_t *>(sequence->k) + row * n_k,
                               sequence->k_scales + row * G);
    call.table->quantize_heads(v, call.block->value_scale, G, heads.dv,
                               static_cast<std::int8_t *>(sequence->v) + row * n_v, sequence->v_scales + row * G);
  } else if (heads.kv_type == MIMO_KV_BF16) {
    call.table->scale_row_bf16(k, 1.0F, n_k, static_cast<std::uint16_t *>(sequence->k) + row * n_k);
    call.table->scale_row_bf16(v, call.block->value_scale, n_v, static_cast<std::uint16_t *>(sequence->v) + row * n_v);
  } else {
    call.table->scale_row(k, 1.0F, n_k, static_cast<float *>(sequence->k) + row * n_k);
    call.table->scale_row(v, call.block->value_scale, n_v, static_cast<float *>(sequence->v) + row * n_v);
  }
}

void run_rotate_and_write(void *context, std::int64_t begin, std::int64_t end, void *) noexcept {
  const AttentionCall &call = *static_cast<const AttentionCall *>(context);
  const mimo_heads &heads = call.block->heads;
  const std::int64_t rotary = call.block->rotary;
  for (std::int64_t t = begin; t < end; ++t) {
    float *row = call.qkv + t * call.block->qkv.rows;
    call.table->rotate_row(row, call.qk_heads(), heads.dk, rotary, call.cos + t * rotary, call.sin + t * rotary);
    write_kv(call, t, row + heads.heads * heads.dk, row + call.qk_heads() * heads.dk);
  }
}

float *floats(Slot slot, std::int64_t n) {
  return static_cast<float *>(scratch(slot, n * static_cast<std::int64_t>(sizeof(float))));
}

// Rows of one chunk, whose sequences are `sequences`; the change to x goes to `out` (rows, D).
void attention_rows(AttentionCall &call, std::int64_t rows, float *out) {
  const mimo_attention_block &block = *call.block;
  const std::int64_t D = call.hidden();
  const std::int64_t n_out = block.heads.heads * block.heads.dv;
  call.normed = floats(kSlotBlock, rows * D);
  call.qkv = floats(kSlotQkv, rows * block.qkv.rows);
  float *attended = floats(kSlotAttended, rows * n_out);
  parallel_for(rows, kRowGrain, run_norm, &call);
  multiply(*call.table, block.qkv, call.normed, D, rows, call.qkv, block.qkv.rows);
  parallel_for(rows, kRowGrain, run_rotate_and_write, &call);
  attend(*call.table, block.heads, call.qkv, block.qkv.rows, call.sequences, call.n_sequences, attended, n_out);
  multiply(*call.table, block.out, attended, n_out, rows, out, D);
}

// The part of `all` (n of them) that falls into rows [begin, end) of the step -> how many were written to `part`.
std::int64_t sequences_between(const mimo_kv *all, std::int64_t n, std::int64_t begin, std::int64_t end,
                               mimo_kv *part) noexcept {
  std::int64_t found = 0;
  std::int64_t at = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t from = std::max(begin, at);
    const std::int64_t to = std::min(end, at + all[i].T);
    if (from < to) {
      part[found] = all[i];
      part[found].start += from - at;
      part[found].T = to - from;
      ++found;
    }
    at += all[i].T;
  }
  return found;
}

bool sensible_block(const mimo_attention_block &block, const mimo_kv *sequences, std::int64_t n, std::int64_t T) {
  const mimo_heads &h = block.heads;
  if (h.heads < 1 || h.kv_heads < 1 || h.dk < 1 || h.dv < 1 || h.window < 0) return false;
  if (h.heads > 1 << 16 || h.dk > 1 << 16 || h.dv > 1 << 16 || h.heads % h.kv_heads != 0) return false;
  if (block.rotary < 0 || block.rotary > h.dk || block.rotary % 2 != 0) return false;
  if (!sensible_matrix(block.qkv) || !sensible_matrix(block.out) || !usable(block.norm, 4)) return false;
  if (block.qkv.rows != (h.heads + h.kv_heads) * h.dk + h.kv_heads * h.dv) return false;
  if (block.out.cols != h.heads * h.dv || block.out.rows != block.qkv.cols) return false;
  std::int64_t rows = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const mimo_kv &s = sequences[i];
    if (!usable_kv(h, s) || s.first < 0 || s.start < s.first || s.T < 1) return false;
    rows += s.T;
  }
  return rows == T;
}

void attention(const mimo_table &table, const mimo_attention_block &block, float *x, std::int64_t T, const float *cos,
               const float *sin, const mimo_kv *sequences, std::int64_t n, float *delta) {
  const std::int64_t D = block.qkv.cols;
  auto *part = static_cast<mimo_kv *>(scratch(kSlotKv, n * static_cast<std::int64_t>(sizeof(mimo_kv))));
  for (std::int64_t t = 0; t < T; t += kRowsAtOnce) {
    const std::int64_t rows = std::min(T - t, kRowsAtOnce);
    const std::int64_t found = sequences_between(sequences, n, t, t + rows, part);
    AttentionCall call{&table, &block, x + t * D, nullptr, nullptr, cos + t * block.rotary, sin + t * block.rotary,
                       part,   found};
    float *out = delta != nullptr ? delta + t * D : floats(kSlotDelta, rows * D);
    attention_rows(call, rows, out);
    if (delta == nullptr) table.add_scaled(out, 1.0F, rows * D, x + t * D);
  }
}

// ids and weights of the rows, and the experts' sum into y.
void mixture_rows(const mimo_table &table, const mimo_mlp_block &block, const float *normed, std::int64_t rows,
                  std::int64_t D, float *y) {
  const std::int64_t K = block.router == nullptr ? 1 : block.router->K;
  auto *ids = static_cast<std::int32_t *>(scratch(kSlotIds, rows * K * 4));
  float *weights = nullptr;
  std::int32_t status = MIMO_OK;
  if (block.router != nullptr) {
    weights = floats(kSlotWeights, rows * K);
    status = mimo_route(&table, block.router, normed, D, rows, ids, weights);
  } else {
    std::fill(ids, ids + rows, 0);
  }
  if (status == MIMO_OK) {
    status = mimo_moe(&table, block.mlps, block.n_mlps, normed, D, rows, ids, weights, K, y, D, 0);
  }
  if (status != MIMO_OK) throw status;
}

}  // namespace
}  // namespace mimo

extern "C" {

int32_t mimo_attention(const mimo_table *table, const mimo_attention_block *block, float *x, int64_t T,
                       const float *cos, const float *sin, const mimo_kv *sequences, int64_t n_sequences,
                       float *delta) noexcept {
  if (table == nullptr || block == nullptr || T < 0 || n_sequences < 0) return MIMO_E_ARGUMENT;
  if (n_sequences > 0 && sequences == nullptr) return MIMO_E_ARGUMENT;
  if (!mimo::sensible_block(*block, sequences, n_sequences, T)) return MIMO_E_ARGUMENT;
  if (T == 0) return MIMO_OK;
  const bool rope = block->rotary == 0 || (mimo::usable(cos, 4) && mimo::usable(sin, 4));
  const std::int64_t D = block->qkv.cols;
  if (!rope || !mimo::sensible_rows(x, D, T, D)) return MIMO_E_ARGUMENT;
  if (delta != nullptr && !mimo::usable(delta, 4)) return MIMO_E_ARGUMENT;
  try {
    mimo::attention(*table, *block, x, T, cos, sin, sequences, n_sequences, delta);
    return MIMO_OK;
  } catch (const std::bad_alloc &) {
    return MIMO_E_MEMORY;
  } catch (...) {
    return MIMO_E_INTERNAL;
  }
}

int32_t mimo_mixture(const mimo_table *table, const mimo_mlp_block *block, float *x, int64_t T,
                     float *delta) noexcept {
  if (table == nullptr || block == nullptr || block->mlps == nullptr || block->n_mlps < 1) return MIMO_E_ARGUMENT;
  if (!mimo::usable(block->norm, 4)) return MIMO_E_ARGUMENT;
  const std::int64_t D = block->router != nullptr ? block->router->D : block->mlps[0].gate.cols;
  if (T < 0 || D < 1 || (block->router != nullptr && block->router->K < 1)) return MIMO_E_ARGUMENT;
  if (T == 0) return MIMO_OK;
  if (!mimo::sensible_rows(x, D, T, D) || (delta != nullptr && !mimo::usable(delta, 4))) return MIMO_E_ARGUMENT;
  try {
    float *normed = mimo::floats(mimo::kSlotBlock, T * D);
    const std::int32_t status = mimo_rms_norm(table, x, D, T, D, block->norm, block->eps, normed, D);
    if (status != MIMO_OK) return status;
    // Summed apart from x, as with a delta: whether somebody looks at the change must not change it.
    float *y = delta != nullptr ? delta : mimo::floats(mimo::kSlotDelta, T * D);
    mimo::mixture_rows(*table, *block, normed, T, D, y);
    if (delta == nullptr) table->add_scaled(y, 1.0F, T * D, x);
    return MIMO_OK;
  } catch (std::int32_t status) {
    return status;
  } catch (const std::bad_alloc &) {
    return MIMO_E_MEMORY;
  } catch (...) {
    return MIMO_E_INTERNAL;
  }
}

int32_t mimo_layers(const mimo_table *table, const mimo_layer *layers, int64_t n_layers, float *x, int64_t T,
                    const mimo_rope *ropes, int64_t n_ropes, const mimo_kv *sequences,
                    int64_t n_sequences) noexcept {
  if (n_layers < 0 || n_ropes < 0 || n_sequences < 0) return MIMO_E_ARGUMENT;
  if (n_layers == 0) return MIMO_OK;
  if (layers == nullptr || ropes == nullptr || (n_sequences > 0 && sequences == nullptr)) return MIMO_E_ARGUMENT;
  for (int64_t i = 0; i < n_layers; ++i) {
    const mimo_layer &layer = layers[i];
    if (layer.rope < 0 || layer.rope >= n_ropes) return MIMO_E_ARGUMENT;
    const mimo_rope &rope = ropes[layer.rope];
    std::int32_t status = mimo_attention(table, layer.attention, x, T, rope.cos, rope.sin, sequences + i * n_sequences,
                                         n_sequences, nullptr);
    if (status == MIMO_OK) status = mimo_mixture(table, layer.mlp, x, T, nullptr);
    if (status != MIMO_OK) return status;
  }
  return MIMO_OK;
}

}  // extern "C"
