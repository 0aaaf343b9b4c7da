// ExpertWorker: the expert role. Holds whole experts and knows no sequences: for every MoE layer
// and micro-batch of a step it receives rows from each participant, runs them through its experts
// and sends every (token, expert) result back. The next micro-batch's rows arrive meanwhile. One
// owner thread of its own; Execute may be called from any thread and only enqueues. Steps run
// strictly in order. A message that does not fit the step (epoch, step, layer, plan hash, sizes) is
// an error that names the rank, never a wait without end.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "comm/communicator.h"
#include "comm/dispatch_planner.h"
#include "comm/exchange_layout.h"
#include "comm/expert_placement.h"
#include "kernels/backend.h"
#include "kernels/mutex.h"
#include "kernels/thread_pool.h"
#include "proto/step_plan.h"
#include "worker/foreign_experts.h"
#include "worker/moe_exchange.h"
#include "worker/weights.h"
#include "worker/worker_counters.h"

namespace switchyard {

struct ExpertWorkerOptions {
  int32_t expert_rank = 0;
  int32_t num_moe_layers = 0;
  int64_t hidden = 0;
  int64_t expert_width = 0;                // of every expert: a model has one for all of them
  std::vector<WeightFormat> slot_formats;  // [num_moe_layers], of the foreign slots
  ExchangeShape exchange;
  CellRanks ranks;
  PlannerOptions planner;
  std::shared_ptr<WorkerCounters> counters;
};

class ExpertWorker {
 public:
  // Starts the thread. `pool` and `communicator` must outlive it. on_failure is called once, on
  // this worker's thread.
  ExpertWorker(const ExpertWorkerOptions& options, std::shared_ptr<const ExpertWeights> weights,
               std::shared_ptr<const ExpertPlacement> placement,
               std::unique_ptr<ComputeBackend> backend, ThreadPool* pool,
               Communicator* communicator, std::function<void(const absl::Status&)> on_failure);
  // REQUIRES: its communicator was aborted or no step runs.
  ~ExpertWorker();

  static int64_t BufferBytes(const ExchangeShape& shape, const CellRanks& ranks);
  // The largest calls that it makes of its back end. `width`: of the widest expert.
  static ScratchLimits MaxCalls(const ExchangeShape& shape, DType act, int64_t hidden,
                                int64_t width);

  void Execute(StepHeader step);

 private:
  static constexpr size_t kMaxQueuedSteps = 8;

  void Run();
  absl::Status RunStep(const StepHeader& step);
  absl::Status RunExchange(const StepHeader& step, const ExchangeKey& key);
  absl::Status StartReceives(const StepHeader& step, int32_t layer, int32_t micro_batch);
  absl::Status Plan(const StepHeader& step, const ExchangeKey& key);
  void CountPlan(std::chrono::nanoseconds duration);
  absl::Status Compute(const ExchangeKey& key);
  void GatherBatch();
  const MlpWeights& Foreign(int32_t layer, int32_t expert) const;
  void FindGroups(int32_t layer);
  void RunGroups(std::span<const MlpGroup> groups);
  absl::Status Answer(const StepHeader& step, const ExchangeKey& key);

  // Constant after construction.
  const ExpertWorkerOptions options_;
  const std::shared_ptr<const ExpertWeights> weights_;
  const std::unique_ptr<ComputeBackend> backend_;
  ThreadPool* const pool_;
  Communicator* const communicator_;
  const std::function<void(const absl::Status&)> on_failure_;

  // Owner thread only.
  absl::Status failed_;
  DispatchPlanner planner_;
  ForeignExperts foreign_;
  DispatchPlan plan_;
  ExpertBatch batch_;
  std::vector<int32_t> counts_;        // [num_participants, num_experts]
  std::vector<DispatchView> views_;    // [num_participants]
  std::vector<MlpGroup> groups_;       // whose weights are here
  std::vector<MlpGroup> late_groups_;  // whose weights this plan moves here
  // The messages of one micro-batch, of the layer that it has reached; the communicator's group of
  // the same number receives them.
  struct Incoming {
    ExchangeShape shape;
    std::vector<RecvOp> recvs;
    std::vector<Buffer> counts_messages;    // [num_attention]
    std::vector<Buffer> dispatch_messages;  // [num_attention]
  };
  std::array<Incoming, kMaxMicroBatches> incoming_;
  std::vector<SendOp> sends_;
  Buffer grouped_;                            // [max copies, hidden] act, by expert
  Buffer results_;                            // the same rows after the experts
  std::vector<std::byte*> combine_messages_;  // [num_participants] in combine_
  Buffer combine_;  // all combine messages of an exchange, one after the other

  Mutex mu_;
  CondVar changed_;
  std::deque<StepHeader> queue_ SY_GUARDED_BY(mu_);
  bool stopping_ SY_GUARDED_BY(mu_) = false;

  std::thread thread_;  // last: it uses the members above
};

}  // namespace switchyard
