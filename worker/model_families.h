// The table of supported architectures: facts that a config.json does not state because the
// architecture's code implies them. A new architecture of a known shape is an entry here. Constant
// data.
#pragma once

#include <span>
#include <string_view>

#include "worker/model_config.h"

namespace switchyard {

struct ModelFamily {
  std::string_view architecture;  // as in config.json's "architectures"
  double default_rope_theta;      // when the config states none
  double default_rms_norm_eps;
  int64_t default_num_kv_heads;  // 0: as many as query heads
  QkNorm qk_norm;
  std::string_view qkv_bias_field;  // boolean field that switches q/k/v biases; empty: never any
  bool default_qkv_bias;
  bool output_bias_too;  // the same field switches a bias on the output projection
  std::string_view expert_width_field;
  bool has_dense_layers;  // decoder_sparse_step and mlp_only_layers apply, intermediate_size is
                          // theirs
  bool has_shared_expert;
  bool always_renormalize;   // Mixtral's softmax over the chosen logits; no norm_topk_prob field
  bool window_needs_switch;  // sliding_window counts only with use_sliding_window
  std::string_view moe_block;
  std::string_view gate, up, down;  // names of an expert's matrices
};

std::span<const ModelFamily> ModelFamilies();
// Null when the architecture is not in the table.
const ModelFamily* FindModelFamily(std::string_view architecture);

}  // namespace switchyard
