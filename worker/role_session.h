// RoleSession: one role of this process and the scheduler, from registration to farewell. A thread
// of its own owns the role's RoleHost, data plane and communicator; it connects, registers, follows
// the scheduler's messages (proto control.proto) and connects again when the stream breaks, for as
// long as it takes. A second thread sends the heartbeats, so that a long step or load is not taken
// for death. Whether somebody is dead is never decided here. The public methods may be called from
// any thread.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "comm/communicator.h"
#include "comm/data_plane.h"
#include "kernels/mutex.h"
#include "kernels/thread_pool.h"
#include "proto/model_info.h"
#include "switchyard/v1/control.pb.h"
#include "worker/control_stream.h"
#include "worker/role_host.h"
#include "worker/waiting_communicator.h"

namespace switchyard {

struct RegisteredRole {
  v1::WorkerRole role = v1::WORKER_ROLE_UNSPECIFIED;
  uint64_t worker = 0;  // the id that the scheduler gave
  std::string data_address;
};

struct RoleSessionOptions {
  ControlAddress control;
  std::string data_host = "127.0.0.1";
  ModelInfo model;
  ThreadPool* pool = nullptr;  // the process's; must outlive the session
  v1::Register registration;   // what all roles of a process share
  std::function<void(const RegisteredRole&)> on_registered;  // at every registration
  std::function<void()> on_end;                              // once, when result() is there
};

const char* RoleName(v1::WorkerRole role);

class RoleSession {
 public:
  // Starts the threads.
  RoleSession(RoleSessionOptions options, std::unique_ptr<RoleHost> host);
  ~RoleSession();  // Stop, then joins

  // Asks the scheduler to let it go; ends OK when it does, or when there is no stream.
  void Drain();
  // Ends at once: for the scheduler that is a death.
  void Stop();
  // None while it runs. OK: it left in order. Else why it cannot serve: it was refused, or what it
  // was told does not fit its memory.
  std::optional<absl::Status> result() const;

 private:
  void Run();
  absl::Status Serve();  // until it ends for good
  // One stream, from its opening to its end. OK: connect again. kCancelled: the session ends in
  // order. Else why it ends.
  absl::Status ServeOnce();
  absl::Status NoteBreak(const absl::Status& why, const char* what);
  absl::Status Register(ControlStream* stream);
  absl::Status Follow(ControlStream* stream);
  absl::Status OnMessage(ControlStream* stream, const v1::SchedulerMessage& message);
  absl::Status OnInstall(ControlStream* stream, const v1::Install& install);
  void OnStep(ControlStream* stream, const v1::Step& step);
  void EndEpoch(const absl::Status& reason);
  // False when the session was stopped or drained meanwhile.
  bool Sleep(std::chrono::milliseconds time);

  void SendHeartbeats();
  v1::WorkerMessage MakeHeartbeat() const;
  // What changed since `told`, which becomes the present; none without traffic.
  std::optional<v1::WorkerMessage> MakeMoeStats(std::vector<uint64_t>* told,
                                                uint64_t* told_rows) const;
  void AddCounters(v1::MoeStats* stats) const;

  // Constant after construction.
  const RoleSessionOptions options_;
  const std::unique_ptr<RoleHost> host_;

  DataPlaneFigures figures_;         // of all epochs
  std::atomic<bool> ending_{false};  // the epoch, on purpose: errors are no news

  // Session thread only.
  uint64_t scheduler_incarnation_ = 0;  // the newest seen
  int32_t foreign_slots_ = 0;
  absl::Status last_break_;  // logged once as long as it stays the same
  std::unique_ptr<DataPlane> data_plane_;
  uint64_t epoch_ = 0;       // installed; 0: none
  uint64_t last_epoch_ = 0;  // of this stream, installed or not
  std::unique_ptr<Communicator> communicator_;

  mutable Mutex mu_;
  CondVar changed_;
  std::shared_ptr<ControlStream> stream_ SY_GUARDED_BY(mu_);  // null: between two of them
  bool registered_ SY_GUARDED_BY(mu_) = false;                // on stream_
  std::chrono::milliseconds heartbeat_ SY_GUARDED_BY(mu_){0};
  bool draining_ SY_GUARDED_BY(mu_) = false;
  bool stopping_ SY_GUARDED_BY(mu_) = false;
  std::optional<absl::Status> result_ SY_GUARDED_BY(mu_);

  std::thread heartbeats_;  // last: they use the members above
  std::thread thread_;
};

}  // namespace switchyard
