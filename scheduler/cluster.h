// Cluster: the workers of a cell that are other processes. It listens on the control port,
// registers workers, carries out what the Membership decides, and is the scheduler's WorkerClient.
// One thread of its own owns the Membership; sessions enqueue to it, results and plans pass it by.
// All public methods may be called from any thread.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/model_info.h"
#include "scheduler/cluster_snapshot.h"
#include "scheduler/membership.h"
#include "scheduler/worker_client.h"

namespace switchyard {

struct ClusterOptions {
  std::string host = "127.0.0.1";
  uint16_t control_port = 9000;  // 0: the system chooses
  // Who may be a worker: whoever knows the token, or with certificates whoever has one signed by
  // `ca`. Without either the host must be a loopback address.
  std::string token;
  std::string certificate, private_key, ca;  // PEM files; all three or none

  // What workers must agree with; a difference is refused with both values named.
  ModelInfo model;
  uint64_t model_hash = 0;

  int32_t max_num_batched_tokens = 2048;
  std::string balance = "auto";  // planner of the dispatch: auto, none, eplb, llep
  int32_t foreign_slots = 0;     // per layer of an expert worker, for spilled weights
  int32_t min_expert_workers = 1;
  int32_t survive_expert_failures = 0;
  int32_t replica_slots = 0;  // per layer and expert worker, beyond one home per expert
  // What an expert worker may load per step that it serves, unless the cell waits; 0: no limit.
  int64_t load_bytes_per_step = 16 << 20;
  // Between looks at the load of the experts, to move homes and replicas; 0: they stay.
  std::chrono::milliseconds placement_interval{30'000};
  std::chrono::milliseconds heartbeat{250};  // eight missed ones are death
  // A connection that has not registered after so long is closed; more at once are refused.
  std::chrono::milliseconds register_timeout{10'000};
  int32_t max_unregistered = 256;
  std::chrono::milliseconds stall_timeout{60'000};
  std::chrono::milliseconds no_home_timeout{60'000};
};

class Cluster final : public WorkerClient {
 public:
  // kUnavailable, naming the address, when the port cannot be bound; kInvalidArgument: the options.
  static absl::StatusOr<std::unique_ptr<Cluster>> Create(const ClusterOptions& options);
  ~Cluster() override;  // closes every session

  uint16_t control_port() const;
  ClusterSnapshot Snapshot() const;
  // Called on the cluster's thread when the first cell runs (and never again).
  void SetReadyCallback(std::function<void()> on_ready);

  uint64_t progress() const override;
  void SetEventCallback(std::function<void(WorkerEvent)> on_event) override;
  void Execute(int32_t attention_rank, StepPlan plan) override;
  void Paused(uint64_t epoch) override;

 private:
  struct State;
  explicit Cluster(std::unique_ptr<State> state);
  const std::unique_ptr<State> state_;
};

}  // namespace switchyard
