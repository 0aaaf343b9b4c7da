#include "server/grpc_server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/mutex.h"
#include "server/grpc_generate.h"
#include "switchyard/v1/inference.grpc.pb.h"

namespace switchyard {
namespace {

constexpr char kServiceName[] = "switchyard.v1.Inference";

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
  State(const GrpcServerOptions& grpc_options, FrontEnd* shared_front_end)
      : options(grpc_options),
        front_end(shared_front_end),
        calls(grpc_options.max_calls),
        service(front_end, &calls) {}

  const GrpcServerOptions options;
  FrontEnd* const front_end;
  GrpcCallCount calls;
  InferenceService service;
  std::unique_ptr<grpc::Server> server;
  std::thread health_thread;

  Mutex mu;
  CondVar stop_health;
  bool stopping SY_GUARDED_BY(mu) = false;

  void UpdateHealth() SY_REQUIRES(mu);
  void FollowHealth() SY_EXCLUDES(mu);
};

GrpcServer::GrpcServer(const GrpcServerOptions& options, FrontEnd* front_end)
    : state_(new State(options, front_end)) {}

GrpcServer::~GrpcServer() { Stop(std::chrono::system_clock::now()); }

absl::StatusOr<uint16_t> GrpcServer::Start(const std::string& host) {
  const GrpcServerOptions& options = state_->options;
  const uint16_t port = options.port;
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  const std::string address = absl::StrContains(host, ':') ? absl::StrCat("[", host, "]:", port)
                                                           : absl::StrCat(host, ":", port);
  int bound = 0;
  grpc::ServerBuilder builder;
  builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &bound);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // a port in use is an error
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, options.max_streams_per_connection);
  builder.SetMaxReceiveMessageSize(options.max_message_bytes);
  grpc::ResourceQuota quota("switchyard");
  builder.SetResourceQuota(quota.Resize(options.max_buffer_bytes));
  builder.RegisterService(&state_->service);
  state_->server = builder.BuildAndStart();
  if (state_->server == nullptr || bound == 0) {
    state_->server = nullptr;
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", address, " for gRPC: is the port in use?"));
  }
  UpdateHealth();
  state_->health_thread = std::thread([state = state_.get()] { state->FollowHealth(); });
  return static_cast<uint16_t>(bound);
}

void GrpcServer::UpdateHealth() {
  MutexLock lock(state_->mu);
  if (!state_->stopping && state_->server != nullptr) state_->UpdateHealth();
}

void GrpcServer::State::UpdateHealth() {
  const bool serving = front_end->Health().ok();
  auto* health = server->GetHealthCheckService();
  health->SetServingStatus("", serving);
  health->SetServingStatus(kServiceName, serving);
}

void GrpcServer::State::FollowHealth() {
  MutexLock lock(mu);
  while (!stopping) {
    UpdateHealth();
    stop_health.WaitUntil(mu, std::chrono::steady_clock::now() + options.health_interval);
  }
}

bool GrpcServer::WaitIdle(std::chrono::steady_clock::time_point deadline) {
  return state_->calls.WaitIdle(deadline);
}

void GrpcServer::Stop(std::chrono::system_clock::time_point deadline) {
  if (state_->server == nullptr) return;
  {
    MutexLock lock(state_->mu);
    state_->stopping = true;
  }
  state_->stop_health.NotifyAll();
  state_->health_thread.join();
  state_->server->Shutdown(deadline);
  state_->server->Wait();
  state_->calls.WaitIdle(std::chrono::steady_clock::time_point::max());
  state_->server = nullptr;
}

}  // namespace switchyard
