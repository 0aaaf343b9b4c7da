// Epochs as the scheduler sees them: who computes, and when that changes. Plain values that the
// control plane (or the adapter over the workers of this process) hands to the scheduler; expert
// workers and placement are not in them, because the scheduler plans without knowing those.
//
//   EpochView e ──▶ steps of e ──▶ EpochPause e ──▶ Paused(e) ──▶ EpochView e'    nothing is lost
//                        └───────▶ EpochEnd e ─────────────────▶ EpochView e'    the step is lost
//
// Epoch numbers rise and are never used again. EpochPause and EpochEnd of another epoch than the
// last one viewed are stale and ignored; EpochEnd may follow EpochPause, which is void then.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "proto/step_plan.h"

namespace switchyard {

struct AttentionMember {
  uint64_t worker = 0;  // never reused: another incarnation is another id
  int32_t num_kv_blocks = 0;
};

// All members have installed the epoch: steps may be sent. A worker that was in the epoch before
// has its KV still, whatever its rank was; it is told everything else anew.
struct EpochView {
  uint64_t epoch = 0;
  std::vector<AttentionMember> attention;  // by attention rank
};

// Finish the step in flight and plan no more, then call WorkerClient::Paused(epoch).
struct EpochPause {
  uint64_t epoch = 0;
};

// The epoch is dead, what is in flight is lost. With neither field set nobody died: a link between
// workers failed, which is no sequence's fault.
struct EpochEnd {
  uint64_t epoch = 0;
  std::vector<uint64_t> lost_attention;  // worker ids
  bool expert_lost = false;
};

// No epoch could be formed for too long: everything accepted ends with `status`, and new requests
// are refused with it, until the next EpochView.
struct Unavailable {
  absl::Status status;
};

using WorkerEvent = std::variant<StepResult, EpochView, EpochPause, EpochEnd, Unavailable>;

}  // namespace switchyard
