#include "comm/dispatch_planner.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace switchyard {
namespace {

constexpr std::pair<std::string_view, BalanceMode> kModes[] = {{"auto", BalanceMode::kAuto},
                                                               {"none", BalanceMode::kNone},
                                                               {"eplb", BalanceMode::kEplb},
                                                               {"llep", BalanceMode::kLlep}};

// One multiplication a word: a plan has hundreds of them.
uint64_t Mix(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
  return hash ^ (hash >> 29);
}

// Over the bytes of plain values. Eight chains, so that multiplications need not wait for each
// other.
template <typename T>
uint64_t HashValues(std::span<const T> values) {
  static_assert(std::has_unique_object_representations_v<T>);
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  size_t left = values.size_bytes();
  constexpr int kChains = 8;
  uint64_t chains[kChains] = {1, 2, 3, 4, 5, 6, 7, left};
  for (; left >= sizeof(chains); left -= sizeof(chains), bytes += sizeof(chains)) {
    uint64_t words[kChains];
    std::memcpy(words, bytes, sizeof(words));
    for (int c = 0; c < kChains; ++c) chains[c] = Mix(chains[c], words[c]);
  }
  for (; left > 0; bytes += sizeof(uint32_t), left -= sizeof(uint32_t)) {
    static_assert(sizeof(T) % sizeof(uint32_t) == 0);
    uint32_t word = 0;
    std::memcpy(&word, bytes, sizeof(word));
    chains[0] = Mix(chains[0], word);
  }
  for (int c = 1; c < kChains; ++c) chains[0] = Mix(chains[0], chains[c]);
  return chains[0];
}

uint64_t HashOf(const DispatchPlan& plan, int32_t layer, uint64_t counts_hash) {
  const auto pair = [](int64_t a, int64_t b) {
    return static_cast<uint64_t>(a) * 0xbf58476d1ce4e5b9u + static_cast<uint64_t>(b);
  };
  uint64_t hash = 0x53595044u;
  hash = Mix(hash, pair(layer, plan.num_sources));
  hash = Mix(hash, pair(plan.num_experts, plan.num_ranks));
  hash = Mix(hash, pair(static_cast<int64_t>(plan.regime), plan.tau_ps));
  hash = Mix(hash, pair(plan.lower_bound_ps, plan.plain_tau_ps));
  hash = Mix(hash, HashValues(std::span(plan.moves)));
  // With the counts the shares say which expert each is of.
  hash = Mix(hash, HashValues(std::span(plan.shares)));
  hash = Mix(hash, counts_hash);
  // The finaliser of splitmix64.
  hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9u;
  hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
  return hash ^ (hash >> 31);
}

}  // namespace

absl::Status CheckPlanCosts(const PlanCosts& costs) {
  const auto check = [](const char* name, int64_t value, int64_t min, int64_t max) {
    if (value >= min && value <= max) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("plan costs: ", name, " is ", value, " ps, not from ", min, " to ", max));
  };
  for (absl::Status status : {check("a token", costs.token_ps, 1, kMaxTokenPs),
                              check("reading an expert", costs.expert_read_ps, 0, kMaxPlanCostPs),
                              check("moving an expert", costs.expert_move_ps, 0, kMaxPlanCostPs),
                              check("an exact plan", costs.exact_plan_ps, 0, kMaxPlanCostPs)}) {
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

const char* PlanRegimeName(PlanRegime regime) {
  switch (regime) {
    case PlanRegime::kPlain:
      return "plain";
    case PlanRegime::kActivated:
      return "activated";
    case PlanRegime::kReplicas:
      return "replicas";
    case PlanRegime::kSpill:
      return "spill";
    case PlanRegime::kEven:
      return "even";
  }
  return "";
}

std::optional<BalanceMode> ParseBalanceMode(std::string_view name) {
  for (const auto& [known, mode] : kModes) {
    if (name == known) return mode;
  }
  return std::nullopt;
}

const char* BalanceModeName(BalanceMode mode) {
  for (const auto& [name, known] : kModes) {
    if (mode == known) return name.data();
  }
  return "";
}

DispatchPlanner::DispatchPlanner(std::shared_ptr<const ExpertPlacement> placement,
                                 const PlannerOptions& options)
    : placement_(std::move(placement)),
      options_(options),
      slots_(*placement_, options.foreign_slots_per_rank) {
  SY_CHECK(CheckPlanCosts(options.costs).ok());
  problem_.num_ranks = placement_->num_ranks();
  problem_.costs = options.costs;
  const auto num_experts = static_cast<size_t>(placement_->num_experts());
  problem_.tokens.resize(num_experts);
  problem_.weights.resize(num_experts);
  free_slots_.resize(static_cast<size_t>(problem_.num_ranks));
  const auto num_ranks = static_cast<size_t>(problem_.num_ranks);
  problem_.forced_quota.reserve(slots_.most_pairs());
  problem_.forced_cost.reserve(num_ranks);
  problem_.plain_cost.reserve(num_ranks);
  scratch_.sums.reserve(2 * num_ranks);
  for (auto* per_expert : {&scratch_.host_of, &scratch_.next, &scratch_.order}) {
    per_expert->reserve(num_experts);
  }
  for (auto* per_rank : {&scratch_.head, &scratch_.queue, &scratch_.parent, &scratch_.by_cost,
                         &scratch_.free_slots}) {
    per_rank->reserve(num_ranks);
  }
  scratch_.load.reserve(num_ranks);
  scratch_.spilled.reserve(num_experts);
  // Assignments change places, so that all are sized for the largest.
  const size_t num_slots =
      static_cast<size_t>(problem_.num_ranks) * static_cast<size_t>(options.foreign_slots_per_rank);
  for (Assignment* assignment : {&best_, &trial_, &scratch_.attempt}) {
    assignment->quota.reserve(slots_.most_pairs());
    assignment->spilled.reserve(num_slots);
    assignment->cost.reserve(num_ranks);
  }
}

void DispatchPlanner::BeginGeneration(uint64_t slots_generation) {
  if (slots_generation != generation_) slots_.Clear();
  generation_ = slots_generation;
}

void DispatchPlanner::Sum(std::span<const int32_t> counts, int32_t num_sources,
                          DispatchPlan* plan) {
  const size_t num_experts = problem_.tokens.size();
  SY_CHECK_GT(num_sources, 0);
  SY_CHECK_EQ(counts.size(), static_cast<size_t>(num_sources) * num_experts);
  plan->before.resize(counts.size() + num_experts);
  std::fill_n(plan->before.begin(), num_experts, 0);
  int32_t negative = 0;
  int32_t* before = plan->before.data();
  const int32_t* row = counts.data();
  for (int32_t s = 0; s < num_sources; ++s, before += num_experts, row += num_experts) {
    int32_t* const next = before + num_experts;
    for (size_t e = 0; e < num_experts; ++e) {
      next[e] = before[e] + row[e];
      negative |= row[e];
    }
  }
  SY_CHECK_GE(negative, 0);
  std::copy_n(before, num_experts, problem_.tokens.begin());
  // In locals: members would go through memory at every step.
  const PlanCosts costs = problem_.costs;
  const int64_t* const tokens = problem_.tokens.data();
  int64_t* const weights = problem_.weights.data();
  int64_t total = 0, total_weight = 0, max_weight = 0;
  int32_t activated = 0, num_memory_bound = 0;
  for (size_t e = 0; e < num_experts; ++e) {
    const int64_t compute = tokens[e] * costs.token_ps;
    const int64_t least = tokens[e] > 0 ? costs.expert_read_ps : 0;
    const int64_t weight = std::max(compute, least);
    weights[e] = weight;
    total += tokens[e];
    total_weight += weight;
    max_weight = std::max(max_weight, weight);
    activated += tokens[e] > 0 ? 1 : 0;
    num_memory_bound += compute <= costs.expert_read_ps ? 1 : 0;
  }
  problem_.total = total;
  problem_.total_weight = total_weight;
  problem_.max_weight = max_weight;
  problem_.activated = activated;
  // Idle experts were counted too.
  problem_.num_memory_bound = num_memory_bound - (static_cast<int32_t>(num_experts) - activated);
}

void DispatchPlanner::TakeTrialIfCheaper(PlanRegime regime, DispatchPlan* plan) {
  if (trial_.tau >= best_.tau) return;
  std::swap(best_, trial_);
  plan->regime = regime;
}

void DispatchPlanner::ChooseAuto(int32_t layer, DispatchPlan* plan) {
  const bool any_choice = problem_.hosts->num_single < problem_.num_experts();
  int64_t& bound = plan->lower_bound_ps;
  if (any_choice && best_.tau > bound && 2 * problem_.num_memory_bound >= problem_.activated) {
    if (PlanActivated(problem_, bound, &scratch_, &trial_)) bound = std::max(bound, trial_.tau);
    TakeTrialIfCheaper(PlanRegime::kActivated, plan);
  }
  if (any_choice && best_.tau > bound && !problem_.memory_bound()) {
    // Two cheap candidates: filling to the bound splits few experts; pouring keeps loads level.
    // Each loses sometimes.
    PlanFill(problem_, bound, &scratch_, &trial_);
    TakeTrialIfCheaper(PlanRegime::kReplicas, plan);
    if (best_.tau > bound) {
      PlanFill(problem_, 0, &scratch_, &trial_);
      TakeTrialIfCheaper(PlanRegime::kReplicas, plan);
    }
    if (best_.tau - bound > options_.costs.exact_plan_ps) {
      // From the best one so far; while that is plain, which is not made yet, trial_ holds the last
      // fill.
      if (plan->regime != PlanRegime::kPlain) trial_ = best_;
      const int64_t tokens = BalanceTokens(problem_, &scratch_, &trial_);
      bound = std::max(bound, tokens * options_.costs.token_ps);
      TakeTrialIfCheaper(PlanRegime::kReplicas, plan);
    }
  }
  if (plan->regime == PlanRegime::kPlain) PlanPlain(problem_, &best_);
  const int64_t move = options_.costs.expert_move_ps;
  const int64_t free_bound = FreeBound(problem_);
  if (options_.foreign_slots_per_rank == 0 || move == 0 || best_.tau - free_bound <= move) return;
  slots_.CountFree(layer, best_.quota, free_slots_);
  PlanSpill(problem_, best_, free_bound, free_slots_, &scratch_, &trial_);
  TakeTrialIfCheaper(PlanRegime::kSpill, plan);
}

void DispatchPlanner::Plan(std::span<const int32_t> counts, int32_t num_sources, int32_t layer,
                           DispatchPlan* plan) {
  // For the largest plan of so many sources: a later one allocates nothing.
  plan->shares.reserve(slots_.most_pairs() + 1);
  plan->moves.reserve(best_.spilled.capacity());
  Sum(counts, num_sources, plan);
  // As published, every plan moves what it needs.
  if (options_.mode == BalanceMode::kLlep) slots_.Clear(layer);
  problem_.hosts = &slots_.Hosts(layer);
  problem_.homes = &slots_.HomesOf(layer);

  const PlainLoad plain = LoadOfPlain(&problem_, &scratch_);
  plan->regime = PlanRegime::kPlain;
  plan->plain_tau_ps = best_.tau = plain.tau;  // made only if no other is cheaper
  plan->plain_max_rank_copies = plain.max_tokens;
  const bool any_choice = problem_.hosts->num_single < problem_.num_experts();
  if (any_choice) FindForced(&problem_);
  plan->lower_bound_ps = any_choice ? ReplicaBound(problem_) : plain.tau;
  switch (options_.mode) {
    case BalanceMode::kNone:
      PlanPlain(problem_, &best_);
      break;
    case BalanceMode::kEplb:
      PlanEven(problem_, &best_);
      plan->regime = PlanRegime::kEven;
      break;
    case BalanceMode::kLlep:
      PlanLlep(problem_, options_.llep, options_.foreign_slots_per_rank, &scratch_, &best_);
      if (!best_.spilled.empty()) plan->regime = PlanRegime::kSpill;
      break;
    case BalanceMode::kAuto:
      ChooseAuto(layer, plan);
      break;
  }
  plan->tau_ps = best_.tau;
  if (options_.foreign_slots_per_rank > 0) {
    // A plan that moves weights is bound by less, but a rank that gets weights pays for the move.
    const int64_t with_move = std::max(FreeBound(problem_), options_.costs.expert_move_ps);
    plan->lower_bound_ps = std::min(plan->lower_bound_ps, with_move);
  }
  CommitMoves(layer, plan);

  plan->num_sources = num_sources;
  plan->num_experts = problem_.num_experts();
  plan->num_ranks = problem_.num_ranks;
  plan->total_copies = problem_.total;
  plan->max_rank_copies = MaxRankCopies();
  plan->spilled_copies = slots_.ForeignTokens(layer, best_.quota);
  WriteShares(plan);
  plan->hash = HashOf(*plan, layer, HashValues(counts));
}

int64_t DispatchPlanner::MaxRankCopies() const {
  const LiveHosts& hosts = *problem_.hosts;
  int64_t most = 0;
  for (size_t r = 0; r + 1 < hosts.rank_first.size(); ++r) {
    int64_t copies = 0;
    for (int32_t k = hosts.rank_first[r]; k < hosts.rank_first[r + 1]; ++k) {
      copies += best_.quota[static_cast<size_t>(hosts.of_rank[static_cast<size_t>(k)])];
    }
    most = std::max(most, copies);
  }
  return most;
}

void DispatchPlanner::CommitMoves(int32_t layer, DispatchPlan* plan) {
  std::ranges::sort(best_.spilled, {},
                    [](const SpillPiece& piece) { return std::pair(piece.rank, piece.expert); });
  plan->moves.clear();
  for (const SpillPiece& piece : best_.spilled) {
    plan->moves.push_back({piece.expert, piece.from_rank, piece.rank, 0});
  }
  if (options_.foreign_slots_per_rank == 0) return;
  slots_.Apply(layer, plan->moves, &best_.quota);
  for (const SpillPiece& piece : best_.spilled) {
    const int32_t pair = problem_.hosts->Find(piece.expert, piece.rank);
    best_.quota[static_cast<size_t>(pair)] = piece.tokens;
  }
}

void DispatchPlanner::WriteShares(DispatchPlan* plan) {
  const LiveHosts& hosts = *problem_.hosts;
  const size_t num_pairs = best_.quota.size();
  plan->first.resize(hosts.first.size());
  plan->shares.resize(num_pairs + 1);  // one more is written and not counted
  DispatchShare* const shares = plan->shares.data();
  const int32_t* const pair_first = hosts.first.data();
  const int32_t* const ranks = hosts.ranks.data();
  const int64_t* const quota = best_.quota.data();
  int32_t* const first = plan->first.data();
  size_t num_shares = 0, pair = 0;
  for (size_t e = 0; e + 1 < hosts.first.size(); ++e) {
    first[e] = static_cast<int32_t>(num_shares);
    for (const auto end = static_cast<size_t>(pair_first[e + 1]); pair < end; ++pair) {
      shares[num_shares] = {ranks[pair], static_cast<int32_t>(quota[pair])};
      num_shares += quota[pair] > 0 ? 1 : 0;
    }
  }
  plan->first.back() = static_cast<int32_t>(num_shares);
  plan->shares.resize(num_shares);
}

}  // namespace switchyard
