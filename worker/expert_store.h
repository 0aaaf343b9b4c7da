// ExpertStore: the packed experts that one expert worker holds, across epochs. A loader thread of
// its own brings in what an assignment asks for while the current epoch serves from snapshots of
// its own, no faster than its budget per step allows; an expert is read once and shared from then
// on. Assign, CountStep, Install and the counters may be called from any thread. What is loaded for
// an assignment stays until the next placement is installed.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/expert_placement.h"
#include "kernels/backend.h"
#include "kernels/mutex.h"
#include "worker/load_budget.h"
#include "worker/model_facts.h"
#include "worker/weights.h"
#include "worker/worker_counters.h"

namespace switchyard {

class ExpertStore {
 public:
  using ExpertLists = std::vector<std::vector<int32_t>>;  // [num_moe_layers], ascending
  struct Sum {  // of an expert's packed weights; the same for all workers of one numerics id
    int32_t layer = 0;
    int32_t expert = 0;
    uint64_t checksum = 0;
  };
  using Done = std::function<void(const std::vector<Sum>&)>;

  // `model` must outlive it; `backend` packs; `counters`: of the worker that serves meanwhile.
  ExpertStore(const OpenedModel* model, std::unique_ptr<ComputeBackend> backend,
              std::shared_ptr<const WorkerCounters> counters);
  ~ExpertStore();

  // The whole set to hold from now on. What is missing is loaded in the background, while steps run
  // at most `bytes_per_step` per step (0: as fast as it can), then `done` is called on the loader's
  // thread with the sums of that set. An assignment under way is replaced: its `done` is never
  // called. REQUIRES: num_moe_layers lists of experts of the model.
  void Assign(ExpertLists experts, int64_t bytes_per_step, Done done);
  void CountStep();  // the worker was given one
  // Its `done` will not be called, unless it is being called now.
  void CancelAssignment();

  // A snapshot of what `rank` serves under this placement; the rest is dropped, except for an
  // assignment under way. kFailedPrecondition, naming the first, when experts are missing; nothing
  // is dropped then.
  absl::StatusOr<std::shared_ptr<const ExpertWeights>> Install(const ExpertPlacement& placement,
                                                               int32_t rank);

  // Experts that would be held at once if `experts` were assigned now.
  int64_t CountWith(const ExpertLists& experts) const;
  // Not while the budget holds it back: a step that hangs is no fault of the loader.
  bool loading() const;
  uint64_t progress() const { return loaded_.load(); }  // experts loaded since the start

 private:
  struct Held {
    std::shared_ptr<const MlpWeights> weights;
    uint64_t checksum = 0;
  };
  struct Assignment {
    uint64_t number = 0;  // 0: none
    ExpertLists experts;
    Done done;  // null when it was called
  };

  void Run();
  Held Load(int32_t layer, int32_t expert);
  const Held& At(int32_t layer, int32_t expert) const SY_REQUIRES(mu_);
  // The first expert of the assignment that is missing; expert -1: none.
  struct Place {
    int32_t layer = 0;
    int32_t expert = -1;
  };
  Place FirstMissing() const SY_REQUIRES(mu_);
  std::vector<Sum> Sums() const SY_REQUIRES(mu_);  // of the assignment
  // Waits for an expert that may be loaded now, or for an assignment without one that is missing.
  // False: it stops.
  bool AwaitNext(Place* next) SY_REQUIRES(mu_);

  // Constant after construction.
  const OpenedModel* const model_;
  const std::unique_ptr<ComputeBackend> backend_;  // loader thread only
  const std::shared_ptr<const WorkerCounters> counters_;

  std::atomic<uint64_t> loaded_{0};

  mutable Mutex mu_;
  CondVar changed_;
  std::vector<std::vector<Held>> held_ SY_GUARDED_BY(mu_);  // [num_moe_layers][num_experts]
  Assignment assignment_ SY_GUARDED_BY(mu_);
  LoadBudget budget_ SY_GUARDED_BY(mu_);
  bool held_back_ SY_GUARDED_BY(mu_) = false;
  bool stopping_ SY_GUARDED_BY(mu_) = false;

  std::thread thread_;  // last: it uses the members above
};

}  // namespace switchyard
