// WorkerProcess: the workers of this process whose scheduler is another process: one RoleSession
// per role, one model, one compute pool, one sum of memory. Create may block for minutes (loading
// what every attention worker holds); experts are loaded when the scheduler says which. The public
// methods may be called from any thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/mutex.h"
#include "kernels/thread_pool.h"
#include "worker/model_facts.h"
#include "worker/process_memory.h"
#include "worker/role_session.h"

namespace switchyard {

using WrapHost = std::function<std::unique_ptr<RoleHost>(std::unique_ptr<RoleHost>)>;

struct WorkerProcessOptions {
  std::vector<v1::WorkerRole> roles;  // each at most once
  ModelFactsOptions model;
  ControlAddress control;
  std::string data_host = "127.0.0.1";  // address of a local interface that the peers can reach
  int threads = 0;                      // of the compute pool, in total; 0: all cores
  int64_t kv_cache_memory = 0;  // bytes; 0: what the sequences can use, at most half of what
                                // weights and buffers leave of the memory
  int64_t expert_memory = 0;    // bytes for expert weights; 0: as many experts as told
  std::string name;             // for people
  std::function<void(int64_t done, int64_t total)> progress;  // bytes of the checkpoint loaded
  std::function<void(const RegisteredRole&)> on_registered;   // at every registration
  WrapHost wrap_host;  // may put a host of its own around each; the tests' workers do
};

class WorkerProcess {
 public:
  // Starts to look for the scheduler when everything is loaded. Errors: the model, the options, too
  // little memory.
  static absl::StatusOr<std::unique_ptr<WorkerProcess>> Create(const WorkerProcessOptions& options);
  ~WorkerProcess();

  // None when `time` passed and a role still runs. OK: all have left in order. Else the first
  // reason why one cannot serve; the others are stopped then.
  std::optional<absl::Status> WaitFor(std::chrono::milliseconds time);
  // Asks the scheduler to let every role go.
  void Drain();

 private:
  WorkerProcess() = default;
  absl::Status PlanMemory(const WorkerProcessOptions& options);
  std::unique_ptr<RoleHost> MakeHost(v1::WorkerRole role, const WorkerProcessOptions& options);

  // Constant after Create.
  OpenedModel model_;
  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<ComputeBackend> backend_;  // for what is done before there are workers
  std::unique_ptr<ProcessMemory> memory_;
  int32_t home_slots_ = 0;
  int32_t kv_blocks_ = 0;

  Mutex mu_;
  CondVar changed_;  // a session has ended

  std::vector<std::unique_ptr<RoleSession>> sessions_;  // first to go
};

}  // namespace switchyard
