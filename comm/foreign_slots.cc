#include "comm/foreign_slots.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <utility>

#include "kernels/check.h"

namespace switchyard {

ForeignSlots::ForeignSlots(const ExpertPlacement& placement, int32_t slots_per_rank)
    : num_ranks_(placement.num_ranks()), slots_per_rank_(slots_per_rank) {
  SY_CHECK_GE(slots_per_rank, 0);
  const auto num_experts = static_cast<size_t>(placement.num_experts());
  const size_t num_slots = static_cast<size_t>(num_ranks_) * static_cast<size_t>(slots_per_rank);
  at_.resize(std::max(num_experts, static_cast<size_t>(num_ranks_)) + 2);
  several_.resize(num_experts + 1);
  foreign_.assign(num_experts, 0);
  mask_.resize((num_experts + 63) / 64);
  layers_.resize(static_cast<size_t>(placement.num_layers()));
  for (size_t l = 0; l < layers_.size(); ++l) {
    Layer& layer = layers_[l];
    layer.experts.assign(num_slots, -1);
    layer.last_use.assign(num_slots, 0);
    layer.homes.first.push_back(0);
    for (size_t e = 0; e < num_experts; ++e) {
      const auto homes = placement.Hosts(static_cast<int32_t>(l), static_cast<int32_t>(e));
      layer.homes.ranks.insert(layer.homes.ranks.end(), homes.begin(), homes.end());
      layer.homes.expert_of.resize(layer.homes.ranks.size(), static_cast<int32_t>(e));
      layer.homes.first.push_back(static_cast<int32_t>(layer.homes.ranks.size()));
    }
    for (int32_t r = 0; r <= num_ranks_; ++r) {
      layer.homes.rank_first.push_back(static_cast<int32_t>(layer.homes.of_rank.size()));
      for (size_t i = 0; i < layer.homes.ranks.size(); ++i) {
        if (layer.homes.ranks[i] == r) layer.homes.of_rank.push_back(static_cast<int32_t>(i));
      }
    }
    most_pairs_ = std::max(most_pairs_, layer.homes.ranks.size() + num_slots);
  }
  moved_.reserve(most_pairs_);
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
    SortExperts(&layer.hosts);
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

// The homes' pairs are spread out to make room for those of the slots. Raw pointers: a store into
// one array must not make the compiler load the others' again.
void ForeignSlots::Rebuild(const Layer& state, LiveHosts* hosts) {
  const size_t num_experts = state.homes.first.size() - 1;
  const auto num_foreign =
      static_cast<size_t>(std::ranges::count_if(state.experts, [](int32_t e) { return e >= 0; }));
  const size_t num_pairs = state.homes.ranks.size() + num_foreign;
  hosts->first.resize(num_experts + 1);
  hosts->home_pair.resize(num_experts);
  hosts->ranks.resize(num_pairs);
  hosts->expert_of.resize(num_pairs);

  const int32_t* const home_first = state.homes.first.data();
  const int32_t* const home_ranks = state.homes.ranks.data();
  int32_t* const first = hosts->first.data();
  int32_t* const ranks = hosts->ranks.data();
  int32_t* const expert_of = hosts->expert_of.data();
  int32_t* const home_pair = hosts->home_pair.data();
  const int32_t* const home_expert_of = state.homes.expert_of.data();
  moved_.resize(state.homes.ranks.size());
  int32_t* const moved = moved_.data();
  int32_t* const foreign = foreign_.data();  // [num_experts] slots that hold it; 0 between calls
  std::ranges::fill(mask_, 0);               // a bit for every expert with some
  for (int32_t e : state.experts) {
    if (e < 0) continue;
    ++foreign[e];
    mask_[static_cast<size_t>(e) / 64] |= uint64_t{1} << (e % 64);
  }
  // Stretches that end with such an expert, or with the last one, are copied as they are.
  size_t e = 0, pair = 0;  // next expert, next home pair
  int32_t inserted = 0;
  const auto copy_to = [&](size_t end) {
    for (; e < end; ++e) first[e] = home_pair[e] = home_first[e] + inserted;
    const auto end_pair = static_cast<size_t>(home_first[end]);
    std::copy(home_ranks + pair, home_ranks + end_pair, ranks + pair + inserted);
    std::copy(home_expert_of + pair, home_expert_of + end_pair, expert_of + pair + inserted);
    for (; pair < end_pair; ++pair) moved[pair] = static_cast<int32_t>(pair) + inserted;
  };
  for (size_t word = 0; word < mask_.size(); ++word) {
    for (uint64_t bits = mask_[word]; bits != 0; bits &= bits - 1) {
      copy_to(word * 64 + static_cast<size_t>(std::countr_zero(bits)) + 1);
      const int32_t room = foreign[e - 1];
      foreign[e - 1] = static_cast<int32_t>(pair) + inserted;  // where the next one goes
      std::fill_n(expert_of + foreign[e - 1], room, static_cast<int32_t>(e - 1));
      inserted += room;
    }
  }
  copy_to(num_experts);
  first[num_experts] = static_cast<int32_t>(num_pairs);
  for (size_t i = 0; i < state.experts.size(); ++i) {
    const int32_t f = state.experts[i];
    if (f < 0) continue;
    const auto rank = static_cast<int32_t>(i / static_cast<size_t>(slots_per_rank_));
    int32_t at = foreign[f]++;  // sorted in among the hosts so far
    for (; at > first[f] && ranks[at - 1] > rank; --at) ranks[at] = ranks[at - 1];
    ranks[at] = rank;
    for (int32_t h = home_first[f + 1]; h > home_first[f] && home_ranks[h - 1] > rank; --h) {
      ++moved[h - 1];
    }
    home_pair[f] = moved[home_first[f]];
  }
  for (int32_t f : state.experts) {
    if (f >= 0) foreign[f] = 0;
  }
  hosts->order.clear();
  SortPairs(state, hosts);
}

void ForeignSlots::SortExperts(LiveHosts* hosts) {
  const size_t num_experts = hosts->first.size() - 1;
  const auto num_ranks = static_cast<size_t>(num_ranks_);
  hosts->order.resize(num_experts);
  const int32_t* const first = hosts->first.data();
  // Most have one host: without a branch on it. Those with several by a counting sort.
  int32_t* const order = hosts->order.data();
  int32_t* const several = several_.data();
  size_t num_single = 0, num_several = 0;
  for (size_t e = 0; e < num_experts; ++e) {
    order[num_single] = several[num_several] = static_cast<int32_t>(e);
    const bool single = first[e + 1] - first[e] == 1;
    num_single += single ? 1 : 0;
    num_several += single ? 0 : 1;
  }
  hosts->num_single = static_cast<int32_t>(num_single);
  int32_t* const at = at_.data();
  std::fill_n(at, num_ranks + 2, 0);
  const auto num_hosts = [&](int32_t e) { return first[e + 1] - first[e]; };
  for (size_t k = 0; k < num_several; ++k) ++at[num_hosts(several[k]) + 1];
  at[2] = static_cast<int32_t>(num_single);
  for (size_t n = 3; n < num_ranks + 2; ++n) at[n] += at[n - 1];
  for (size_t k = 0; k < num_several; ++k) order[at[num_hosts(several[k])]++] = several[k];
}

void ForeignSlots::SortPairs(const Layer& state, LiveHosts* hosts) {
  const auto num_ranks = static_cast<size_t>(num_ranks_);
  const auto slots = static_cast<size_t>(slots_per_rank_);
  hosts->rank_first.resize(num_ranks + 1);
  hosts->of_rank.resize(hosts->ranks.size());
  int32_t* const of_rank = hosts->of_rank.data();
  const int32_t* const home_of_rank = state.homes.of_rank.data();
  const int32_t* const moved = moved_.data();
  size_t to = 0;
  for (size_t r = 0; r < num_ranks; ++r) {
    hosts->rank_first[r] = static_cast<int32_t>(to);
    const auto end = static_cast<size_t>(state.homes.rank_first[r + 1]);
    for (auto k = static_cast<size_t>(state.homes.rank_first[r]); k < end; ++k) {
      of_rank[to++] = moved[home_of_rank[k]];
    }
    for (size_t i = r * slots; i < (r + 1) * slots; ++i) {
      if (state.experts[i] < 0) continue;
      of_rank[to++] = hosts->Find(state.experts[i], static_cast<int32_t>(r));
    }
  }
  hosts->rank_first[num_ranks] = static_cast<int32_t>(to);
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
  const bool only_homes = !std::exchange(state.any, true);
  Rebuild(state, &spare_);
  std::swap(state.hosts, spare_);  // spare_: the hosts before the moves
  carried_.assign(state.hosts.ranks.size(), 0);
  if (only_homes) {
    for (size_t i = 0; i < moved_.size(); ++i)
      carried_[static_cast<size_t>(moved_[i])] = (*quota)[i];
    std::swap(*quota, carried_);
    return;
  }
  // Both by expert, then rank. A pair without tokens is perhaps no longer there.
  const LiveHosts& before = spare_;
  const LiveHosts& hosts = state.hosts;
  size_t to = 0;
  for (size_t i = 0; i < before.ranks.size(); ++i) {
    const int64_t tokens = (*quota)[i];
    if (tokens == 0) continue;
    while (hosts.expert_of[to] != before.expert_of[i] || hosts.ranks[to] != before.ranks[i]) ++to;
    carried_[to] = tokens;
  }
  std::swap(*quota, carried_);
}

}  // namespace switchyard
