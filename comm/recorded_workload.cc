#include "comm/recorded_workload.h"

#include <algorithm>
#include <numeric>

#include "kernels/check.h"

namespace switchyard {

RecordedWorkload::RecordedWorkload(const Spec& spec)
    : spec_(spec), begins_(spec.trace->SequenceBegins()) {
  SY_CHECK(!spec.trace->rows.empty() && spec.tokens >= 1 && spec.num_sources >= 1);
  const size_t num_sequences = begins_.size() - 1;
  const size_t most = spec.order == ReplayOrder::kDecode ? num_sequences : spec.trace->rows.size();
  tokens_ = static_cast<int32_t>(std::min(static_cast<size_t>(spec.tokens), most));
  counts_.resize(static_cast<size_t>(spec.num_sources) *
                 static_cast<size_t>(spec.trace->shape.num_experts));
  if (spec.order == ReplayOrder::kPrefill) return;
  const auto places = static_cast<size_t>(tokens_);
  for (size_t i = 0; i < places; ++i) {
    const size_t length = begins_[i + 1] - begins_[i];
    places_.push_back({i, begins_[i] + length * i / places});
  }
  next_sequence_ = places % num_sequences;
}

void RecordedWorkload::AddRow(size_t row, size_t source) {
  const auto num_experts = static_cast<size_t>(spec_.trace->shape.num_experts);
  for (uint16_t expert : spec_.trace->Experts(row, spec_.layer)) {
    if (expert == RoutingTrace::kNoExpert) continue;
    ++counts_[source % static_cast<size_t>(spec_.num_sources) * num_experts + expert];
  }
}

void RecordedWorkload::NextDecode() {
  for (size_t i = 0; i < places_.size(); ++i) {
    Place& place = places_[i];
    AddRow(place.row, i);
    if (++place.row < begins_[place.sequence + 1]) continue;
    place = {next_sequence_, begins_[next_sequence_]};
    next_sequence_ = (next_sequence_ + 1) % (begins_.size() - 1);
  }
}

void RecordedWorkload::NextPrefill() {
  for (int32_t t = 0; t < tokens_; ++t) {
    AddRow(next_.row, next_.sequence);
    if (++next_.row == begins_[next_.sequence + 1]) ++next_.sequence;
    if (next_.row == begins_.back()) next_ = {};
  }
}

std::span<const int32_t> RecordedWorkload::Next() {
  std::ranges::fill(counts_, 0);
  if (spec_.order == ReplayOrder::kDecode) NextDecode();
  if (spec_.order == ReplayOrder::kPrefill) NextPrefill();
  return counts_;
}

std::vector<int32_t> LayersToReplay(const RoutingTrace& trace) {
  const std::vector<RoutingLayerLoad> loads = RoutingLayerLoads(trace);
  std::vector<int32_t> order(loads.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, std::ranges::greater{}, [&](int32_t layer) {
    return loads[static_cast<size_t>(layer)].max_mean;
  });
  if (order.size() < 2) return order;
  return {order.front(), order[order.size() / 2]};
}

}  // namespace switchyard
