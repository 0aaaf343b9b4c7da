#include "scheduler/batch_policy.h"

#include <algorithm>
#include <tuple>

#include "kernels/check.h"

namespace switchyard {

int32_t PrefillReserve(int32_t budget) { return budget < 2 ? 0 : std::max(1, budget / 8); }

std::vector<RowPick> PickRows(const std::vector<RowCandidate>& candidates, int32_t budget) {
  SY_CHECK_GE(budget, 1);
  int64_t prefill_rows = 0;
  std::vector<const RowCandidate*> decodes;
  for (const RowCandidate& c : candidates) {
    SY_CHECK_GE(c.pending, 1);
    if (c.alone) return {{c.sequence, std::min(c.pending, budget)}};
    if (c.decoding) {
      decodes.push_back(&c);
    } else {
      prefill_rows += c.pending;
    }
  }
  const int64_t reserve = std::min<int64_t>(PrefillReserve(budget), prefill_rows);
  const size_t num_decodes =
      std::min(decodes.size(), static_cast<size_t>(std::max<int64_t>(0, budget - reserve)));
  if (num_decodes < decodes.size()) {
    std::nth_element(decodes.begin(), decodes.begin() + num_decodes, decodes.end(),
                     [](const RowCandidate* a, const RowCandidate* b) {
                       return std::tie(a->last_step, a->sequence) <
                              std::tie(b->last_step, b->sequence);
                     });
    decodes.resize(num_decodes);
  }
  std::vector<RowPick> picks;
  for (const RowCandidate* c : decodes) picks.push_back({c->sequence, 1});
  int32_t left = budget - static_cast<int32_t>(num_decodes);
  for (const RowCandidate& c : candidates) {
    if (c.decoding || left == 0) continue;
    const int32_t count = std::min(c.pending, left);
    picks.push_back({c.sequence, count});
    left -= count;
  }
  std::sort(picks.begin(), picks.end(),
            [](const RowPick& a, const RowPick& b) { return a.sequence < b.sequence; });
  return picks;
}

}  // namespace switchyard
