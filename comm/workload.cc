#include "comm/workload.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace switchyard {
namespace {

constexpr double kTaste = 1.5;  // standard deviation of a request's taste, in logits
constexpr double kDrift = 0.1;  // of a step's change

}  // namespace

std::string WorkloadSpec::Name() const {
  std::string name = skew == WorkloadSkew::kZipf      ? absl::StrFormat("zipf%.1f", zipf)
                     : skew == WorkloadSkew::kHotRank ? absl::StrFormat("hot-rank%.0f", hot)
                                                      : absl::StrFormat("hot-stripe%.0f", hot);
  if (tokens_per_request > 1) name += "-correlated";
  if (change == WorkloadChange::kDrift) name += "-drift";
  if (change == WorkloadChange::kShift) name += "-shift";
  if (change == WorkloadChange::kBurst) name += "-bursts";
  if (ragged) name += "-ragged";
  if (prefill_tokens > 0) absl::StrAppend(&name, "-mixed", prefill_tokens);
  return absl::StrCat(name, " N=", num_experts, " P=", num_ranks, " tokens=", tokens);
}

int32_t EvenHome(int32_t expert, int32_t num_experts, int32_t num_ranks) {
  return static_cast<int32_t>(((int64_t{expert} + 1) * num_ranks - 1) / num_experts);
}

Workload::Workload(const WorkloadSpec& spec) : spec_(spec), rng_(spec.seed) {
  const auto num_experts = static_cast<size_t>(spec.num_experts);
  logits_.resize(num_experts);
  rates_.resize(num_experts);
  keys_.resize(num_experts);
  counts_.resize(static_cast<size_t>(spec.num_sources) * num_experts);
  DrawPopularity();
}

double Workload::LogUniform() {
  return std::log((static_cast<double>(rng_() >> 11) + 0.5) / 9007199254740992.0);  // never log 0
}

void Workload::DrawPopularity() {
  std::vector<int32_t> order(logits_.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::shuffle(order, rng_);
  for (size_t i = 0; i < order.size(); ++i) {
    const int32_t e = order[i];
    double& logit = logits_[static_cast<size_t>(e)];
    if (spec_.skew == WorkloadSkew::kZipf) {
      logit = -spec_.zipf * std::log(static_cast<double>(i + 1));
      continue;
    }
    const int32_t rank = EvenHome(e, spec_.num_experts, spec_.num_ranks);
    const bool hot = spec_.skew == WorkloadSkew::kHotRank
                         ? rank == 0
                         : e == 0 || EvenHome(e - 1, spec_.num_experts, spec_.num_ranks) != rank;
    logit = hot ? std::log(spec_.hot) : 0.0;
  }
}

void Workload::Change() {
  if (spec_.change == WorkloadChange::kShift && step_ == kWorkloadShift) DrawPopularity();
  if (spec_.change != WorkloadChange::kDrift) return;
  std::normal_distribution<double> normal(0.0, kDrift);
  for (double& logit : logits_) logit += normal(rng_);
}

void Workload::AddTokens(int32_t source, int32_t tokens) {
  const std::span<int32_t> counts =
      std::span(counts_).subspan(static_cast<size_t>(source) * logits_.size(), logits_.size());
  std::normal_distribution<double> normal(0.0, kTaste);
  for (int32_t t = 0; t < tokens; ++t) {
    const bool tasteful = spec_.tokens_per_request > 1;
    if (t == 0 || (tasteful && t % spec_.tokens_per_request == 0)) {
      for (size_t e = 0; e < rates_.size(); ++e) {
        rates_[e] = std::exp(-logits_[e] - (tasteful ? normal(rng_) : 0.0));
      }
    }
    // The first top_k arrivals of processes with these mean times.
    for (size_t e = 0; e < keys_.size(); ++e) {
      keys_[e] = {LogUniform() * rates_[e], static_cast<int32_t>(e)};
    }
    const auto last = keys_.begin() + spec_.top_k;
    std::nth_element(keys_.begin(), last - 1, keys_.end(), std::greater<>());
    for (auto it = keys_.begin(); it != last; ++it) ++counts[static_cast<size_t>(it->second)];
  }
}

std::span<const int32_t> Workload::Next() {
  Change();
  std::ranges::fill(counts_, 0);
  int32_t tokens = spec_.tokens;
  if (spec_.change == WorkloadChange::kBurst && step_ % 8 == 7) tokens *= 8;
  if (spec_.prefill_tokens > 0 && step_ % 4 == 3) tokens += spec_.prefill_tokens;
  int32_t left = tokens;
  for (int32_t s = 0; s < spec_.num_sources; ++s) {
    const int32_t rest = spec_.num_sources - s;
    int32_t own = left / rest;
    if (spec_.ragged && s == 0 && rest > 1) own = 0;
    if (spec_.ragged && s > 0 && rest > 1) own = left * 2 / 3;
    if (rest == 1) own = left;
    AddTokens(s, own);
    left -= own;
  }
  ++step_;
  return counts_;
}

}  // namespace switchyard
