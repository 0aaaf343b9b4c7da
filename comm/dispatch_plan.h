// DispatchPlan: who computes which (token, expert) copies of one layer, and which expert weights
// move for it. Made by DispatchPlanner; every rank of a step makes the identical plan. Integers
// only. Its owner reuses it from layer to layer, so nothing grows after the largest plan.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

namespace switchyard {

// `copies` copies of an expert go to expert rank `rank`.
struct DispatchShare {
  int32_t rank = 0;
  int32_t copies = 0;
  friend bool operator==(const DispatchShare&, const DispatchShare&) = default;
};

// The shares of one source for one expert, ascending by rank: the sources take from the expert's
// shares in turn, so they are a stretch of those. A view of the plan.
class SourceShares {
 public:
  class Iterator {
   public:
    Iterator(const DispatchShare* at, int32_t taken, int32_t left)
        : at_(at), taken_(taken), left_(left) {}
    DispatchShare operator*() const { return {at_->rank, std::min(at_->copies - taken_, left_)}; }
    Iterator& operator++() {
      left_ -= std::min(at_->copies - taken_, left_);
      ++at_;
      taken_ = 0;
      return *this;
    }
    bool operator!=(const Iterator& end) const { return left_ != end.left_; }

   private:
    const DispatchShare* at_;
    int32_t taken_;  // copies of *at_ that earlier sources have
    int32_t left_;
  };

  // `shares`: of the expert; `before`: copies of earlier sources; `copies`: of this one.
  SourceShares(const DispatchShare* shares, int32_t before, int32_t copies)
      : at_(shares), taken_(before), copies_(copies) {
    if (copies == 0) return;
    for (; taken_ >= at_->copies; ++at_) taken_ -= at_->copies;
  }
  Iterator begin() const { return {at_, taken_, copies_}; }
  Iterator end() const { return {nullptr, 0, 0}; }

 private:
  const DispatchShare* at_;
  int32_t taken_;
  int32_t copies_;
};

// Before this layer is computed expert rank `from_rank`, a home of the expert, sends its weights to
// `to_rank`, which keeps them in foreign slot `slot` of the layer. What was in the slot is not read
// by this plan.
struct WeightMove {
  int32_t expert = 0;
  int32_t from_rank = 0;
  int32_t to_rank = 0;
  int32_t slot = 0;
  friend bool operator==(const WeightMove&, const WeightMove&) = default;
};

// What the plan was made by (BALANCE.md section 1).
enum class PlanRegime : uint8_t {
  kPlain,      // every copy at the expert's first home
  kActivated,  // A: whole experts, fewest distinct ones per rank
  kReplicas,   // B: tokens split over the replicas
  kSpill,      // C: weights moved
  kEven,       // tokens split evenly over the homes
};
const char* PlanRegimeName(PlanRegime regime);

struct DispatchPlan {
  int32_t num_sources = 0;
  int32_t num_experts = 0;
  int32_t num_ranks = 0;
  std::vector<int32_t> first;         // [num_experts + 1] into shares
  std::vector<DispatchShare> shares;  // of all sources: by expert, then rank; none without copies
  // [num_sources + 1, num_experts] copies of the sources before this one; last all of them.
  std::vector<int32_t> before;
  std::vector<WeightMove> moves;  // by to_rank, then expert

  PlanRegime regime = PlanRegime::kPlain;
  int64_t tau_ps = 0;          // modelled cost of the most loaded rank, transfers included
  int64_t lower_bound_ps = 0;  // no plan that the options allow can have a smaller tau
  int64_t plain_tau_ps = 0;    // of plain expert parallelism on the same counts
  int64_t total_copies = 0;
  int64_t max_rank_copies = 0;  // load of the most loaded rank
  int64_t plain_max_rank_copies = 0;
  int64_t spilled_copies = 0;  // computed from a foreign slot
  uint64_t hash = 0;           // over the whole plan; stands in data headers

  // Copies that the source has for the expert.
  int32_t CopiesOf(int32_t source, int32_t expert) const {
    const size_t i = Index(source, expert);
    return before[i + static_cast<size_t>(num_experts)] - before[i];
  }
  // Who computes them.
  SourceShares Of(int32_t source, int32_t expert) const {
    return {shares.data() + first[static_cast<size_t>(expert)], before[Index(source, expert)],
            CopiesOf(source, expert)};
  }
  size_t Index(int32_t source, int32_t expert) const {
    return static_cast<size_t>(source) * static_cast<size_t>(num_experts) +
           static_cast<size_t>(expert);
  }
  // tau over its lower bound, minus 1; for reports.
  double Gap() const {
    return lower_bound_ps == 0
               ? 0.0
               : static_cast<double>(tau_ps) / static_cast<double>(lower_bound_ps) - 1.0;
  }
};

}  // namespace switchyard
