#include "worker/control_stream.h"

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/mutex.h"
#include "switchyard/v1/control.grpc.pb.h"

namespace switchyard {
namespace {

constexpr int kMaxMessageBytes = 256 << 20;  // a full plan of thousands of long sequences
// A cut network must be noticed here too: the scheduler's side has the heartbeats.
constexpr int kKeepaliveMs = 2000;
constexpr int kKeepaliveTimeoutMs = 4000;

// Orders a stream's construction before its callbacks where ThreadSanitizer can see it: gRPC's own
// ordering is in a library that is not instrumented.
std::atomic<uint64_t> streams_begun{0};

absl::StatusOr<std::string> ReadPem(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat("cannot open ", path));
  return std::string(std::istreambuf_iterator<char>(file), {});
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> Credentials(
    const ControlAddress& address) {
  const int given =
      !address.certificate.empty() + !address.private_key.empty() + !address.ca.empty();
  if (given == 0) return grpc::InsecureChannelCredentials();
  if (given != 3) {
    return absl::InvalidArgumentError(
        "mutual TLS needs all three of certificate, private key and CA");
  }
  grpc::SslCredentialsOptions ssl;
  for (const auto& [path, into] : {std::pair{&address.certificate, &ssl.pem_cert_chain},
                                   {&address.private_key, &ssl.pem_private_key},
                                   {&address.ca, &ssl.pem_root_certs}}) {
    absl::StatusOr<std::string> pem = ReadPem(*path);
    if (!pem.ok()) return pem.status();
    *into = *std::move(pem);
  }
  return grpc::SslCredentials(ssl);
}

}  // namespace

// A hold stands for the side that writes; it is given up once, when the stream closes. Must not be
// destroyed on a gRPC thread: that would end the channel, and with it the thread itself.
class ControlStream::Call final
    : public grpc::ClientBidiReactor<v1::WorkerMessage, v1::SchedulerMessage> {
 public:
  Call(std::shared_ptr<grpc::Channel> channel, const std::string& token)
      : stub_(v1::Control::NewStub(std::move(channel))) {
    if (!token.empty()) context_.AddMetadata("authorization", absl::StrCat("Bearer ", token));
    stub_->async()->Session(&context_, this);
  }

  void Start() {
    streams_begun.fetch_add(1, std::memory_order_release);
    AddHold();
    StartRead(&incoming_);
    StartCall();
  }

  void Send(v1::WorkerMessage message) {
    MutexLock lock(mu_);
    if (closed_) return;
    if (out_.size() >= kMaxQueuedOut) return Close();
    out_.push_back(std::move(message));
    if (out_.size() == 1) StartWrite(&out_.front());
  }

  std::optional<v1::SchedulerMessage> Receive(std::chrono::steady_clock::time_point deadline) {
    MutexLock lock(mu_);
    while (in_.empty()) {
      if (ended_ || !changed_.WaitUntil(mu_, deadline)) break;
    }
    if (in_.empty()) return std::nullopt;
    v1::SchedulerMessage message = std::move(in_.front());
    in_.pop_front();
    if (!reading_ && !closed_) {
      reading_ = true;
      StartRead(&incoming_);
    }
    return message;
  }

  bool ended() {
    MutexLock lock(mu_);
    return ended_ && in_.empty();
  }

  absl::Status status() {
    MutexLock lock(mu_);
    return status_;
  }

  void Cancel() {
    MutexLock lock(mu_);
    if (!ended_) Close();
  }

  void WaitUntilDone() {
    MutexLock lock(mu_);
    while (!ended_) changed_.Wait(mu_);
  }

 private:
  // No more writes and reads are begun. The stream then ends by itself or by the cancel.
  void Close() SY_REQUIRES(mu_) {
    context_.TryCancel();
    GiveUpHold();
  }
  void GiveUpHold() SY_REQUIRES(mu_) {
    if (std::exchange(closed_, true)) return;
    RemoveHold();
  }

  void OnReadDone(bool ok) override {
    streams_begun.load(std::memory_order_acquire);
    MutexLock lock(mu_);
    reading_ = false;
    if (!ok) return GiveUpHold();
    in_.push_back(std::move(incoming_));
    incoming_.Clear();
    if (in_.size() < kMaxQueuedIn && !closed_) {
      reading_ = true;
      StartRead(&incoming_);
    }
    changed_.NotifyAll();
  }

  void OnWriteDone(bool ok) override {
    streams_begun.load(std::memory_order_acquire);
    MutexLock lock(mu_);
    out_.pop_front();
    if (ok && !closed_ && !out_.empty()) StartWrite(&out_.front());
  }

  void OnDone(const grpc::Status& status) override {
    streams_begun.load(std::memory_order_acquire);
    MutexLock lock(mu_);
    status_ = status.ok() ? absl::UnavailableError("the scheduler closed the stream")
                          : absl::Status(static_cast<absl::StatusCode>(status.error_code()),
                                         status.error_message());
    ended_ = true;
    changed_.NotifyAll();
  }

  const std::unique_ptr<v1::Control::Stub> stub_;
  grpc::ClientContext context_;
  v1::SchedulerMessage incoming_;  // of the read under way

  Mutex mu_;
  CondVar changed_;
  std::deque<v1::WorkerMessage> out_ SY_GUARDED_BY(mu_);  // the front is being written
  std::deque<v1::SchedulerMessage> in_ SY_GUARDED_BY(mu_);
  bool reading_ SY_GUARDED_BY(mu_) = true;
  bool closed_ SY_GUARDED_BY(mu_) = false;
  bool ended_ SY_GUARDED_BY(mu_) = false;
  absl::Status status_ SY_GUARDED_BY(mu_);
};

absl::StatusOr<std::unique_ptr<ControlStream>> ControlStream::Open(const ControlAddress& address) {
  auto credentials = Credentials(address);
  if (!credentials.ok()) return credentials.status();
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  arguments.SetMaxSendMessageSize(kMaxMessageBytes);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  // A channel of its own, connected anew: a shared one would wait out another stream's back-off.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  auto call = std::make_unique<Call>(
      grpc::CreateCustomChannel(address.scheduler, *credentials, arguments), address.token);
  call->Start();
  return std::unique_ptr<ControlStream>(new ControlStream(std::move(call)));
}

ControlStream::ControlStream(std::unique_ptr<Call> call) : call_(std::move(call)) {}

ControlStream::~ControlStream() {
  call_->Cancel();
  call_->WaitUntilDone();
}

void ControlStream::Send(v1::WorkerMessage message) { call_->Send(std::move(message)); }

std::optional<v1::SchedulerMessage> ControlStream::Receive(
    std::chrono::steady_clock::time_point deadline) {
  return call_->Receive(deadline);
}

bool ControlStream::ended() const { return call_->ended(); }
absl::Status ControlStream::status() const { return call_->status(); }
void ControlStream::Cancel() { call_->Cancel(); }

}  // namespace switchyard
