#include "comm/foreign_slots.h"

#include <algorithm>
#include <cstddef>

#include "kernels/check.h"

namespace switchyard {

ForeignSlots::ForeignSlots(const ExpertPlacement& placement, int32_t slots_per_rank)
    : num_ranks_(placement.num_ranks()), slots_per_rank_(slots_per_rank) {
  SY_CHECK_GE(slots_per_rank, 0);
  const auto num_experts = static_cast<size_t>(placement.num_experts());
  const size_t num_slots = static_cast<size_t>(num_ranks_) * static_cast<size_t>(slots_per_rank);
  at_.resize(std::max(num_experts, static_cast<size_t>(num_ranks_)) + 2);
  layers_.resize(static_cast<size_t>(placement.num_layers()));
  for (size_t l = 0; l < layers_.size(); ++l) {
    Layer& layer = layers_[l];
    layer.experts.assign(num_slots, -1);
    layer.last_use.assign(num_slots, 0);
    layer.homes.first.push_back(0);
    for (size_t e = 0; e < num_experts; ++e) {
      const auto homes = placement.Hosts(static_cast<int32_t>(l), static_cast<int32_t>(e));
      layer.homes.ranks.insert(layer.homes.ranks.end(), homes.begin(), homes.end());
      layer.homes.first.push_back(static_cast<int32_t>(layer.homes.ranks.size()));
    }
    most_pairs_ = std::max(most_pairs_, layer.homes.ranks.size() + num_slots);
  }
  const auto reserve = [&](LiveHosts* hosts) {
    hosts->first.reserve(num_experts + 1);
    hosts->home_pair.reserve(num_experts);
    hosts->order.reserve(num_experts);
    hosts->rank_first.reserve(static_cast<size_t>(num_ranks_) + 1);
    hosts->ranks.reserve(most_pairs_);
    hosts->expert_of.reserve(most_pairs_);
    hosts->of_rank.reserve(most_pairs_);
  };
  for (Layer& layer : layers_) {
    if (slots_per_rank > 0) reserve(&layer.hosts);  // they are swapped with spare_
    Rebuild(layer, &layer.hosts);
  }
  if (slots_per_rank == 0) return;
  reserve(&spare_);
  carried_.reserve(most_pairs_);
}

std::span<const int32_t> ForeignSlots::Experts(int32_t layer, int32_t rank) const {
  const auto n = static_cast<size_t>(slots_per_rank_);
  return std::span(layers_[static_cast<size_t>(layer)].experts)
      .subspan(static_cast<size_t>(rank) * n, n);
}

void ForeignSlots::Rebuild(const Layer& state, LiveHosts* hosts) {
  const size_t num_experts = state.homes.first.size() - 1;
  const auto num_ranks = static_cast<size_t>(num_ranks_);
  hosts->first.resize(num_experts + 1);
  hosts->home_pair.resize(num_experts);
  hosts->order.resize(num_experts);
  hosts->rank_first.assign(num_ranks + 1, 0);
  const auto num_foreign =
      static_cast<size_t>(std::ranges::count_if(state.experts, [](int32_t e) { return e >= 0; }));
  const size_t num_pairs = state.homes.ranks.size() + num_foreign;
  hosts->ranks.resize(num_pairs);
  hosts->expert_of.resize(num_pairs);
  hosts->of_rank.resize(num_pairs);

  // Raw pointers: a store into one array must not make the compiler load the others' again.
  const int32_t* const home_first = state.homes.first.data();
  const int32_t* const home_ranks = state.homes.ranks.data();
  int32_t* const first = hosts->first.data();
  int32_t* const ranks = hosts->ranks.data();
  int32_t* const expert_of = hosts->expert_of.data();
  int32_t* const at = at_.data();
  std::fill(at_.begin(), at_.end(), 0);
  for (int32_t e : state.experts) {
    if (e >= 0) ++at[e];  // foreign copies of the expert
  }
  first[0] = 0;
  for (size_t e = 0; e < num_experts; ++e) {
    int32_t to = first[e];
    for (int32_t i = home_first[e]; i < home_first[e + 1]; ++i, ++to) {
      ranks[to] = home_ranks[i];
      expert_of[to] = static_cast<int32_t>(e);
    }
    const int32_t foreign = at[e];
    at[e] = to;  // where they go
    for (int32_t i = 0; i < foreign; ++i, ++to) expert_of[to] = static_cast<int32_t>(e);
    first[e + 1] = to;
  }
  for (size_t i = 0; num_foreign > 0 && i < state.experts.size(); ++i) {
    if (state.experts[i] < 0) continue;
    const auto e = static_cast<size_t>(state.experts[i]);
    const auto rank = static_cast<int32_t>(i / static_cast<size_t>(slots_per_rank_));
    int32_t to = at[e]++;  // sorted in among the hosts so far
    for (; to > first[e] && ranks[to - 1] > rank; --to) ranks[to] = ranks[to - 1];
    ranks[to] = rank;
  }
  int32_t* const home_pair = hosts->home_pair.data();
  for (size_t e = 0; e < num_experts; ++e) {
    int32_t pair = first[e];  // ranks with a foreign copy may stand before the first home
    while (ranks[pair] != home_ranks[home_first[e]]) ++pair;
    home_pair[e] = pair;
  }
  SortPairs(hosts);
}

void ForeignSlots::SortPairs(LiveHosts* hosts) {
  // Counting sorts: experts by number of hosts, pairs by rank.
  const size_t num_experts = hosts->order.size();
  const size_t num_pairs = hosts->ranks.size();
  const int32_t* const first = hosts->first.data();
  const int32_t* const ranks = hosts->ranks.data();
  int32_t* const at = at_.data();
  std::fill(at_.begin(), at_.end(), 0);
  // Most experts have one host; counting those in memory would wait for each store.
  int32_t num_single = 0;
  for (size_t e = 0; e < num_experts; ++e) {
    const int32_t num_hosts = first[e + 1] - first[e];
    if (num_hosts == 1) {
      ++num_single;
    } else {
      ++at[num_hosts + 1];
    }
  }
  hosts->num_single = num_single;
  at[2] = num_single;
  for (size_t n = 3; n < at_.size(); ++n) at[n] += at[n - 1];
  int32_t* const order = hosts->order.data();
  int32_t next_single = 0;
  for (size_t e = 0; e < num_experts; ++e) {
    const int32_t num_hosts = first[e + 1] - first[e];
    order[num_hosts == 1 ? next_single++ : at[num_hosts]++] = static_cast<int32_t>(e);
  }
  int32_t* const rank_first = hosts->rank_first.data();
  for (size_t i = 0; i < num_pairs; ++i) ++rank_first[ranks[i] + 1];
  for (size_t r = 0; r + 1 < hosts->rank_first.size(); ++r) rank_first[r + 1] += rank_first[r];
  std::copy(hosts->rank_first.begin(), hosts->rank_first.end() - 1, at_.begin());
  int32_t* const of_rank = hosts->of_rank.data();
  for (size_t i = 0; i < num_pairs; ++i) of_rank[at[ranks[i]]++] = static_cast<int32_t>(i);
}

void ForeignSlots::Clear() {
  for (size_t layer = 0; layer < layers_.size(); ++layer) Clear(static_cast<int32_t>(layer));
}

void ForeignSlots::Clear(int32_t layer) {
  Layer& state = layers_[static_cast<size_t>(layer)];
  if (!state.any) return;
  std::ranges::fill(state.experts, -1);
  std::ranges::fill(state.last_use, 0);
  state.any = false;
  Rebuild(state, &state.hosts);
}

int64_t ForeignSlots::TokensOf(const Layer& layer, std::span<const int64_t> quota,
                               size_t slot) const {
  if (layer.experts[slot] < 0) return 0;
  const auto rank = static_cast<int32_t>(slot / static_cast<size_t>(slots_per_rank_));
  return quota[static_cast<size_t>(layer.hosts.Find(layer.experts[slot], rank))];
}

int64_t ForeignSlots::ForeignTokens(int32_t layer, std::span<const int64_t> quota) const {
  const Layer& state = layers_[static_cast<size_t>(layer)];
  int64_t tokens = 0;
  if (!state.any) return tokens;
  for (size_t i = 0; i < state.experts.size(); ++i) tokens += TokensOf(state, quota, i);
  return tokens;
}

void ForeignSlots::CountFree(int32_t layer, std::span<const int64_t> quota,
                             std::span<int32_t> free) const {
  const Layer& state = layers_[static_cast<size_t>(layer)];
  std::ranges::fill(free, slots_per_rank_);
  if (!state.any) return;
  for (size_t i = 0; i < state.experts.size(); ++i) {
    if (TokensOf(state, quota, i) > 0) --free[i / static_cast<size_t>(slots_per_rank_)];
  }
}

void ForeignSlots::Apply(int32_t layer, std::span<WeightMove> moves, std::vector<int64_t>* quota) {
  Layer& state = layers_[static_cast<size_t>(layer)];
  ++plans_;
  const auto slots = static_cast<size_t>(slots_per_rank_);
  if (state.any) {
    for (size_t i = 0; i < state.experts.size(); ++i) {
      if (TokensOf(state, *quota, i) > 0) state.last_use[i] = plans_;
    }
  }
  if (moves.empty()) return;
  for (WeightMove& move : moves) {
    const size_t begin = static_cast<size_t>(move.to_rank) * slots;
    size_t best = begin;  // empty slots have last_use 0
    for (size_t i = begin + 1; i < begin + slots; ++i) {
      if (state.last_use[i] < state.last_use[best]) best = i;
    }
    SY_CHECK_LT(state.last_use[best], plans_);
    state.experts[best] = move.expert;
    state.last_use[best] = plans_;
    move.slot = static_cast<int32_t>(best - begin);
  }
  state.any = true;
  Rebuild(state, &spare_);
  std::swap(state.hosts, spare_);  // spare_: the hosts before the moves
  carried_.assign(state.hosts.ranks.size(), 0);
  for (size_t e = 0; e + 1 < spare_.first.size(); ++e) {
    int32_t to = state.hosts.first[e];
    for (int32_t i = spare_.first[e]; i < spare_.first[e + 1]; ++i) {
      const int64_t tokens = (*quota)[static_cast<size_t>(i)];
      if (tokens == 0) continue;  // perhaps no longer a host
      while (state.hosts.ranks[static_cast<size_t>(to)] != spare_.ranks[static_cast<size_t>(i)]) {
        ++to;
      }
      carried_[static_cast<size_t>(to)] = tokens;
    }
  }
  std::swap(*quota, carried_);
}

}  // namespace switchyard
