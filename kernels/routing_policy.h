// RoutingPolicy: the router as one pure function, logits -> (ids, weights, count), in the fixed
// order of steps of SEEDS.md M1 (score, selection bias, mask, group limit, select, weights,
// renormalise, scale). Each step is a no-op by default. Immutable after construction and shared by
// threads; one row never depends on another.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kernels/tensor.h"

namespace switchyard {

enum class RouterScore : uint8_t { kSoftmax, kSigmoid };

// Facts of a layer's router, from the checkpoint's config.
struct RoutingConfig {
  int num_experts = 0;
  int top_k = 0;
  RouterScore score = RouterScore::kSoftmax;
  bool softmax_after_topk =
      false;  // Mixtral's spelling: softmax over the chosen k logits (equal to renormalising)
  bool renormalize = false;  // divide the chosen weights by their sum
  float routed_scaling = 1.0f;
};

// A per-token choice of rules, loaded once and immutable; profile 0 is the identity. [num_experts]
// or empty.
struct RoutingProfile {
  std::vector<uint8_t> allowed;       // 0: the expert is never chosen; empty: all are
  std::vector<float> selection_bias;  // added for the selection only; empty: none
};

class RoutingPolicy {
 public:
  // Work space of Route, kept by its caller: only the first call allocates.
  struct Scratch {
    std::vector<float> score;      // [num_experts] weights before the choice
    std::vector<float> selection;  // [num_experts] what the choice goes by
    std::vector<double> exps;      // [num_experts]
  };

  explicit RoutingPolicy(const RoutingConfig& config,
                         std::vector<RoutingProfile> profiles = {RoutingProfile{}});

  // logits: [num_tokens, num_experts] float32; profile: [num_tokens] ids. Writes ids and weights
  // [num_tokens, top_k] (in descending order of selection score, ties to the lower id) and counts
  // [num_tokens] (< top_k only when fewer experts are allowed). A row with non-finite logits gets
  // count 0.
  void Route(const Tensor& logits, std::span<const uint32_t> profile, Scratch* scratch,
             std::span<int32_t> ids, std::span<float> weights, std::span<int32_t> counts) const;

  const RoutingConfig& config() const { return config_; }

 private:
  RoutingConfig config_;
  std::vector<RoutingProfile> profiles_;
};

}  // namespace switchyard
