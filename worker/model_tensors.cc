#include "worker/model_tensors.h"

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace switchyard {
namespace {

// Collects the specs of one model.
class SpecList {
 public:
  explicit SpecList(std::vector<TensorSpec>* out) : out_(out) {}
  void Add(TensorRole role, int64_t layer, std::string name, std::vector<int64_t> shape,
           int64_t expert = -1) {
    out_->push_back({{role, static_cast<int32_t>(layer), static_cast<int32_t>(expert)},
                     std::move(name),
                     std::move(shape)});
  }

 private:
  std::vector<TensorSpec>* out_;
};

void AddAttention(const ModelConfig& config, int64_t layer, const std::string& prefix,
                  SpecList& list) {
  const AttentionConfig& a = config.attention;
  const int64_t hidden = config.hidden_size;
  const int64_t q = a.num_heads * a.head_dim;
  const int64_t kv = a.num_kv_heads * a.head_dim;
  const std::string at = absl::StrCat(prefix, "self_attn.");
  list.Add(TensorRole::kInputNorm, layer, prefix + "input_layernorm.weight", {hidden});
  list.Add(TensorRole::kQuery, layer, at + "q_proj.weight", {q, hidden});
  list.Add(TensorRole::kKey, layer, at + "k_proj.weight", {kv, hidden});
  list.Add(TensorRole::kValue, layer, at + "v_proj.weight", {kv, hidden});
  list.Add(TensorRole::kOutput, layer, at + "o_proj.weight", {hidden, q});
  if (a.qkv_bias) {
    list.Add(TensorRole::kQueryBias, layer, at + "q_proj.bias", {q});
    list.Add(TensorRole::kKeyBias, layer, at + "k_proj.bias", {kv});
    list.Add(TensorRole::kValueBias, layer, at + "v_proj.bias", {kv});
  }
  if (a.output_bias) list.Add(TensorRole::kOutputBias, layer, at + "o_proj.bias", {hidden});
  if (a.qk_norm != QkNorm::kNone) {
    const bool per_head = a.qk_norm == QkNorm::kPerHead;
    list.Add(TensorRole::kQueryNorm, layer, at + "q_norm.weight", {per_head ? a.head_dim : q});
    list.Add(TensorRole::kKeyNorm, layer, at + "k_norm.weight", {per_head ? a.head_dim : kv});
  }
  list.Add(TensorRole::kPostAttentionNorm, layer, prefix + "post_attention_layernorm.weight",
           {hidden});
}

void AddMlp(int64_t layer, const std::string& prefix, int64_t width, int64_t hidden,
            SpecList& list) {
  list.Add(TensorRole::kDenseGate, layer, prefix + "gate_proj.weight", {width, hidden});
  list.Add(TensorRole::kDenseUp, layer, prefix + "up_proj.weight", {width, hidden});
  list.Add(TensorRole::kDenseDown, layer, prefix + "down_proj.weight", {hidden, width});
}

void AddMoe(const ModelConfig& config, int64_t layer, const std::string& prefix, SpecList& list) {
  const int64_t hidden = config.hidden_size;
  const int64_t width = config.moe.expert_width;
  list.Add(TensorRole::kRouter, layer, prefix + "gate.weight",
           {config.moe.routing.num_experts, hidden});
  for (int64_t e = 0; e < config.moe.routing.num_experts; ++e) {
    const std::string expert = absl::StrCat(prefix, "experts.", e, ".");
    list.Add(TensorRole::kExpertGate, layer, absl::StrCat(expert, config.names.gate, ".weight"),
             {width, hidden}, e);
    list.Add(TensorRole::kExpertUp, layer, absl::StrCat(expert, config.names.up, ".weight"),
             {width, hidden}, e);
    list.Add(TensorRole::kExpertDown, layer, absl::StrCat(expert, config.names.down, ".weight"),
             {hidden, width}, e);
  }
  if (const int64_t shared = config.moe.shared_width; shared > 0) {
    list.Add(TensorRole::kSharedGateProj, layer, prefix + "shared_expert.gate_proj.weight",
             {shared, hidden});
    list.Add(TensorRole::kSharedUp, layer, prefix + "shared_expert.up_proj.weight",
             {shared, hidden});
    list.Add(TensorRole::kSharedDown, layer, prefix + "shared_expert.down_proj.weight",
             {hidden, shared});
    list.Add(TensorRole::kSharedGate, layer, prefix + "shared_expert_gate.weight", {1, hidden});
  }
}

}  // namespace

int64_t TensorSpec::numel() const {
  int64_t n = 1;
  for (int64_t dim : shape) n *= dim;
  return n;
}

std::vector<TensorSpec> ModelTensors(const ModelConfig& config) {
  std::vector<TensorSpec> specs;
  SpecList list(&specs);
  list.Add(TensorRole::kEmbedding, -1, "model.embed_tokens.weight",
           {config.vocab_size, config.hidden_size});
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    AddAttention(config, layer, prefix, list);
    if (config.is_moe_layer[static_cast<size_t>(layer)]) {
      AddMoe(config, layer, absl::StrCat(prefix, config.names.block, "."), list);
    } else {
      AddMlp(layer, prefix + "mlp.", config.dense_width, config.hidden_size, list);
    }
  }
  list.Add(TensorRole::kFinalNorm, -1, "model.norm.weight", {config.hidden_size});
  if (!config.tie_word_embeddings) {
    list.Add(TensorRole::kLmHead, -1, "lm_head.weight", {config.vocab_size, config.hidden_size});
  }
  return specs;
}

int32_t LayerOfMoe(const ModelConfig& config, int32_t moe_layer) {
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    if (config.is_moe_layer[static_cast<size_t>(layer)] && moe_layer-- == 0) return layer;
  }
  SY_CHECK(false);
}

bool IsExpertRole(TensorRole role) {
  return role == TensorRole::kExpertGate || role == TensorRole::kExpertUp ||
         role == TensorRole::kExpertDown;
}

bool IsNormRole(TensorRole role) {
  return role == TensorRole::kFinalNorm || role == TensorRole::kInputNorm ||
         role == TensorRole::kPostAttentionNorm || role == TensorRole::kQueryNorm ||
         role == TensorRole::kKeyNorm;
}

bool IsBiasRole(TensorRole role) {
  return role == TensorRole::kQueryBias || role == TensorRole::kKeyBias ||
         role == TensorRole::kValueBias || role == TensorRole::kOutputBias;
}

ParameterCounts CountParameters(const ModelConfig& config) {
  ParameterCounts counts;
  // Arithmetic instead of ModelTensors: a hostile config may name millions of experts' tensors.
  ModelConfig one = config;
  one.moe.routing.num_experts = 0;
  for (const TensorSpec& spec : ModelTensors(one)) counts.attention_side += spec.numel();
  const int64_t moe_layers = config.num_moe_layers();
  counts.attention_side +=
      moe_layers * config.moe.routing.num_experts * config.hidden_size;  // routers
  counts.per_expert = 3 * config.moe.expert_width * config.hidden_size;
  counts.experts = moe_layers * config.moe.routing.num_experts * counts.per_expert;
  counts.total = counts.attention_side + counts.experts;
  counts.active = counts.attention_side + moe_layers * config.moe.routing.top_k * counts.per_expert;
  return counts;
}

}  // namespace switchyard
