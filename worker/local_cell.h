// LocalCell: attention and expert workers of one process as separate ranks, joined by an in-process
// communicator: each attention worker has a thread of its own, all expert workers share one. It
// loads the checkpoint, decides the memory, and hands step plans to the workers. Create may block
// for minutes (loading); Execute may be called from one thread at a time and only enqueues. A
// failure of any worker ends the cell: every step under way and every later one is answered with an
// error. The destructor ends all waits and joins all threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/communicator.h"
#include "comm/expert_placement.h"
#include "kernels/mutex.h"
#include "kernels/thread_pool.h"
#include "proto/model_info.h"
#include "proto/step_plan.h"
#include "worker/attention_worker.h"
#include "worker/expert_worker.h"
#include "worker/routing_recorder.h"
#include "worker/weight_formats.h"

namespace switchyard {

struct CellOptions {
  std::string model_dir;
  int attention_workers = 1;
  int expert_workers = 2;
  int threads = 0;             // of the compute pool, in total; 0: all cores
  std::string dtype = "auto";  // "auto": as stored; "float32", "bfloat16"
  std::string isa = "auto";    // of the CPU back end: "auto", "avx512", "avx2", "portable"
  int max_model_len = 0;       // tokens; 0: max_position_embeddings
  WeightFormatOptions formats = {};
  int64_t kv_cache_memory = 0;  // bytes for all attention workers; 0: what the sequences can use,
                                // at most half of what weights and buffers leave of the memory
  int max_num_seqs = 256;       // bounds the default of kv_cache_memory
  int max_num_batched_tokens = 2048;  // rows of a step over all participants; sizes all buffers
  PlannerOptions planner;           // how each layer's copies are balanced over the experts' hosts
  bool measure_plan_costs = false;  // planner.costs is replaced by what this machine takes
  RoutingRecorderOptions recorder;  // with a path: routing is recorded
  std::shared_ptr<const ExpertPlacement> placement;           // null: even, without replicas
  std::function<void(int64_t done, int64_t total)> progress;  // bytes of the checkpoint loaded
};

class LocalCell {
 public:
  static absl::StatusOr<std::unique_ptr<LocalCell>> Create(const CellOptions& options);
  ~LocalCell();
  LocalCell(const LocalCell&) = delete;
  LocalCell& operator=(const LocalCell&) = delete;

  const ModelInfo& model_info() const { return info_; }
  int num_attention_workers() const { return static_cast<int>(attention_.size()); }
  int num_expert_workers() const { return static_cast<int>(expert_weights_.size()); }
  const ExpertPlacement& placement() const { return *placement_; }
  // Rises while any step computes (a layer of an attention worker is one); any thread.
  uint64_t progress() const;
  // Any thread.
  const WorkerCounters& expert_counters(int worker) const {
    return *expert_counters_[static_cast<size_t>(worker)];
  }
  const AttentionWeights& attention_weights() const { return *attention_weights_; }
  const ExpertWeights& expert_weights(int worker) const {
    return *expert_weights_[static_cast<size_t>(worker)];
  }
  ThreadPool* pool() { return pool_.get(); }
  RoutingRecorder* recorder() { return recorder_.get(); }  // null: routing is not recorded

  // Called before the first Execute; called on the workers' threads, also during destruction when
  // steps are under way.
  void SetResultCallback(std::function<void(StepResult)> on_result);
  // Sends `plan` to attention worker `worker`, one of plan.header.participants. The first plan of a
  // step also opens the step at the expert workers. REQUIRES: all plans of a step come before any
  // of the next.
  void Execute(int worker, StepPlan plan);

 private:
  struct Parts;  // what Create gathers before there is a cell

  LocalCell() = default;
  static absl::Status Load(const CellOptions& options, Parts* parts);
  static absl::Status PlanMemory(const CellOptions& options, Parts* parts);
  void StartWorkers(const CellOptions& options, Parts* parts);
  void Fail(const absl::Status& reason);

  // Constant after Create. Workers go first: they use the rest.
  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<RoutingRecorder> recorder_;
  std::vector<std::unique_ptr<Communicator>> communicators_;
  std::shared_ptr<const AttentionWeights> attention_weights_;
  std::vector<std::shared_ptr<const ExpertWeights>> expert_weights_;  // one per expert worker
  std::vector<std::unique_ptr<KvCache>> kv_;                          // one per attention worker
  std::vector<std::shared_ptr<WorkerCounters>> counters_;             // one per attention worker
  std::vector<std::shared_ptr<WorkerCounters>> expert_counters_;
  ModelInfo info_;
  std::shared_ptr<const ExpertPlacement> placement_;
  std::function<void(StepResult)> on_result_;
  std::atomic<bool> failed_{false};  // any thread
  // Caller of Execute only: the newest step, and the attention workers that have its plan.
  bool any_step_ = false;
  uint64_t last_step_ = 0;
  std::vector<uint8_t> sent_;
  // Constant after Create.
  std::vector<std::unique_ptr<AttentionWorker>> attention_;
  std::unique_ptr<ExpertWorker> experts_;  // all of them
};

}  // namespace switchyard
