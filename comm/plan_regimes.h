// The planner's candidates: each function turns one layer's loads into an Assignment. Pure,
// integers only, ties to the lowest rank and expert. Internal to DispatchPlanner; the scratch is
// its.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "comm/foreign_slots.h"
#include "comm/plan_costs.h"

namespace switchyard {

// One layer's loads over the live hosts.
struct PlanProblem {
  int32_t num_ranks = 0;
  const Homes* homes = nullptr;
  const LiveHosts* hosts = nullptr;  // homes and foreign slots
  PlanCosts costs;
  std::vector<int64_t> tokens;   // [num_experts] copies of all sources
  std::vector<int64_t> weights;  // [num_experts] ps: Compute(tokens)
  int64_t total = 0;             // sum of tokens
  int64_t total_weight = 0;      // sum of weights
  int64_t max_weight = 0;
  int32_t activated = 0;              // experts with tokens
  int32_t num_memory_bound = 0;       // of them, those whose reading takes longer than computing
  std::vector<int64_t> plain_cost;    // [num_ranks] ps of plain expert parallelism
  std::vector<int64_t> forced_cost;   // [num_ranks] ps of the experts with one host
  std::vector<int64_t> forced_quota;  // [pairs of the hosts] tokens of those, else 0

  int32_t num_experts() const { return static_cast<int32_t>(tokens.size()); }
  // Every activated expert costs its reading alone.
  bool memory_bound() const { return max_weight <= costs.expert_read_ps; }
};

// Copies of an expert on a rank that gets its weights by this plan.
struct SpillPiece {
  int32_t expert = 0;
  int32_t rank = 0;
  int32_t from_rank = 0;
  int64_t tokens = 0;
};

struct Assignment {
  std::vector<int64_t> quota;  // [pairs of the hosts] tokens
  std::vector<SpillPiece> spilled;
  std::vector<int64_t> cost;  // [num_ranks] ps
  int64_t tau = 0;            // the largest cost

  void Reset(const PlanProblem& problem);
  // What no plan without moves can change: experts with one host.
  void ResetToForced(const PlanProblem& problem);
  // Costs and tau from quota and spilled.
  void Evaluate(const PlanProblem& problem);
};

struct RankLoad {
  int64_t tokens = 0;
  int64_t cost = 0;  // ps
};

// Scratch, sized by the planner.
struct PlanScratch {
  std::vector<RankLoad> sums;       // [2 * num_ranks]
  std::vector<int32_t> host_of;     // [num_experts] pair at which a whole expert lies
  std::vector<int32_t> head, next;  // [num_ranks], [num_experts] the movable experts of each rank
  std::vector<int32_t> queue;       // [num_ranks]
  std::vector<int32_t> parent;      // [num_ranks] pair through which a rank was reached
  std::vector<int64_t> load;        // [num_ranks]
  std::vector<int32_t> by_cost;     // [num_ranks]
  std::vector<int32_t> free_slots;  // [num_ranks]
  std::vector<int32_t> order;       // [num_experts]
  std::vector<uint8_t> spilled;     // [num_experts]
  Assignment attempt;               // of PlanSpill
};

struct LlepOptions {
  int32_t alpha_percent = 110;   // capacity of a rank over the mean load
  int32_t min_chunk = 1024;      // fewest tokens worth a spill
  int32_t lambda_percent = 130;  // plain below this max over mean load of the ranks
};

// Sets forced_cost and forced_quota.
void FindForced(PlanProblem* problem);
// No plan over the live hosts costs less: from the total, each rank's and each expert's forced
// share and the count of activated experts. After FindForced.
int64_t ReplicaBound(const PlanProblem& problem);
// No plan costs less even if every rank held every expert and moving were free.
int64_t FreeBound(const PlanProblem& problem);

// ---- plan_baselines.cc ----
// What PlanPlain would cost, without making it; sets plain_cost.
struct PlainLoad {
  int64_t tau = 0;
  int64_t max_tokens = 0;  // of one rank
};
PlainLoad LoadOfPlain(PlanProblem* problem, PlanScratch* scratch);
void PlanPlain(const PlanProblem& problem, Assignment* out);
void PlanEven(const PlanProblem& problem, Assignment* out);
// Least-loaded expert parallelism as published (arXiv 2601.17111 and its code): experts by
// descending load; what exceeds the native rank's capacity goes, with weights, to the rank with the
// least assigned and pending load. A rank takes at most `slots` foreign experts; what then fits
// nowhere stays at the native rank. hosts = homes here.
void PlanLlep(const PlanProblem& problem, const LlepOptions& options, int32_t slots,
              PlanScratch* scratch, Assignment* out);

// ---- plan_decode.cc: regime A ----
// Whole experts, those with the fewest hosts first, each to its cheapest host (the activated-expert
// balancing of Janus, arXiv 2512.13525, in a better order), then augmenting paths while some path
// lowers a most loaded rank and tau is above `bound`. Returns true when tau is proven optimal:
// everything is memory-bound and no path is left.
bool PlanActivated(const PlanProblem& problem, int64_t bound, PlanScratch* scratch,
                   Assignment* out);

// ---- plan_replicas.cc: regime B ----
// From the forced shares on, expert after expert fills its cheapest hosts up to `target` ps, the
// rest is poured level; target 0 pours from the start.
void PlanFill(const PlanProblem& problem, int64_t target, PlanScratch* scratch, Assignment* out);
// Moves tokens between hosts until the most tokens on one rank are fewest (exact). Returns that
// number.
int64_t BalanceTokens(const PlanProblem& problem, PlanScratch* scratch, Assignment* inout);

// ---- plan_spill.cc: regime C ----
// From `base`: most loaded rank to least loaded with weights, while the model says that it pays.
// free_slots [num_ranks]: foreign slots that base leaves free. Homes send. When nothing is better
// than base, out's tau is base's and the rest of it means nothing.
void PlanSpill(const PlanProblem& problem, const Assignment& base, int64_t bound,
               std::span<const int32_t> free_slots, PlanScratch* scratch, Assignment* out);

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace switchyard
