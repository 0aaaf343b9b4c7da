#include "scheduler/home_placement.h"

#include <algorithm>
#include <cstddef>

namespace switchyard {
namespace {

// One layer on its way to a placement: sets by index into `workers`.
struct Layer {
  const std::vector<HomeSlots>& workers;
  size_t rotation;  // which worker wins a tie, so that remainders spread over the layers
  std::vector<std::set<int32_t>> held;

  bool Full(size_t w) const { return held[w].size() >= static_cast<size_t>(workers[w].slots); }
  size_t Turn(size_t w) const { return (w + rotation) % workers.size(); }

  // The worker with the fewest experts among those with a free slot and without `expert`.
  std::optional<size_t> Emptiest(int32_t expert) const {
    std::optional<size_t> best;
    for (size_t w = 0; w < workers.size(); ++w) {
      if (Full(w) || held[w].count(expert) > 0) continue;
      if (!best || held[w].size() < held[*best].size() ||
          (held[w].size() == held[*best].size() && Turn(w) < Turn(*best))) {
        best = w;
      }
    }
    return best;
  }

  // Makes room at the fullest worker that holds an expert which others hold too.
  std::optional<size_t> DropReplica() {
    std::map<int32_t, int> homes;
    for (const std::set<int32_t>& s : held) {
      for (int32_t e : s) ++homes[e];
    }
    std::optional<size_t> fullest;
    int32_t replica = -1;
    for (size_t w = 0; w < workers.size(); ++w) {
      if (held[w].size() > static_cast<size_t>(workers[w].slots)) continue;
      if (fullest && held[w].size() <= held[*fullest].size()) continue;
      const auto e = std::find_if(held[w].begin(), held[w].end(),
                                  [&](int32_t expert) { return homes[expert] > 1; });
      if (e == held[w].end()) continue;
      fullest = w;
      replica = *e;
    }
    if (fullest) held[*fullest].erase(replica);
    return fullest;
  }

  bool PlaceOrphans(int32_t num_experts) {
    for (int32_t e = 0; e < num_experts; ++e) {
      const bool has_home = std::any_of(held.begin(), held.end(),
                                        [e](const std::set<int32_t>& s) { return s.count(e) > 0; });
      if (has_home) continue;
      std::optional<size_t> worker = Emptiest(e);
      if (!worker) worker = DropReplica();
      if (!worker) return false;
      held[*worker].insert(e);
    }
    return true;
  }

  // Moves single experts from the fullest worker to an emptier one while that narrows the range.
  void Relieve() {
    for (;;) {
      size_t fullest = 0;
      for (size_t w = 1; w < workers.size(); ++w) {
        if (held[w].size() > held[fullest].size()) fullest = w;
      }
      std::optional<size_t> to;
      int32_t moved = -1;
      for (auto e = held[fullest].rbegin(); e != held[fullest].rend() && !to; ++e) {
        to = Emptiest(*e);
        moved = *e;
        if (to && held[*to].size() + 2 > held[fullest].size()) to.reset();
      }
      if (!to) return;
      held[fullest].erase(moved);
      held[*to].insert(moved);
    }
  }
};

}  // namespace

std::optional<HomePlacement> PlanHomes(const HomePlacement& current,
                                       const std::vector<HomeSlots>& workers, int32_t num_layers,
                                       int32_t num_experts) {
  if (workers.empty()) return std::nullopt;
  HomePlacement planned;
  for (const HomeSlots& worker : workers)
    planned[worker.worker].resize(static_cast<size_t>(num_layers));
  for (size_t l = 0; l < static_cast<size_t>(num_layers); ++l) {
    Layer layer{.workers = workers, .rotation = l, .held = {}};
    for (const HomeSlots& worker : workers) {
      const auto held = current.find(worker.worker);
      layer.held.push_back(held == current.end() ? std::set<int32_t>() : held->second[l]);
    }
    if (!layer.PlaceOrphans(num_experts)) return std::nullopt;
    layer.Relieve();
    for (size_t w = 0; w < workers.size(); ++w)
      planned[workers[w].worker][l] = std::move(layer.held[w]);
  }
  return planned;
}

}  // namespace switchyard
