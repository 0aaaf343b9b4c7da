// WorkerClient: the scheduler's view of the cell's workers. Implemented over workers in this
// process, and by fakes in the scheduler's tests.
#pragma once

#include <cstdint>
#include <functional>

#include "proto/step_plan.h"

namespace switchyard {

class WorkerClient {
 public:
  virtual ~WorkerClient() = default;
  virtual int32_t num_attention_workers() const = 0;
  // Rises while a step makes progress, so that a long step is told from a hanging one. Any thread.
  virtual uint64_t progress() const = 0;

  // Sends `plan` to attention worker `worker` (one of plan.header.participants). The result arrives
  // through the callback given to SetResultCallback, on any thread. Expert workers get the header
  // from the client itself, once per step.
  virtual void Execute(int32_t worker, StepPlan plan) = 0;

  // Called once, before the first Execute. The function may be called as long as the client lives;
  // results that come after the scheduler has gone are ignored.
  virtual void SetResultCallback(std::function<void(StepResult)> on_result) = 0;
};

}  // namespace switchyard
