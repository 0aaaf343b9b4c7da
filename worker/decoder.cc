#include "worker/decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/check.h"

namespace switchyard {
namespace {

size_t Bytes(int64_t rows, int64_t columns, DType dtype) {
  return static_cast<size_t>(rows * columns) * DTypeSize(dtype);
}

// OLMoE's clip_qkv: |x| <= limit, elementwise; NaN stays NaN.
void Clamp(const Tensor& x, float limit) {
  float* data = x.as<float>();
  for (int64_t i = 0, n = x.numel(); i < n; ++i) {
    if (data[i] > limit) data[i] = limit;
    if (data[i] < -limit) data[i] = -limit;
  }
}

}  // namespace

Decoder::Decoder(const ModelConfig& config, std::shared_ptr<const AttentionWeights> weights,
                 int32_t max_rows, ComputeBackend* backend, KvCache* kv, MoeExchange* exchange,
                 WorkerCounters* counters)
    : config_(config),
      weights_(std::move(weights)),
      act_(weights_->dtype),
      max_rows_(max_rows),
      backend_(backend),
      kv_(kv),
      exchange_(exchange),
      router_(config.moe.routing),
      counters_(counters) {
  const AttentionConfig& a = config_.attention;
  const int64_t hidden = config_.hidden_size;
  const auto rows = [&](int64_t columns, DType dtype) {
    return Buffer(Bytes(max_rows_, columns, dtype));
  };
  residual_ = rows(hidden, DType::kF32);
  normed_ = rows(hidden, act_);
  q_ = rows(a.num_heads * a.head_dim, DType::kF32);
  k_ = rows(a.num_kv_heads * a.head_dim, DType::kF32);
  v_ = rows(a.num_kv_heads * a.head_dim, DType::kF32);
  attended_ = rows(a.num_heads * a.head_dim, act_);
  projected_ = rows(hidden, DType::kF32);
  mlp_out_ = rows(hidden, act_);
  shared_gate_ = rows(1, DType::kF32);
  router_logits_ = rows(config_.moe.routing.num_experts, DType::kF32);
  picked_ = Buffer(Bytes(kMaxLogitsRows, hidden, DType::kF32));
  picked_normed_ = Buffer(Bytes(kMaxLogitsRows, hidden, act_));
  logits_ = Buffer(Bytes(kMaxLogitsRows, config_.vocab_size, DType::kF32));
  const size_t copies =
      static_cast<size_t>(max_rows_) * static_cast<size_t>(config_.moe.routing.top_k);
  expert_ids_.resize(copies);
  expert_weights_.resize(copies);
  expert_counts_.resize(static_cast<size_t>(max_rows_));
}

int64_t Decoder::WorkspaceBytes(const ModelConfig& config, DType act, int32_t max_rows) {
  const AttentionConfig& a = config.attention;
  const int64_t act_size = static_cast<int64_t>(DTypeSize(act));
  const int64_t f32 =
      4 * (2 * config.hidden_size + (a.num_heads + 2 * a.num_kv_heads) * a.head_dim +
           config.moe.routing.num_experts + 2 * config.moe.routing.top_k + 2);
  const int64_t activations = act_size * (2 * config.hidden_size + a.num_heads * a.head_dim);
  const int64_t logits_row = config.hidden_size * (4 + act_size) + 4 * config.vocab_size;
  return max_rows * (f32 + activations) + kMaxLogitsRows * logits_row;
}

ScratchLimits Decoder::MaxCalls(const ModelConfig& config, DType act, int32_t max_rows,
                                int32_t max_model_len) {
  const AttentionConfig& a = config.attention;
  return {.act = act,
          .matmul_rows = std::max<int64_t>(max_rows, kMaxLogitsRows),
          .matmul_k = std::max(config.hidden_size, a.num_heads * a.head_dim),
          .mlp_rows = max_rows,
          .mlp_hidden = config.hidden_size,
          .mlp_width = std::max(config.dense_width, config.moe.shared_width),
          .attention_rows = max_rows,
          .num_heads = a.num_heads,
          .num_kv_heads = a.num_kv_heads,
          .head_dim = a.head_dim,
          .max_positions = max_model_len,
          .combine_hidden = config.hidden_size,
          .vocab_size = config.vocab_size};
}

absl::Status Decoder::Forward(const StepHeader& step, const DecoderBatch& batch) {
  const int64_t rows = batch.num_rows();
  SY_CHECK(rows >= 1 && rows <= max_rows_);
  const Tensor residual = residual_.View(DType::kF32, {rows, config_.hidden_size});
  const Tensor normed = normed_.View(act_, {rows, config_.hidden_size});
  backend_->Embed(weights_->embedding, batch.tokens, residual);
  int32_t moe_layer = 0;
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    const AttentionLayerWeights& weights = weights_->layers[static_cast<size_t>(layer)];
    backend_->RmsNorm(residual, weights.input_norm.view, config_.rms_norm_eps, normed);
    Attention(layer, batch);
    backend_->RmsNorm(residual, weights.post_attention_norm.view, config_.rms_norm_eps, normed);
    if (!weights.is_moe) {
      Dense(weights, rows);
    } else if (absl::Status status = Moe(step, moe_layer++, weights, batch); !status.ok()) {
      return status;
    }
    counters_->progress.fetch_add(1, std::memory_order_relaxed);
  }
  return absl::OkStatus();
}

void Decoder::Attention(int64_t layer, const DecoderBatch& batch) {
  const AttentionConfig& a = config_.attention;
  const AttentionLayerWeights& weights = weights_->layers[static_cast<size_t>(layer)];
  const int64_t rows = batch.num_rows();
  const Tensor normed = normed_.View(act_, {rows, config_.hidden_size});
  backend_->Matmul(normed, weights.q, weights.q_bias.data(),
                   q_.View(DType::kF32, {rows, a.num_heads * a.head_dim}));
  backend_->Matmul(normed, weights.k, weights.k_bias.data(),
                   k_.View(DType::kF32, {rows, a.num_kv_heads * a.head_dim}));
  backend_->Matmul(normed, weights.v, weights.v_bias.data(),
                   v_.View(DType::kF32, {rows, a.num_kv_heads * a.head_dim}));

  const Tensor q = q_.View(DType::kF32, {rows, a.num_heads, a.head_dim});
  const Tensor k = k_.View(DType::kF32, {rows, a.num_kv_heads, a.head_dim});
  const Tensor v = v_.View(DType::kF32, {rows, a.num_kv_heads, a.head_dim});
  NormQueryKey(weights, rows, q, k);
  if (a.clip_qkv > 0.0f) {
    backend_->Synchronize();
    for (const Tensor& x : {q, k, v}) Clamp(x, a.clip_qkv);
  }
  backend_->Rope(q, weights_->rope.cos, weights_->rope.sin, batch.positions);
  backend_->Rope(k, weights_->rope.cos, weights_->rope.sin, batch.positions);
  const Tensor& kv = kv_->layer(layer);
  backend_->WriteKv(k, v, kv_->shape(), batch.sequences, kv);
  const Tensor attended = attended_.View(act_, {rows, a.num_heads * a.head_dim});
  backend_->Attention({.q = q,
                       .kv = &kv,
                       .shape = kv_->shape(),
                       .sequences = batch.sequences,
                       .scale = 1.0f / std::sqrt(static_cast<float>(a.head_dim)),
                       .out = attended});
  const Tensor projected = projected_.View(DType::kF32, {rows, config_.hidden_size});
  backend_->Matmul(attended, weights.o, weights.o_bias.data(), projected);
  backend_->Add(projected, residual_.View(DType::kF32, {rows, config_.hidden_size}));
}

void Decoder::NormQueryKey(const AttentionLayerWeights& weights, int64_t rows, const Tensor& q,
                           const Tensor& k) {
  const AttentionConfig& a = config_.attention;
  if (a.qk_norm == QkNorm::kNone) return;
  const bool per_head = a.qk_norm == QkNorm::kPerHead;
  for (const auto& [x, heads, norm] :
       {std::tuple{q, a.num_heads, &weights.q_norm}, {k, a.num_kv_heads, &weights.k_norm}}) {
    const Tensor view = per_head ? Tensor(x.data, DType::kF32, {rows * heads, a.head_dim})
                                 : Tensor(x.data, DType::kF32, {rows, heads * a.head_dim});
    backend_->RmsNorm(view, norm->view, config_.rms_norm_eps, view);
  }
}

void Decoder::Dense(const AttentionLayerWeights& weights, int64_t rows) {
  const Tensor out = mlp_out_.View(act_, {rows, config_.hidden_size});
  const MlpGroup group{&weights.dense, 0, rows};
  backend_->GroupedMlp(normed_.View(act_, {rows, config_.hidden_size}), {&group, 1}, out);
  backend_->Add(out, residual_.View(DType::kF32, {rows, config_.hidden_size}));
}

void Decoder::Route(const AttentionLayerWeights& weights, const DecoderBatch& batch) {
  const int64_t rows = batch.num_rows();
  const RoutingConfig& routing = config_.moe.routing;
  const Tensor logits = router_logits_.View(DType::kF32, {rows, routing.num_experts});
  backend_->Matmul(normed_.View(act_, {rows, config_.hidden_size}), weights.router, nullptr,
                   logits);
  backend_->Synchronize();
  const size_t top_k = static_cast<size_t>(routing.top_k);
  const size_t copies = static_cast<size_t>(rows) * top_k;
  router_.Route(logits, batch.routing_profiles, std::span(expert_ids_).first(copies),
                std::span(expert_weights_).first(copies),
                std::span(expert_counts_).first(static_cast<size_t>(rows)));
  for (size_t r = 0; r < static_cast<size_t>(rows); ++r) {
    for (size_t j = static_cast<size_t>(expert_counts_[r]); j < top_k; ++j) {
      expert_ids_[r * top_k + j] = -1;
      expert_weights_[r * top_k + j] = 0.0f;
    }
  }
}

absl::Status Decoder::Moe(const StepHeader& step, int32_t moe_layer,
                          const AttentionLayerWeights& weights, const DecoderBatch& batch) {
  const int64_t rows = batch.num_rows();
  const int32_t top_k = config_.moe.routing.top_k;
  const size_t copies = static_cast<size_t>(rows) * static_cast<size_t>(top_k);
  const Tensor normed = normed_.View(act_, {rows, config_.hidden_size});
  Route(weights, batch);
  if (batch.record != nullptr) {
    batch.record->SetLayer(moe_layer, std::span(expert_ids_).first(copies),
                           std::span(expert_weights_).first(copies));
  }
  if (absl::Status status =
          exchange_->Dispatch(step, moe_layer, std::span(expert_ids_).first(copies), normed);
      !status.ok()) {
    return status;
  }
  const Tensor shared = mlp_out_.View(act_, {rows, config_.hidden_size});
  const Tensor gate = shared_gate_.View(DType::kF32, {rows, 1});
  if (weights.has_shared) {  // while the routed rows are away
    const MlpGroup group{&weights.shared, 0, rows};
    backend_->GroupedMlp(normed, {&group, 1}, shared);
    backend_->Matmul(normed, weights.shared_gate, nullptr, gate);
    backend_->Sigmoid(Tensor(gate.data, DType::kF32, {rows}));
    backend_->Synchronize();
  }
  if (absl::Status status = exchange_->Await(); !status.ok()) return status;
  const Tensor results = exchange_->results();
  backend_->Combine({.residual = residual_.View(DType::kF32, {rows, config_.hidden_size}),
                     .expert_rows = &results,
                     .row_of = exchange_->row_of(),
                     .weights = std::span(expert_weights_).first(copies),
                     .top_k = top_k,
                     .shared = weights.has_shared ? &shared : nullptr,
                     .shared_gate = weights.has_shared ? gate.as<float>() : nullptr});
  backend_->Synchronize();  // the results' buffer is received into again by the next layer
  return absl::OkStatus();
}

Tensor Decoder::Logits(std::span<const int32_t> rows) {
  const int64_t count = static_cast<int64_t>(rows.size());
  SY_CHECK(count >= 1 && count <= kMaxLogitsRows);
  const size_t row_bytes = Bytes(1, config_.hidden_size, DType::kF32);
  backend_->Synchronize();
  for (size_t i = 0; i < rows.size(); ++i) {
    std::memcpy(picked_.data() + i * row_bytes,
                residual_.data() + static_cast<size_t>(rows[i]) * row_bytes, row_bytes);
  }
  const Tensor normed = picked_normed_.View(act_, {count, config_.hidden_size});
  const Tensor logits = logits_.View(DType::kF32, {count, config_.vocab_size});
  backend_->RmsNorm(picked_.View(DType::kF32, {count, config_.hidden_size}),
                    weights_->final_norm.view, config_.rms_norm_eps, normed);
  backend_->Matmul(normed, weights_->lm_head, nullptr, logits);
  return logits;
}

}  // namespace switchyard
