// ControlSession: the scheduler's end of one worker's control stream (proto control.proto). It
// moves messages and decides nothing. Send and Close may be called from any thread and never block;
// what arrives goes to the handler on a gRPC thread, one message at a time: the next is read when
// Next() is called. Lives until gRPC is done with it; the Cluster holds it by shared_ptr.
#pragma once

#include <grpcpp/grpcpp.h>

#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <string>

#include "kernels/mutex.h"
#include "switchyard/v1/control.grpc.pb.h"

namespace switchyard {

class ControlSession final
    : public grpc::ServerBidiReactor<v1::WorkerMessage, v1::SchedulerMessage>,
      public std::enable_shared_from_this<ControlSession> {
 public:
  struct Handler {
    std::function<void(const std::shared_ptr<ControlSession>&, v1::WorkerMessage)> on_message;
    // Once, after the last message: the stream is broken or was closed.
    std::function<void(const std::shared_ptr<ControlSession>&)> on_end;
  };

  // More messages than this waiting to be written: the worker does not read, so it is cut off.
  static constexpr size_t kMaxQueued = 1024;

  // gRPC owns it, and is given get(). Nothing is read before Next().
  static std::shared_ptr<ControlSession> Accept(grpc::CallbackServerContext* context,
                                                Handler handler);
  // Reads nothing: the call ends with `status`.
  static ControlSession* Refuse(grpc::CallbackServerContext* context, const grpc::Status& status);

  const std::string& peer() const { return peer_; }
  void Next();
  void Send(v1::SchedulerMessage message);
  // After what was sent. `abandon`: at once, without waiting for a peer that may never read.
  void Close(const grpc::Status& status, bool abandon);

 private:
  ControlSession(grpc::CallbackServerContext* context, Handler handler);
  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;
  void FinishIfIdle() SY_REQUIRES(mu_);

  // Constant after construction.
  grpc::CallbackServerContext* const context_;
  const Handler handler_;
  const std::string peer_;

  v1::WorkerMessage incoming_;  // of the read under way

  Mutex mu_;
  std::shared_ptr<ControlSession> self_ SY_GUARDED_BY(mu_);    // until OnDone
  std::deque<v1::SchedulerMessage> queue_ SY_GUARDED_BY(mu_);  // the front is being written
  bool closing_ SY_GUARDED_BY(mu_) = false;
  bool finished_ SY_GUARDED_BY(mu_) = false;
  grpc::Status status_ SY_GUARDED_BY(mu_);
};

}  // namespace switchyard
