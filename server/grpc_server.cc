#include "server/grpc_server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/grpc_generate.h"
#include "switchyard/v1/inference.grpc.pb.h"

namespace switchyard {
namespace {

constexpr char kServiceName[] = "switchyard.v1.Inference";
constexpr int kMaxMessageBytes = 16 << 20;

class InferenceService final : public v1::Inference::CallbackService {
 public:
  InferenceService(FrontEnd* front_end, GrpcCallCount* calls)
      : front_end_(front_end), calls_(calls) {}

  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(
      grpc::CallbackServerContext* context, const v1::GenerateRequest* request) override {
    return StartGrpcGenerate(front_end_, calls_, context, request);
  }

 private:
  FrontEnd* const front_end_;
  GrpcCallCount* const calls_;
};

}  // namespace

struct GrpcServer::State {
  explicit State(FrontEnd* front_end) : service(front_end, &calls) {}

  GrpcCallCount calls;
  InferenceService service;
  std::unique_ptr<grpc::Server> server;
};

GrpcServer::GrpcServer(FrontEnd* front_end) : state_(new State(front_end)) {}

GrpcServer::~GrpcServer() { Stop(std::chrono::system_clock::now()); }

absl::StatusOr<uint16_t> GrpcServer::Start(const std::string& host, uint16_t port) {
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  const std::string address = absl::StrContains(host, ':') ? absl::StrCat("[", host, "]:", port)
                                                           : absl::StrCat(host, ":", port);
  int bound = 0;
  grpc::ServerBuilder builder;
  builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &bound);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // a port in use is an error
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  builder.RegisterService(&state_->service);
  state_->server = builder.BuildAndStart();
  if (state_->server == nullptr || bound == 0) {
    state_->server = nullptr;
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", address, " for gRPC: is the port in use?"));
  }
  SetServing(false);
  return static_cast<uint16_t>(bound);
}

void GrpcServer::SetServing(bool serving) {
  if (state_->server == nullptr) return;
  auto* health = state_->server->GetHealthCheckService();
  health->SetServingStatus("", serving);
  health->SetServingStatus(kServiceName, serving);
}

bool GrpcServer::WaitIdle(std::chrono::steady_clock::time_point deadline) {
  return state_->calls.WaitIdle(deadline);
}

void GrpcServer::Stop(std::chrono::system_clock::time_point deadline) {
  if (state_->server == nullptr) return;
  state_->server->Shutdown(deadline);
  state_->server->Wait();
  state_->calls.WaitIdle(std::chrono::steady_clock::time_point::max());
  state_->server = nullptr;
}

}  // namespace switchyard
