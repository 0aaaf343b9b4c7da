// Quality that only shows in aggregate (regime C against committed solutions of a MILP solver, the
// benchmark's own promises), and no heap growth once the planner is warm.
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>

#include "comm/bench_planner.h"
#include "comm/test_problems.h"
#include "comm/workload.h"
#include "kernels/count_allocations.h"

namespace switchyard {
namespace {

TEST(PlannerQuality, AWarmPlannerAllocatesNothing) {
  std::mt19937 rng = SeededRng();
  for (BalanceMode mode :
       {BalanceMode::kAuto, BalanceMode::kNone, BalanceMode::kEplb, BalanceMode::kLlep}) {
    PlannerOptions options;
    options.mode = mode;
    options.foreign_slots_per_rank = 3;
    options.costs = {.token_ps = 1, .expert_read_ps = 20, .expert_move_ps = 50, .exact_plan_ps = 0};
    options.llep.min_chunk = 8;
    constexpr int32_t kLayers = 2, kExperts = 64, kSources = 3;
    DispatchPlanner planner(
        std::make_shared<const ExpertPlacement>(RandomPlacement(rng, kLayers, kExperts, 8)),
        options);
    std::vector<std::vector<int32_t>> counts;
    for (int i = 0; i < 400; ++i) counts.push_back(RandomCounts(rng, kSources, kExperts));
    DispatchPlan plan;
    planner.Plan(counts[0], kSources, 0, &plan);
    const int64_t before = num_allocations.load();
    uint64_t generation = 0;
    for (size_t i = 1; i < counts.size(); ++i) {  // counts that it has not seen
      if (i % 20 == 0) planner.BeginGeneration(++generation);
      planner.Plan(counts[i], kSources, static_cast<int32_t>(i % kLayers), &plan);
    }
    EXPECT_EQ(num_allocations.load() - before, 0) << BalanceModeName(mode);
  }
}

// comm/testdata/spill_instances.py made the file.
struct SpillInstance {
  std::vector<int32_t> counts;
  std::vector<std::vector<int32_t>> homes;
  PlannerOptions options;
  int32_t num_ranks = 0;
  int64_t best = 0;
};

std::vector<SpillInstance> ReadSpillInstances() {
  std::vector<SpillInstance> instances;
  std::ifstream file(SWITCHYARD_SOURCE_DIR "/comm/testdata/spill_instances.txt");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("#")) continue;
    SpillInstance& instance = instances.emplace_back();
    std::istringstream in(line);
    size_t num_experts = 0;
    int proven = 0;
    PlanCosts& costs = instance.options.costs;
    in >> num_experts >> instance.num_ranks >> instance.options.foreign_slots_per_rank >>
        costs.expert_read_ps >> costs.expert_move_ps >> instance.best >> proven;
    costs.token_ps = 1;
    costs.exact_plan_ps = 0;
    instance.counts.resize(num_experts);
    for (int32_t& count : instance.counts) in >> count;
    for (size_t e = 0; e < num_experts; ++e) {
      std::string ranks;
      in >> ranks;
      std::istringstream list(ranks);
      instance.homes.emplace_back();
      for (std::string rank; std::getline(list, rank, ',');) {
        instance.homes.back().push_back(std::stoi(rank));
      }
    }
    EXPECT_FALSE(in.fail()) << line;
  }
  return instances;
}

TEST(PlannerQuality, RegimeCIsCloseToTheBestKnownSolutions) {
  const std::vector<SpillInstance> instances = ReadSpillInstances();
  ASSERT_EQ(instances.size(), 200u);
  double ours = 0, llep = 0, plain = 0, most = 0;
  for (const SpillInstance& instance : instances) {
    const auto placement = ExpertPlacement::Create(instance.num_ranks, {instance.homes});
    ASSERT_TRUE(placement.ok());
    const auto over_best = [&](BalanceMode mode) {
      PlannerOptions options = instance.options;
      options.mode = mode;
      options.llep.min_chunk = static_cast<int32_t>(options.costs.expert_move_ps);
      const DispatchPlan plan = PlanOnce(instance.counts, 1, *placement, 0, options);
      return static_cast<double>(plan.tau_ps) / static_cast<double>(instance.best) - 1;
    };
    const double gap = over_best(BalanceMode::kAuto);
    EXPECT_GT(gap, -1e-3) << "better than the best known solution";
    ours += gap / 200;
    most = std::max(most, gap);
    llep += over_best(BalanceMode::kLlep) / 200;
    plain += over_best(BalanceMode::kNone) / 200;
  }
  std::cout << "mean gap to the best known solution: auto " << 100 * ours << " % (largest "
            << 100 * most << " %), llep " << 100 * llep << " %, none " << 100 * plain << " %\n";
  EXPECT_LE(ours, 0.10);
  EXPECT_LT(ours, llep);
}

TEST(BenchPlanner, AutoIsNeverModelledWorseThanPlain) {
  BenchPlannerOptions options;
  options.steps = 26;  // beyond the shift
  const auto report = BenchPlanner(options);
  ASSERT_TRUE(report.ok()) << report.status();
  std::set<std::string> workloads;
  double none = 0, plain_max_mean = 0;
  for (const BenchPlannerRow& row : report->rows) {
    workloads.insert(row.workload);
    EXPECT_GE(row.tau_us, row.bound_us * (1 - 1e-9)) << row.workload;
    if (row.planner == BalanceMode::kNone) {
      none = row.tau_us;
      plain_max_mean = row.max_mean;
    }
    if (row.planner != BalanceMode::kAuto) continue;
    EXPECT_LE(row.tau_us, none) << row.workload;
    EXPECT_GT(plain_max_mean, 1.0);
  }
  EXPECT_GE(workloads.size(), 12u);
  EXPECT_EQ(std::ranges::count_if(
                workloads, [](const std::string& name) { return name.starts_with("demo-layer"); }),
            4);
  EXPECT_EQ(workloads.size() * 4, report->rows.size());
  EXPECT_NE(report->Json().find("\"planner\": \"auto\""), std::string::npos);
  EXPECT_NE(report->Svg().find("<polyline"), std::string::npos);
}

TEST(Workload, TokensDrawDistinctExpertsAndSkewShows) {
  WorkloadSpec spec{.num_experts = 32, .num_ranks = 4, .num_sources = 3, .tokens = 500};
  spec.zipf = 1.2;
  spec.ragged = true;
  Workload workload(spec);
  const std::span<const int32_t> counts = workload.Next();
  int64_t total = 0, first_source = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    EXPECT_LE(counts[i], spec.tokens);  // a token has an expert once
    total += counts[i];
    if (i < 32) first_source += counts[i];
  }
  EXPECT_EQ(total, int64_t{spec.tokens} * spec.top_k);
  EXPECT_EQ(first_source, 0);
  EXPECT_GT(std::ranges::max(counts), total / 32 / 3 * 2);
}

}  // namespace
}  // namespace switchyard
