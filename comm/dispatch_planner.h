// DispatchPlanner: counts of one layer -> DispatchPlan (BALANCE.md). A pure function of the counts,
// the epoch's constants (placement, mode, costs, slots) and the plans since the current slots
// generation began, in integers with a total order at every choice: planners of all ranks that are
// asked the same questions in the same order (step, layer, micro-batch) give identical plans. It
// owns the replicated state of the foreign slots and all scratch. One per worker, used on its
// thread only; only the first plan of so many sources allocates.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "comm/dispatch_plan.h"
#include "comm/expert_placement.h"
#include "comm/foreign_slots.h"
#include "comm/plan_costs.h"
#include "comm/plan_regimes.h"

namespace switchyard {

// The names are those of --balance.
enum class BalanceMode : uint8_t {
  kAuto,  // "auto": the cheapest of the regimes' candidates, never modelled worse than plain
  kNone,  // "none": plain expert parallelism, every copy at its expert's first home
  kEplb,  // "eplb": an expert's tokens split evenly over its homes
  kLlep,  // "llep": least-loaded expert parallelism as published
};
std::optional<BalanceMode> ParseBalanceMode(std::string_view name);
const char* BalanceModeName(BalanceMode mode);

// Foreign slots per layer and rank: so many weights may be under way between two ranks at once.
constexpr int32_t kMaxForeignSlots = 16;

struct PlannerOptions {
  BalanceMode mode = BalanceMode::kAuto;
  PlanCosts costs;
  int32_t foreign_slots_per_rank = 0;  // per layer; 0: weights never move
  LlepOptions llep;
};

class DispatchPlanner {
 public:
  // REQUIRES: CheckPlanCosts(options.costs) is OK, foreign_slots_per_rank >= 0.
  DispatchPlanner(std::shared_ptr<const ExpertPlacement> placement, const PlannerOptions& options);

  // Once per step, before its plans: the foreign slots are empty when a new generation begins.
  void BeginGeneration(uint64_t slots_generation);

  // counts: [num_sources, num_experts] copies per participant (in the order of the step header) and
  // expert, >= 0 and together at most kMaxStepCopies, in one micro-batch of `layer`.
  void Plan(std::span<const int32_t> counts, int32_t num_sources, int32_t layer,
            DispatchPlan* plan);

  // [foreign_slots_per_rank] the expert in each foreign slot of a rank after the last plan; -1:
  // none.
  std::span<const int32_t> ForeignExperts(int32_t layer, int32_t rank) const {
    return slots_.Experts(layer, rank);
  }
  const PlannerOptions& options() const { return options_; }

 private:
  void Sum(std::span<const int32_t> counts, int32_t num_sources, DispatchPlan* plan);
  void ChooseAuto(int32_t layer, DispatchPlan* plan);
  void TakeTrialIfCheaper(PlanRegime regime, DispatchPlan* plan);
  void CommitMoves(int32_t layer, DispatchPlan* plan);
  int64_t MaxRankCopies() const;
  void WriteShares(DispatchPlan* plan);

  // Constant after construction.
  const std::shared_ptr<const ExpertPlacement> placement_;
  const PlannerOptions options_;

  uint64_t generation_ = 0;
  ForeignSlots slots_;

  // Of the plan being made.
  PlanProblem problem_;
  Assignment best_, trial_;
  PlanScratch scratch_;
  std::vector<int32_t> free_slots_;  // [num_ranks]
};

}  // namespace switchyard
