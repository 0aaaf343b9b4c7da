// The list of tensors that a checkpoint of a config holds: name, shape and what each is for. One
// list serves loading, the check for missing and left-over tensors, `inspect` and `synth`. Pure
// functions.
#pragma once

#include <compare>
#include <cstdint>
#include <string>
#include <vector>

#include "worker/model_config.h"

namespace switchyard {

enum class TensorRole : uint8_t {
  kEmbedding,          // [vocab, hidden]
  kFinalNorm,          // [hidden]
  kLmHead,             // [vocab, hidden]; absent when tied to the embedding
  kInputNorm,          // [hidden]
  kPostAttentionNorm,  // [hidden]
  kQuery,              // [num_heads * head_dim, hidden]
  kKey,                // [num_kv_heads * head_dim, hidden]
  kValue,              // [num_kv_heads * head_dim, hidden]
  kOutput,             // [hidden, num_heads * head_dim]
  kQueryBias,
  kKeyBias,
  kValueBias,
  kOutputBias,
  kQueryNorm,  // [head_dim] or [num_heads * head_dim]
  kKeyNorm,    // [head_dim] or [num_kv_heads * head_dim]
  kDenseGate,  // [dense_width, hidden]
  kDenseUp,
  kDenseDown,   // [hidden, dense_width]
  kRouter,      // [num_experts, hidden]
  kExpertGate,  // [expert_width, hidden]
  kExpertUp,
  kExpertDown,      // [hidden, expert_width]
  kSharedGateProj,  // [shared_width, hidden]
  kSharedUp,
  kSharedDown,  // [hidden, shared_width]
  kSharedGate,  // [1, hidden]: the sigmoid gate of the shared expert
};

// Which tensor of a model: the role, the layer (-1 outside layers) and the expert (-1 for all but
// expert tensors).
struct TensorKey {
  TensorRole role = TensorRole::kEmbedding;
  int32_t layer = -1;
  int32_t expert = -1;
  friend auto operator<=>(const TensorKey&, const TensorKey&) = default;
};

struct TensorSpec {
  TensorKey key;
  std::string name;
  std::vector<int64_t> shape;
  int64_t numel() const;
};

// In the order of computation. REQUIRES: a config without refusals.
std::vector<TensorSpec> ModelTensors(const ModelConfig& config);

// The layer of the model that is its `moe_layer`-th with experts. REQUIRES: there is one.
int32_t LayerOfMoe(const ModelConfig& config, int32_t moe_layer);

bool IsExpertRole(TensorRole role);
bool IsNormRole(TensorRole role);
bool IsBiasRole(TensorRole role);

// Parameter counts by where they live. `active` is what one token touches: top_k experts instead of
// all.
struct ParameterCounts {
  int64_t total = 0;
  int64_t active = 0;
  int64_t attention_side = 0;  // everything that every attention worker holds
  int64_t experts = 0;
  int64_t per_expert = 0;
};
ParameterCounts CountParameters(const ModelConfig& config);

}  // namespace switchyard
