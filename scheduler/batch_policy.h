// The batching policy: which sequences get how many rows in the next step. A pure function of
// values, any thread; the SchedulerCore turns running sequences into candidates and the answer into
// step plans.
#pragma once

#include <cstdint>
#include <vector>

#include "proto/step_plan.h"

namespace switchyard {

struct RowCandidate {
  SequenceId sequence = 0;
  int32_t pending = 0;     // rows it could use: known tokens without KV, ≥ 1
  bool decoding = false;   // one row, which draws its next token
  bool alone = false;      // struck twice: must not share a step
  uint64_t last_step = 0;  // in which it last had rows
};

struct RowPick {
  SequenceId sequence = 0;
  int32_t count = 0;
};

// Rows kept for prefill in every step, so that decodes that fill the budget cannot starve it.
int32_t PrefillReserve(int32_t budget);

// At most `budget` rows in all. A candidate that must run alone gets the step for itself (the
// oldest of them). Otherwise decodes come first, the longest waiting ones when not all fit, then
// prefills, in order of their ids, split where the budget ends. Candidates and picks ascend by
// sequence. Never empty when there are candidates. REQUIRES: budget ≥ 1.
std::vector<RowPick> PickRows(const std::vector<RowCandidate>& candidates, int32_t budget);

}  // namespace switchyard
