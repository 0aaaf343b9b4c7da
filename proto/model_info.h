// ModelInfo: the facts of a model that reach the scheduler and the server at registration. A plain
// value.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace switchyard {

struct ModelInfo {
  std::string name;          // the folder's base name unless --served-model-name
  std::string architecture;  // e.g. "Qwen3MoeForCausalLM"
  std::string numerics_id;   // (back end, path, numerics version, dtype, quantisation)
  std::string dtype;         // "float32" | "bfloat16"
  int32_t vocab_size = 0;    // of the embedding; may exceed the tokenizer's
  int32_t max_model_len = 0;
  int32_t num_layers = 0;
  int32_t num_moe_layers = 0;
  int32_t num_experts = 0;
  int32_t top_k = 0;
  uint32_t num_routing_profiles = 1;  // SamplingParams::routing_profile is below it
  int32_t block_size = 0;             // KV block, in tokens
  int64_t kv_bytes_per_token = 0;
  int32_t num_kv_blocks = 0;  // per attention worker
  std::vector<int32_t>
      eos_token_ids;  // from generation_config.json, else config.json; within the vocabulary
};

}  // namespace switchyard
