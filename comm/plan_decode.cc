// Regime A: most experts have too few tokens to be worth more than their reading, so the fewest
// distinct experts per rank win.
#include <algorithm>
#include <cstddef>

#include "comm/plan_regimes.h"

namespace switchyard {
namespace {

// Augmenting paths over ranks. A step moves one whole expert from a rank to another of its hosts; a
// path lowers the most loaded rank that it starts at and raises no rank to tau. Over experts of
// equal weight, no path from one most loaded rank proves that tau is optimal: the ranks it reaches
// hold all hosts of their experts and are full.
class Augmenter {
 public:
  Augmenter(const PlanProblem& problem, PlanScratch* scratch, std::vector<int64_t>* cost)
      : problem_(problem), hosts_(*problem.hosts), s_(*scratch), cost_(*cost) {
    s_.head.assign(static_cast<size_t>(problem.num_ranks), -1);
    s_.next.resize(problem.tokens.size());
    s_.parent.resize(static_cast<size_t>(problem.num_ranks));
    s_.queue.resize(static_cast<size_t>(problem.num_ranks));
    for (size_t k = hosts_.order.size(); k > static_cast<size_t>(hosts_.num_single); --k) {
      const int32_t e = hosts_.order[k - 1];
      if (problem.tokens[static_cast<size_t>(e)] == 0) continue;
      const auto rank = static_cast<size_t>(RankOf(e));
      s_.next[static_cast<size_t>(e)] = s_.head[rank];
      s_.head[rank] = e;
    }
  }

  // Lowers rank `start`, whose cost is `tau`; false when no path does.
  bool Lower(int32_t start, int64_t tau) {
    std::ranges::fill(s_.parent, -1);
    s_.parent[static_cast<size_t>(start)] = 0;  // any value: it is never read
    size_t begin = 0, end = 0;
    s_.queue[end++] = start;
    while (begin < end) {
      const int32_t x = s_.queue[begin++];
      const int64_t incoming =
          x == start ? 0 : problem_.weights[Expert(s_.parent[static_cast<size_t>(x)])];
      for (int32_t e = s_.head[static_cast<size_t>(x)]; e >= 0;
           e = s_.next[static_cast<size_t>(e)]) {
        const int64_t weight = problem_.weights[static_cast<size_t>(e)];
        const int64_t after = cost_[static_cast<size_t>(x)] + incoming - weight;
        if (after >= tau && after > cost_[static_cast<size_t>(x)]) continue;
        for (int32_t i = hosts_.first[static_cast<size_t>(e)];
             i < hosts_.first[static_cast<size_t>(e) + 1]; ++i) {
          const auto y = static_cast<size_t>(hosts_.ranks[static_cast<size_t>(i)]);
          if (s_.parent[y] >= 0) continue;
          s_.parent[y] = i;
          if (cost_[y] + weight < tau) {
            Shift(start, static_cast<int32_t>(y));
            return true;
          }
          s_.queue[end++] = static_cast<int32_t>(y);
        }
      }
    }
    return false;
  }

 private:
  size_t Expert(int32_t pair) const {
    return static_cast<size_t>(hosts_.expert_of[static_cast<size_t>(pair)]);
  }
  int32_t RankOf(int32_t e) const {
    return hosts_.ranks[static_cast<size_t>(s_.host_of[static_cast<size_t>(e)])];
  }

  // Moves the experts of the path that ends at rank y, from its end to its start.
  void Shift(int32_t start, int32_t y) {
    while (y != start) {
      const int32_t pair = s_.parent[static_cast<size_t>(y)];
      const size_t e = Expert(pair);
      const int32_t x = RankOf(static_cast<int32_t>(e));
      int32_t* link = &s_.head[static_cast<size_t>(x)];
      while (*link != static_cast<int32_t>(e)) link = &s_.next[static_cast<size_t>(*link)];
      *link = s_.next[e];
      s_.next[e] = s_.head[static_cast<size_t>(y)];
      s_.head[static_cast<size_t>(y)] = static_cast<int32_t>(e);
      s_.host_of[e] = pair;
      cost_[static_cast<size_t>(x)] -= problem_.weights[e];
      cost_[static_cast<size_t>(y)] += problem_.weights[e];
      y = x;
    }
  }

  const PlanProblem& problem_;
  const LiveHosts& hosts_;
  PlanScratch& s_;
  std::vector<int64_t>& cost_;
};

}  // namespace

bool PlanActivated(const PlanProblem& problem, int64_t bound, PlanScratch* scratch,
                   Assignment* out) {
  out->ResetToForced(problem);
  const LiveHosts& hosts = *problem.hosts;
  const auto choices = std::span(hosts.order).subspan(static_cast<size_t>(hosts.num_single));
  scratch->host_of.resize(problem.tokens.size());
  int32_t* const host_of = scratch->host_of.data();
  int64_t* const cost = out->cost.data();
  const int32_t* const first = hosts.first.data();
  const int32_t* const ranks = hosts.ranks.data();
  const int64_t* const weights = problem.weights.data();
  for (const int32_t e : choices) {
    if (weights[e] == 0) continue;
    int32_t best = first[e];
    int64_t least = cost[ranks[best]];
    for (int32_t i = best + 1; i < first[e + 1]; ++i) {
      if (cost[ranks[i]] < least) {
        least = cost[ranks[i]];
        best = i;
      }
    }
    host_of[e] = best;
    cost[ranks[best]] = least + weights[e];
  }
  auto most = std::ranges::max_element(out->cost);
  bool proven = *most <= bound;
  if (!proven) {
    Augmenter augmenter(problem, scratch, &out->cost);
    // A path lowers one rank; a bound on their number bounds the time.
    for (int32_t left = 4 * problem.num_ranks; left > 0 && *most > bound; --left) {
      if (!augmenter.Lower(static_cast<int32_t>(most - out->cost.begin()), *most)) {
        proven = problem.memory_bound();
        break;
      }
      most = std::ranges::max_element(out->cost);
    }
    proven = proven || *most <= bound;
  }
  out->tau = *most;
  for (const int32_t e : choices) {
    const int64_t tokens = problem.tokens[static_cast<size_t>(e)];
    if (tokens > 0) out->quota[static_cast<size_t>(host_of[e])] = tokens;
  }
  return proven;
}

}  // namespace switchyard
