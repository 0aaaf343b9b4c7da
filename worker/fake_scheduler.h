// FakeScheduler: the scheduler's side of the control plane for tests: a Control service whose every
// message is scripted by the test. It remembers what each worker said until the test asks for it.
// Methods may be called from any thread; waits end after a minute with a failure.
#pragma once

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "comm/expert_placement.h"
#include "gtest/gtest.h"
#include "kernels/mutex.h"
#include "proto/step_wire.h"
#include "switchyard/v1/control.grpc.pb.h"

namespace switchyard {

class FakeScheduler final : public v1::Control::Service {
 public:
  using Case = v1::WorkerMessage::MessageCase;

  FakeScheduler() {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 1000);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  ~FakeScheduler() override {
    {
      MutexLock lock(mu_);
      for (auto& [id, peer] : peers_) {
        if (!peer->over) peer->context->TryCancel();
      }
    }
    server_->Shutdown(std::chrono::system_clock::now());
    server_->Wait();
    server_.reset();  // its handlers use the members below
  }

  std::string address() const { return absl::StrCat("127.0.0.1:", port_); }

  // What the next registrations meet.
  void SetToken(const std::string& token) {
    MutexLock lock(mu_);
    token_ = token;
  }
  void SetRefusal(const std::string& reason) {
    MutexLock lock(mu_);
    refusal_ = reason;
  }
  void SetIncarnation(uint64_t incarnation) {
    MutexLock lock(mu_);
    incarnation_ = incarnation;
  }
  void SetMaxRows(int32_t rows) {
    MutexLock lock(mu_);
    max_rows_ = rows;
  }
  void SetForeignSlots(int32_t slots) {
    MutexLock lock(mu_);
    foreign_slots_ = slots;
  }
  // Of the epochs that are installed from now on; as measured unless set.
  void SetCosts(const v1::PlanCosts& costs) {
    MutexLock lock(mu_);
    costs_ = costs;
  }
  // Called with every StepDone, on a gRPC thread.
  void SetOnResult(std::function<void(StepResult)> on_result) {
    MutexLock lock(mu_);
    on_result_ = std::move(on_result);
  }

  // The next worker that registered and was not returned before: its id.
  uint64_t NextWorker(v1::Register* registration) {
    MutexLock lock(mu_);
    const bool came = Await([&]() SY_REQUIRES(mu_) { return peers_.count(next_) > 0; });
    EXPECT_TRUE(came) << "no worker " << next_ << " registered";
    if (!came) return 0;
    *registration = peers_.at(next_)->registration;
    return next_++;
  }

  void Send(uint64_t worker, const v1::SchedulerMessage& message) {
    std::shared_ptr<Peer> peer;
    {
      MutexLock lock(mu_);
      peer = peers_.at(worker);
    }
    MutexLock lock(peer->write_mu);
    if (!peer->ended) peer->stream->Write(message);
  }
  uint64_t Incarnation(uint64_t worker) {  // that it was told
    MutexLock lock(mu_);
    return peers_.at(worker)->incarnation;
  }
  void Break(uint64_t worker) {
    MutexLock lock(mu_);
    if (!peers_.at(worker)->over) peers_.at(worker)->context->TryCancel();
  }

  // The next message of that kind from that worker; those before it are forgotten. Heartbeats are
  // kept apart: the newest.
  v1::WorkerMessage Expect(uint64_t worker, Case kind) {
    MutexLock lock(mu_);
    Peer& peer = *peers_.at(worker);
    v1::WorkerMessage found;
    const bool came = Await([&]() SY_REQUIRES(mu_) {
      while (!peer.messages.empty()) {
        found = std::move(peer.messages.front());
        peer.messages.pop_front();
        if (found.message_case() == kind) return true;
      }
      return false;
    });
    EXPECT_TRUE(came) << "worker " << worker << " did not send message " << kind;
    return found;
  }
  bool ExpectEnd(uint64_t worker) {
    MutexLock lock(mu_);
    return Await([&]() SY_REQUIRES(mu_) { return peers_.at(worker)->over; });
  }
  v1::Heartbeat ExpectHeartbeat(uint64_t worker,
                                const std::function<bool(const v1::Heartbeat&)>& wanted) {
    MutexLock lock(mu_);
    Peer& peer = *peers_.at(worker);
    EXPECT_TRUE(Await([&]() SY_REQUIRES(mu_) { return peer.beats > 0 && wanted(peer.heartbeat); }));
    return peer.heartbeat;
  }

  // ---- an epoch ----

  void Assign(uint64_t worker, uint64_t assignment, const ExpertPlacement& placement,
              int32_t rank) {
    v1::SchedulerMessage message;
    message.mutable_assign()->set_assignment(assignment);
    for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
      v1::ExpertList* list = message.mutable_assign()->add_layers();
      for (int32_t expert : placement.ExpertsOf(layer, rank)) list->add_experts(expert);
    }
    Send(worker, message);
  }

  struct Member {
    uint64_t worker = 0;
    std::string data_address;
  };
  // `members`: attention workers, then expert workers. Does not wait.
  void Install(uint64_t epoch, const std::vector<Member>& members, int32_t num_attention,
               const ExpertPlacement& placement, const std::string& balance = "auto") {
    v1::SchedulerMessage message;
    v1::Install* install = message.mutable_install();
    install->set_epoch(epoch);
    install->set_num_attention(num_attention);
    install->set_secret(absl::StrCat("secret ", epoch));
    install->set_balance(balance);
    {
      MutexLock lock(mu_);
      if (costs_) *install->mutable_costs() = *costs_;
    }
    for (const Member& member : members) {
      v1::Member* out = install->add_members();
      out->set_worker(member.worker);
      out->set_data_address(member.data_address);
    }
    for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
      for (int32_t expert = 0; expert < placement.num_experts(); ++expert) {
        v1::HostList* hosts = install->add_hosts();
        for (int32_t rank : placement.Hosts(layer, expert)) hosts->add_ranks(rank);
      }
    }
    for (size_t rank = 0; rank < members.size(); ++rank) {
      install->set_rank(static_cast<int32_t>(rank));
      Send(members[rank].worker, message);
    }
  }
  void Abort(uint64_t worker, uint64_t epoch) {
    v1::SchedulerMessage message;
    message.mutable_abort()->set_epoch(epoch);
    Send(worker, message);
  }
  void SendStep(uint64_t worker, const StepPlan& plan) {
    v1::SchedulerMessage message;
    ToWire(plan, message.mutable_step()->mutable_plan());
    Send(worker, message);
  }

 private:
  struct Peer {
    grpc::ServerContext* context = nullptr;
    grpc::ServerReaderWriter<v1::SchedulerMessage, v1::WorkerMessage>* stream = nullptr;
    v1::Register registration;
    uint64_t incarnation = 0;
    Mutex write_mu;
    bool ended SY_GUARDED_BY(write_mu) = false;
    // Guarded by the scheduler's mu_.
    bool over = false;
    std::deque<v1::WorkerMessage> messages;
    v1::Heartbeat heartbeat;
    int64_t beats = 0;
  };

  template <typename Condition>
  bool Await(const Condition& condition) SY_REQUIRES(mu_) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (!condition()) {
      if (!changed_.WaitUntil(mu_, deadline)) return condition();
    }
    return true;
  }

  grpc::Status Session(
      grpc::ServerContext* context,
      grpc::ServerReaderWriter<v1::SchedulerMessage, v1::WorkerMessage>* stream) override {
    v1::WorkerMessage message;
    if (!stream->Read(&message) || !message.has_register_()) return grpc::Status::CANCELLED;
    auto peer = std::make_shared<Peer>();
    peer->context = context;
    peer->stream = stream;
    peer->registration = message.register_();
    {
      v1::SchedulerMessage welcome;
      MutexLock lock(mu_);
      const auto sent = context->client_metadata().find("authorization");
      const std::string wanted = absl::StrCat("Bearer ", token_);
      if (!token_.empty() && (sent == context->client_metadata().end() ||
                              std::string(sent->second.data(), sent->second.size()) != wanted)) {
        return {grpc::StatusCode::UNAUTHENTICATED, "the cluster token is wrong"};
      }
      if (!refusal_.empty()) return {grpc::StatusCode::FAILED_PRECONDITION, refusal_};
      const uint64_t id = last_++;
      welcome.mutable_welcome()->set_worker(id);
      welcome.mutable_welcome()->set_scheduler_incarnation(incarnation_);
      welcome.mutable_welcome()->set_heartbeat_ms(20);
      welcome.mutable_welcome()->set_max_num_batched_tokens(max_rows_);
      welcome.mutable_welcome()->set_foreign_slots(foreign_slots_);
      stream->Write(welcome);
      peer->incarnation = incarnation_;
      peers_[id] = peer;
      changed_.NotifyAll();
    }
    while (stream->Read(&message)) {
      std::function<void(StepResult)> on_result;
      {
        MutexLock lock(mu_);
        if (message.has_heartbeat()) {
          peer->heartbeat = message.heartbeat();
          ++peer->beats;
        } else if (message.has_step_done()) {
          on_result = on_result_;
        } else {
          peer->messages.push_back(message);
        }
        changed_.NotifyAll();
      }
      if (on_result) on_result(FromWire(message.step_done().result()));
    }
    {
      MutexLock lock(peer->write_mu);
      peer->ended = true;
    }
    MutexLock lock(mu_);
    peer->over = true;
    changed_.NotifyAll();
    return grpc::Status::OK;
  }

  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
  Mutex mu_;
  CondVar changed_;
  std::map<uint64_t, std::shared_ptr<Peer>> peers_ SY_GUARDED_BY(mu_);
  uint64_t next_ SY_GUARDED_BY(mu_) = 1;  // not yet returned by NextWorker
  uint64_t last_ SY_GUARDED_BY(mu_) = 1;  // next id
  std::string token_ SY_GUARDED_BY(mu_);
  std::string refusal_ SY_GUARDED_BY(mu_);
  uint64_t incarnation_ SY_GUARDED_BY(mu_) = 1;
  int32_t max_rows_ SY_GUARDED_BY(mu_) = 256;
  int32_t foreign_slots_ SY_GUARDED_BY(mu_) = 0;
  std::optional<v1::PlanCosts> costs_ SY_GUARDED_BY(mu_);
  std::function<void(StepResult)> on_result_ SY_GUARDED_BY(mu_);
};

}  // namespace switchyard
