// ExpertRank: the expert role's rank in one epoch. Holds whole experts and knows no sequences: for
// every MoE layer and micro-batch of a step it receives rows from each participant, runs them
// through its experts and sends every (token, expert) result back. The next micro-batch's rows
// arrive meanwhile. Used by one thread. A message that does not fit the step (epoch, step, layer,
// plan hash, sizes) is an error that names the rank, never a wait without end.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "comm/communicator.h"
#include "comm/dispatch_planner.h"
#include "comm/exchange_layout.h"
#include "comm/expert_placement.h"
#include "kernels/backend.h"
#include "kernels/thread_pool.h"
#include "proto/step_plan.h"
#include "worker/foreign_experts.h"
#include "worker/moe_exchange.h"
#include "worker/weights.h"
#include "worker/worker_counters.h"

namespace switchyard {

struct ExpertRankOptions {
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

class ExpertRank {
 public:
  // `pool` and `communicator` must outlive it.
  ExpertRank(const ExpertRankOptions& options, std::shared_ptr<const ExpertWeights> weights,
             std::shared_ptr<const ExpertPlacement> placement,
             std::unique_ptr<ComputeBackend> backend, ThreadPool* pool, Communicator* communicator);

  static int64_t BufferBytes(const ExchangeShape& shape, const CellRanks& ranks);
  // The largest calls that it makes of its back end. `width`: of the widest expert.
  static ScratchLimits MaxCalls(const ExchangeShape& shape, DType act, int64_t hidden,
                                int64_t width);

  // A step: BeginStep, then Compute and Answer for every MoE layer and, within it, micro-batch.
  // Errors say where they happened and are final: Quit must follow, and nothing else.
  absl::Status BeginStep(const StepHeader& step);
  // Waits for the rows and computes those whose weights are here; others' weights are under way.
  // `key` must live until Answer returned.
  absl::Status Compute(const ExchangeKey& key);
  // Computes the rest and sends the results. With one micro-batch they may still be under way, with
  // the receives of the next layer's rows, until Compute has waited for both.
  absl::Status Answer(const ExchangeKey& key);
  void Quit(const absl::Status& reason) { communicator_->Quit(reason); }

  int32_t num_moe_layers() const { return options_.num_moe_layers; }
  WorkerCounters& counters() const { return *options_.counters; }

 private:
  std::span<RecvOp> Receives(const StepHeader& step, int32_t layer, int32_t micro_batch);
  absl::Status Plan(const ExchangeKey& key);
  void CountPlan(std::chrono::nanoseconds duration);
  absl::Status ComputeHere(const ExchangeKey& key);
  absl::Status ComputeMoved();
  void WriteResults(const ExchangeKey& key);
  absl::Status SendResults(const ExchangeKey& key);
  absl::Status At(int32_t layer, uint64_t step, const absl::Status& status) const;
  void GatherBatch();
  const MlpWeights& Foreign(int32_t layer, int32_t expert) const;
  void FindGroups(int32_t layer);
  void RunGroups(std::span<const MlpGroup> groups);

  // Constant after construction.
  const ExpertRankOptions options_;
  const std::shared_ptr<const ExpertWeights> weights_;
  const std::unique_ptr<ComputeBackend> backend_;
  ThreadPool* const pool_;
  Communicator* const communicator_;

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
  Buffer combine_;       // all combine messages of an exchange, one after the other
  bool moving_ = false;  // weights are under way, from Compute to Answer
};

}  // namespace switchyard
