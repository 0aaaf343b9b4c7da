// WorkerClient: the scheduler's view of the cell's workers. Implemented by the control plane, over
// the workers of this process, and by fakes in the scheduler's tests. Attention workers are named
// by their rank in the epoch that the client announced last (proto/epoch.h).
#pragma once

#include <cstdint>
#include <functional>

#include "proto/epoch.h"
#include "proto/step_plan.h"

namespace switchyard {

class WorkerClient {
 public:
  virtual ~WorkerClient() = default;
  // Rises while a step makes progress, so that a long step is told from a hanging one. Any thread.
  virtual uint64_t progress() const = 0;

  // Sends `plan` to attention rank `attention_rank` (one of plan.header.participants) of epoch
  // plan.header.epoch. The result arrives as an event; none need come once the epoch has ended, and
  // a plan of an epoch that ended is dropped. Expert workers get the header from the client itself,
  // once per step.
  virtual void Execute(int32_t attention_rank, StepPlan plan) = 0;

  // The steps in flight when EpochPause came have ended: the epoch is at rest. Not called when the
  // epoch has ended meanwhile.
  virtual void Paused(uint64_t epoch) = 0;

  // Called once, before the first Execute. Events may come on any thread, also during this call, as
  // long as the client lives; those that come after the scheduler has gone are ignored. Until the
  // first EpochView nothing is executed. A StepResult with an error strikes the sequences of its
  // rank and the epoch goes on: a client that ends the epoch instead sends EpochEnd and no such
  // result, or one step would strike twice.
  virtual void SetEventCallback(std::function<void(WorkerEvent)> on_event) = 0;
};

}  // namespace switchyard
