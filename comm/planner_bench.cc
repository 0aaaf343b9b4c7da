// How long one plan takes, on one core: the regimes of BALANCE.md at N = 256 experts, P = 16 ranks,
// top-8, for 1 to 8 sources. Counts are Poisson draws, so no two plans are of the same counts.
// Every plan is timed in several passes of equal planners and its shortest time counts: others
// share the cores. Usage: planner_bench [--regime NAME]
// [--plans N] [--passes N] [--json]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <numeric>
#include <random>
#include <string_view>
#include <vector>

#include "comm/dispatch_planner.h"
#include "kernels/check.h"

namespace switchyard {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int32_t kExperts = 256, kRanks = 16, kTopK = 8;
constexpr int32_t kSources[] = {1, 2, 4, 8};

struct Options {
  int plans = 400;
  int passes = 7;
  std::string_view regime;  // the only one; empty: all
  bool json = false;
};

struct Regime {
  const char* name;
  double zipf = 0;            // exponent of the experts' popularity
  int32_t tokens = 0;         // of a step, over all sources
  int32_t replicas = 0;       // home slots per rank beyond N / P, for the most popular experts
  int32_t foreign_slots = 0;  // per rank
  bool fresh = false;         // every plan begins with empty foreign slots
  int64_t exact_plan_ps = 0;
};

constexpr int64_t kNeverExact = kMaxPlanCostPs;
constexpr Regime kRegimes[] = {
    {.name = "check", .tokens = 8192, .foreign_slots = 4, .exact_plan_ps = kNeverExact},
    {.name = "A", .zipf = 0.6, .tokens = 64, .replicas = 4, .exact_plan_ps = kNeverExact},
    {.name = "B greedy", .zipf = 0.6, .tokens = 16384, .replicas = 4, .exact_plan_ps = kNeverExact},
    {.name = "B exact", .zipf = 0.6, .tokens = 16384, .replicas = 4, .exact_plan_ps = 0},
    {.name = "C empty slots",
     .zipf = 1.0,
     .tokens = 65536,
     .foreign_slots = 4,
     .fresh = true,
     .exact_plan_ps = kNeverExact},
    {.name = "C cached",
     .zipf = 1.0,
     .tokens = 65536,
     .foreign_slots = 4,
     .exact_plan_ps = kNeverExact},
};

// Popularity of each expert: a copy's chance to be for it, at most 1 / top-k, for a token has an
// expert once.
std::vector<double> Popularity(const Regime& regime, std::mt19937_64& rng) {
  std::vector<double> popularity(kExperts);
  for (int32_t i = 0; i < kExperts; ++i) {
    popularity[static_cast<size_t>(i)] = std::pow(i + 1, -regime.zipf);
  }
  const double sum = std::reduce(popularity.begin(), popularity.end());
  for (double& p : popularity) p = std::min(p / sum, 1.0 / kTopK);
  std::ranges::shuffle(popularity, rng);
  return popularity;
}

// Even homes, and second ones of the most popular experts, each on the rank with the least load.
std::shared_ptr<const ExpertPlacement> Homes(const Regime& regime,
                                             const std::vector<double>& popularity) {
  std::vector<std::vector<int32_t>> hosts;
  std::vector<double> load(kRanks);
  std::vector<int32_t> free(kRanks, regime.replicas);
  for (int32_t e = 0; e < kExperts; ++e) {
    hosts.push_back({e / (kExperts / kRanks)});
    load[static_cast<size_t>(hosts.back()[0])] += popularity[static_cast<size_t>(e)];
  }
  std::vector<size_t> order(kExperts);
  std::iota(order.begin(), order.end(), size_t{0});
  std::ranges::stable_sort(order, std::ranges::greater{}, [&](size_t e) { return popularity[e]; });
  for (int32_t i = 0; i < regime.replicas * kRanks; ++i) {
    const size_t e = order[static_cast<size_t>(i)];
    const auto home = static_cast<size_t>(hosts[e][0]);
    size_t best = kRanks;
    for (size_t r = 0; r < kRanks; ++r) {
      if (r != home && free[r] > 0 && (best == kRanks || load[r] < load[best])) best = r;
    }
    if (best == kRanks) continue;
    --free[best];
    load[home] -= popularity[e] / 2;
    load[best] += popularity[e] / 2;
    hosts[e].push_back(static_cast<int32_t>(best));
    std::ranges::sort(hosts[e]);
  }
  auto placement = ExpertPlacement::Create(kRanks, {std::move(hosts)});
  SY_CHECK(placement.ok());
  return std::make_shared<const ExpertPlacement>(*std::move(placement));
}

struct Row {
  const Regime* regime = nullptr;
  int32_t sources = 0;
  double p50_us = 0, p99_us = 0;
  double gap = 0;         // mean of tau over its bound, minus 1
  double at_bound = 0;    // share of plans whose tau is their bound
  double moves = 0;       // mean experts moved
  const char* made = "";  // what the last plan was made by
};

Row Measure(const Regime& regime, int32_t sources, const Options& options) {
  std::mt19937_64 rng(7);
  const std::vector<double> popularity = Popularity(regime, rng);
  std::vector<std::vector<int32_t>> steps(static_cast<size_t>(options.plans));
  for (std::vector<int32_t>& counts : steps) {
    for (int32_t s = 0; s < sources; ++s) {
      for (double p : popularity) {
        std::poisson_distribution<int32_t> draw(p * regime.tokens * kTopK / sources);
        counts.push_back(draw(rng));
      }
    }
  }
  PlannerOptions planner_options;
  constexpr int64_t kTokenPs = 110'000;
  planner_options.costs = {.token_ps = kTokenPs,
                           .expert_read_ps = 125 * kTokenPs,
                           .expert_move_ps = 1500 * kTokenPs,
                           .exact_plan_ps = regime.exact_plan_ps};
  planner_options.foreign_slots_per_rank = regime.foreign_slots;
  const std::shared_ptr<const ExpertPlacement> homes = Homes(regime, popularity);
  Row row{.regime = &regime, .sources = sources};
  std::vector<double> best_us(steps.size(), 1e9);
  std::vector<int32_t> counts(steps.front().size());
  DispatchPlan plan;
  for (int pass = 0; pass < options.passes; ++pass) {
    DispatchPlanner planner(homes, planner_options);
    row.gap = row.at_bound = row.moves = 0;
    uint64_t generation = 1;
    for (size_t i = 0; i < steps.size(); ++i) {
      planner.BeginGeneration(regime.fresh ? ++generation : generation);
      std::ranges::copy(steps[i], counts.begin());  // as a rank's thread parses its messages
      const Clock::time_point start = Clock::now();
      planner.Plan(counts, sources, 0, &plan);
      const std::chrono::duration<double, std::micro> time = Clock::now() - start;
      best_us[i] = std::min(best_us[i], time.count());
      const auto num = static_cast<double>(steps.size());
      row.gap += plan.Gap() / num;
      row.at_bound += (plan.tau_ps == plan.lower_bound_ps ? 1 : 0) / num;
      row.moves += static_cast<double>(plan.moves.size()) / num;
    }
  }
  row.made = PlanRegimeName(plan.regime);
  std::ranges::sort(best_us);
  row.p50_us = best_us[best_us.size() / 2];
  row.p99_us = best_us[best_us.size() * 99 / 100];
  return row;
}

void Print(const std::vector<Row>& rows, bool json) {
  if (!json) {
    std::printf(
        "one plan, N = %d experts, P = %d ranks, top-%d\n%-14s %7s %8s %8s %7s %9s %6s  %s\n",
        kExperts, kRanks, kTopK, "regime", "sources", "p50 us", "p99 us", "gap %", "at bound",
        "moves", "made by");
  }
  const char* separator = "{\"unit\": \"us\", \"rows\": [\n";
  for (const Row& row : rows) {
    if (json) {
      std::printf(
          "%s  {\"regime\": \"%s\", \"sources\": %d, \"plan_p50\": %.3f, \"plan_p99\": %.3f, "
          "\"gap\": %.5f, \"at_bound\": %.3f, \"moves\": %.2f, \"made_by\": \"%s\"}",
          separator, row.regime->name, row.sources, row.p50_us, row.p99_us, row.gap, row.at_bound,
          row.moves, row.made);
      separator = ",\n";
    } else {
      std::printf("%-14s %7d %8.2f %8.2f %7.2f %8.0f%% %6.1f  %s\n", row.regime->name, row.sources,
                  row.p50_us, row.p99_us, row.gap * 100, row.at_bound * 100, row.moves, row.made);
    }
  }
  if (json) std::printf("\n]}\n");
}

int Main(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view flag = argv[i];
    if (flag == "--json") {
      options.json = true;
    } else if (flag == "--regime" && i + 1 < argc) {
      options.regime = argv[++i];
    } else if (flag == "--plans" && i + 1 < argc) {
      options.plans = std::clamp(std::atoi(argv[++i]), 10, 100'000);
    } else if (flag == "--passes" && i + 1 < argc) {
      options.passes = std::clamp(std::atoi(argv[++i]), 1, 1000);
    } else {
      std::fprintf(stderr, "usage: %s [--regime NAME] [--plans N] [--passes N] [--json]\n",
                   argv[0]);
      return 2;
    }
  }
  std::vector<Row> rows;
  for (const Regime& regime : kRegimes) {
    if (!options.regime.empty() && regime.name != options.regime) continue;
    for (int32_t sources : kSources) {
      std::fprintf(stderr, "\r%-16s %d sources", regime.name, sources);
      rows.push_back(Measure(regime, sources, options));
    }
  }
  std::fprintf(stderr, "\r%*s\r", 32, "");
  Print(rows, options.json);
  return 0;
}

}  // namespace
}  // namespace switchyard

int main(int argc, char** argv) { return switchyard::Main(argc, argv); }
