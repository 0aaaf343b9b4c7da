#include "worker/plan_cost_probe.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "spdlog/spdlog.h"

namespace switchyard {
namespace {

constexpr int64_t kProbeBytes = int64_t{32} << 20;  // of experts: more than the caches near a core
constexpr int kRepetitions = 3;
constexpr int64_t kRowsPerExpert = 128;

// The shortest of some runs, in ps.
int64_t Shortest(const std::function<void()>& run) {
  int64_t best = INT64_MAX;
  for (int i = 0; i < kRepetitions; ++i) {
    const auto start = std::chrono::steady_clock::now();
    run();
    const auto time = std::chrono::steady_clock::now() - start;
    best = std::min<int64_t>(
        best, std::chrono::duration_cast<std::chrono::nanoseconds>(time).count() * 1000);
  }
  return best;
}

void Clear(const Buffer& buffer) { std::memset(buffer.data(), 0, buffer.bytes()); }

// From each expert to the next: none of them in a cache near a core. The shortest of some rounds,
// in ps; 0 when the link fails.
int64_t MeasureMove(std::span<const MlpWeights> experts, MoveLink* link) {
  int64_t best = INT64_MAX;
  for (int i = 0; i < kRepetitions; ++i) {
    std::chrono::nanoseconds sum{0};
    for (size_t e = 1; e < experts.size(); ++e) {
      const auto time = link->Move(experts[e - 1], experts[e]);
      if (!time.ok()) {
        spdlog::warn("moving an expert between ranks cannot be measured, so none will move: {}",
                     std::string(time.status().message()));
        return 0;
      }
      sum += *time;
    }
    best = std::min<int64_t>(best, sum.count() * 1000 / static_cast<int64_t>(experts.size() - 1));
  }
  return std::max<int64_t>(1, best);
}

int64_t MeasureCopy(std::span<const MlpWeights> experts) {
  const auto copy = [](const Buffer& from, const Buffer& to) {
    std::memcpy(to.data(), from.data(), from.bytes());
  };
  const int64_t all = Shortest([&] {
    for (size_t e = 1; e < experts.size(); ++e) {
      copy(experts[e - 1].gate_up.storage, experts[e].gate_up.storage);
      copy(experts[e - 1].down.storage, experts[e].down.storage);
    }
  });
  return std::max<int64_t>(1, all / static_cast<int64_t>(experts.size() - 1));
}

}  // namespace

PlanCosts MeasurePlanCosts(const PlanCostProbe& probe, ComputeBackend* backend, MoveLink* link) {
  std::vector<MlpWeights> experts;
  int64_t bytes = 0;
  while (experts.size() < 2 || (bytes < kProbeBytes && experts.size() < 64)) {
    const MlpWeights& expert =
        experts.emplace_back(backend->MakeMlp(probe.width, probe.hidden, probe.format));
    Clear(expert.gate_up.storage);
    Clear(expert.down.storage);
    bytes += static_cast<int64_t>(expert.gate_up.storage.bytes() + expert.down.storage.bytes());
  }
  const auto num = static_cast<int64_t>(experts.size());
  const int64_t most_rows = std::max(num, 2 * kRowsPerExpert);
  Buffer in(static_cast<size_t>(most_rows * probe.hidden) * DTypeSize(probe.dtype));
  Buffer out(in.bytes());
  Clear(in);
  const auto run = [&](std::span<const MlpGroup> groups) {
    const int64_t rows = groups.back().end;
    backend->GroupedMlp(in.View(probe.dtype, {rows, probe.hidden}), groups,
                        out.View(probe.dtype, {rows, probe.hidden}));
    backend->Synchronize();
  };
  std::vector<MlpGroup> one_row_each;
  for (int64_t e = 0; e < num; ++e) {
    one_row_each.push_back({&experts[static_cast<size_t>(e)], e, e + 1});
  }
  const std::vector<MlpGroup> many_rows = {{&experts[0], 0, kRowsPerExpert},
                                           {&experts[1], kRowsPerExpert, 2 * kRowsPerExpert}};
  const int64_t read = Shortest([&] { run(one_row_each); }) / num;
  const int64_t token = Shortest([&] { run(many_rows); }) / (2 * kRowsPerExpert);
  const int64_t move = link != nullptr ? MeasureMove(experts, link) : MeasureCopy(experts);
  PlanCosts costs;
  costs.token_ps = std::clamp<int64_t>(token, 1, kMaxTokenPs);
  costs.expert_read_ps = std::clamp<int64_t>(read, 0, kMaxPlanCostPs);
  costs.expert_move_ps = std::min(move, kMaxPlanCostPs);
  return costs;
}

}  // namespace switchyard
