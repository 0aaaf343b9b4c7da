// FailPoints: where a worker of the tests ends itself: a file, written while the worker runs, names
// (phase, steps from now, MoE layer) and what to do there. One per process; any thread. Only
// tests/failing_worker.cc links it.
//
//   phase   of an attention worker's layer: counts, counted, planned, dispatched, combined
//           of its step: step (the plan came), result (before it is sent), reported (after)
//           of an expert worker's layer: received (rows are here), computing, moving (weights are
//           on their way), moved, computed (before the answer), answered
//           of the control plane: load (loading has begun), loaded (before the scheduler hears of
//           it), quiesced (an epoch has ended, before the scheduler hears of it), install (before
//           the worker of the next epoch is made)
//   action  kill (SIGKILL), abort (as a failed CHECK), stall (this thread never returns)
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "kernels/mutex.h"

namespace switchyard {

class FailPoints {
 public:
  // SWITCHYARD_FAIL_FILE: the file to look for. SWITCHYARD_FAIL_TOKEN: an attention worker aborts
  // when it computes the row of this prompt token, after it has dispatched it.
  // SWITCHYARD_FAIL_ROW: an expert worker aborts when a row with this hash comes to its first MoE
  // layer; with "show" it prints the hashes instead, as "row HASH" on stderr.
  FailPoints();

  // Takes what the file says, if there is one: "PHASE STEPS LAYER ACTION", LAYER -1 for any.
  // `step`: the newest one of this process.
  void Poll(uint64_t step);
  // Does not return when this is the point: the phase, the layer, and the step or a later one. The
  // phases of the control plane have no step.
  void Pass(std::string_view phase, uint64_t step = UINT64_MAX, int32_t layer = -1);

  std::optional<int32_t> token() const { return token_; }
  // Of a row that came to MoE layer 0.
  void CheckRow(uint64_t hash);
  // Prints where, then aborts.
  [[noreturn]] static void Abort(std::string_view where);

 private:
  struct Armed {
    std::string phase;
    uint64_t step = 0;
    int32_t layer = -1;
    std::string action;
  };
  [[noreturn]] static void Fire(const Armed& armed, uint64_t step, int32_t layer);

  // Constant after construction.
  std::string file_;
  std::optional<int32_t> token_;
  std::optional<uint64_t> row_;
  bool show_rows_ = false;

  Mutex mu_;
  std::optional<Armed> armed_ SY_GUARDED_BY(mu_);
};

}  // namespace switchyard
