// ExpertWorker: the owner thread of the expert ranks of one process in one epoch. It runs all of
// them in turn, layer by layer: whoever waits for one of them waits for all, and a thread more than
// there are cores would only have to be woken. Execute may be called from any thread and only
// enqueues. Steps run strictly in order.
#pragma once

#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "kernels/thread_pool.h"
#include "proto/step_plan.h"
#include "worker/expert_rank.h"
#include "worker/step_queue.h"

namespace switchyard {

class ExpertWorker {
 public:
  // Starts the thread. `pool` and the ranks' communicators must outlive it. on_failure is called
  // once, on this worker's thread, with the first error of a rank; then all of them quit. REQUIRES:
  // at least one rank.
  ExpertWorker(std::vector<std::unique_ptr<ExpertRank>> ranks, ThreadPool* pool,
               std::function<void(const absl::Status&)> on_failure);
  // REQUIRES: the communicators were aborted or no step runs.
  ~ExpertWorker();

  // At most StepQueue::kMaxSteps may be waiting.
  void Execute(StepHeader step);

 private:
  void Run();
  absl::Status RunStep(const StepHeader& step);
  void CountSteps(int64_t change);

  // Constant after construction; the ranks are used by the owner thread only.
  const std::vector<std::unique_ptr<ExpertRank>> ranks_;
  const std::function<void(const absl::Status&)> on_failure_;

  StepQueue<StepHeader> queue_;
  std::thread thread_;  // last: it uses the members above
};

}  // namespace switchyard
