#include "comm/placement_planner.h"

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace switchyard {
namespace {

// Loads are scaled so that shares of replicas stay integers.
constexpr int64_t kScale = 1024;
constexpr int64_t kMostLoad = int64_t{1} << 40;

using Hosts = std::vector<std::vector<int32_t>>;  // [num_experts] ranks, ascending

int64_t ShareOf(int64_t load, size_t replicas) {
  return replicas == 0 ? 0 : std::min(load, kMostLoad) * kScale / static_cast<int64_t>(replicas);
}

std::vector<int64_t> RankLoads(const Hosts& hosts, std::span<const int64_t> loads,
                               int32_t num_ranks) {
  std::vector<int64_t> rank_loads(static_cast<size_t>(num_ranks), 0);
  for (size_t e = 0; e < hosts.size(); ++e) {
    for (int32_t r : hosts[e]) {
      rank_loads[static_cast<size_t>(r)] += ShareOf(loads[e], hosts[e].size());
    }
  }
  return rank_loads;
}

// How many homes each expert gets.
std::vector<size_t> ReplicaCounts(const PlacementRequest& request, std::span<const int64_t> loads) {
  const auto num_experts = static_cast<size_t>(request.num_experts);
  const auto num_ranks = static_cast<size_t>(request.num_ranks);
  std::vector<size_t> replicas(num_experts, 1);
  size_t extra = num_ranks * static_cast<size_t>(request.home_slots_per_rank) - num_experts;
  extra = std::min(extra, num_experts * (num_ranks - 1));
  std::vector<size_t> hottest(num_experts);
  std::iota(hottest.begin(), hottest.end(), size_t{0});
  std::ranges::stable_sort(hottest, std::ranges::greater{}, [&](size_t e) { return loads[e]; });
  if (num_ranks > 1) {
    for (size_t i = 0; i < num_experts && extra > 0; ++i, --extra) ++replicas[hottest[i]];
  }
  for (; extra > 0; --extra) {
    size_t most = num_experts;
    for (size_t e : hottest) {
      if (replicas[e] == num_ranks) continue;
      if (most == num_experts ||
          ShareOf(loads[e], replicas[e]) > ShareOf(loads[most], replicas[most])) {
        most = e;
      }
    }
    ++replicas[most];
  }
  return replicas;
}

// One layer on its way from what is loaded to what is wanted.
class LayerBuilder {
 public:
  LayerBuilder(const PlacementRequest& request, std::span<const int64_t> loads, Hosts hosts)
      : slots_(static_cast<size_t>(request.home_slots_per_rank)),
        replicas_(ReplicaCounts(request, loads)),
        hosts_(std::move(hosts)),
        held_(static_cast<size_t>(request.num_ranks)),
        load_(static_cast<size_t>(request.num_ranks), 0) {
    for (size_t e = 0; e < hosts_.size(); ++e) {
      share_.push_back(ShareOf(loads[e], replicas_[e]));
      for (int32_t r : hosts_[e]) {
        held_[static_cast<size_t>(r)].push_back(e);
        load_[static_cast<size_t>(r)] += share_[e];
      }
    }
  }

  Hosts Build() {
    for (size_t r = 0; r < held_.size(); ++r) {  // there may be fewer slots than before
      while (held_[r].size() > slots_)
        Remove(*std::ranges::min_element(held_[r], {}, ByShare()), r);
    }
    for (size_t e = 0; e < hosts_.size(); ++e) {
      while (hosts_[e].size() > replicas_[e]) {
        Remove(e, static_cast<size_t>(*std::ranges::max_element(
                      hosts_[e], {}, [&](int32_t r) { return load_[static_cast<size_t>(r)]; })));
      }
    }
    std::vector<size_t> order(hosts_.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::ranges::stable_sort(order, std::ranges::greater{}, ByShare());
    for (size_t e : order) {
      while (hosts_[e].size() < replicas_[e]) AddSomewhere(e);
    }
    // Every step lowers the sum of squares of two ranks; the limit bounds the time.
    for (size_t left = 4 * held_.size() * slots_; left > 0 && Improve(); --left) {
    }
    return std::move(hosts_);
  }

 private:
  struct ShareLess {
    const std::vector<int64_t>* share;
    int64_t operator()(size_t e) const { return (*share)[e]; }
  };
  ShareLess ByShare() const { return {&share_}; }

  bool Holds(size_t r, size_t e) const {
    return std::ranges::binary_search(hosts_[e], static_cast<int32_t>(r));
  }
  void Add(size_t e, size_t r) {
    std::vector<int32_t>& hosts = hosts_[e];
    hosts.insert(std::ranges::lower_bound(hosts, static_cast<int32_t>(r)), static_cast<int32_t>(r));
    held_[r].push_back(e);
    load_[r] += share_[e];
  }
  void Remove(size_t e, size_t r) {
    std::erase(hosts_[e], static_cast<int32_t>(r));
    std::erase(held_[r], e);
    load_[r] -= share_[e];
  }

  // On the least loaded rank with room (then the emptiest, then the lowest).
  void AddSomewhere(size_t e) {
    const auto key = [&](size_t r) { return std::tuple(load_[r], held_[r].size(), r); };
    size_t best = held_.size(), full = held_.size(), room = held_.size();
    for (size_t r = 0; r < held_.size(); ++r) {
      const bool has_room = held_[r].size() < slots_;
      if (Holds(r, e)) {
        if (has_room) room = r;
      } else if (has_room) {
        if (best == held_.size() || key(r) < key(best)) best = r;
      } else if (full == held_.size() || key(r) < key(full)) {
        full = r;
      }
    }
    if (best < held_.size()) return Add(e, best);
    // Room only where e is: something moves there from a full rank. It holds more experts than
    // `room`, and e is not among them, so one is not at `room`.
    SY_CHECK(room < held_.size() && full < held_.size());
    const auto moved = std::ranges::find_if(held_[full], [&](size_t f) { return !Holds(room, f); });
    SY_CHECK(moved != held_[full].end());
    const size_t f = *moved;
    Remove(f, full);
    Add(f, room);
    Add(e, full);
  }

  // Moves one expert off the fullest rank, or swaps it for a colder one, if that lowers the larger
  // of the two loads by at least 2 %.
  bool Improve() {
    const size_t a = static_cast<size_t>(std::ranges::max_element(load_) - load_.begin());
    int64_t best = load_[a] - load_[a] / 50;
    size_t best_e = 0, best_f = 0, best_b = held_.size();
    constexpr size_t kNone = SIZE_MAX;
    for (size_t b = 0; b < held_.size(); ++b) {
      if (b == a || load_[b] >= best) continue;
      for (size_t e : held_[a]) {
        if (Holds(b, e)) continue;
        const auto consider = [&](int64_t back, size_t f) {
          const int64_t most = std::max(load_[a] - share_[e] + back, load_[b] + share_[e] - back);
          if (most >= best) return;
          best = most;
          best_b = b;
          best_e = e;
          best_f = f;
        };
        if (held_[b].size() < slots_) consider(0, kNone);
        for (size_t f : held_[b]) {
          if (share_[f] < share_[e] && !Holds(a, f)) consider(share_[f], f);
        }
      }
    }
    if (best_b == held_.size()) return false;
    Remove(best_e, a);
    if (best_f != kNone) {
      Remove(best_f, best_b);
      Add(best_f, a);
    }
    Add(best_e, best_b);
    return true;
  }

  const size_t slots_;
  const std::vector<size_t> replicas_;
  Hosts hosts_;
  std::vector<std::vector<size_t>> held_;  // [num_ranks] experts
  std::vector<int64_t> load_;              // [num_ranks]
  std::vector<int64_t> share_;             // [num_experts] load of one replica
};

absl::Status Check(const PlacementRequest& request) {
  const int64_t slots = int64_t{request.num_ranks} * request.home_slots_per_rank;
  if (request.num_layers < 0 || request.num_experts < 0 || request.num_ranks < 1 ||
      request.home_slots_per_rank < 0 || (request.num_layers > 0 && slots < request.num_experts)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "placement: ", request.num_experts, " experts per layer do not fit into ",
        request.home_slots_per_rank, " home slots on each of ", request.num_ranks, " ranks"));
  }
  const size_t num_loads =
      static_cast<size_t>(request.num_layers) * static_cast<size_t>(request.num_experts);
  if (request.loads.size() != num_loads ||
      std::ranges::any_of(request.loads, [](int64_t load) { return load < 0; })) {
    return absl::InvalidArgumentError(absl::StrCat("placement: ", request.loads.size(),
                                                   " loads, expected ", num_loads,
                                                   " that are not negative"));
  }
  const ExpertPlacement* current = request.current;
  if (current == nullptr) return absl::OkStatus();
  const auto known = [&](int32_t r) { return r < request.num_ranks; };
  const bool ranks_fit = request.new_rank_of.empty()
                             ? current->num_ranks() <= request.num_ranks
                             : std::cmp_equal(request.new_rank_of.size(), current->num_ranks()) &&
                                   std::ranges::all_of(request.new_rank_of, known);
  if (!ranks_fit || current->num_layers() != request.num_layers ||
      (request.num_layers > 0 && current->num_experts() != request.num_experts)) {
    return absl::InvalidArgumentError(
        absl::StrCat("placement: the current one is for ", current->num_layers(), " layers, ",
                     current->num_experts(), " experts and ", current->num_ranks(), " ranks, not ",
                     request.num_layers, ", ", request.num_experts, " and ", request.num_ranks));
  }
  return absl::OkStatus();
}

// The homes of a layer that are left, in the new ranks' numbers.
Hosts Surviving(const ExpertPlacement* current, std::span<const int32_t> new_rank_of, int32_t layer,
                int32_t num_experts) {
  Hosts hosts(static_cast<size_t>(num_experts));
  if (current == nullptr) return hosts;
  for (int32_t e = 0; e < num_experts; ++e) {
    for (int32_t r : current->Hosts(layer, e)) {
      const int32_t rank = new_rank_of.empty() ? r : new_rank_of[static_cast<size_t>(r)];
      if (rank >= 0) hosts[static_cast<size_t>(e)].push_back(rank);
    }
    std::ranges::sort(hosts[static_cast<size_t>(e)]);
  }
  return hosts;
}

// Whether a layer may stay as it is: complete, within the slots, and balanced almost as well as it
// could be.
bool MayStay(const PlacementRequest& request, std::span<const int64_t> loads, const Hosts& now,
             const Hosts& wanted) {
  std::vector<int32_t> held(static_cast<size_t>(request.num_ranks), 0);
  for (const std::vector<int32_t>& hosts : now) {
    if (hosts.empty()) return false;
    for (int32_t r : hosts) ++held[static_cast<size_t>(r)];
  }
  if (std::ranges::max(held) > request.home_slots_per_rank) return false;
  // A rank that just joined and holds nothing is to be used.
  if (std::ranges::min(held) == 0 && request.num_experts >= request.num_ranks) return false;
  const int64_t before = std::ranges::max(RankLoads(now, loads, request.num_ranks));
  const int64_t after = std::ranges::max(RankLoads(wanted, loads, request.num_ranks));
  return before * 100 <= after * (100 + request.hysteresis_percent);
}

}  // namespace

absl::StatusOr<ExpertPlacement> PlanPlacement(const PlacementRequest& request) {
  if (absl::Status status = Check(request); !status.ok()) return status;
  const auto num_experts = static_cast<size_t>(request.num_experts);
  std::vector<Hosts> layers;
  for (int32_t layer = 0; layer < request.num_layers; ++layer) {
    const std::span<const int64_t> loads =
        request.loads.subspan(static_cast<size_t>(layer) * num_experts, num_experts);
    const Hosts now = Surviving(request.current, request.new_rank_of, layer, request.num_experts);
    Hosts wanted = LayerBuilder(request, loads, now).Build();
    layers.push_back(MayStay(request, loads, now, wanted) ? now : wanted);
  }
  return ExpertPlacement::Create(request.num_ranks, std::move(layers));
}

std::vector<ExpertLoad> ExpertLoads(const ExpertPlacement* from,
                                    std::span<const int32_t> new_rank_of,
                                    const ExpertPlacement& to) {
  std::vector<ExpertLoad> loads;
  for (int32_t layer = 0; layer < to.num_layers(); ++layer) {
    const Hosts before = Surviving(from, new_rank_of, layer, to.num_experts());
    for (int32_t e = 0; e < to.num_experts(); ++e) {
      for (int32_t r : to.Hosts(layer, e)) {
        if (!std::ranges::binary_search(before[static_cast<size_t>(e)], r)) {
          loads.push_back({layer, e, r});
        }
      }
    }
  }
  return loads;
}

double PlacementImbalance(const ExpertPlacement& placement, int32_t layer,
                          std::span<const int64_t> loads) {
  const Hosts hosts = Surviving(&placement, {}, layer, placement.num_experts());
  const std::vector<int64_t> ranks = RankLoads(hosts, loads, placement.num_ranks());
  const auto total = static_cast<double>(std::accumulate(ranks.begin(), ranks.end(), int64_t{0}));
  if (total <= 0) return 1.0;
  return static_cast<double>(std::ranges::max(ranks)) * placement.num_ranks() / total;
}

}  // namespace switchyard
