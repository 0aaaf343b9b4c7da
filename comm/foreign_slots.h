// ForeignSlots: what the foreign slots of every layer and rank hold, and with it the live hosts of
// every expert: homes of the placement plus ranks that hold it in a foreign slot. Replicated state:
// changed only by plans, so equal on every rank. Owned by a DispatchPlanner.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "comm/dispatch_plan.h"
#include "comm/expert_placement.h"

namespace switchyard {

// The live hosts of one layer's experts. `slot i` below means an index into `ranks`: one (expert,
// host) pair.
struct LiveHosts {
  std::vector<int32_t> first;       // [num_experts + 1] into ranks
  std::vector<int32_t> ranks;       // [pairs] hosts of each expert, ascending
  std::vector<int32_t> expert_of;   // [pairs]
  std::vector<int32_t> home_pair;   // [num_experts] the pair of the first home
  std::vector<int32_t> order;       // [num_experts] by number of hosts, then id; empty: not sorted
  std::vector<int32_t> rank_first;  // [num_ranks + 1] into of_rank
  std::vector<int32_t> of_rank;     // [pairs] the pairs of each rank: homes by expert, then slots
  int32_t num_single = 0;           // experts with one host: the first of `order`

  std::span<const int32_t> Hosts(int32_t expert) const {
    const auto e = static_cast<size_t>(expert);
    return std::span(ranks).subspan(static_cast<size_t>(first[e]),
                                    static_cast<size_t>(first[e + 1] - first[e]));
  }
  // The pair (expert, rank), -1 when the rank does not hold it.
  int32_t Find(int32_t expert, int32_t rank) const {
    for (int32_t i = first[static_cast<size_t>(expert)]; i < first[static_cast<size_t>(expert) + 1];
         ++i) {
      if (ranks[static_cast<size_t>(i)] == rank) return i;
    }
    return -1;
  }
};

// The homes of one layer's experts, those of the placement: always loaded, so they may send.
struct Homes {
  std::vector<int32_t> first;       // [num_experts + 1] into ranks
  std::vector<int32_t> ranks;       // [home pairs] ascending per expert
  std::vector<int32_t> expert_of;   // [home pairs]
  std::vector<int32_t> rank_first;  // [num_ranks + 1] into of_rank
  std::vector<int32_t> of_rank;     // [home pairs] the pairs of each rank, by expert

  std::span<const int32_t> Hosts(int32_t expert) const {
    const auto e = static_cast<size_t>(expert);
    return std::span(ranks).subspan(static_cast<size_t>(first[e]),
                                    static_cast<size_t>(first[e + 1] - first[e]));
  }
};

class ForeignSlots {
 public:
  ForeignSlots(const ExpertPlacement& placement, int32_t slots_per_rank);

  size_t most_pairs() const { return most_pairs_; }  // of any layer with all slots in use
  const LiveHosts& Hosts(int32_t layer) {
    LiveHosts& hosts = layers_[static_cast<size_t>(layer)].hosts;
    if (hosts.order.empty()) SortExperts(&hosts);  // when the next plan needs it
    return hosts;
  }
  const Homes& HomesOf(int32_t layer) const { return layers_[static_cast<size_t>(layer)].homes; }
  std::span<const int32_t> Experts(int32_t layer, int32_t rank) const;

  void Clear();  // all layers
  void Clear(int32_t layer);

  // Tokens of `quota` [pairs of Hosts(layer)] that lie on foreign slots.
  int64_t ForeignTokens(int32_t layer, std::span<const int64_t> quota) const;

  // Slots of a rank that hold nothing that `quota` [pairs of Hosts(layer)] uses.
  void CountFree(int32_t layer, std::span<const int64_t> quota, std::span<int32_t> free) const;
  // Chooses the slots of `moves` (free ones first, then the longest unused that `quota` does not
  // use), marks what the plan uses and rebuilds the hosts. quota is carried over to the new pairs;
  // those of moved experts are 0.
  void Apply(int32_t layer, std::span<WeightMove> moves, std::vector<int64_t>* quota);

 private:
  struct Layer {
    Homes homes;
    LiveHosts hosts;
    std::vector<int32_t> experts;    // [num_ranks, slots_per_rank], -1: empty
    std::vector<uint64_t> last_use;  // [num_ranks, slots_per_rank] plan number
    bool any = false;                // some slot is not empty
  };
  void Rebuild(const Layer& layer, LiveHosts* hosts);
  void SortExperts(LiveHosts* hosts);                    // sets order, num_single
  void SortPairs(const Layer& layer, LiveHosts* hosts);  // sets rank_first, of_rank
  // What `quota` gives to slot `slot` [num_ranks * slots_per_rank] of the layer.
  int64_t TokensOf(const Layer& layer, std::span<const int64_t> quota, size_t slot) const;

  const int32_t num_ranks_;
  const int32_t slots_per_rank_;
  size_t most_pairs_ = 0;
  uint64_t plans_ = 0;
  std::vector<Layer> layers_;
  LiveHosts spare_;               // Rebuild writes here, then swaps
  std::vector<int64_t> carried_;  // [pairs]
  std::vector<int32_t> at_;       // [max(num_experts, num_ranks) + 2]
  std::vector<int32_t> several_;  // [num_experts + 1] experts with several hosts
  std::vector<int32_t> foreign_;  // [num_experts]
  std::vector<uint64_t> mask_;    // [num_experts] bits
  std::vector<int32_t> moved_;    // [home pairs] the pair of the live hosts that each is
};

}  // namespace switchyard
