#include "comm/dispatch_plan.h"

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <utility>

#include "kernels/check.h"

namespace switchyard {
namespace {

// Copies of one expert that one of its hosts computes.
struct Quota {
  int32_t rank = 0;
  int64_t copies = 0;
};

// How the experts' copies lie on the ranks. quotas of expert e: [first[e], first[e + 1]), ascending
// by rank.
struct Assignment {
  std::vector<size_t> first;
  std::vector<Quota> quotas;
  std::vector<int64_t> load;  // [num_ranks]
  int64_t Max() const { return *std::ranges::max_element(load); }
};

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

uint64_t Mix(uint64_t hash, uint64_t value) {  // the finaliser of splitmix64 over a running state
  uint64_t z = hash + 0x9e3779b97f4a7c15u + value;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Valid for every plan over these replicas: copies that can only lie on a set of ranks are shared
// by at most that set. Sets tried: all ranks that host an expert with copies, each rank alone, each
// expert's hosts.
int64_t LowerBound(std::span<const int64_t> load, const ExpertPlacement& placement, int32_t layer) {
  const auto num_ranks = static_cast<size_t>(placement.num_ranks());
  std::vector<int64_t> forced(num_ranks, 0);
  std::vector<char> reached(num_ranks, 0);
  int64_t total = 0;
  int64_t bound = 0;
  for (size_t e = 0; e < load.size(); ++e) {
    if (load[e] == 0) continue;
    const std::span<const int32_t> hosts = placement.Hosts(layer, static_cast<int32_t>(e));
    total += load[e];
    bound = std::max(bound, CeilDiv(load[e], static_cast<int64_t>(hosts.size())));
    if (hosts.size() == 1) forced[static_cast<size_t>(hosts[0])] += load[e];
    for (int32_t rank : hosts) reached[static_cast<size_t>(rank)] = 1;
  }
  const int64_t num_reached = std::accumulate(reached.begin(), reached.end(), int64_t{0});
  if (num_reached > 0) bound = std::max(bound, CeilDiv(total, num_reached));
  return std::max(bound, *std::ranges::max_element(forced));
}

// Gives expert after expert, in `order`, to its hosts. Each time the least-loaded host (lowest rank
// on ties) is filled up to `target`; what is left when all hosts are full is poured over them level
// by level. A target of 0 pours from the start.
Assignment Fill(std::span<const int32_t> order, std::span<const int64_t> load,
                const ExpertPlacement& placement, int32_t layer, int64_t target) {
  Assignment result;
  result.load.assign(static_cast<size_t>(placement.num_ranks()), 0);
  result.first.assign(load.size() + 1, 0);
  for (size_t e = 0; e < load.size(); ++e) {
    result.first[e + 1] = result.first[e] + placement.Hosts(layer, static_cast<int32_t>(e)).size();
  }
  result.quotas.resize(result.first.back());
  std::vector<Quota*> by_load;
  for (int32_t e : order) {
    const std::span<const int32_t> hosts = placement.Hosts(layer, e);
    Quota* quotas = &result.quotas[result.first[static_cast<size_t>(e)]];
    by_load.clear();
    for (size_t i = 0; i < hosts.size(); ++i) {
      quotas[i].rank = hosts[i];
      by_load.push_back(&quotas[i]);
    }
    std::ranges::sort(by_load, {}, [&](const Quota* q) {
      return std::pair(result.load[static_cast<size_t>(q->rank)], q->rank);
    });
    int64_t left = load[static_cast<size_t>(e)];
    const auto give = [&](Quota* quota, int64_t copies) {
      quota->copies += copies;
      result.load[static_cast<size_t>(quota->rank)] += copies;
      left -= copies;
    };
    for (Quota* quota : by_load) {
      const int64_t room = target - result.load[static_cast<size_t>(quota->rank)];
      if (room > 0) give(quota, std::min(room, left));
    }
    if (left == 0) continue;
    // All hosts are at `target` or above. Raise the lowest ones together until everything is poured
    // out.
    std::ranges::sort(by_load, {}, [&](const Quota* q) {
      return std::pair(result.load[static_cast<size_t>(q->rank)], q->rank);
    });
    size_t num_level = 1;
    int64_t poured =
        0;  // copies needed to bring the first num_level hosts to the level of the last of them
    while (num_level < by_load.size()) {
      const int64_t step = result.load[static_cast<size_t>(by_load[num_level]->rank)] -
                           result.load[static_cast<size_t>(by_load[num_level - 1]->rank)];
      const int64_t next = poured + step * static_cast<int64_t>(num_level);
      if (next > left) break;
      poured = next;
      ++num_level;
    }
    const int64_t top = result.load[static_cast<size_t>(by_load[num_level - 1]->rank)];
    const int64_t each = (left - poured) / static_cast<int64_t>(num_level);
    int64_t extra = (left - poured) % static_cast<int64_t>(num_level);
    for (size_t i = 0; i < num_level; ++i) {
      const int64_t level = top + each + (extra > 0 ? 1 : 0);
      if (extra > 0) --extra;
      give(by_load[i], level - result.load[static_cast<size_t>(by_load[i]->rank)]);
    }
    SY_CHECK_EQ(left, 0);
  }
  return result;
}

}  // namespace

DispatchPlan PlanDispatch(std::span<const int32_t> counts, int32_t num_sources,
                          const ExpertPlacement& placement, int32_t layer) {
  const auto num_experts = static_cast<size_t>(placement.num_experts());
  SY_CHECK_GT(num_sources, 0);
  SY_CHECK_EQ(counts.size(), static_cast<size_t>(num_sources) * num_experts);
  std::vector<int64_t> load(num_experts, 0);
  for (size_t i = 0; i < counts.size(); ++i) {
    SY_CHECK_GE(counts[i], 0);
    load[i % num_experts] += counts[i];
  }

  // Experts with the fewest choices first, then the lower id.
  std::vector<int32_t> order;
  for (size_t e = 0; e < num_experts; ++e) {
    if (load[e] > 0) order.push_back(static_cast<int32_t>(e));
  }
  std::ranges::sort(order, {},
                    [&](int32_t e) { return std::pair(placement.Hosts(layer, e).size(), e); });

  DispatchPlan plan;
  plan.num_sources = num_sources;
  plan.num_experts = placement.num_experts();
  plan.num_ranks = placement.num_ranks();
  plan.lower_bound = LowerBound(load, placement, layer);
  // Two cheap candidates: filling to the bound splits few experts; pouring keeps loads level. Each
  // loses sometimes.
  Assignment best = Fill(order, load, placement, layer, plan.lower_bound);
  if (best.Max() > plan.lower_bound) {
    Assignment poured = Fill(order, load, placement, layer, 0);
    if (poured.Max() < best.Max()) best = std::move(poured);
  }
  plan.max_rank_copies = best.Max();

  // Sources take from an expert's quotas in turn, ascending by source and rank.
  std::vector<size_t> at(best.first.begin(),
                         best.first.end() - 1);  // first quota with copies left, per expert
  plan.offsets.reserve(counts.size() + 1);
  plan.offsets.push_back(0);
  plan.shares.reserve(order.size() * static_cast<size_t>(num_sources) + best.quotas.size());
  for (size_t i = 0; i < counts.size(); ++i) {
    const size_t e = i % num_experts;
    int64_t left = counts[i];
    while (left > 0) {
      SY_CHECK_LT(at[e], best.first[e + 1]);
      Quota& quota = best.quotas[at[e]];
      const int64_t copies = std::min(left, quota.copies);
      if (copies > 0) plan.shares.push_back({quota.rank, static_cast<int32_t>(copies)});
      left -= copies;
      quota.copies -= copies;
      if (quota.copies == 0) ++at[e];
    }
    plan.offsets.push_back(static_cast<int32_t>(plan.shares.size()));
  }
  for (const Quota& quota : best.quotas) SY_CHECK_EQ(quota.copies, 0);

  uint64_t hash = Mix(static_cast<uint64_t>(layer), static_cast<uint64_t>(num_sources));
  hash = Mix(Mix(hash, num_experts), static_cast<uint64_t>(placement.num_ranks()));
  for (size_t i = 0; i < counts.size(); ++i) {
    for (int32_t j = plan.offsets[i]; j < plan.offsets[i + 1]; ++j) {
      const DispatchShare& share = plan.shares[static_cast<size_t>(j)];
      hash = Mix(Mix(hash, i),
                 (static_cast<uint64_t>(share.rank) << 32) | static_cast<uint64_t>(share.copies));
    }
  }
  plan.hash = hash;
  return plan;
}

}  // namespace switchyard
