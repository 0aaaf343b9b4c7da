// HttpServer: HTTP/1.1 over Boost.Asio coroutines: listener, connections, limits and timeouts. It
// knows no routes: each complete request goes to one handler, which answers through the
// HttpExchange it is given. Every answer carries an X-Request-Id, the client's own or a new one. A
// few I/O threads; every connection lives on one of them. Handlers run on I/O threads and must only
// enqueue. No Boost type appears here.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"

namespace switchyard {

struct HttpServerOptions {
  std::string host = "127.0.0.1";
  uint16_t port = 8000;  // 0: the system chooses
  int num_io_threads = 2;
  int max_connections = 4096;                // more get 503 and are closed …
  int max_refusals = 256;                    // … so many at once, the rest without an answer
  size_t max_body_bytes = 16 << 20;          // 413 beyond
  size_t max_header_bytes = 32 << 10;        // 431 beyond
  size_t max_stream_buffer_bytes = 1 << 20;  // a reader that lags further behind is dropped
  int send_buffer_bytes = 256 << 10;         // the kernel's, per connection
  std::chrono::milliseconds idle_timeout{75'000};     // between requests
  std::chrono::milliseconds request_timeout{60'000};  // from a request's first byte to its last
  std::chrono::milliseconds write_timeout{30'000};    // for one write to be taken by the peer
  std::chrono::milliseconds linger_timeout{2'000};    // reading on after an early error, so that
                                                      // the peer sees the answer
  std::chrono::milliseconds ping_interval{15'000};  // silence on a stream before a comment is sent
};

using HttpHeaders = std::vector<std::pair<std::string, std::string>>;

struct HttpRequest {
  std::string method;  // as sent, e.g. "GET"
  std::string path;    // percent-encoded, without the query
  std::string content_type;
  std::string authorization;
  std::string body;
  std::chrono::steady_clock::time_point arrival;  // when the last byte was read
};

struct HttpResponse {
  int status = 200;
  std::string content_type = "application/json";
  HttpHeaders headers;
  std::string body;
};

// One request's way back to its client. All methods may be called from any thread and never block.
// Exactly one of Respond or BeginStream … EndStream; an exchange that is destroyed unanswered
// answers 500. After the client has gone every call is ignored.
class HttpExchange {
 public:
  struct State;
  explicit HttpExchange(std::shared_ptr<State> state);
  ~HttpExchange();
  HttpExchange(const HttpExchange&) = delete;
  HttpExchange& operator=(const HttpExchange&) = delete;

  void Respond(HttpResponse response);
  // Sends 200 with `headers` and begins a server-sent-event stream.
  void BeginStream(HttpHeaders headers);
  void Write(std::string bytes);  // flushed at once
  void EndStream();
  // `callback` runs once, on an I/O thread, if the client goes away before its answer was sent; at
  // once if it has gone.
  void OnDisconnect(std::function<void()> callback);

 private:
  const std::shared_ptr<State> state_;
};

using HttpHandler = std::function<void(HttpRequest, std::shared_ptr<HttpExchange>)>;

class HttpServer {
 public:
  HttpServer(const HttpServerOptions& options, HttpHandler handler);
  ~HttpServer();

  // Listens; the port that was bound. kUnavailable, naming the address and the reason, when that
  // fails.
  absl::StatusOr<uint16_t> Start();
  // Waits until no request is being answered; false when `deadline` came first.
  bool WaitIdle(std::chrono::steady_clock::time_point deadline);
  // Closes the listener and every connection (their OnDisconnect callbacks run), joins the I/O
  // threads. Idempotent.
  void Stop();

 private:
  struct State;
  const std::unique_ptr<State> state_;
};

}  // namespace switchyard
