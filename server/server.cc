#include "server/server.h"

#include "absl/strings/str_cat.h"
#include "server/http_routes.h"
#include "spdlog/spdlog.h"

namespace switchyard {
namespace {

// Between telling the last requests that they failed and cutting their connections.
constexpr std::chrono::seconds kGoodbye{2};

}  // namespace

struct Server::State {
  explicit State(const ServerOptions& server_options)
      : options(server_options),
        front_end(options.front_end),
        routes(&front_end),
        http(options.http,
             [this](HttpRequest request, const std::shared_ptr<HttpExchange>& exchange) {
               routes.Handle(std::move(request), exchange);
             }),
        grpc(options.grpc, &front_end) {}

  const ServerOptions options;
  FrontEnd front_end;
  HttpRoutes routes;
  HttpServer http;
  GrpcServer grpc;
  uint16_t http_port = 0;
  uint16_t grpc_port = 0;
  bool shut_down = false;
};

Server::Server(const ServerOptions& options) : state_(new State(options)) {}

Server::~Server() {
  if (state_->shut_down) return;
  state_->front_end.SetDraining();
  state_->front_end.FailAll(absl::UnavailableError("the server is shutting down"));
  state_->grpc.Stop(std::chrono::system_clock::now());
  state_->http.Stop();
}

absl::Status Server::Start() {
  const auto http_port = state_->http.Start();
  if (!http_port.ok()) return http_port.status();
  state_->http_port = *http_port;
  const auto grpc_port = state_->grpc.Start(state_->options.http.host);
  if (!grpc_port.ok()) return grpc_port.status();
  state_->grpc_port = *grpc_port;
  return absl::OkStatus();
}

uint16_t Server::http_port() const { return state_->http_port; }
uint16_t Server::grpc_port() const { return state_->grpc_port; }
void Server::SetLoading(int percent) { state_->front_end.SetLoading(percent); }

void Server::SetWaitsFor(std::function<std::string()> waits_for) {
  state_->front_end.SetWaitsFor(std::move(waits_for));
}

void Server::SetCluster(std::function<ClusterSnapshot()> cluster) {
  state_->front_end.SetCluster(std::move(cluster));
}

void Server::SetEngine(Engine engine) {
  state_->front_end.SetEngine(std::move(engine));
  state_->grpc.UpdateHealth();
}

std::function<void(const StepObservation&)> Server::step_observer() {
  return [metrics = &state_->front_end.metrics()](const StepObservation& step) {
    metrics->ObserveStep(step);
  };
}

void Server::Shutdown() {
  State& state = *state_;
  if (state.shut_down) return;
  state.shut_down = true;
  state.front_end.SetDraining();
  state.grpc.UpdateHealth();
  const auto begun = std::chrono::steady_clock::now();
  const auto deadline = begun + state.options.shutdown_timeout;
  const bool http_idle = state.http.WaitIdle(deadline);
  const bool grpc_idle = state.grpc.WaitIdle(deadline);
  if (!http_idle || !grpc_idle) {
    spdlog::warn("requests still ran after the shutdown timeout of {} ms; they end with an error",
                 state.options.shutdown_timeout.count());
    state.front_end.FailAll(absl::UnavailableError("the server is shutting down"));
    state.http.WaitIdle(std::chrono::steady_clock::now() + kGoodbye);
  }
  state.grpc.Stop(std::chrono::system_clock::now() + kGoodbye);
  state.http.Stop();
  state.front_end.StopPools();
}

}  // namespace switchyard
