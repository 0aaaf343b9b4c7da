#include "worker/decoder.h"

#include <algorithm>
#include <array>
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
                 int32_t max_rows, int32_t max_model_len, ComputeBackend* backend, KvCache* kv,
                 MoeExchange* exchange, WorkerCounters* counters)
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
    return Buffer(Bytes(max_rows_, columns, dtype), Buffer::Pages::kNow);
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
  backend_->Reserve(MaxCalls(config_, act_, max_rows_, max_model_len));
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

// Cuts the batch into the step's micro-batches.
std::span<Decoder::MicroBatch> Decoder::Split(const StepHeader& step, const DecoderBatch& batch) {
  const int64_t first = RowsOfFirstMicroBatch(batch.num_rows(), step.micro_batches);
  const int64_t ends[kMaxMicroBatches] = {first, batch.num_rows()};
  int64_t begin = 0;
  for (size_t m = 0; m < step.micro_batches; ++m) {
    MicroBatch& micro = micro_batches_[m];
    const int64_t end = ends[m];
    micro.index = static_cast<int32_t>(m);
    micro.begin = begin;
    micro.sequences.clear();
    for (const SequenceRows& s : batch.sequences) {
      const int64_t from = std::max<int64_t>(s.first_row, begin);
      const int64_t to = std::min<int64_t>(s.first_row + s.num_rows, end);
      if (from >= to) continue;
      micro.sequences.push_back(
          {.block_table = s.block_table,
           .start_position = s.start_position + static_cast<int32_t>(from - s.first_row),
           .first_row = static_cast<int32_t>(from - begin),
           .num_rows = static_cast<int32_t>(to - from)});
    }
    const auto at = static_cast<size_t>(begin);
    const auto count = static_cast<size_t>(end - begin);
    micro.batch = {.tokens = batch.tokens.subspan(at, count),
                   .positions = batch.positions.subspan(at, count),
                   .routing_profiles = batch.routing_profiles.subspan(at, count),
                   .sequences = micro.sequences,
                   .record = m + 1 == step.micro_batches ? batch.record : nullptr};
    begin = end;
  }
  return std::span(micro_batches_).first(step.micro_batches);
}

Tensor Decoder::Residual(const MicroBatch& micro) const {
  return {residual_.data() + Bytes(micro.begin, config_.hidden_size, DType::kF32),
          DType::kF32,
          {micro.batch.num_rows(), config_.hidden_size}};
}

Tensor Decoder::MlpOut(const MicroBatch& micro) const {
  return {mlp_out_.data() + Bytes(micro.begin, config_.hidden_size, act_),
          act_,
          {micro.batch.num_rows(), config_.hidden_size}};
}

Tensor Decoder::SharedGate(const MicroBatch& micro) const {
  return {shared_gate_.data() + Bytes(micro.begin, 1, DType::kF32),
          DType::kF32,
          {micro.batch.num_rows(), 1}};
}

size_t Decoder::Copies(const MicroBatch& micro) const {
  return static_cast<size_t>(micro.batch.num_rows()) *
         static_cast<size_t>(config_.moe.routing.top_k);
}

size_t Decoder::FirstCopy(const MicroBatch& micro) const {
  return static_cast<size_t>(micro.begin) * static_cast<size_t>(config_.moe.routing.top_k);
}

absl::Status Decoder::Forward(const StepHeader& step, const DecoderBatch& batch) {
  const int64_t rows = batch.num_rows();
  SY_CHECK(rows >= 1 && rows <= max_rows_);
  SY_CHECK(step.micro_batches >= 1 && step.micro_batches <= kMaxMicroBatches);
  const std::span<MicroBatch> micro_batches = Split(step, batch);
  backend_->Embed(weights_->embedding, batch.tokens,
                  residual_.View(DType::kF32, {rows, config_.hidden_size}));
  int32_t moe_layer = 0;
  const AttentionLayerWeights* away = nullptr;  // the layer whose rows are at the experts
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    const AttentionLayerWeights& weights = weights_->layers[static_cast<size_t>(layer)];
    for (const MicroBatch& micro : micro_batches) {
      absl::Status status;
      if (away != nullptr) status = AddResults(*away, micro);
      if (!status.ok()) return status;
      if (micro.batch.num_rows() > 0) AttentionBlock(layer, micro);
      if (weights.is_moe) {
        status = SendRows(step, moe_layer, weights, micro);
      } else if (micro.batch.num_rows() > 0) {
        Dense(weights, micro);
      }
      if (!status.ok()) return status;
    }
    away = weights.is_moe ? &weights : nullptr;
    if (weights.is_moe) ++moe_layer;
    counters_->progress.fetch_add(1, std::memory_order_relaxed);
  }
  for (const MicroBatch& micro : micro_batches) {
    if (away == nullptr) break;
    if (absl::Status status = AddResults(*away, micro); !status.ok()) return status;
  }
  return absl::OkStatus();
}

// Leaves the MLP's input in normed_.
void Decoder::AttentionBlock(int64_t layer, const MicroBatch& micro) {
  const AttentionLayerWeights& weights = weights_->layers[static_cast<size_t>(layer)];
  const Tensor residual = Residual(micro);
  const Tensor normed = normed_.View(act_, {micro.batch.num_rows(), config_.hidden_size});
  backend_->RmsNorm(residual, weights.input_norm.view, config_.rms_norm_eps, normed);
  Attention(layer, micro);
  backend_->RmsNorm(residual, weights.post_attention_norm.view, config_.rms_norm_eps, normed);
}

void Decoder::Attention(int64_t layer, const MicroBatch& micro) {
  const AttentionConfig& a = config_.attention;
  const AttentionLayerWeights& weights = weights_->layers[static_cast<size_t>(layer)];
  const DecoderBatch& batch = micro.batch;
  const int64_t rows = batch.num_rows();
  const Tensor normed = normed_.View(act_, {rows, config_.hidden_size});
  backend_->Matmul(
      normed,
      std::array{
          ComputeBackend::Product{&weights.q, weights.q_bias.data(),
                                  q_.View(DType::kF32, {rows, a.num_heads * a.head_dim})},
          ComputeBackend::Product{&weights.k, weights.k_bias.data(),
                                  k_.View(DType::kF32, {rows, a.num_kv_heads * a.head_dim})},
          ComputeBackend::Product{&weights.v, weights.v_bias.data(),
                                  v_.View(DType::kF32, {rows, a.num_kv_heads * a.head_dim})}});

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
  backend_->Add(projected, Residual(micro));
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

void Decoder::Dense(const AttentionLayerWeights& weights, const MicroBatch& micro) {
  const int64_t rows = micro.batch.num_rows();
  const Tensor out = MlpOut(micro);
  const MlpGroup group{&weights.dense, 0, rows};
  backend_->GroupedMlp(normed_.View(act_, {rows, config_.hidden_size}), {&group, 1}, out);
  backend_->Add(out, Residual(micro));
}

void Decoder::Route(const AttentionLayerWeights& weights, const MicroBatch& micro) {
  const int64_t rows = micro.batch.num_rows();
  const RoutingConfig& routing = config_.moe.routing;
  const Tensor logits = router_logits_.View(DType::kF32, {rows, routing.num_experts});
  backend_->Matmul(normed_.View(act_, {rows, config_.hidden_size}), weights.router, nullptr,
                   logits);
  backend_->Synchronize();
  const size_t top_k = static_cast<size_t>(routing.top_k);
  const std::span<int32_t> ids = std::span(expert_ids_).subspan(FirstCopy(micro), Copies(micro));
  const std::span<float> expert_weights =
      std::span(expert_weights_).subspan(FirstCopy(micro), Copies(micro));
  router_.Route(logits, micro.batch.routing_profiles, &router_scratch_, ids, expert_weights,
                std::span(expert_counts_).first(static_cast<size_t>(rows)));
  for (size_t r = 0; r < static_cast<size_t>(rows); ++r) {
    for (size_t j = static_cast<size_t>(expert_counts_[r]); j < top_k; ++j) {
      ids[r * top_k + j] = -1;
      expert_weights[r * top_k + j] = 0.0f;
    }
  }
}

absl::Status Decoder::SendRows(const StepHeader& step, int32_t moe_layer,
                               const AttentionLayerWeights& weights, const MicroBatch& micro) {
  const int64_t rows = micro.batch.num_rows();
  const Tensor normed = normed_.View(act_, {rows, config_.hidden_size});
  if (rows > 0) Route(weights, micro);
  if (micro.batch.record != nullptr) {  // the last one has it: all rows of the step are routed
    const size_t copies = FirstCopy(micro) + Copies(micro);
    micro.batch.record->SetLayer(moe_layer, std::span(expert_ids_).first(copies),
                                 std::span(expert_weights_).first(copies));
  }
  absl::Status status =
      exchange_->Dispatch({.step = &step, .layer = moe_layer, .micro_batch = micro.index},
                          std::span(expert_ids_).subspan(FirstCopy(micro), Copies(micro)), normed);
  if (!status.ok() || !weights.has_shared || rows == 0) return status;
  // While the routed rows are away.
  const MlpGroup group{&weights.shared, 0, rows};
  const Tensor gate = SharedGate(micro);
  backend_->GroupedMlp(normed, {&group, 1}, MlpOut(micro));
  backend_->Matmul(normed, weights.shared_gate, nullptr, gate);
  backend_->Sigmoid(Tensor(gate.data, DType::kF32, {rows}));
  backend_->Synchronize();
  return absl::OkStatus();
}

absl::Status Decoder::AddResults(const AttentionLayerWeights& weights, const MicroBatch& micro) {
  if (absl::Status status = exchange_->Await(micro.index); !status.ok()) return status;
  if (micro.batch.num_rows() == 0) return absl::OkStatus();
  const Tensor results = exchange_->results(micro.index);
  const Tensor shared = MlpOut(micro);
  const Tensor gate = SharedGate(micro);
  backend_->Combine({.residual = Residual(micro),
                     .expert_rows = &results,
                     .row_of = exchange_->row_of(micro.index),
                     .weights = std::span(expert_weights_).subspan(FirstCopy(micro), Copies(micro)),
                     .top_k = config_.moe.routing.top_k,
                     .shared = weights.has_shared ? &shared : nullptr,
                     .shared_gate = weights.has_shared ? gate.as<float>() : nullptr});
  backend_->Synchronize();  // the results' buffer is received into again by the next layer
  return absl::OkStatus();
}

Tensor Decoder::FinalNorm(std::span<const int32_t> rows) {
  const int64_t count = static_cast<int64_t>(rows.size());
  SY_CHECK(count >= 1 && count <= kMaxLogitsRows);
  const size_t row_bytes = Bytes(1, config_.hidden_size, DType::kF32);
  backend_->Synchronize();
  for (size_t i = 0; i < rows.size(); ++i) {
    std::memcpy(picked_.data() + i * row_bytes,
                residual_.data() + static_cast<size_t>(rows[i]) * row_bytes, row_bytes);
  }
  const Tensor normed = picked_normed_.View(act_, {count, config_.hidden_size});
  backend_->RmsNorm(picked_.View(DType::kF32, {count, config_.hidden_size}),
                    weights_->final_norm.view, config_.rms_norm_eps, normed);
  return normed;
}

Tensor Decoder::Logits(std::span<const int32_t> rows) {
  const Tensor normed = FinalNorm(rows);
  const Tensor logits = logits_.View(DType::kF32, {normed.dim(0), config_.vocab_size});
  backend_->Matmul(normed, weights_->lm_head, nullptr, logits);
  return logits;
}

void Decoder::Argmax(std::span<const int32_t> rows, std::span<SampledToken> out) {
  backend_->MatmulArgmax(FinalNorm(rows), weights_->lm_head, out);
}

}  // namespace switchyard
