// HttpRoutes: the HTTP API: paths, methods, keys, content types, and one handler per endpoint.
// Handle runs on I/O threads and only enqueues: parsing, tokenizing and rendering run on the front
// end's task pool.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <string_view>

#include "server/front_end.h"
#include "server/http_server.h"

namespace switchyard {

class HttpRoutes {
 public:
  // `front_end` outlives the routes and the HTTP server that calls them.
  explicit HttpRoutes(FrontEnd* front_end) : front_end_(front_end) {}

  void Handle(HttpRequest request, const std::shared_ptr<HttpExchange>& exchange);

 private:
  struct Call;  // one request with its way back
  using Handler = void (HttpRoutes::*)(const Call&);
  struct Route {
    std::string_view path;  // without /v1
    std::string_view method;
    Handler handler;
  };
  static const Route kRoutes[];

  void Dispatch(const std::shared_ptr<const Call>& call, const Route& route);
  void Complete(const Call& call);
  void Chat(const Call& call);
  void Generate(const Call& call, absl::StatusOr<GenerationRequest> request);
  void Tokenize(const Call& call);
  void Detokenize(const Call& call);
  void ListModels(const Call& call);
  void OneModel(const Call& call);
  void Health(const Call& call);
  void Version(const Call& call);
  void ShowMetrics(const Call& call);
  void ShowCluster(const Call& call);

  FrontEnd* const front_end_;
  const int64_t started_unix_seconds_ = std::chrono::duration_cast<std::chrono::seconds>(
                                            std::chrono::system_clock::now().time_since_epoch())
                                            .count();
};

}  // namespace switchyard
