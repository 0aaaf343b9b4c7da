#include "worker/weights.h"

#include <cstring>

#include "kernels/check.h"

namespace switchyard {
namespace {

// Reports what was read when it has been copied.
void ReleaseLoaded(Checkpoint::Loaded& loaded, const LoadProgress& progress) {
  loaded.Release();
  if (!progress) return;
  int64_t bytes = 0;
  for (const StoredPart& part : loaded.source) bytes += static_cast<int64_t>(part.bytes.size());
  progress(bytes);
}

// A stored matrix as the back end takes it: one code a byte, scales, zero points.
class StoredCodes {
 public:
  explicit StoredCodes(const StoredMatrix& m)
      : n_(m.n),
        k_(m.k),
        format_{.type = m.scheme.bits == 4 ? WeightType::kInt4 : WeightType::kInt8,
                .group = static_cast<int32_t>(m.scheme.block_cols == 0 ? m.k : m.scheme.block_cols),
                .zero_points = m.scheme.zero_points},
        codes_(static_cast<size_t>(m.n * m.k)),
        scales_(UnpackScales(m)) {
    UnpackCodes(m, 0, m.n, codes_.data());
    if (!format_.zero_points) return;
    for (const int32_t zero : UnpackZeros(m)) zeros_.push_back(static_cast<uint8_t>(zero));
  }
  QuantizedTensor view() const {
    return {
        .n = n_, .k = k_, .format = format_, .codes = codes_, .scales = scales_, .zeros = zeros_};
  }

 private:
  const int64_t n_, k_;
  const WeightFormat format_;
  std::vector<uint8_t> codes_;
  std::vector<float> scales_;
  std::vector<uint8_t> zeros_;
};

// Loads the tensors of one layer (or of none) and reports progress.
class Loader {
 public:
  Loader(const OpenedModel& model, ComputeBackend* backend, const LoadProgress& progress)
      : model_(model), backend_(backend), progress_(progress) {}

  FloatVector Vector(TensorRole role, int32_t layer = -1) const {
    Checkpoint::Loaded loaded = model_.checkpoint.Load({role, layer}, DType::kF32);
    FloatVector out;
    out.storage = Buffer(loaded.view.bytes());
    std::memcpy(out.storage.data(), loaded.view.data, loaded.view.bytes());
    out.view = out.storage.View(DType::kF32, {loaded.view.numel()});
    Done(loaded);
    return out;
  }

  PackedMatrix Matrix(TensorRole role, int32_t layer = -1) const {
    const TensorKey key{role, layer};
    if (model_.formats.keeps_stored(key)) {
      const StoredCodes stored(*model_.checkpoint.Quantized(key));
      PackedMatrix out = backend_->Pack(stored.view());
      backend_->Synchronize();
      Kept(key);
      return out;
    }
    Checkpoint::Loaded loaded = model_.checkpoint.Load(key, model_.dtype);
    PackedMatrix out = backend_->Pack(loaded.view, model_.formats.Of(key));
    backend_->Synchronize();
    Done(loaded);
    return out;
  }

  MlpWeights Mlp(TensorKey gate_key, TensorKey up_key, TensorKey down_key) const {
    if (model_.formats.keeps_stored(down_key)) {
      const StoredCodes gate(*model_.checkpoint.Quantized(gate_key));
      const StoredCodes up(*model_.checkpoint.Quantized(up_key));
      const StoredCodes down(*model_.checkpoint.Quantized(down_key));
      MlpWeights out = backend_->PackMlp(gate.view(), up.view(), down.view());
      backend_->Synchronize();
      for (const TensorKey& key : {gate_key, up_key, down_key}) Kept(key);
      return out;
    }
    Checkpoint::Loaded gate = model_.checkpoint.Load(gate_key, model_.dtype);
    Checkpoint::Loaded up = model_.checkpoint.Load(up_key, model_.dtype);
    Checkpoint::Loaded down = model_.checkpoint.Load(down_key, model_.dtype);
    MlpWeights out = backend_->PackMlp(gate.view, up.view, down.view, model_.formats.Of(down_key));
    backend_->Synchronize();
    Done(gate);
    Done(up);
    Done(down);
    return out;
  }

 private:
  void Kept(const TensorKey& key) const {
    Checkpoint::Loaded read;
    read.source = model_.checkpoint.Parts(key);
    Done(read);
  }
  void Done(Checkpoint::Loaded& loaded) const { ReleaseLoaded(loaded, progress_); }

  const OpenedModel& model_;
  ComputeBackend* const backend_;
  const LoadProgress& progress_;
};

AttentionLayerWeights LoadLayer(const Loader& load, const ModelConfig& config, int32_t layer) {
  AttentionLayerWeights out;
  out.input_norm = load.Vector(TensorRole::kInputNorm, layer);
  out.q = load.Matrix(TensorRole::kQuery, layer);
  out.k = load.Matrix(TensorRole::kKey, layer);
  out.v = load.Matrix(TensorRole::kValue, layer);
  out.o = load.Matrix(TensorRole::kOutput, layer);
  if (config.attention.qkv_bias) {
    out.q_bias = load.Vector(TensorRole::kQueryBias, layer);
    out.k_bias = load.Vector(TensorRole::kKeyBias, layer);
    out.v_bias = load.Vector(TensorRole::kValueBias, layer);
  }
  if (config.attention.output_bias) out.o_bias = load.Vector(TensorRole::kOutputBias, layer);
  if (config.attention.qk_norm != QkNorm::kNone) {
    out.q_norm = load.Vector(TensorRole::kQueryNorm, layer);
    out.k_norm = load.Vector(TensorRole::kKeyNorm, layer);
  }
  out.post_attention_norm = load.Vector(TensorRole::kPostAttentionNorm, layer);
  out.is_moe = config.is_moe_layer[static_cast<size_t>(layer)] != 0;
  if (!out.is_moe) {
    out.dense = load.Mlp({TensorRole::kDenseGate, layer}, {TensorRole::kDenseUp, layer},
                         {TensorRole::kDenseDown, layer});
    return out;
  }
  out.router = load.Matrix(TensorRole::kRouter, layer);
  out.has_shared = config.moe.shared_width > 0;
  if (out.has_shared) {
    out.shared = load.Mlp({TensorRole::kSharedGateProj, layer}, {TensorRole::kSharedUp, layer},
                          {TensorRole::kSharedDown, layer});
    out.shared_gate = load.Matrix(TensorRole::kSharedGate, layer);
  }
  return out;
}

}  // namespace

std::shared_ptr<const AttentionWeights> LoadAttentionWeights(const OpenedModel& model,
                                                             ComputeBackend* backend,
                                                             const LoadProgress& progress) {
  const ModelConfig& config = model.config;
  auto weights = std::make_shared<AttentionWeights>();
  weights->dtype = model.dtype;
  const Loader load(model, backend, progress);
  Checkpoint::Loaded embedding = model.checkpoint.Load({TensorRole::kEmbedding}, model.dtype);
  weights->embedding_storage = Buffer(embedding.view.bytes());
  std::memcpy(weights->embedding_storage.data(), embedding.view.data, embedding.view.bytes());
  weights->embedding =
      weights->embedding_storage.View(model.dtype, {config.vocab_size, config.hidden_size});
  if (config.tie_word_embeddings) {
    weights->lm_head = backend->Pack(weights->embedding, model.formats.Of({TensorRole::kLmHead}));
    backend->Synchronize();
  }
  ReleaseLoaded(embedding, progress);
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    weights->layers.push_back(LoadLayer(load, config, layer));
  }
  weights->final_norm = load.Vector(TensorRole::kFinalNorm);
  if (!config.tie_word_embeddings) weights->lm_head = load.Matrix(TensorRole::kLmHead);
  weights->rope = MakeRopeTables(config.attention.rope, model.info.max_model_len);
  return weights;
}

std::shared_ptr<const MlpWeights> LoadExpert(const OpenedModel& model, int32_t moe_layer,
                                             int32_t expert, ComputeBackend* backend,
                                             const LoadProgress& progress) {
  const Loader load(model, backend, progress);
  const int32_t layer = LayerOfMoe(model.config, moe_layer);
  return std::make_shared<MlpWeights>(load.Mlp({TensorRole::kExpertGate, layer, expert},
                                               {TensorRole::kExpertUp, layer, expert},
                                               {TensorRole::kExpertDown, layer, expert}));
}

std::shared_ptr<const ExpertWeights> LoadExpertWeights(const OpenedModel& model,
                                                       const ExpertPlacement& placement,
                                                       int32_t rank, ComputeBackend* backend,
                                                       const LoadProgress& progress) {
  auto weights = std::make_shared<ExpertWeights>();
  weights->dtype = model.dtype;
  for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
    auto& experts = weights->experts.emplace_back();
    experts.resize(static_cast<size_t>(model.config.moe.routing.num_experts));
    for (int32_t expert : placement.ExpertsOf(layer, rank)) {
      experts[static_cast<size_t>(expert)] = LoadExpert(model, layer, expert, backend, progress);
    }
  }
  return weights;
}

int64_t StoredAttentionBytes(const Checkpoint& checkpoint, const ModelConfig& config) {
  int64_t bytes = 0;
  for (const TensorSpec& spec : ModelTensors(config)) {
    if (!IsExpertRole(spec.key.role)) bytes += checkpoint.StoredBytes(spec.key);
  }
  return bytes;
}

int64_t StoredExpertBytes(const Checkpoint& checkpoint, const ModelConfig& config,
                          const ExpertPlacement& placement, int32_t rank) {
  int64_t bytes = 0;
  int32_t moe_layer = 0;
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    if (!config.is_moe_layer[static_cast<size_t>(layer)]) continue;
    for (int32_t expert : placement.ExpertsOf(moe_layer, rank)) {
      for (TensorRole role :
           {TensorRole::kExpertGate, TensorRole::kExpertUp, TensorRole::kExpertDown}) {
        bytes += checkpoint.StoredBytes({role, layer, expert});
      }
    }
    ++moe_layer;
  }
  return bytes;
}

}  // namespace switchyard
