// Regime C: weights move from the most to the least loaded ranks where the tokens that follow them
// are worth more than the move.
#include <algorithm>
#include <cstddef>

#include "comm/plan_regimes.h"

namespace switchyard {
namespace {

constexpr int kMaxTargets = 6;

// One attempt to bring every rank to `target`.
class Spiller {
 public:
  Spiller(const PlanProblem& problem, std::span<const int32_t> free_slots, PlanScratch* scratch,
          Assignment* out)
      : problem_(problem), hosts_(*problem.hosts), free_(scratch->by_cost), out_(*out) {
    free_.assign(free_slots.begin(), free_slots.end());
  }

  void Run(int64_t target) {
    std::vector<int64_t>& cost = out_.cost;
    for (;;) {
      const auto u = static_cast<size_t>(std::ranges::max_element(cost) - cost.begin());
      if (cost[u] <= target) break;
      const size_t v = LeastLoaded();
      if (v == cost.size() || v == u || !SpillOne(u, v, target)) break;
    }
    out_.tau = *std::ranges::max_element(cost);
  }

 private:
  struct Choice {
    int32_t pair = -1;
    int32_t from = 0;
    int64_t tokens = 0;
  };

  // The cheapest rank with a free slot; num_ranks when there is none.
  size_t LeastLoaded() const {
    size_t best = free_.size();
    for (size_t r = 0; r < free_.size(); ++r) {
      if (free_[r] > 0 && (best == free_.size() || out_.cost[r] < out_.cost[best])) best = r;
    }
    return best;
  }

  bool HasPiece(int32_t expert, size_t rank) const {
    return std::ranges::any_of(out_.spilled, [&](const SpillPiece& piece) {
      return piece.expert == expert && static_cast<size_t>(piece.rank) == rank;
    });
  }

  // The home that sends: the cheapest that stays within target, else u itself if it is a home.
  int32_t Sender(int32_t expert, size_t u, int64_t target) const {
    int32_t best = -1;
    for (int32_t home : problem_.homes->Hosts(expert)) {
      if (best < 0 || out_.cost[static_cast<size_t>(home)] < out_.cost[static_cast<size_t>(best)]) {
        best = home;
      }
    }
    const bool fits =
        out_.cost[static_cast<size_t>(best)] + problem_.costs.expert_move_ps <= target;
    return fits || static_cast<size_t>(best) == u ? best : -1;
  }

  // Moves tokens of one expert from rank u to rank v. The smallest quota that covers what u must
  // give and v can take, else the largest.
  bool SpillOne(size_t u, size_t v, int64_t target) {
    const PlanCosts& costs = problem_.costs;
    const int64_t move = costs.expert_move_ps;
    const int64_t room = target - out_.cost[v] - move;
    if (room < std::max(costs.expert_read_ps, costs.token_ps)) return false;
    Choice fitting, largest;
    int64_t smallest = 0, most = 0;
    for (int32_t k = hosts_.rank_first[u]; k < hosts_.rank_first[u + 1]; ++k) {
      const int32_t pair = hosts_.of_rank[static_cast<size_t>(k)];
      const int64_t quota = out_.quota[static_cast<size_t>(pair)];
      if (quota == 0 || (fitting.pair >= 0 && quota >= smallest && quota <= most)) continue;
      const int32_t expert = hosts_.expert_of[static_cast<size_t>(pair)];
      const int64_t weight = costs.Compute(quota);
      if (weight <= move) continue;
      if (hosts_.Find(expert, static_cast<int32_t>(v)) >= 0 || HasPiece(expert, v)) continue;
      const int32_t from = Sender(expert, u, target);
      if (from < 0) continue;
      const int64_t sends = static_cast<size_t>(from) == u ? move : 0;
      const int64_t need = out_.cost[u] - target + sends;
      const int64_t give = std::min(need, room);
      if (weight >= give) {
        if (fitting.pair < 0 || quota < smallest) {
          const int64_t tokens =
              give == need ? CeilDiv(give, costs.token_ps) : give / costs.token_ps;
          const Choice choice{pair, from, std::min(quota, tokens)};
          if (Gain(choice) > sends) {
            fitting = choice;
            smallest = quota;
          }
        }
      } else if (quota > most) {
        largest = {pair, from, quota};
        most = quota;
      }
    }
    const Choice& choice = fitting.pair >= 0 ? fitting : largest;
    if (choice.pair < 0) return false;
    Commit(choice, u, v);
    return true;
  }

  int64_t Gain(const Choice& choice) const {
    const int64_t quota = out_.quota[static_cast<size_t>(choice.pair)];
    return problem_.costs.Compute(quota) - problem_.costs.Compute(quota - choice.tokens);
  }

  void Commit(const Choice& choice, size_t u, size_t v) {
    out_.cost[u] -= Gain(choice);
    out_.quota[static_cast<size_t>(choice.pair)] -= choice.tokens;
    out_.cost[v] += problem_.costs.Compute(choice.tokens) + problem_.costs.expert_move_ps;
    out_.cost[static_cast<size_t>(choice.from)] += problem_.costs.expert_move_ps;
    --free_[v];
    out_.spilled.push_back({hosts_.expert_of[static_cast<size_t>(choice.pair)],
                            static_cast<int32_t>(v), choice.from, choice.tokens});
  }

  const PlanProblem& problem_;
  const LiveHosts& hosts_;
  std::vector<int32_t>& free_;
  Assignment& out_;
};

}  // namespace

void PlanSpill(const PlanProblem& problem, const Assignment& base, int64_t bound,
               std::span<const int32_t> free_slots, PlanScratch* scratch, Assignment* out) {
  // Which target is best is not known: moves add to the total. Bisect between the bound and the
  // best tau so far; keep the best attempt in `out`.
  out->quota = base.quota;
  out->spilled.clear();
  out->cost = base.cost;
  out->tau = base.tau;
  Assignment& trial = scratch->attempt;
  int64_t low = bound, high = base.tau;
  int64_t target = bound;
  for (int i = 0; i < kMaxTargets && low < high; ++i) {
    trial.quota = base.quota;
    trial.spilled.clear();
    trial.cost = base.cost;
    Spiller(problem, free_slots, scratch, &trial).Run(target);
    const int64_t tau = trial.tau;
    if (tau < out->tau) std::swap(*out, trial);
    if (tau <= target) {
      high = target;
    } else {
      low = target + 1;
      high = std::min(high, tau);
    }
    target = low + (high - low) / 2;
  }
}

}  // namespace switchyard
