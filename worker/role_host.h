// RoleHost: what one role of a process keeps from epoch to epoch (weights, KV cache, counters), and
// the worker object of the epoch that runs. Owned by a RoleSession and used on its thread; the
// counters and loading state may be read by any thread. It knows no control stream.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "comm/communicator.h"
#include "kernels/thread_pool.h"
#include "proto/step_plan.h"
#include "switchyard/v1/control.pb.h"
#include "worker/model_facts.h"
#include "worker/process_memory.h"
#include "worker/rank_epoch.h"
#include "worker/weights.h"
#include "worker/worker_counters.h"

namespace switchyard {

// What the roles of one process share. Must outlive them.
struct HostContext {
  const OpenedModel* model = nullptr;
  ThreadPool* pool = nullptr;
  ProcessMemory* memory = nullptr;
  std::string isa;
};

class RoleHost {
 public:
  // On the worker's thread, between Begin and the end of End.
  struct Callbacks {
    std::function<void(StepResult)> on_result;  // of a step that succeeded
    std::function<void(const absl::Status&)> on_failure;
  };
  static constexpr int64_t kMaxSteps = 4;  // under way and waiting in one epoch

  virtual ~RoleHost() = default;
  virtual v1::WorkerRole role() const = 0;
  // The fields of the registration that are the role's.
  virtual void Describe(v1::Register* registration) const = 0;
  // Steps will have at most so many rows, expert workers so many foreign slots per layer.
  // kResourceExhausted when the buffers do not fit.
  virtual absl::Status Prepare(int32_t max_rows, int32_t foreign_slots) = 0;

  using LoadedCallback = std::function<void(const v1::Loaded&)>;
  // Expert role: the whole set to hold; `done` is called on another thread when it does.
  virtual absl::Status Assign(const v1::Assign& assign, LoadedCallback done) = 0;
  virtual void CancelAssignment() = 0;

  // Starts the worker of an epoch. REQUIRES: none runs; `communicator` outlives it.
  virtual absl::Status Begin(const RankEpoch& epoch, Communicator* communicator,
                             Callbacks callbacks) = 0;
  // REQUIRES: an epoch runs, fewer than kMaxSteps steps are under way.
  virtual void Execute(StepPlan plan) = 0;
  // Destroys the worker. REQUIRES: its communicator was aborted, or no step runs.
  virtual void End() = 0;

  virtual const WorkerCounters& counters() const = 0;
  virtual bool loading() const = 0;
  virtual uint64_t loaded() const = 0;  // parts of an assignment, since the start
};

// `kv_blocks` blocks; allocated here.
std::unique_ptr<RoleHost> MakeAttentionHost(const HostContext& context,
                                            std::shared_ptr<const AttentionWeights> weights,
                                            int32_t kv_blocks);
// `home_slots`: experts per layer that its memory holds, 0: as many as told. `costs`: as measured.
std::unique_ptr<RoleHost> MakeExpertHost(const HostContext& context, int32_t home_slots,
                                         const v1::PlanCosts& costs);

}  // namespace switchyard
