#include "kernels/routing_policy.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/exact_math.h"
#include "kernels/float_mode.h"

namespace switchyard {
namespace {

constexpr float kExcluded = -std::numeric_limits<float>::infinity();

bool AllFinite(std::span<const float> logits) {
  return std::all_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); });
}

// Softmax in float64, rounded once: sums run in ascending order.
void Softmax(std::span<const float> logits, std::span<double> exps, std::span<float> out) {
  const double max = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (size_t i = 0; i < logits.size(); ++i)
    sum += exps[i] = ExactExp(static_cast<double>(logits[i]) - max);
  for (size_t i = 0; i < logits.size(); ++i) out[i] = static_cast<float>(exps[i] / sum);
}

// Step 2. The raw logits when the softmax comes after the choice.
void Score(const RoutingConfig& config, std::span<const float> logits, RoutingPolicy::Scratch& s) {
  if (config.score == RouterScore::kSigmoid) {
    for (size_t i = 0; i < logits.size(); ++i)
      s.score[i] = static_cast<float>(1.0 / (1.0 + ExactExp(-static_cast<double>(logits[i]))));
  } else if (config.softmax_after_topk) {
    std::copy(logits.begin(), logits.end(), s.score.begin());
  } else {
    Softmax(logits, s.exps, s.score);
  }
}

// Steps 3 and 4.
void Bias(const RoutingProfile& profile, RoutingPolicy::Scratch& s) {
  s.selection = s.score;
  for (size_t i = 0; i < profile.selection_bias.size(); ++i)
    s.selection[i] += profile.selection_bias[i];
  for (size_t i = 0; i < profile.allowed.size(); ++i)
    if (profile.allowed[i] == 0) s.selection[i] = kExcluded;
}

// Step 6: the highest k in descending order, ties to the lower id. Returns how many there were.
int Select(std::span<float> selection, std::span<int32_t> ids) {
  int count = 0;
  for (int32_t& id : ids) {
    const auto best = std::max_element(selection.begin(), selection.end());  // the first of equals
    if (*best == kExcluded) break;
    id = static_cast<int32_t>(best - selection.begin());
    *best = kExcluded;
    ++count;
  }
  return count;
}

}  // namespace

RoutingPolicy::RoutingPolicy(const RoutingConfig& config, std::vector<RoutingProfile> profiles)
    : config_(config), profiles_(std::move(profiles)) {
  SY_CHECK_GE(config_.num_experts, 1);
  SY_CHECK_GE(config_.top_k, 1);
  SY_CHECK_LE(config_.top_k, config_.num_experts);
  SY_CHECK(!profiles_.empty());
  for (const RoutingProfile& p : profiles_) {
    const size_t n = static_cast<size_t>(config_.num_experts);
    SY_CHECK(p.allowed.empty() || p.allowed.size() == n);
    SY_CHECK(p.selection_bias.empty() || p.selection_bias.size() == n);
    SY_CHECK(AllFinite(p.selection_bias));
  }
}

void RoutingPolicy::Route(const Tensor& logits, std::span<const uint32_t> profile, Scratch* scratch,
                          std::span<int32_t> ids, std::span<float> weights,
                          std::span<int32_t> counts) const {
  const FlushDenormals flush;
  const size_t tokens = static_cast<size_t>(logits.dim(0));
  const size_t experts = static_cast<size_t>(config_.num_experts);
  const size_t k = static_cast<size_t>(config_.top_k);
  SY_CHECK_EQ(logits.ndim, 2);
  SY_CHECK_EQ(logits.dim(1), config_.num_experts);
  SY_CHECK_EQ(profile.size(), tokens);
  SY_CHECK_EQ(ids.size(), tokens * k);
  SY_CHECK_EQ(weights.size(), tokens * k);
  SY_CHECK_EQ(counts.size(), tokens);

  Scratch& s = *scratch;
  s.score.resize(experts);
  s.exps.resize(experts);
  const float* all_logits = logits.as<float>();
  for (size_t t = 0; t < tokens; ++t) {
    const std::span<const float> row(all_logits + t * experts, experts);
    const std::span<int32_t> row_ids = ids.subspan(t * k, k);
    const std::span<float> row_weights = weights.subspan(t * k, k);
    std::fill(row_ids.begin(), row_ids.end(), -1);
    std::fill(row_weights.begin(), row_weights.end(), 0.0f);
    counts[t] = 0;
    if (!AllFinite(row)) continue;
    SY_CHECK_LT(profile[t], profiles_.size());

    Score(config_, row, s);
    Bias(profiles_[profile[t]], s);
    const int count = Select(s.selection, row_ids);
    counts[t] = count;
    if (count == 0) continue;
    // Step 7: weights are the scores without the bias.
    const std::span<float> chosen = row_weights.first(static_cast<size_t>(count));
    for (size_t j = 0; j < chosen.size(); ++j) chosen[j] = s.score[static_cast<size_t>(row_ids[j])];
    if (config_.softmax_after_topk && config_.score == RouterScore::kSoftmax)
      Softmax(chosen, s.exps, chosen);
    // Step 9, then 10.
    if (config_.renormalize) {
      double sum = 0.0;
      for (float w : chosen) sum += static_cast<double>(w);
      // Scores can all underflow to zero (sigmoid of very low logits).
      if (sum > 0.0)
        for (float& w : chosen) w = static_cast<float>(static_cast<double>(w) / sum);
    }
    for (float& w : chosen) w *= config_.routed_scaling;
  }
}

}  // namespace switchyard
