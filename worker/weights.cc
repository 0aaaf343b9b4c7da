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

// Loads the tensors of one layer (or of none) and reports progress.
class Loader {
 public:
  Loader(const Checkpoint& checkpoint, DType dtype, ComputeBackend* backend,
         const LoadProgress& progress)
      : checkpoint_(checkpoint), dtype_(dtype), backend_(backend), progress_(progress) {}

  FloatVector Vector(TensorRole role, int32_t layer = -1) const {
    Checkpoint::Loaded loaded = checkpoint_.Load({role, layer}, DType::kF32);
    FloatVector out;
    out.storage = Buffer(loaded.view.bytes());
    std::memcpy(out.storage.data(), loaded.view.data, loaded.view.bytes());
    out.view = out.storage.View(DType::kF32, {loaded.view.numel()});
    Done(loaded);
    return out;
  }

  PackedMatrix Matrix(TensorRole role, int32_t layer = -1) const {
    Checkpoint::Loaded loaded = checkpoint_.Load({role, layer}, dtype_);
    PackedMatrix out = backend_->Pack(loaded.view, FormatOf(dtype_));
    backend_->Synchronize();
    Done(loaded);
    return out;
  }

  MlpWeights Mlp(TensorKey gate_key, TensorKey up_key, TensorKey down_key) const {
    Checkpoint::Loaded gate = checkpoint_.Load(gate_key, dtype_);
    Checkpoint::Loaded up = checkpoint_.Load(up_key, dtype_);
    Checkpoint::Loaded down = checkpoint_.Load(down_key, dtype_);
    MlpWeights out = backend_->PackMlp(gate.view, up.view, down.view, FormatOf(dtype_));
    backend_->Synchronize();
    Done(gate);
    Done(up);
    Done(down);
    return out;
  }

 private:
  void Done(Checkpoint::Loaded& loaded) const { ReleaseLoaded(loaded, progress_); }

  const Checkpoint& checkpoint_;
  const DType dtype_;
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

// The layer of the model that is its `moe_layer`-th with experts.
int32_t LayerOfMoe(const ModelConfig& config, int32_t moe_layer) {
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    if (config.is_moe_layer[static_cast<size_t>(layer)] && moe_layer-- == 0) return layer;
  }
  SY_CHECK(false);
}

}  // namespace

std::shared_ptr<const AttentionWeights> LoadAttentionWeights(const Checkpoint& checkpoint,
                                                             const ModelConfig& config, DType dtype,
                                                             int64_t max_model_len,
                                                             ComputeBackend* backend,
                                                             const LoadProgress& progress) {
  auto weights = std::make_shared<AttentionWeights>();
  weights->dtype = dtype;
  const Loader load(checkpoint, dtype, backend, progress);
  Checkpoint::Loaded embedding = checkpoint.Load({TensorRole::kEmbedding}, dtype);
  weights->embedding_storage = Buffer(embedding.view.bytes());
  std::memcpy(weights->embedding_storage.data(), embedding.view.data, embedding.view.bytes());
  weights->embedding =
      weights->embedding_storage.View(dtype, {config.vocab_size, config.hidden_size});
  if (config.tie_word_embeddings) {
    weights->lm_head = backend->Pack(weights->embedding, FormatOf(dtype));
    backend->Synchronize();
  }
  ReleaseLoaded(embedding, progress);
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    weights->layers.push_back(LoadLayer(load, config, layer));
  }
  weights->final_norm = load.Vector(TensorRole::kFinalNorm);
  if (!config.tie_word_embeddings) weights->lm_head = load.Matrix(TensorRole::kLmHead);
  weights->rope = MakeRopeTables(config.attention.rope, max_model_len);
  return weights;
}

std::shared_ptr<const MlpWeights> LoadExpert(const Checkpoint& checkpoint,
                                             const ModelConfig& config, DType dtype,
                                             int32_t moe_layer, int32_t expert,
                                             ComputeBackend* backend,
                                             const LoadProgress& progress) {
  const Loader load(checkpoint, dtype, backend, progress);
  const int32_t layer = LayerOfMoe(config, moe_layer);
  return std::make_shared<MlpWeights>(load.Mlp({TensorRole::kExpertGate, layer, expert},
                                               {TensorRole::kExpertUp, layer, expert},
                                               {TensorRole::kExpertDown, layer, expert}));
}

std::shared_ptr<const ExpertWeights> LoadExpertWeights(const Checkpoint& checkpoint,
                                                       const ModelConfig& config, DType dtype,
                                                       const ExpertPlacement& placement,
                                                       int32_t rank, ComputeBackend* backend,
                                                       const LoadProgress& progress) {
  auto weights = std::make_shared<ExpertWeights>();
  weights->dtype = dtype;
  for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
    auto& experts = weights->experts.emplace_back();
    experts.resize(static_cast<size_t>(config.moe.routing.num_experts));
    for (int32_t expert : placement.ExpertsOf(layer, rank)) {
      experts[static_cast<size_t>(expert)] =
          LoadExpert(checkpoint, config, dtype, layer, expert, backend, progress);
    }
  }
  return weights;
}

int64_t AttentionMemoryBytes(const ModelConfig& config, DType dtype, int64_t max_model_len) {
  const int64_t tied_copy = config.tie_word_embeddings ? config.vocab_size * config.hidden_size : 0;
  const int64_t rope_tables =
      max_model_len * config.attention.rope.rotary_dim * static_cast<int64_t>(sizeof(float));
  return (CountParameters(config).attention_side + tied_copy) *
             static_cast<int64_t>(DTypeSize(dtype)) +
         rope_tables;
}

int64_t ExpertMemoryBytes(const ModelConfig& config, DType dtype, const ExpertPlacement& placement,
                          int32_t rank) {
  int64_t experts = 0;
  for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
    experts += static_cast<int64_t>(placement.ExpertsOf(layer, rank).size());
  }
  return experts * CountParameters(config).per_expert * static_cast<int64_t>(DTypeSize(dtype));
}

int64_t AttentionBytes(const Checkpoint& checkpoint, const ModelConfig& config) {
  int64_t bytes = 0;
  for (const TensorSpec& spec : ModelTensors(config)) {
    if (!IsExpertRole(spec.key.role)) bytes += checkpoint.StoredBytes(spec.key);
  }
  return bytes;
}

int64_t ExpertBytes(const Checkpoint& checkpoint, const ModelConfig& config,
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
