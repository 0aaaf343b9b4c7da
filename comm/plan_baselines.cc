#include <algorithm>
#include <cstddef>
#include <numeric>

#include "comm/plan_regimes.h"

namespace switchyard {

void Assignment::Reset(const PlanProblem& problem) {
  quota.assign(problem.hosts->ranks.size(), 0);
  spilled.clear();
  cost.assign(static_cast<size_t>(problem.num_ranks), 0);
  tau = 0;
}

void Assignment::ResetToForced(const PlanProblem& problem) {
  quota = problem.forced_quota;
  spilled.clear();
  cost = problem.forced_cost;
  tau = 0;
}

void Assignment::Evaluate(const PlanProblem& problem) {
  std::ranges::fill(cost, 0);
  const std::vector<int32_t>& ranks = problem.hosts->ranks;
  for (size_t i = 0; i < quota.size(); ++i) {
    cost[static_cast<size_t>(ranks[i])] += problem.costs.Compute(quota[i]);
  }
  for (const SpillPiece& piece : spilled) {
    cost[static_cast<size_t>(piece.rank)] +=
        problem.costs.Compute(piece.tokens) + problem.costs.expert_move_ps;
    cost[static_cast<size_t>(piece.from_rank)] += problem.costs.expert_move_ps;
  }
  tau = *std::ranges::max_element(cost);
}

void FindForced(PlanProblem* problem) {
  const LiveHosts& hosts = *problem->hosts;
  problem->forced_quota.assign(hosts.ranks.size(), 0);
  problem->forced_cost.assign(static_cast<size_t>(problem->num_ranks), 0);
  int64_t* const quota = problem->forced_quota.data();
  int64_t* const cost = problem->forced_cost.data();
  const int32_t* const home_pair = hosts.home_pair.data();
  const int32_t* const ranks = hosts.ranks.data();
  const int64_t* const tokens = problem->tokens.data();
  const int64_t* const weights = problem->weights.data();
  for (const int32_t e : std::span(hosts.order).first(static_cast<size_t>(hosts.num_single))) {
    const int32_t pair = home_pair[e];
    quota[pair] = tokens[e];
    cost[ranks[pair]] += weights[e];
  }
}

int64_t ReplicaBound(const PlanProblem& problem) {
  const LiveHosts& hosts = *problem.hosts;
  int64_t bound = FreeBound(problem);
  for (int64_t cost : problem.forced_cost) bound = std::max(bound, cost);
  if (problem.max_weight <= bound) return bound;  // so is every expert's share
  for (auto k = static_cast<size_t>(hosts.num_single); k < hosts.order.size(); ++k) {
    const auto e = static_cast<size_t>(hosts.order[k]);
    if (problem.weights[e] <= bound) continue;
    bound = std::max(bound, CeilDiv(problem.weights[e], hosts.first[e + 1] - hosts.first[e]));
  }
  return bound;
}

int64_t FreeBound(const PlanProblem& problem) {
  if (problem.total == 0) return 0;
  return std::max({CeilDiv(problem.total_weight, problem.num_ranks),
                   CeilDiv(problem.activated, problem.num_ranks) * problem.costs.expert_read_ps,
                   std::max(problem.costs.expert_read_ps, problem.costs.token_ps)});
}

PlainLoad LoadOfPlain(PlanProblem* problem, PlanScratch* scratch) {
  // Neighbours often share a home: two sums per rank keep additions from waiting for each other.
  const auto num_ranks = static_cast<size_t>(problem->num_ranks);
  problem->plain_cost.resize(num_ranks);
  scratch->sums.assign(2 * num_ranks, {});
  RankLoad* const sums = scratch->sums.data();
  const int32_t* const home_pair = problem->hosts->home_pair.data();
  const int32_t* const ranks = problem->hosts->ranks.data();
  const int64_t* const tokens = problem->tokens.data();
  const int64_t* const weights = problem->weights.data();
  const size_t num_experts = problem->tokens.size();
  for (size_t e = 0; e < num_experts; ++e) {
    RankLoad& sum = sums[2 * static_cast<size_t>(ranks[home_pair[e]]) + e % 2];
    sum.tokens += tokens[e];
    sum.cost += weights[e];
  }
  PlainLoad load;
  for (size_t r = 0; r < num_ranks; ++r) {
    load.max_tokens = std::max(load.max_tokens, sums[2 * r].tokens + sums[2 * r + 1].tokens);
    problem->plain_cost[r] = sums[2 * r].cost + sums[2 * r + 1].cost;
    load.tau = std::max(load.tau, problem->plain_cost[r]);
  }
  return load;
}

void PlanPlain(const PlanProblem& problem, Assignment* out) {
  const std::vector<int32_t>& home_pair = problem.hosts->home_pair;
  out->spilled.clear();
  out->cost = problem.plain_cost;
  out->tau = *std::ranges::max_element(out->cost);
  if (home_pair.size() == problem.hosts->ranks.size()) {  // a pair is an expert
    out->quota = problem.tokens;
    return;
  }
  out->quota.assign(problem.hosts->ranks.size(), 0);
  int64_t* const quota = out->quota.data();
  for (size_t e = 0; e < home_pair.size(); ++e) quota[home_pair[e]] = problem.tokens[e];
}

void PlanEven(const PlanProblem& problem, Assignment* out) {
  out->Reset(problem);
  const LiveHosts& hosts = *problem.hosts;
  for (size_t e = 0; e < problem.tokens.size(); ++e) {
    const int64_t n = hosts.first[e + 1] - hosts.first[e];
    const int64_t each = problem.tokens[e] / n;
    const int64_t extra = problem.tokens[e] % n;
    for (int64_t i = 0; i < n; ++i) {
      const auto pair = static_cast<size_t>(hosts.first[e] + i);
      out->quota[pair] = each + (i < extra ? 1 : 0);
    }
  }
  out->Evaluate(problem);
}

void PlanLlep(const PlanProblem& problem, const LlepOptions& options, int32_t slots,
              PlanScratch* scratch, Assignment* out) {
  out->Reset(problem);
  const LiveHosts& homes = *problem.hosts;
  const auto num_ranks = static_cast<size_t>(problem.num_ranks);
  const auto native_pair = [&](size_t e) { return static_cast<size_t>(homes.first[e]); };
  const auto native = [&](size_t e) { return static_cast<size_t>(homes.ranks[native_pair(e)]); };
  std::vector<int64_t>& load = scratch->load;  // assigned + native experts still to come
  load.assign(num_ranks, 0);
  for (size_t e = 0; e < problem.tokens.size(); ++e) load[native(e)] += problem.tokens[e];
  const int64_t max_load = *std::ranges::max_element(load);
  const bool balanced = max_load * 100 * problem.num_ranks < problem.total * options.lambda_percent;
  if (balanced || problem.num_ranks == 1 || slots == 0) {
    for (size_t e = 0; e < problem.tokens.size(); ++e)
      out->quota[native_pair(e)] = problem.tokens[e];
    out->Evaluate(problem);
    return;
  }
  const int64_t mean = problem.total / problem.num_ranks;  // floor, as published
  const int64_t capacity =
      std::max<int64_t>(1, mean > 0 ? mean * options.alpha_percent / 100 : problem.total);

  scratch->order.resize(problem.tokens.size());
  std::iota(scratch->order.begin(), scratch->order.end(), 0);
  std::ranges::sort(scratch->order, [&](int32_t a, int32_t b) {
    const int64_t of_a = problem.tokens[static_cast<size_t>(a)];
    const int64_t of_b = problem.tokens[static_cast<size_t>(b)];
    return of_a != of_b ? of_a > of_b : a < b;
  });
  std::vector<int32_t>& free_slots = scratch->free_slots;
  free_slots.assign(num_ranks, slots);
  for (int32_t expert : scratch->order) {
    const auto e = static_cast<size_t>(expert);
    const auto home = native(e);
    int64_t left = problem.tokens[e];
    if (left == 0) break;
    load[home] -= left;
    const int64_t keep = std::clamp<int64_t>(capacity - load[home], 0, left);
    out->quota[native_pair(e)] = keep;
    load[home] += keep;
    left -= keep;
    const size_t first_piece = out->spilled.size();
    // The least loaded rank with room; `forced`: with or without room.
    const auto least_loaded = [&](bool forced) {
      size_t best = num_ranks;
      for (size_t p = 0; p < num_ranks; ++p) {
        if (p == home) continue;
        const bool has_piece = std::any_of(
            out->spilled.begin() + static_cast<ptrdiff_t>(first_piece), out->spilled.end(),
            [&](const SpillPiece& piece) { return static_cast<size_t>(piece.rank) == p; });
        if (!has_piece && free_slots[p] == 0 && homes.Find(expert, static_cast<int32_t>(p)) < 0) {
          continue;
        }
        const int64_t room = capacity - load[p];
        if (!forced && (room <= 0 || (room < options.min_chunk && room < left))) continue;
        if (best == num_ranks || load[p] < load[best]) best = p;
      }
      return best;
    };
    const auto give = [&](size_t p, int64_t tokens) {
      load[p] += tokens;
      left -= tokens;
      const int32_t pair = homes.Find(expert, static_cast<int32_t>(p));
      if (pair >= 0) {  // another home: nothing to move
        out->quota[static_cast<size_t>(pair)] += tokens;
        return;
      }
      for (size_t i = first_piece; i < out->spilled.size(); ++i) {
        if (static_cast<size_t>(out->spilled[i].rank) != p) continue;
        out->spilled[i].tokens += tokens;
        return;
      }
      --free_slots[p];
      out->spilled.push_back({expert, static_cast<int32_t>(p), static_cast<int32_t>(home), tokens});
    };
    while (left > 0) {
      size_t p = least_loaded(/*forced=*/false);
      if (p < num_ranks) {
        give(p, std::min(left, capacity - load[p]));
        continue;
      }
      p = least_loaded(/*forced=*/true);
      if (p == num_ranks) break;
      give(p, left);
    }
    out->quota[native_pair(e)] += left;
    load[home] += left;
  }
  out->Evaluate(problem);
}

}  // namespace switchyard
