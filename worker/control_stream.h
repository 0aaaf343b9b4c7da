// ControlStream: the worker's end of one control stream (proto control.proto): a queue of messages
// each way, and how the stream ended. It moves messages and decides nothing. Send and Cancel may be
// called from any thread and never block; Receive belongs to the role's owner thread. No gRPC type
// but the status appears here.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "switchyard/v1/control.pb.h"

namespace switchyard {

struct ControlAddress {
  std::string scheduler;  // HOST:PORT
  std::string token;      // "": none is sent
  // mTLS, PEM files; all three or none.
  std::string certificate, private_key, ca;
};

class ControlStream {
 public:
  // More messages than this waiting to be written: the scheduler does not read, the stream is cut.
  static constexpr size_t kMaxQueuedOut = 1024;
  // More than this waiting to be taken: no more are read.
  static constexpr size_t kMaxQueuedIn = 64;

  // Begins to connect. kInvalidArgument, kNotFound: the certificate files.
  static absl::StatusOr<std::unique_ptr<ControlStream>> Open(const ControlAddress& address);
  ~ControlStream();  // cancels and waits until gRPC is done; not on a gRPC thread

  // Lost when the stream has ended, or ends before it was written.
  void Send(v1::WorkerMessage message);
  // The next message; none when the stream has ended or `deadline` passed.
  std::optional<v1::SchedulerMessage> Receive(std::chrono::steady_clock::time_point deadline);
  bool ended() const;
  // Why it ended, as the scheduler or gRPC said; kUnavailable when it ended in order. REQUIRES:
  // ended().
  absl::Status status() const;
  void Cancel();

 private:
  class Call;
  explicit ControlStream(std::unique_ptr<Call> call);
  const std::unique_ptr<Call> call_;
};

}  // namespace switchyard
