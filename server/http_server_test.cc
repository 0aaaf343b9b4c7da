// Connections: limits, timeouts, clients that leave or read slowly, overload, keys, loading and
// draining.
#include <gtest/gtest.h>

#include <future>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "server/fake_engine.h"
#include "server/raw_socket.h"

namespace switchyard {
namespace {

using Json = nlohmann::json;

std::string Request(const std::string& path, const std::string& body,
                    const std::string& more = "") {
  return absl::StrCat("POST ", path,
                      " HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: ",
                      body.size(), "\r\n", more, "\r\n", body);
}

// Answers "repeat", and never ends by itself.
Json Endless() {
  return {{"prompt", "repeat"}, {"max_tokens", 1000000}, {"ignore_eos", true}, {"stream", true}};
}

TEST(HttpServerTest, ClosingAStreamFreesItsBlocks) {
  TestServer server;
  RawSocket client(server.server().http_port());
  client.Send(Request("/v1/completions", Endless().dump()));
  EXPECT_TRUE(absl::StrContains(client.ReceiveUntil("data: {"), "200 OK"));
  EXPECT_EQ(server.scheduler().Stats().running, 1);
  client.Close();
  EXPECT_TRUE(server.WaitIdle());
}

TEST(HttpServerTest, LeavingWhileWaitingFreesItsBlocks) {
  TestServer server;
  Json body = Endless();
  body["stream"] = false;
  body["n"] = 3;
  RawSocket client(server.server().http_port());
  client.Send(Request("/v1/completions", body.dump()));
  EXPECT_TRUE(TestServer::WaitFor([&] { return server.scheduler().Stats().running == 3; }));
  client.Close();
  EXPECT_TRUE(server.WaitIdle());
}

TEST(HttpServerTest, LeavingWhileQueuedFreesThePlace) {
  TestServer server({.scheduler = {.max_num_seqs = 1}});
  RawSocket first(server.server().http_port());
  first.Send(Request("/v1/completions", Endless().dump()));
  first.ReceiveUntil("data: {");
  RawSocket second(server.server().http_port());
  second.Send(Request("/v1/completions", Endless().dump()));
  EXPECT_TRUE(TestServer::WaitFor([&] { return server.scheduler().Stats().waiting == 1; }));
  second.Close();
  EXPECT_TRUE(TestServer::WaitFor([&] { return server.scheduler().Stats().waiting == 0; }));
  EXPECT_EQ(server.scheduler().Stats().running, 1);
  first.Close();
  EXPECT_TRUE(server.WaitIdle());
}

TEST(HttpServerTest, SlowReaderIsDroppedAndOthersAreNot) {
  TestServerOptions options;
  options.server.http.max_stream_buffer_bytes = 64 << 10;
  options.server.http.send_buffer_bytes = 16 << 10;
  TestServer server(options);
  RawSocket slow(server.server().http_port(), 4096);
  slow.Send(Request("/v1/completions", Endless().dump()));
  slow.ReceiveUntil("data: {");  // and no more
  EXPECT_EQ(server.Post("/v1/completions", R"({"prompt":"quick"})").status, 200);
  EXPECT_TRUE(server.WaitIdle());
  EXPECT_FALSE(absl::StrContains(slow.ReceiveAll(), "[DONE]"));
}

TEST(HttpServerTest, SilentStreamsGetPings) {
  TestServerOptions options;
  options.server.http.ping_interval = std::chrono::milliseconds(5);
  TestServer server(options);
  server.worker().Pause();
  RawSocket client(server.server().http_port());
  client.Send(Request("/v1/chat/completions",
                      R"({"messages":[{"role":"user","content":"a"}],"stream":true})"));
  EXPECT_TRUE(absl::StrContains(client.ReceiveUntil(": ping\n\n"), ": ping\n\n"));
  server.worker().Resume();
  EXPECT_TRUE(absl::StrContains(client.ReceiveUntil("[DONE]"), "[DONE]"));
}

TEST(HttpServerTest, FailureInAStreamIsAnErrorEvent) {
  TestServer server;
  RawSocket client(server.server().http_port());
  client.Send(Request("/v1/completions", Endless().dump(), "Connection: close\r\n"));
  client.ReceiveUntil("data: {");
  // Three strikes; a step that was sent before the one ahead of it failed counts for nothing.
  server.worker().FailSteps(5);
  const std::string rest = client.ReceiveAll();
  EXPECT_TRUE(absl::StrContains(rest, "data: {\"error\":{\"message\":")) << rest;
  EXPECT_TRUE(absl::StrContains(rest, "data: [DONE]\n\n\r\n0\r\n\r\n")) << rest;
  EXPECT_EQ(server.Post("/v1/completions", R"({"prompt":"the next"})").status, 200);
}

TEST(HttpServerTest, PipelinedRequestsAreAnsweredInOrder) {
  TestServer server;
  RawSocket client(server.server().http_port());
  client.Send(Request("/v1/completions", R"({"prompt":"first"})") +
              Request("/v1/completions", R"({"prompt":"second"})") +
              "GET /version HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
  const std::string all = client.ReceiveAll();
  const size_t first = all.find("\"text\":\"first\"");
  const size_t second = all.find("\"text\":\"second\"");
  const size_t version = all.find("\"version\"");
  EXPECT_LT(first, second);
  EXPECT_LT(second, version);
  EXPECT_NE(version, std::string::npos);
}

TEST(HttpServerTest, ExpectContinueAndChunkedBodies) {
  TestServer server;
  RawSocket client(server.server().http_port());
  const std::string body = R"({"prompt":"hello"})";
  client.Send(absl::StrCat(
      "POST /v1/completions HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: ",
      body.size(), "\r\n\r\n"));
  EXPECT_TRUE(absl::StartsWith(client.ReceiveUntil("\r\n\r\n"), "HTTP/1.1 100 Continue"));
  client.Send(body);
  EXPECT_TRUE(absl::StrContains(client.ReceiveUntil("\"usage\""), "200 OK"));
  client.Send(
      "POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nConnection: "
      "close\r\n\r\n");
  client.Send(absl::StrCat("5\r\n", body.substr(0, 5), "\r\n", absl::Hex(body.size() - 5), "\r\n",
                           body.substr(5), "\r\n0\r\n\r\n"));
  EXPECT_TRUE(absl::StrContains(client.ReceiveAll(), "200 OK"));
}

TEST(HttpServerTest, LimitsOfARequest) {
  TestServerOptions options;
  options.server.http.max_body_bytes = 1000;
  options.server.http.max_header_bytes = 2000;
  TestServer server(options);
  EXPECT_EQ(
      server.Post("/v1/completions", Json({{"prompt", std::string(2000, 'a')}}).dump()).status,
      413);
  EXPECT_EQ(server.Send("GET", "/health", "", {{"X-Big", std::string(3000, 'a')}}).status, 431);
  RawSocket declared(server.server().http_port());
  declared.Send(
      "POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-Request-Id: big\r\nContent-Length: "
      "99999999999\r\n\r\n");
  const std::string answer = declared.ReceiveUntil("}}");
  EXPECT_TRUE(absl::StartsWith(answer, "HTTP/1.1 413 ")) << answer;
  EXPECT_TRUE(absl::StrContains(answer, "X-Request-Id: big\r\n")) << answer;
  RawSocket garbage(server.server().http_port());
  garbage.Send("nonsense\r\n\r\n");
  EXPECT_TRUE(absl::StartsWith(garbage.ReceiveUntil("}}"), "HTTP/1.1 400 "));
}

TEST(HttpServerTest, IdleAndSlowClientsAreClosed) {
  TestServerOptions options;
  options.server.http.idle_timeout = std::chrono::milliseconds(20);
  options.server.http.request_timeout = std::chrono::milliseconds(20);
  TestServer server(options);
  RawSocket idle(server.server().http_port());
  EXPECT_EQ(idle.ReceiveAll(), "");
  RawSocket slow(server.server().http_port());
  slow.Send("POST /v1/completions HTTP/1.1\r\nContent-Len");
  EXPECT_EQ(slow.ReceiveAll(), "");
}

TEST(HttpServerTest, TooManyConnections) {
  TestServerOptions options;
  options.server.http.max_connections = 2;
  TestServer server(options);
  RawSocket first(server.server().http_port());
  RawSocket second(server.server().http_port());
  for (RawSocket* held : {&first, &second}) {
    held->Send("GET /version HTTP/1.1\r\nHost: a\r\n\r\n");
    held->ReceiveUntil("}");
  }
  RawSocket third(server.server().http_port());
  EXPECT_TRUE(absl::StartsWith(third.ReceiveAll(), "HTTP/1.1 503 "));
  first.Close();
  EXPECT_TRUE(TestServer::WaitFor([&] {
    RawSocket again(server.server().http_port());
    again.Send("GET /version HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    return absl::StartsWith(again.ReceiveAll(), "HTTP/1.1 200 ");
  }));
}

TEST(HttpServerTest, RefusedConnectionSeesItsAnswer) {
  TestServerOptions options;
  options.server.http.max_connections = 1;
  TestServer server(options);
  RawSocket held(server.server().http_port());
  held.Send("GET /version HTTP/1.1\r\nHost: a\r\n\r\n");
  held.ReceiveUntil("}");
  RawSocket refused(server.server().http_port());
  refused.Send(Request("/v1/completions", std::string(100'000, ' ')));
  const std::string answer = refused.ReceiveAll();
  EXPECT_TRUE(refused.ended_in_order()) << "reset: the answer can be lost on its way";
  EXPECT_TRUE(absl::StartsWith(answer, "HTTP/1.1 503 ")) << answer;
  EXPECT_TRUE(absl::StrContains(answer, "X-Request-Id: req-")) << answer;
  EXPECT_TRUE(absl::StrContains(answer, "Retry-After: ")) << answer;
  EXPECT_TRUE(absl::StrContains(answer, "too many connections")) << answer;
}

TEST(HttpServerTest, RefusalsAreBounded) {
  for (const int linger_ms : {60'000, 20}) {
    TestServerOptions options;
    options.server.http.max_connections = 0;
    options.server.http.max_refusals = 1;
    options.server.http.linger_timeout = std::chrono::milliseconds(linger_ms);
    TestServer server(options);
    RawSocket staying(server.server().http_port());  // refused, and does not close
    EXPECT_TRUE(absl::StartsWith(staying.ReceiveAll(), "HTTP/1.1 503 "));
    const auto next = [&] { return RawSocket(server.server().http_port()).ReceiveAll(); };
    if (linger_ms > 1000) {
      EXPECT_EQ(next(), "");  // closed without an answer
    } else {
      EXPECT_TRUE(TestServer::WaitFor([&] { return absl::StartsWith(next(), "HTTP/1.1 503 "); }));
    }
  }
}

TEST(HttpServerTest, EveryAnswerCarriesARequestId) {
  HttpServer drops({.port = 0, .max_header_bytes = 2000},
                   [](const HttpRequest&, const std::shared_ptr<HttpExchange>&) {});
  const auto port = drops.Start();
  ASSERT_TRUE(port.ok()) << port.status();
  const auto answer = [&](const std::string& request) {
    RawSocket client(*port);
    client.Send(request);
    return client.ReceiveUntil("}}");
  };
  const std::string close = "Connection: close\r\n";
  const std::string dropped =
      answer("GET / HTTP/1.1\r\nHost: a\r\nX-Request-Id: mine\r\n" + close + "\r\n");
  EXPECT_TRUE(absl::StartsWith(dropped, "HTTP/1.1 500 ")) << dropped;
  EXPECT_TRUE(absl::StrContains(dropped, "X-Request-Id: mine\r\n")) << dropped;
  const std::string large =
      answer("GET / HTTP/1.1\r\nHost: a\r\nX-Request-Id: mine\r\nX-Big: " + std::string(3000, 'a') +
             "\r\n\r\n");
  EXPECT_TRUE(absl::StartsWith(large, "HTTP/1.1 431 ")) << large;
  EXPECT_TRUE(absl::StrContains(large, "X-Request-Id: ")) << large;
  const std::string garbage = answer("nonsense\r\n\r\n");
  EXPECT_TRUE(absl::StartsWith(garbage, "HTTP/1.1 400 ")) << garbage;
  EXPECT_TRUE(absl::StrContains(garbage, "X-Request-Id: req-")) << garbage;
  const std::string length =
      answer("POST / HTTP/1.1\r\nHost: a\r\nX-Request-Id: mine\r\nContent-Length: -5\r\n\r\n");
  EXPECT_TRUE(absl::StartsWith(length, "HTTP/1.1 400 ")) << length;
  EXPECT_TRUE(absl::StrContains(length, "X-Request-Id: mine\r\n")) << length;
}

TEST(HttpServerTest, NoContentHasNoLengthAndNoBody) {
  TestServer server;
  RawSocket client(server.server().http_port());
  client.Send("OPTIONS /v1/models HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
  const std::string answer = client.ReceiveAll();
  EXPECT_TRUE(absl::StartsWith(answer, "HTTP/1.1 204 ")) << answer;
  EXPECT_FALSE(absl::StrContains(answer, "Content-Length")) << answer;
  EXPECT_FALSE(absl::StrContains(answer, "Transfer-Encoding")) << answer;
  EXPECT_TRUE(absl::EndsWith(answer, "\r\n\r\n")) << answer;
  EXPECT_TRUE(absl::StrContains(answer, "X-Request-Id: ")) << answer;
}

TEST(HttpServerTest, FullQueueIs429) {
  TestServer server({.scheduler = {.max_num_seqs = 1, .max_queued_requests = 1}});
  server.worker().Pause();
  RawSocket running(server.server().http_port());
  running.Send(Request("/v1/completions", Endless().dump()));
  EXPECT_TRUE(TestServer::WaitFor([&] { return server.scheduler().Stats().running == 1; }));
  RawSocket queued(server.server().http_port());
  queued.Send(Request("/v1/completions", Endless().dump()));
  EXPECT_TRUE(TestServer::WaitFor([&] { return server.scheduler().Stats().waiting == 1; }));
  for (const bool stream : {false, true}) {
    Json body = Endless();
    body["stream"] = stream;
    const HttpReply refused = server.Post("/v1/completions", body.dump());
    EXPECT_EQ(refused.status, 429) << refused.body;
    EXPECT_FALSE(refused.Header("Retry-After").empty());
    EXPECT_EQ(Json::parse(refused.body)["error"]["type"], "rate_limit_error");
  }
  EXPECT_TRUE(absl::StrContains(server.Send("GET", "/metrics").body,
                                "switchyard_admission_rejections_total{reason=\"queue_full\"} 2"));
  running.Close();
  queued.Close();
  server.worker().Resume();
  EXPECT_TRUE(server.WaitIdle());
}

TEST(HttpServerTest, Keys) {
  TestServerOptions options;
  options.server.front_end.api_keys = {"one", "two"};
  TestServer server(options);
  EXPECT_EQ(server.Send("GET", "/v1/models").status, 401);
  EXPECT_EQ(Json::parse(server.Send("GET", "/v1/models").body)["error"]["type"],
            "authentication_error");
  EXPECT_EQ(server.Send("GET", "/v1/models", "", {{"Authorization", "Bearer three"}}).status, 401);
  EXPECT_EQ(server.Send("GET", "/v1/models", "", {{"Authorization", "Bearer on"}}).status, 401);
  EXPECT_EQ(server.Send("GET", "/v1/models", "", {{"Authorization", "Bearer two"}}).status, 200);
  EXPECT_EQ(server.Send("GET", "/health").status, 200);
  EXPECT_EQ(server.Send("OPTIONS", "/v1/models").status, 204);
}

TEST(HttpServerTest, LoadingIs503) {
  TestServer server({.load = false});
  server.server().SetLoading(43);
  const HttpReply health = server.Send("GET", "/health");
  EXPECT_EQ(health.status, 503);
  EXPECT_TRUE(absl::StrContains(health.body, "loading 43 %")) << health.body;
  const HttpReply refused = server.Post("/v1/completions", R"({"prompt":"a"})");
  EXPECT_EQ(refused.status, 503);
  EXPECT_FALSE(refused.Header("Retry-After").empty());
  EXPECT_EQ(server.Send("GET", "/v1/models").status, 503);
  EXPECT_EQ(server.Send("GET", "/metrics").status, 200);
  server.FinishLoading();
  EXPECT_EQ(server.Send("GET", "/health").status, 200);
}

TEST(HttpServerTest, DrainFinishesWhatRunsAndRefusesTheRest) {
  TestServer server;
  server.worker().Pause();
  RawSocket running(server.server().http_port());
  running.Send(Request("/v1/completions", R"({"prompt":"finish me"})"));
  EXPECT_TRUE(TestServer::WaitFor([&] { return server.scheduler().Stats().running == 1; }));
  RawSocket late(server.server().http_port());
  std::future<void> drained = std::async(std::launch::async, [&] { server.server().Shutdown(); });
  std::string refused;
  EXPECT_TRUE(TestServer::WaitFor([&] {  // draining begins on the other thread
    late.Send("GET /health HTTP/1.1\r\nHost: a\r\n\r\n");
    refused = late.ReceiveUntil("}");
    return absl::StartsWith(refused, "HTTP/1.1 503 ");
  }));
  late.Send(Request("/v1/completions", R"({"prompt":"too late"})"));
  EXPECT_TRUE(absl::StrContains(late.ReceiveUntil("}}"), "HTTP/1.1 503 "));
  server.worker().Resume();
  EXPECT_TRUE(absl::StrContains(running.ReceiveUntil("\"usage\""), "finish me"));
  drained.wait();
}

TEST(HttpServerTest, DrainEndsWhatRunsTooLong) {
  TestServerOptions options;
  options.server.shutdown_timeout = std::chrono::milliseconds(20);
  TestServer server(options);
  RawSocket client(server.server().http_port());
  client.Send(Request("/v1/completions", Endless().dump(), "Connection: close\r\n"));
  client.ReceiveUntil("data: {");
  std::future<void> drained = std::async(std::launch::async, [&] { server.server().Shutdown(); });
  const std::string rest = client.ReceiveAll();
  EXPECT_TRUE(absl::StrContains(rest, "shutting down"))
      << rest.substr(rest.size() - std::min<size_t>(rest.size(), 300));
  drained.wait();
  EXPECT_TRUE(server.WaitIdle());
}

TEST(HttpServerTest, PortInUseIsAClearError) {
  TestServer server;
  ServerOptions options;
  options.http.port = server.server().http_port();
  options.grpc.port = 0;
  Server second(options);
  const absl::Status status = second.Start();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(absl::StrContains(status.message(), absl::StrCat(options.http.port))) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "in use")) << status;
}

}  // namespace
}  // namespace switchyard
