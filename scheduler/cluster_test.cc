// The cluster's end of the control plane against scripted workers over gRPC: registration, what an
// assignment says, and whom it sends away.
#include "scheduler/cluster.h"

#include <grpcpp/grpcpp.h>

#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/step_wire.h"
#include "switchyard/v1/control.grpc.pb.h"

namespace switchyard {
namespace {

using std::chrono::milliseconds;
using testing::AllOf;
using testing::HasSubstr;

constexpr std::chrono::seconds kLong{60};
constexpr int32_t kLayers = 2;
constexpr int32_t kExperts = 4;

ClusterOptions Options() {
  ClusterOptions options;
  options.control_port = 0;
  options.model.name = "scripted";
  options.model.num_moe_layers = kLayers;
  options.model.num_experts = kExperts;
  options.model.max_model_len = 64;
  options.model.block_size = 16;
  options.heartbeat = std::chrono::seconds(10);  // scripted workers send none
  return options;
}

std::unique_ptr<Cluster> Start(const ClusterOptions& options) {
  absl::StatusOr<std::unique_ptr<Cluster>> cluster = Cluster::Create(options);
  EXPECT_TRUE(cluster.ok()) << cluster.status();
  return cluster.ok() ? *std::move(cluster) : nullptr;
}

// One control stream, used on the test's thread; every wait ends after a minute.
class ScriptedWorker {
 public:
  explicit ScriptedWorker(const Cluster& cluster)
      : stub_(v1::Control::NewStub(
            grpc::CreateChannel(absl::StrCat("127.0.0.1:", cluster.control_port()),
                                grpc::InsecureChannelCredentials()))) {
    context_.set_deadline(std::chrono::system_clock::now() + kLong);
    stream_ = stub_->Session(&context_);
  }
  ~ScriptedWorker() { context_.TryCancel(); }

  void Send(const v1::WorkerMessage& message) { stream_->Write(message); }
  void Register(v1::WorkerRole role) {
    v1::WorkerMessage message;
    v1::Register* registration = message.mutable_register_();
    registration->set_protocol_version(kProtocolVersion);
    registration->set_version(SWITCHYARD_VERSION);
    registration->set_name("scripted");
    registration->set_role(role);
    registration->set_data_address("nowhere");
    registration->set_num_kv_blocks(16);
    registration->set_max_model_len(64);
    Send(message);
  }
  // The next message of this kind; others are forgotten. One without a kind when the stream ended.
  v1::SchedulerMessage Expect(v1::SchedulerMessage::MessageCase kind) {
    v1::SchedulerMessage message;
    while (stream_->Read(&message)) {
      if (message.message_case() == kind) return message;
    }
    ADD_FAILURE() << "the stream ended without message " << kind;
    return {};
  }
  // How the stream ends.
  grpc::Status End() {
    v1::SchedulerMessage message;
    while (stream_->Read(&message)) {
    }
    return stream_->Finish();
  }
  // Answers an assignment. `delta` is added to each checksum of the layer 1.
  void SendLoaded(const v1::Assign& assign, uint64_t delta) {
    v1::WorkerMessage message;
    v1::Loaded* loaded = message.mutable_loaded();
    loaded->set_assignment(assign.assignment());
    for (int32_t layer = 0; layer < assign.layers_size(); ++layer) {
      for (int32_t expert : assign.layers(layer).experts()) {
        v1::ExpertSum* sum = loaded->add_sums();
        sum->set_layer(layer);
        sum->set_expert(expert);
        sum->set_checksum(static_cast<uint64_t>(0xa0 + layer * 16 + expert) +
                          (layer == 1 ? delta : 0));
      }
    }
    Send(message);
  }
  void AcknowledgeInstall() {
    const v1::SchedulerMessage install = Expect(v1::SchedulerMessage::kInstall);
    v1::WorkerMessage message;
    message.mutable_installed()->set_epoch(install.install().epoch());
    Send(message);
  }

 private:
  grpc::ClientContext context_;
  const std::unique_ptr<v1::Control::Stub> stub_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::WorkerMessage, v1::SchedulerMessage>> stream_;
};

TEST(ClusterTest, WhoDoesNotRegisterIsHungUpOn) {
  ClusterOptions options = Options();
  options.register_timeout = milliseconds(1000);
  const std::unique_ptr<Cluster> cluster = Start(options);
  ScriptedWorker worker(*cluster);
  worker.Register(v1::WORKER_ROLE_ATTENTION);
  worker.Expect(v1::SchedulerMessage::kWelcome);
  ScriptedWorker silent(*cluster);
  const grpc::Status end = silent.End();
  EXPECT_EQ(end.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_EQ(end.error_message(), "no registration within 1000 ms");
  // Not the one that did.
  v1::WorkerMessage drain;
  drain.mutable_drain();
  worker.Send(drain);
  worker.Expect(v1::SchedulerMessage::kGoodbye);
}

TEST(ClusterTest, OnlySoManyMayBeUnregistered) {
  ClusterOptions options = Options();
  options.max_unregistered = 2;
  options.register_timeout = milliseconds(1000);
  const std::unique_ptr<Cluster> cluster = Start(options);
  std::vector<std::unique_ptr<ScriptedWorker>> workers;
  for (int i = 0; i < 5; ++i) workers.push_back(std::make_unique<ScriptedWorker>(*cluster));
  std::map<int, int> ends;
  for (const auto& worker : workers) ++ends[worker->End().error_code()];
  EXPECT_EQ(ends[grpc::StatusCode::RESOURCE_EXHAUSTED], 3);
  EXPECT_EQ(ends[grpc::StatusCode::DEADLINE_EXCEEDED], 2);
  // There is room again.
  ScriptedWorker late(*cluster);
  late.Register(v1::WORKER_ROLE_ATTENTION);
  late.Expect(v1::SchedulerMessage::kWelcome);
}

TEST(ClusterTest, WhoLoadsOtherWeightsIsToldWhyAndRefused) {
  const std::unique_ptr<Cluster> cluster = Start(Options());
  cluster->SetEventCallback([&](WorkerEvent event) {  // a scheduler without a step in flight
    if (const auto* pause = std::get_if<EpochPause>(&event)) cluster->Paused(pause->epoch);
  });
  ScriptedWorker attention(*cluster);
  attention.Register(v1::WORKER_ROLE_ATTENTION);
  attention.Expect(v1::SchedulerMessage::kWelcome);
  ScriptedWorker expert(*cluster);
  expert.Register(v1::WORKER_ROLE_EXPERT);
  const v1::SchedulerMessage first = expert.Expect(v1::SchedulerMessage::kAssign);
  EXPECT_EQ(first.assign().bytes_per_step(), 0) << "the cell waits for it";
  expert.SendLoaded(first.assign(), 0);
  attention.AcknowledgeInstall();
  expert.AcknowledgeInstall();

  ScriptedWorker other(*cluster);
  other.Register(v1::WORKER_ROLE_EXPERT);
  const v1::SchedulerMessage second = other.Expect(v1::SchedulerMessage::kAssign);
  EXPECT_EQ(second.assign().bytes_per_step(), Options().load_bytes_per_step) << "it goes on";
  other.SendLoaded(second.assign(), 0x100);
  const grpc::Status end = other.End();
  EXPECT_EQ(end.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  const int32_t e = second.assign().layers(1).experts(0);
  EXPECT_THAT(end.error_message(),
              AllOf(HasSubstr("worker 3 (scripted) holds other weights"),
                    HasSubstr(absl::StrCat("expert ", e, " of MoE layer 1 is 00000000000001b", e)),
                    HasSubstr(absl::StrCat("that of worker 2 00000000000000b", e))));
  // One that has the same may come.
  ScriptedWorker same(*cluster);
  same.Register(v1::WORKER_ROLE_EXPERT);
  same.SendLoaded(same.Expect(v1::SchedulerMessage::kAssign).assign(), 0);
  attention.Expect(v1::SchedulerMessage::kAbort);
}

}  // namespace
}  // namespace switchyard
