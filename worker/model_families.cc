#include "worker/model_families.h"

#include <array>

namespace switchyard {
namespace {

constexpr std::array<ModelFamily, 4> kFamilies = {{
    {.architecture = "Qwen3MoeForCausalLM",
     .default_rope_theta = 10000.0,
     .default_rms_norm_eps = 1e-6,
     .default_num_kv_heads = 4,
     .qk_norm = QkNorm::kPerHead,
     .qkv_bias_field = "attention_bias",
     .default_qkv_bias = false,
     .output_bias_too = true,
     .expert_width_field = "moe_intermediate_size",
     .has_dense_layers = true,
     .has_shared_expert = false,
     .always_renormalize = false,
     .window_needs_switch = true,
     .moe_block = "mlp",
     .gate = "gate_proj",
     .up = "up_proj",
     .down = "down_proj"},
    {.architecture = "OlmoeForCausalLM",
     .default_rope_theta = 10000.0,
     .default_rms_norm_eps = 1e-5,
     .default_num_kv_heads = 0,
     .qk_norm = QkNorm::kWhole,
     .qkv_bias_field = "attention_bias",
     .default_qkv_bias = false,
     .output_bias_too = true,
     .expert_width_field = "intermediate_size",
     .has_dense_layers = false,
     .has_shared_expert = false,
     .always_renormalize = false,
     .window_needs_switch = false,
     .moe_block = "mlp",
     .gate = "gate_proj",
     .up = "up_proj",
     .down = "down_proj"},
    {.architecture = "MixtralForCausalLM",
     .default_rope_theta = 1000000.0,
     .default_rms_norm_eps = 1e-5,
     .default_num_kv_heads = 8,
     .qk_norm = QkNorm::kNone,
     .qkv_bias_field = "",
     .default_qkv_bias = false,
     .output_bias_too = false,
     .expert_width_field = "intermediate_size",
     .has_dense_layers = false,
     .has_shared_expert = false,
     .always_renormalize = true,
     .window_needs_switch = false,
     .moe_block = "block_sparse_moe",
     .gate = "w1",
     .up = "w3",
     .down = "w2"},
    {.architecture = "Qwen2MoeForCausalLM",
     .default_rope_theta = 10000.0,
     .default_rms_norm_eps = 1e-6,
     .default_num_kv_heads = 16,
     .qk_norm = QkNorm::kNone,
     .qkv_bias_field = "qkv_bias",
     .default_qkv_bias = true,
     .output_bias_too = false,
     .expert_width_field = "moe_intermediate_size",
     .has_dense_layers = true,
     .has_shared_expert = true,
     .always_renormalize = false,
     .window_needs_switch = true,
     .moe_block = "mlp",
     .gate = "gate_proj",
     .up = "up_proj",
     .down = "down_proj"},
}};

}  // namespace

std::span<const ModelFamily> ModelFamilies() { return kFamilies; }

const ModelFamily* FindModelFamily(std::string_view architecture) {
  for (const ModelFamily& family : kFamilies) {
    if (family.architecture == architecture) return &family;
  }
  return nullptr;
}

}  // namespace switchyard
