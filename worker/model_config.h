// ModelConfig: a checkpoint's config.json as data that one decoder reads: what kind of attention,
// router and experts each layer has. A plain value, immutable after parsing and shared freely by
// threads. Parsing touches no weights; whatever a hostile file holds ends in a message that names
// the field and its value, never in a CHECK.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/routing_policy.h"
#include "kernels/tensor.h"
#include "worker/stored_scheme.h"

namespace switchyard {

enum class RopeType : uint8_t { kDefault, kLinear, kDynamicNtk, kYarn, kLlama3 };

// Rotary position embedding and its scaling, as in transformers' rope_parameters.
struct RopeConfig {
  RopeType type = RopeType::kDefault;
  double theta = 10000.0;
  int64_t rotary_dim = 0;  // even, <= head_dim; the remaining dimensions pass unrotated
  double factor = 1.0;     // linear, dynamic, yarn, llama3
  int64_t original_max_position = 0;
  double low_freq_factor = 1.0;    // llama3
  double high_freq_factor = 4.0;   // llama3
  double attention_factor = -1.0;  // yarn; negative: derived from factor
  double beta_fast = 32.0;         // yarn
  double beta_slow = 1.0;          // yarn
  double mscale = 0.0;             // yarn; 0: absent
  double mscale_all_dim = 0.0;     // yarn; 0: absent
  bool truncate = true;            // yarn
};

enum class QkNorm : uint8_t {
  kNone,
  kPerHead,  // RMSNorm over each head's head_dim (Qwen3)
  kWhole,    // RMSNorm over the whole projection before it is cut into heads (OLMoE)
};

struct AttentionConfig {
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  QkNorm qk_norm = QkNorm::kNone;
  bool qkv_bias = false;
  bool output_bias = false;
  float clip_qkv = 0.0f;  // |q|, |k|, |v| are clamped to it; 0: off
  RopeConfig rope;
};

struct MoeConfig {
  RoutingConfig routing;
  int64_t expert_width = 0;
  int64_t shared_width = 0;  // 0: no shared expert; otherwise one with a sigmoid gate of its own
};

// How a family spells its expert block in the checkpoint.
struct MoeTensorNames {
  std::string block;  // "mlp" or "block_sparse_moe"
  std::string gate;   // "gate_proj" or "w1"
  std::string up;     // "up_proj" or "w3"
  std::string down;   // "down_proj" or "w2"
};

struct ModelConfig {
  std::string architecture;
  DType dtype = DType::kF32;  // the type that "auto" computes in
  std::string stored_dtype;   // as spelled in the config; empty: not stated
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t num_layers = 0;
  int64_t dense_width = 0;  // of layers without experts
  int64_t max_position = 0;
  float rms_norm_eps = 1e-6f;
  bool tie_word_embeddings = false;
  AttentionConfig attention;
  MoeConfig moe;
  std::vector<uint8_t> is_moe_layer;   // [num_layers]
  std::vector<int32_t> eos_token_ids;  // within the vocabulary
  MoeTensorNames names;
  StoredQuantization quantization;  // how the checkpoint stores matrices that are not floats

  int64_t num_moe_layers() const;
};

// What parsing found. `refusals` empty: the config is usable.
struct ConfigReport {
  std::vector<std::string>
      refusals;                    // why it cannot be served, each naming the field and its value
  std::vector<std::string> notes;  // unknown fields, ignored ids; logged once
};

// Reads config.json. The result is complete only when report->refusals stays empty; with refusals
// it holds what could be read, for `inspect`.
ModelConfig ParseModelConfig(std::string_view config_json, ConfigReport* report);
// Replaces the eos ids when generation_config.json names any.
void ApplyGenerationConfig(std::string_view generation_json, ModelConfig* config,
                           ConfigReport* report);

// Reads DIR/config.json and DIR/generation_config.json (optional), logs the notes. kNotFound when
// there is no such file, kInvalidArgument with every refusal otherwise.
absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& model_dir);

// A whole JSON file; kNotFound, or kInvalidArgument when it is larger than `max_bytes` or nested
// too deep for a parser that recurses.
absl::StatusOr<std::string> ReadSmallFile(const std::string& path, int64_t max_bytes);

// Parses "float32", "bfloat16" (also "torch.…").
absl::StatusOr<DType> ParseDType(const std::string& name);

}  // namespace switchyard
