// Regime C: weights move from the most to the least loaded ranks where the tokens that follow them
// are worth more than the move.
#include <algorithm>
#include <cstddef>
#include <numeric>

#include "comm/plan_regimes.h"

namespace switchyard {
namespace {

constexpr int kMaxTargets = 3;
constexpr int64_t kPrecision = 128;  // a target is found when it is known to one part of so many

// One attempt to bring every rank to `target`.
class Spiller {
 public:
  Spiller(const PlanProblem& problem, PlanScratch* scratch, Assignment* out)
      : problem_(problem),
        hosts_(*problem.hosts),
        least_room_(std::max(problem.costs.expert_read_ps, problem.costs.token_ps)),
        move_(problem.costs.expert_move_ps),
        free_(scratch->by_cost.data()),
        spilled_(scratch->spilled.data()),
        out_(*out) {}

  void Run(int64_t target) {
    const size_t num_ranks = out_.cost.size();
    const int64_t* const cost = out_.cost.data();
    for (;;) {
      size_t u = 0, v = num_ranks;  // the most loaded; the least loaded with a free slot
      int64_t most = -1, least = INT64_MAX;
      for (size_t r = 0; r < num_ranks; ++r) {
        u = cost[r] > most ? r : u;
        most = std::max(most, cost[r]);
        const int64_t to = free_[r] > 0 ? cost[r] : INT64_MAX;
        v = to < least ? r : v;
        least = std::min(least, to);
      }
      out_.tau = most;
      if (most <= target || v == num_ranks || v == u || !SpillOne(u, v, target)) return;
    }
  }

 private:
  // The rank has the expert, or gets it.
  bool Holds(int32_t expert, size_t rank) const {
    const auto e = static_cast<size_t>(expert);
    if (hosts_.first[e + 1] - hosts_.first[e] > 1 &&
        hosts_.Find(expert, static_cast<int32_t>(rank)) >= 0) {
      return true;
    }
    return spilled_[e] != 0 && std::ranges::any_of(out_.spilled, [&](const SpillPiece& piece) {
             return piece.expert == expert && static_cast<size_t>(piece.rank) == rank;
           });
  }

  // The home that sends: the cheapest that stays within target, else u itself if it is a home.
  int32_t Sender(int32_t expert, size_t u, int64_t target) const {
    const std::span<const int32_t> homes = problem_.homes->Hosts(expert);
    int32_t best = homes[0];
    for (const int32_t home : homes.subspan(1)) {
      if (out_.cost[static_cast<size_t>(home)] < out_.cost[static_cast<size_t>(best)]) best = home;
    }
    if (static_cast<size_t>(best) == u) return best;
    return out_.cost[static_cast<size_t>(best)] + move_ <= target ? best : -1;
  }

  // Moves tokens of one expert from rank u to rank v. The smallest quota that covers what u must
  // give and v can take, else the largest.
  bool SpillOne(size_t u, size_t v, int64_t target) {
    const PlanCosts& costs = problem_.costs;
    const int64_t room = target - out_.cost[v] - move_;
    if (room < least_room_) return false;
    const int64_t surplus = out_.cost[u] - target;
    int32_t fitting = -1, largest = -1;  // pairs
    int32_t fitting_from = 0, largest_from = 0;
    int64_t smallest = INT64_MAX, most = 0;
    for (int32_t k = hosts_.rank_first[u]; k < hosts_.rank_first[u + 1]; ++k) {
      const int32_t pair = hosts_.of_rank[static_cast<size_t>(k)];
      const int64_t quota = out_.quota[static_cast<size_t>(pair)];
      if (quota >= smallest || quota <= most) continue;  // `most` is below `smallest`
      const int64_t weight = costs.Compute(quota);
      if (weight <= move_) continue;
      const int32_t expert = hosts_.expert_of[static_cast<size_t>(pair)];
      if (Holds(expert, v)) continue;
      const int32_t from = Sender(expert, u, target);
      if (from < 0) continue;
      const int64_t sends = static_cast<size_t>(from) == u ? move_ : 0;
      if (weight >= std::min(surplus + sends, room)) {
        fitting = pair;
        fitting_from = from;
        smallest = quota;
      } else {
        largest = pair;
        largest_from = from;
        most = quota;
      }
    }
    if (fitting >= 0) {
      const int64_t need = surplus + (static_cast<size_t>(fitting_from) == u ? move_ : 0);
      const int64_t tokens = need <= room ? CeilDiv(need, costs.token_ps) : room / costs.token_ps;
      if (Commit(fitting, fitting_from, std::min(smallest, tokens), u, v)) return true;
    }
    return largest >= 0 && Commit(largest, largest_from, most, u, v);
  }

  // False when u would gain nothing.
  bool Commit(int32_t pair, int32_t from, int64_t tokens, size_t u, size_t v) {
    const PlanCosts& costs = problem_.costs;
    int64_t& quota = out_.quota[static_cast<size_t>(pair)];
    const int64_t gain = costs.Compute(quota) - costs.Compute(quota - tokens);
    if (gain <= (static_cast<size_t>(from) == u ? move_ : 0)) return false;
    const int32_t expert = hosts_.expert_of[static_cast<size_t>(pair)];
    out_.cost[u] -= gain;
    quota -= tokens;
    out_.cost[v] += costs.Compute(tokens) + move_;
    out_.cost[static_cast<size_t>(from)] += move_;
    --free_[v];
    spilled_[static_cast<size_t>(expert)] = 1;
    out_.spilled.push_back({expert, static_cast<int32_t>(v), from, tokens});
    return true;
  }

  const PlanProblem& problem_;
  const LiveHosts& hosts_;
  const int64_t least_room_;
  const int64_t move_;
  int32_t* const free_;     // [num_ranks] slots
  uint8_t* const spilled_;  // [num_experts] 1: some piece is of it
  Assignment& out_;
};

}  // namespace

void PlanSpill(const PlanProblem& problem, const Assignment& base, int64_t bound,
               std::span<const int32_t> free_slots, PlanScratch* scratch, Assignment* out) {
  // Which target is best is not known: every move adds to the total. The first attempt, at the
  // bound, shows about how many are needed, and the second counts them in; then bisect between what
  // failed and the best tau so far. The best attempt is kept in `out`.
  out->tau = base.tau;
  Assignment& trial = scratch->attempt;
  int64_t low = bound, high = base.tau;
  int64_t target = bound;
  for (int i = 0; i < kMaxTargets && high - low > low / kPrecision; ++i) {
    trial.quota = base.quota;
    trial.spilled.clear();
    trial.cost = base.cost;
    scratch->by_cost.assign(free_slots.begin(), free_slots.end());
    scratch->spilled.assign(problem.tokens.size(), 0);
    Spiller(problem, scratch, &trial).Run(target);
    const auto moves = static_cast<int64_t>(trial.spilled.size());
    const int64_t tau = trial.tau;
    if (tau < out->tau) std::swap(*out, trial);
    high = std::min(high, tau);
    if (tau > target) low = target + 1;
    target = low + (high - low) / 2;
    if (i > 0) continue;
    const int64_t total = std::accumulate(base.cost.begin(), base.cost.end(), int64_t{0}) +
                          2 * moves * problem.costs.expert_move_ps;
    const int64_t level = CeilDiv(total, problem.num_ranks);
    target = std::clamp(level + level / 64, low, high);
  }
}

}  // namespace switchyard
