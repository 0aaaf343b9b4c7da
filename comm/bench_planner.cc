#include "comm/bench_planner.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <numeric>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "comm/bench_cases.h"
#include "comm/placement_planner.h"
#include "kernels/check.h"
#include "kernels/measure.h"

namespace switchyard {
namespace {

constexpr BalanceMode kModes[] = {BalanceMode::kNone, BalanceMode::kEplb, BalanceMode::kLlep,
                                  BalanceMode::kAuto};
constexpr int32_t kRebalanceSteps = 8;
constexpr int kTwins = 5;  // equal planners whose shortest time counts: others share the cores
// Copies per expert over some steps.
std::vector<int64_t> LoadsOf(const Steps& steps, size_t begin, size_t end, int32_t num_experts) {
  std::vector<int64_t> loads(static_cast<size_t>(num_experts), 0);
  for (size_t s = begin; s < end; ++s) {
    for (size_t i = 0; i < steps[s].size(); ++i) loads[i % loads.size()] += steps[s][i];
  }
  return loads;
}

using Placement = std::shared_ptr<const ExpertPlacement>;

// Even homes; the hottest experts of the first steps have a second one on the emptiest rank above.
Placement HomesWithReplicas(const BenchCase& c, const Steps& steps) {
  const WorkloadSpec& spec = c.spec;
  const std::vector<int64_t> loads = LoadsOf(steps, 0, kRebalanceSteps, spec.num_experts);
  std::vector<std::vector<int32_t>> hosts;
  std::vector<int32_t> hottest;
  std::vector<int64_t> rank_load(static_cast<size_t>(spec.num_ranks), 0);
  std::vector<int32_t> free(static_cast<size_t>(spec.num_ranks), c.replica_slots);
  for (int32_t e = 0; e < spec.num_experts; ++e) {
    const int32_t home = EvenHome(e, spec.num_experts, spec.num_ranks);
    hosts.push_back({home});
    hottest.push_back(e);
    rank_load[static_cast<size_t>(home)] += loads[static_cast<size_t>(e)];
  }
  std::ranges::stable_sort(hottest, std::ranges::greater{},
                           [&](int32_t e) { return loads[static_cast<size_t>(e)]; });
  for (int32_t e : hottest) {
    std::vector<int32_t>& of = hosts[static_cast<size_t>(e)];
    int32_t best = -1;
    for (int32_t r = of[0] + 1; r < spec.num_ranks; ++r) {
      const auto rank = static_cast<size_t>(r);
      if (free[rank] > 0 && (best < 0 || rank_load[rank] < rank_load[static_cast<size_t>(best)])) {
        best = r;
      }
    }
    if (best < 0) continue;
    const int64_t half = loads[static_cast<size_t>(e)] / 2;
    rank_load[static_cast<size_t>(of[0])] -= half;
    rank_load[static_cast<size_t>(best)] += half;
    --free[static_cast<size_t>(best)];
    of.push_back(best);
  }
  auto placement = ExpertPlacement::Create(spec.num_ranks, {std::move(hosts)});
  SY_CHECK(placement.ok());
  return std::make_shared<const ExpertPlacement>(*std::move(placement));
}

// One planner over one workload.
class Run {
 public:
  Run(const BenchCase& c, const BenchPlannerOptions& options, BalanceMode mode)
      : case_(c), mode_(mode), steps_(options.steps) {
    options_.mode = mode;
    options_.costs.token_ps = options.token_ps;
    options_.costs.expert_read_ps = options.token_ps * options.t_mem_tokens;
    options_.costs.expert_move_ps = options.token_ps * options.t_link_tokens;
    if (mode == BalanceMode::kLlep || mode == BalanceMode::kAuto) {
      options_.foreign_slots_per_rank = options.foreign_slots;
    }
    eplb_slots_ = (c.spec.num_experts + c.spec.num_ranks - 1) / c.spec.num_ranks + c.replica_slots +
                  options.foreign_slots;
    row_.workload = c.Name();
    row_.planner = mode;
    row_.skew = c.skew;
    row_.move_us = static_cast<double>(options_.costs.expert_move_ps) * 1e-6;
  }

  BenchPlannerRow Over(const Steps& steps, Placement placement) {
    Use(std::move(placement));
    for (size_t s = 0; s < steps.size(); ++s) {
      if (mode_ == BalanceMode::kEplb && s > 0 && s % kRebalanceSteps == 0) Rebalance(steps, s);
      OneStep(steps[s]);
    }
    return Finish();
  }

 private:
  void Use(Placement placement) {
    placement_ = std::move(placement);
    twins_.clear();
    for (int i = 0; i < kTwins; ++i) twins_.emplace_back(placement_, options_);
  }

  void Rebalance(const Steps& steps, size_t s) {
    const std::vector<int64_t> loads =
        LoadsOf(steps, s - kRebalanceSteps, s, case_.spec.num_experts);
    PlacementRequest request{.num_layers = 1,
                             .num_experts = case_.spec.num_experts,
                             .num_ranks = case_.spec.num_ranks,
                             .home_slots_per_rank = eplb_slots_};
    request.loads = loads;
    request.current = placement_.get();
    auto next = PlanPlacement(request);
    SY_CHECK(next.ok());
    // Loaded from a former home each: a rank pays for what it sends and gets, as in a plan.
    std::vector<int64_t> moves(static_cast<size_t>(case_.spec.num_ranks), 0);
    for (const ExpertLoad& load : ExpertLoads(placement_.get(), {}, *next)) {
      ++row_.transfers;
      ++moves[static_cast<size_t>(load.rank)];
      ++moves[static_cast<size_t>(placement_->Hosts(0, load.expert)[0])];
    }
    rebalance_us_ = static_cast<double>(std::ranges::max(moves)) * row_.move_us;
    Use(std::make_shared<const ExpertPlacement>(*std::move(next)));
  }

  void OneStep(const std::vector<int32_t>& counts) {
    double shortest = std::numeric_limits<double>::max();
    for (DispatchPlanner& planner : twins_) {
      const double start = CpuSeconds(CLOCK_THREAD_CPUTIME_ID);
      planner.Plan(counts, case_.spec.num_sources, 0, &plan_);
      shortest = std::min(shortest, CpuSeconds(CLOCK_THREAD_CPUTIME_ID) - start);
    }
    plan_us_.push_back(shortest * 1e6);
    taus_.push_back(static_cast<double>(plan_.tau_ps) * 1e-6 + std::exchange(rebalance_us_, 0.0));
    row_.tau_us += taus_.back() / steps_;
    row_.bound_us += static_cast<double>(plan_.lower_bound_ps) * 1e-6 / steps_;
    const double mean = static_cast<double>(plan_.total_copies) / plan_.num_ranks;
    if (mean > 0) row_.max_mean += static_cast<double>(plan_.max_rank_copies) / mean / steps_;
    row_.transfers += static_cast<int64_t>(plan_.moves.size());
    ++regimes_[PlanRegimeName(plan_.regime)];
  }

  BenchPlannerRow Finish() {
    row_.gap = row_.bound_us > 0 ? row_.tau_us / row_.bound_us - 1 : 0;
    std::ranges::sort(plan_us_);
    row_.plan_p50_us = plan_us_[plan_us_.size() / 2];
    row_.plan_p99_us = plan_us_[std::min(plan_us_.size() - 1, plan_us_.size() * 99 / 100)];
    row_.regime =
        std::ranges::max_element(regimes_, {}, [](const auto& r) { return r.second; })->first;
    if (case_.spec.change == WorkloadChange::kShift && taus_.size() > kWorkloadShift) {
      const auto shift = taus_.begin() + kWorkloadShift;
      const double before = std::accumulate(shift - 8, shift, 0.0) / 8;
      const auto at =
          std::find_if(shift, taus_.end(), [&](double t) { return t <= 1.05 * before; });
      row_.recover_steps = static_cast<int32_t>(at - shift);
    }
    return row_;
  }

  const BenchCase& case_;
  const BalanceMode mode_;
  const double steps_;
  PlannerOptions options_;
  int32_t eplb_slots_ = 0;
  double rebalance_us_ = 0;  // of the rebalancing before this step
  Placement placement_;
  std::vector<DispatchPlanner> twins_;
  DispatchPlan plan_;
  std::vector<double> plan_us_, taus_;
  std::map<std::string, int> regimes_;
  BenchPlannerRow row_;
};

// Mean over draws of max/mean when every copy falls on any rank with equal chance.
double SamplingFloor(const WorkloadSpec& spec) {
  std::mt19937_64 rng(spec.seed);
  const double mean = static_cast<double>(spec.tokens) * spec.top_k / spec.num_ranks;
  std::poisson_distribution<int64_t> copies(mean);
  constexpr int kDraws = 400;
  double sum = 0;
  for (int i = 0; i < kDraws; ++i) {
    int64_t most = 0, total = 0;
    for (int32_t r = 0; r < spec.num_ranks; ++r) {
      const int64_t n = copies(rng);
      most = std::max(most, n);
      total += n;
    }
    if (total > 0) {
      sum += static_cast<double>(most) * spec.num_ranks / static_cast<double>(total) / kDraws;
    }
  }
  return sum;
}

}  // namespace

absl::StatusOr<BenchPlannerReport> BenchPlanner(const BenchPlannerOptions& options) {
  if (options.steps <= kRebalanceSteps || options.steps > 100000 || options.foreign_slots < 0 ||
      options.foreign_slots > kMaxForeignSlots) {
    return absl::InvalidArgumentError(absl::StrCat(
        "steps ", options.steps, " must be from ", kRebalanceSteps + 1,
        " to 100000, foreign slots ", options.foreign_slots, " from 0 to ", kMaxForeignSlots));
  }
  PlanCosts costs;
  costs.token_ps = options.token_ps;
  costs.expert_read_ps = options.token_ps * options.t_mem_tokens;
  costs.expert_move_ps = options.token_ps * options.t_link_tokens;
  if (absl::Status status = CheckPlanCosts(costs); !status.ok()) return status;
  const auto traces = ReadTraces(options.traces);
  if (!traces.ok()) return traces.status();
  BenchPlannerReport report{.options = options, .rows = {}};
  std::vector<BenchCase> cases = SyntheticCases(options.seed);
  for (size_t i = 0; i < traces->size(); ++i) {  // the demo model's always in the same way
    const ReplayOptions replay = i == 0 ? ReplayOptions{} : options.replay;
    if (absl::Status status = AddRecordedCases((*traces)[i], replay, &cases); !status.ok())
      return status;
  }
  const int64_t total = static_cast<int64_t>(cases.size()) * options.steps;
  int64_t done = 0;
  for (const BenchCase& c : cases) {
    const Steps steps = StepsOf(c, options.steps, [&] {
      if (options.progress) options.progress(done, total);
      ++done;
    });
    const Placement homes = HomesWithReplicas(c, steps);
    const double floor = SamplingFloor(c.spec);
    for (BalanceMode mode : kModes) {
      report.rows.push_back(Run(c, options, mode).Over(steps, homes));
      report.rows.back().floor = floor;
    }
  }
  if (options.progress) options.progress(total, total);
  return report;
}

}  // namespace switchyard
