// Synthetic routing for planner benchmarks and tests (BALANCE.md section 5): every token draws its
// top-k *distinct* experts by Gumbel-top-k over the layer's logits and its request's taste (as an
// exponential race, which has the same law and needs one logarithm). Deterministic per seed on one
// platform. One thread per object.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "comm/expert_placement.h"

namespace switchyard {

// How experts differ in popularity.
enum class WorkloadSkew : uint8_t {
  kZipf,       // popularity rank^-zipf, ranks shuffled over the experts
  kHotRank,    // the experts of the first rank are `hot` times as popular
  kHotStripe,  // one expert of every rank is
};
// How popularity changes over the steps.
enum class WorkloadChange : uint8_t {
  kNone,
  kDrift,  // a slow random walk
  kShift,  // another popularity at half time
  kBurst,  // every eighth step has eight times the tokens
};

struct WorkloadSpec {
  int32_t num_experts = 64;
  int32_t num_ranks = 8;
  int32_t top_k = 8;
  int32_t num_sources = 1;
  int32_t tokens = 1024;  // per step, over all sources
  WorkloadSkew skew = WorkloadSkew::kZipf;
  double zipf = 0.6;  // exponent
  double hot = 8;     // times as popular
  WorkloadChange change = WorkloadChange::kNone;
  int32_t tokens_per_request = 1;  // neighbours that share a taste; 1: none do
  bool ragged = false;             // sources of unequal sizes, one of them empty
  int32_t prefill_tokens = 0;  // every fourth step: decode tokens and one prefill chunk of these
  uint64_t seed = 1;

  // Names it uniquely among a benchmark's workloads, e.g. "zipf1.0 N=64 P=8 tokens=1024".
  std::string Name() const;
};
constexpr int32_t kWorkloadSteps = 48;
constexpr int32_t kWorkloadShift = 24;  // the step at which kShift changes

class Workload {
 public:
  explicit Workload(const WorkloadSpec& spec);

  // The next step's counts [num_sources, num_experts].
  std::span<const int32_t> Next();
  const WorkloadSpec& spec() const { return spec_; }

 private:
  void DrawPopularity();
  void Change();
  void AddTokens(int32_t source, int32_t tokens);
  double LogUniform();

  const WorkloadSpec spec_;
  std::mt19937_64 rng_;
  int32_t step_ = 0;
  std::vector<double> logits_;   // [num_experts]
  std::vector<double> rates_;    // [num_experts] 1 / popularity for the request at hand
  std::vector<int32_t> counts_;  // [num_sources, num_experts]
  std::vector<std::pair<double, int32_t>> keys_;  // [num_experts]
};

// The home of an expert without replicas, as ExpertPlacement::Even has it.
int32_t EvenHome(int32_t expert, int32_t num_experts, int32_t num_ranks);

}  // namespace switchyard
