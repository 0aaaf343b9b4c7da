#include "worker/weight_memory.h"

#include <algorithm>
#include <functional>

#include "worker/model_tensors.h"

namespace switchyard {
namespace {

int64_t Packed(const ComputeBackend& backend, int64_t n, int64_t k, const WeightFormat& format) {
  return static_cast<int64_t>(backend.PackedBytes(n, k, format));
}

// Gate and up of one MLP are packed as one matrix, each in whole panels of 16 outputs.
int64_t GateUp(const ComputeBackend& backend, int64_t width, int64_t hidden,
               const WeightFormat& format) {
  constexpr int64_t kPanel = 16;
  return Packed(backend, 2 * ((width + kPanel - 1) / kPanel * kPanel), hidden, format);
}

void ForEachMoeLayer(const ModelConfig& config, const std::function<void(int32_t)>& call) {
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    if (config.is_moe_layer[static_cast<size_t>(layer)]) call(layer);
  }
}

// Of one layer's experts, by a function of the expert's bytes. Experts of one format are one call.
void ForEachFormat(const ModelConfig& config, const WeightFormats& formats,
                   const ComputeBackend& backend,
                   const std::function<void(int64_t bytes, int64_t count)>& call) {
  const int32_t experts = config.moe.routing.num_experts;
  ForEachMoeLayer(config, [&](int32_t layer) {
    if (formats.OfExperts(config, layer).has_value()) {
      call(ExpertBytes(config, formats, backend, layer, 0), experts);
      return;
    }
    for (int32_t e = 0; e < experts; ++e) call(ExpertBytes(config, formats, backend, layer, e), 1);
  });
}

}  // namespace

int64_t AttentionWeightBytes(const ModelConfig& config, const WeightFormats& formats, DType dtype,
                             const ComputeBackend& backend) {
  // Without its experts: a hostile config may name millions of their tensors.
  ModelConfig one = config;
  one.moe.routing.num_experts = 0;
  int64_t bytes = 0;
  for (const TensorSpec& spec : ModelTensors(one)) {
    if (IsNormRole(spec.key.role) || IsBiasRole(spec.key.role)) {
      bytes += spec.numel() * static_cast<int64_t>(sizeof(float));
    } else if (spec.key.role == TensorRole::kEmbedding) {
      bytes += spec.numel() * static_cast<int64_t>(DTypeSize(dtype));
    } else if (spec.key.role == TensorRole::kDenseGate ||
               spec.key.role == TensorRole::kSharedGateProj) {
      bytes += GateUp(backend, spec.shape[0], spec.shape[1], formats.Of(spec.key));
    } else if (spec.key.role == TensorRole::kDenseUp || spec.key.role == TensorRole::kSharedUp) {
      continue;  // counted with its gate
    } else {
      const int64_t n =
          spec.key.role == TensorRole::kRouter ? config.moe.routing.num_experts : spec.shape[0];
      bytes += Packed(backend, n, spec.shape[1], formats.Of(spec.key));
    }
  }
  // A tied lm_head is packed as a matrix of its own beside the table.
  if (config.tie_word_embeddings) {
    bytes +=
        Packed(backend, config.vocab_size, config.hidden_size, formats.Of({TensorRole::kLmHead}));
  }
  return bytes;
}

int64_t RopeTableBytes(const ModelConfig& config, int64_t max_model_len) {
  return max_model_len * config.attention.rope.rotary_dim * static_cast<int64_t>(sizeof(float));
}

int64_t ExpertBytes(const ModelConfig& config, const WeightFormats& formats,
                    const ComputeBackend& backend, int32_t layer, int32_t expert) {
  const WeightFormat format = formats.Of({TensorRole::kExpertDown, layer, expert});
  const int64_t width = config.moe.expert_width;
  return GateUp(backend, width, config.hidden_size, format) +
         Packed(backend, config.hidden_size, width, format);
}

int64_t LargestExpertBytes(const ModelConfig& config, const WeightFormats& formats,
                           const ComputeBackend& backend) {
  int64_t largest = 0;
  ForEachFormat(config, formats, backend,
                [&](int64_t bytes, int64_t) { largest = std::max(largest, bytes); });
  return largest;
}

int64_t AllExpertsBytes(const ModelConfig& config, const WeightFormats& formats,
                        const ComputeBackend& backend) {
  int64_t sum = 0;
  ForEachFormat(config, formats, backend,
                [&](int64_t bytes, int64_t count) { sum += bytes * count; });
  return sum;
}

int64_t ExpertMemoryBytes(const ModelConfig& config, const WeightFormats& formats,
                          const ComputeBackend& backend, const ExpertPlacement& placement,
                          int32_t rank) {
  int64_t bytes = 0;
  int32_t moe_layer = 0;
  ForEachMoeLayer(config, [&](int32_t layer) {
    for (int32_t expert : placement.ExpertsOf(moe_layer, rank))
      bytes += ExpertBytes(config, formats, backend, layer, expert);
    ++moe_layer;
  });
  return bytes;
}

}  // namespace switchyard
