// AttentionWorker: the attention role in one epoch. Serves a subset of the sequences: keeps their
// token ids, runs each StepPlan through the Decoder and samples. Their KV is in a cache that it is
// given: it stays when the epoch ends, and the next epoch's plans say whose blocks are whose. One
// owner thread of its own; Execute may be called from any thread and only enqueues. Steps run
// strictly in order.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "comm/communicator.h"
#include "kernels/backend.h"
#include "kernels/thread_pool.h"
#include "proto/step_plan.h"
#include "worker/decoder.h"
#include "worker/routing_recorder.h"
#include "worker/sequence_table.h"
#include "worker/step_queue.h"
#include "worker/worker_counters.h"

namespace switchyard {

struct AttentionWorkerOptions {
  int32_t index = 0;     // its rank, and StepResult::worker
  int32_t max_rows = 0;  // in one step
  SequenceLimits limits;
  ExchangeShape exchange;
  CellRanks ranks;
  PlannerOptions planner;
  std::shared_ptr<WorkerCounters> counters;
  // These outlive the worker.
  ThreadPool* pool = nullptr;
  KvCache* kv = nullptr;                 // at least limits.num_blocks blocks
  Communicator* communicator = nullptr;  // this rank's
  RoutingRecorder* recorder = nullptr;   // null: routing is not recorded
};

class AttentionWorker {
 public:
  struct Callbacks {
    std::function<void(StepResult)> on_result;  // on this worker's thread
    std::function<void(const absl::Status&)>
        on_failure;  // before the result that carries the error
  };

  // Starts the thread.
  AttentionWorker(const AttentionWorkerOptions& options, const ModelConfig& config,
                  std::shared_ptr<const AttentionWeights> weights,
                  std::shared_ptr<const ExpertPlacement> placement,
                  std::unique_ptr<ComputeBackend> backend, Callbacks callbacks);
  // REQUIRES: its communicator was aborted or no step runs, or this waits for the step's end.
  ~AttentionWorker();

  // At most StepQueue::kMaxSteps may be waiting.
  void Execute(StepPlan plan);

 private:
  void Run();
  StepResult RunStep(const StepPlan& plan);
  absl::Status ComputeStep(const StepPlan& plan, StepResult* result);
  absl::Status BuildBatch(const StepPlan& plan);
  absl::Status Forward(const StepPlan& plan);
  void SampleTokens(const StepPlan& plan, StepResult* result);
  void ScorePrompt(const SequenceWork& work, int32_t first_row, SequenceResult* result);
  SamplingRow MakeSamplingRow(const SequenceWork& work);

  // Constant after construction.
  const AttentionWorkerOptions options_;
  const Callbacks callbacks_;
  const std::unique_ptr<ComputeBackend> backend_;

  // Owner thread only.
  MoeExchange exchange_;
  Decoder decoder_;
  SequenceTable table_;
  absl::Status failed_;                      // the first error; every later step answers with it
  std::vector<int32_t> tokens_, positions_;  // [rows]
  std::vector<uint32_t> profiles_;           // [rows]
  std::vector<SequenceRows> sequences_;      // one per work of the plan
  std::vector<SamplingRow> sampling_;        // of the rows that are sampled at once
  std::vector<SampledToken> sampled_;

  StepQueue<StepPlan> queue_;
  std::thread thread_;  // last: it uses the members above
};

}  // namespace switchyard
