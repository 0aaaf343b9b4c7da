// Regime B: experts have many tokens, and those of one expert may be split over its hosts.
#include <algorithm>
#include <cstddef>

#include "comm/plan_regimes.h"

namespace switchyard {
namespace {

// The hosts of one expert in ascending cost, as pairs. Few hosts, so an insertion sort.
void SortByCost(const LiveHosts& hosts, int32_t first, int32_t last, std::span<const int64_t> cost,
                std::vector<int32_t>* pairs) {
  pairs->resize(static_cast<size_t>(last - first));
  size_t n = 0;
  for (int32_t i = first; i < last; ++i, ++n) {  // ascending by rank, so ties stay that way
    const int64_t own = cost[static_cast<size_t>(hosts.ranks[static_cast<size_t>(i)])];
    size_t to = n;
    for (; to > 0; --to) {
      const auto before = static_cast<size_t>((*pairs)[to - 1]);
      if (cost[static_cast<size_t>(hosts.ranks[before])] <= own) break;
      (*pairs)[to] = (*pairs)[to - 1];
    }
    (*pairs)[to] = i;
  }
}

}  // namespace

void PlanFill(const PlanProblem& problem, int64_t target, PlanScratch* scratch, Assignment* out) {
  out->ResetToForced(problem);
  const LiveHosts& hosts = *problem.hosts;
  const PlanCosts& costs = problem.costs;
  std::vector<int64_t>& cost = out->cost;
  std::vector<int32_t>& pairs = scratch->by_cost;
  const auto cost_of = [&](int32_t pair) -> int64_t& {
    return cost[static_cast<size_t>(hosts.ranks[static_cast<size_t>(pair)])];
  };
  const auto give = [&](int32_t pair, int64_t tokens) {
    int64_t& quota = out->quota[static_cast<size_t>(pair)];
    cost_of(pair) += costs.Compute(quota + tokens) - costs.Compute(quota);
    quota += tokens;
  };
  for (int32_t expert : std::span(hosts.order).subspan(static_cast<size_t>(hosts.num_single))) {
    const auto e = static_cast<size_t>(expert);
    int64_t left = problem.tokens[e];
    if (left == 0) continue;
    const int32_t first = hosts.first[e], last = hosts.first[e + 1];
    SortByCost(hosts, first, last, cost, &pairs);
    for (int32_t pair : pairs) {
      const int64_t room = target - cost_of(pair);
      if (room < std::max(costs.expert_read_ps, costs.token_ps)) break;  // the next have less
      if (room >= left * costs.token_ps) {
        give(pair, left);
        left = 0;
        break;
      }
      const int64_t fit = room / costs.token_ps;
      give(pair, fit);
      left -= fit;
    }
    if (left == 0) continue;
    // No host has room. Raise the cheapest ones together until everything is poured out.
    SortByCost(hosts, first, last, cost, &pairs);
    int64_t num_level = 1;
    int64_t sum = cost_of(pairs[0]);
    const int64_t amount = left * costs.token_ps;
    while (num_level < last - first) {
      const int64_t next = cost_of(pairs[static_cast<size_t>(num_level)]);
      if (next > (sum + amount) / num_level) break;  // no product: it could overflow
      sum += next;
      ++num_level;
    }
    const int64_t level = (sum + amount) / num_level;
    for (size_t i = 0; i < static_cast<size_t>(num_level) && left > 0; ++i) {
      // Rounded to the nearest token. The last one takes what is left.
      const int64_t to_level =
          std::max<int64_t>(0, (level - cost_of(pairs[i]) + costs.token_ps / 2) / costs.token_ps);
      const int64_t tokens =
          i + 1 == static_cast<size_t>(num_level) ? left : std::min(left, to_level);
      if (tokens > 0) give(pairs[i], tokens);
      left -= tokens;
    }
  }
  out->tau = *std::ranges::max_element(cost);
}

int64_t BalanceTokens(const PlanProblem& problem, PlanScratch* scratch, Assignment* inout) {
  // Target tokens per rank: the mean. Push tokens along paths from ranks above it to ranks below.
  // When no path is left the ranks reached from one above hold all hosts of their tokens, so they
  // prove a higher target: their mean. Each round proves more, so the last target is the optimum.
  const LiveHosts& hosts = *problem.hosts;
  const auto num_ranks = static_cast<size_t>(problem.num_ranks);
  std::vector<int64_t>& quota = inout->quota;
  std::vector<int64_t>& load = scratch->load;
  std::vector<int32_t>& parent = scratch->parent;
  std::vector<int32_t>& queue = scratch->queue;
  load.assign(num_ranks, 0);
  parent.resize(num_ranks);
  queue.resize(num_ranks);
  for (size_t i = 0; i < quota.size(); ++i) load[static_cast<size_t>(hosts.ranks[i])] += quota[i];

  int64_t target = CeilDiv(problem.total, problem.num_ranks);
  constexpr int32_t kStart = -2;  // parent of a rank above the target
  for (;;) {
    std::ranges::fill(parent, -1);
    size_t begin = 0, end = 0;
    for (size_t r = 0; r < num_ranks; ++r) {
      if (load[r] <= target) continue;
      parent[r] = kStart;
      queue[end++] = static_cast<int32_t>(r);
    }
    if (end == 0) break;
    int32_t below = -1;
    while (begin < end && below < 0) {
      const auto x = static_cast<size_t>(queue[begin++]);
      for (int32_t k = hosts.rank_first[x]; k < hosts.rank_first[x + 1] && below < 0; ++k) {
        const int32_t pair = hosts.of_rank[static_cast<size_t>(k)];
        if (quota[static_cast<size_t>(pair)] == 0) continue;
        const auto e = static_cast<size_t>(hosts.expert_of[static_cast<size_t>(pair)]);
        for (int32_t i = hosts.first[e]; i < hosts.first[e + 1]; ++i) {
          const auto y = static_cast<size_t>(hosts.ranks[static_cast<size_t>(i)]);
          if (parent[y] != -1) continue;
          parent[y] = pair;  // tokens of this pair go on to y
          if (load[y] < target) {
            below = static_cast<int32_t>(y);
            break;
          }
          queue[end++] = static_cast<int32_t>(y);
        }
      }
    }
    if (below < 0) {
      int64_t sum = 0;
      for (size_t i = 0; i < end; ++i) sum += load[static_cast<size_t>(queue[i])];
      target = CeilDiv(sum, static_cast<int64_t>(end));
      continue;
    }
    int64_t amount = target - load[static_cast<size_t>(below)];
    int32_t y = below;
    while (parent[static_cast<size_t>(y)] != kStart) {
      const auto pair = static_cast<size_t>(parent[static_cast<size_t>(y)]);
      amount = std::min(amount, quota[pair]);
      y = hosts.ranks[pair];
    }
    amount = std::min(amount, load[static_cast<size_t>(y)] - target);
    load[static_cast<size_t>(y)] -= amount;
    load[static_cast<size_t>(below)] += amount;
    y = below;
    while (parent[static_cast<size_t>(y)] != kStart) {
      const auto pair = static_cast<size_t>(parent[static_cast<size_t>(y)]);
      quota[pair] -= amount;
      quota[static_cast<size_t>(hosts.Find(hosts.expert_of[pair], y))] += amount;
      y = hosts.ranks[pair];
    }
  }
  inout->Evaluate(problem);
  return *std::ranges::max_element(load);
}

}  // namespace switchyard
