// The weights of the two roles, in the back end's packed layout. Immutable after loading and shared
// by shared_ptr<const>: several attention workers of a process hold one AttentionWeights. Loading
// streams tensor by tensor: besides the packed weights at most one tensor is in memory, and mapped
// pages are given back as soon as they are packed.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/expert_placement.h"
#include "kernels/backend.h"
#include "worker/checkpoint.h"
#include "worker/model_config.h"
#include "worker/model_facts.h"
#include "worker/rope.h"

namespace switchyard {

// A vector kept in float32 whatever the model's type: norm weights and biases. Empty when the model
// has none.
struct FloatVector {
  Buffer storage;
  Tensor view;  // [n] float32
  bool empty() const { return view.data == nullptr; }
  const float* data() const { return empty() ? nullptr : view.as<float>(); }
};

struct AttentionLayerWeights {
  FloatVector input_norm;           // [hidden]
  FloatVector post_attention_norm;  // [hidden]
  FloatVector q_norm, k_norm;       // per head or whole; empty without q/k norm
  FloatVector q_bias, k_bias, v_bias, o_bias;
  PackedMatrix q, k, v, o;
  bool is_moe = false;
  MlpWeights dense;     // layers without experts
  PackedMatrix router;  // [num_experts, hidden]
  bool has_shared = false;
  MlpWeights shared;
  PackedMatrix shared_gate;  // [1, hidden]
};

// What every attention worker holds.
struct AttentionWeights {
  Buffer embedding_storage;
  Tensor embedding;  // [vocab, hidden] in the model's type
  std::vector<AttentionLayerWeights> layers;
  FloatVector final_norm;
  PackedMatrix lm_head;  // [vocab, hidden]
  RopeTables rope;       // of max_model_len positions
  DType dtype = DType::kF32;
};

// The experts of one expert rank. Each expert is a value of its own: the next epoch's weights share
// those that stay.
struct ExpertWeights {
  std::vector<std::vector<std::shared_ptr<const MlpWeights>>>
      experts;  // [num_moe_layers][num_experts]; null where not held
  DType dtype = DType::kF32;
};

// Called after each tensor with the bytes of the checkpoint that it took.
using LoadProgress = std::function<void(int64_t bytes)>;

// In the formats of `model.formats`.
std::shared_ptr<const AttentionWeights> LoadAttentionWeights(const OpenedModel& model,
                                                             ComputeBackend* backend,
                                                             const LoadProgress& progress);
// One expert; `moe_layer` counts MoE layers only.
std::shared_ptr<const MlpWeights> LoadExpert(const OpenedModel& model, int32_t moe_layer,
                                             int32_t expert, ComputeBackend* backend,
                                             const LoadProgress& progress);
std::shared_ptr<const ExpertWeights> LoadExpertWeights(const OpenedModel& model,
                                                       const ExpertPlacement& placement,
                                                       int32_t rank, ComputeBackend* backend,
                                                       const LoadProgress& progress);

// Bytes of the checkpoint that loading the attention side, or the experts of one rank, reads.
int64_t StoredAttentionBytes(const Checkpoint& checkpoint, const ModelConfig& config);
int64_t StoredExpertBytes(const Checkpoint& checkpoint, const ModelConfig& config,
                          const ExpertPlacement& placement, int32_t rank);

}  // namespace switchyard
