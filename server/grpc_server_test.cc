// The gRPC service over loopback, with the real scheduler and a model that repeats the prompt.
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <future>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/fake_engine.h"
#include "switchyard/v1/inference.grpc.pb.h"

namespace switchyard {
namespace {

class GrpcServerTest : public testing::Test {
 protected:
  void Begin(TestServerOptions options = {}) {
    server_ = std::make_unique<TestServer>(std::move(options));
    grpc::ChannelArguments small;  // the client's library reads no further ahead
    small.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
    small.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 64 << 10);
    stub_ = v1::Inference::NewStub(
        grpc::CreateCustomChannel(absl::StrCat("127.0.0.1:", server_->server().grpc_port()),
                                  grpc::InsecureChannelCredentials(), small));
  }
  grpc::Status Run(const v1::GenerateRequest& request,
                   std::vector<v1::GenerateResponse>* responses = nullptr,
                   const std::string& authorization = "") {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    if (!authorization.empty()) context.AddMetadata("authorization", authorization);
    const auto reader = stub_->Generate(&context, request);
    v1::GenerateResponse response;
    while (reader->Read(&response)) {
      if (responses != nullptr) responses->push_back(response);
    }
    return reader->Finish();
  }

  static v1::GenerateRequest Endless() {
    v1::GenerateRequest request;
    request.set_prompt("for ever");
    request.mutable_sampling()->set_ignore_eos(true);
    request.mutable_sampling()->set_max_tokens(1000000);
    return request;
  }

  // What grpc.health.v1.Health/Check says of the service; its messages by hand, the distribution
  // has no header for them.
  bool Serving() {
    const std::string name = "switchyard.v1.Inference";
    const grpc::Slice asked(absl::StrCat("\x0a", std::string(1, char(name.size())), name));
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    grpc::CompletionQueue queue;
    grpc::GenericStub stub(
        grpc::CreateChannel(absl::StrCat("127.0.0.1:", server_->server().grpc_port()),
                            grpc::InsecureChannelCredentials()));
    const auto call = stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check",
                                            grpc::ByteBuffer(&asked, 1), &queue);
    call->StartCall();
    grpc::ByteBuffer answer;
    grpc::Status status;
    call->Finish(&answer, &status, nullptr);
    void* tag = nullptr;
    bool ok = false;
    queue.Next(&tag, &ok);
    EXPECT_TRUE(status.ok()) << status.error_message();
    grpc::Slice bytes;
    if (!answer.DumpToSingleSlice(&bytes).ok()) return false;
    return std::string(bytes.begin(), bytes.end()) == "\x08\x01";  // SERVING
  }
  bool Healthy() { return server_->Send("GET", "/health").status == 200; }

  std::unique_ptr<TestServer> server_;
  std::unique_ptr<v1::Inference::Stub> stub_;
};

TEST_F(GrpcServerTest, StreamsChoicesThenUsage) {
  Begin();
  v1::GenerateRequest request;
  request.set_prompt("Hello you");
  request.set_request_id("mine");
  request.mutable_sampling()->set_n(2);
  request.mutable_sampling()->set_logprobs(2);
  std::vector<v1::GenerateResponse> responses;
  const grpc::Status status = Run(request, &responses);
  ASSERT_TRUE(status.ok()) << status.error_message();
  std::map<int, std::string> text;
  std::map<int, std::string> finish;
  for (size_t i = 0; i < responses.size(); ++i) {
    const v1::GenerateResponse& response = responses[i];
    EXPECT_EQ(response.request_id(), "mine");
    EXPECT_EQ(response.has_usage(), i + 1 == responses.size());
    EXPECT_EQ(finish.count(response.index()), 0u);
    text[response.index()] += response.text();
    for (const auto& token : response.tokens()) {
      EXPECT_TRUE(token.has_logprob());
      EXPECT_EQ(token.top_size(), 2);
    }
    if (!response.finish_reason().empty()) finish[response.index()] = response.finish_reason();
  }
  EXPECT_EQ(text, (std::map<int, std::string>{{0, "Hello you"}, {1, "Hello you"}}));
  EXPECT_EQ(finish, (std::map<int, std::string>{{0, "stop"}, {1, "stop"}}));
  EXPECT_GT(responses.back().usage().completion_tokens(), 2);
  EXPECT_TRUE(server_->WaitIdle());
}

TEST_F(GrpcServerTest, ChatsAndTokens) {
  Begin();
  v1::GenerateRequest request;
  v1::ChatMessage* message = request.mutable_chat()->add_messages();
  message->set_role("user");
  message->set_content("said");
  std::vector<v1::GenerateResponse> responses;
  ASSERT_TRUE(Run(request, &responses).ok());
  std::string text;
  for (const auto& response : responses) text += response.text();
  EXPECT_EQ(text, "said");
  request.mutable_tokens()->add_ids(5);
  request.mutable_sampling()->set_max_tokens(1);
  responses.clear();
  ASSERT_TRUE(Run(request, &responses).ok());
  EXPECT_EQ(responses.back().tokens(0).token_id(), 5);
  EXPECT_EQ(responses.back().finish_reason(), "length");
}

TEST_F(GrpcServerTest, ErrorsHaveTheirCodes) {
  Begin();
  v1::GenerateRequest request;
  EXPECT_EQ(Run(request).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  request.set_prompt("");
  EXPECT_EQ(Run(request).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  request.set_prompt("a");
  request.set_model("other");
  EXPECT_EQ(Run(request).error_code(), grpc::StatusCode::NOT_FOUND);
  request.clear_model();
  request.mutable_sampling()->set_top_p(7);
  const grpc::Status status = Run(request);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_TRUE(absl::StrContains(status.error_message(), "top_p")) << status.error_message();
}

TEST_F(GrpcServerTest, KeysAndLoading) {
  TestServerOptions options;
  options.load = false;
  options.server.front_end.api_keys = {"secret"};
  Begin(options);
  v1::GenerateRequest request;
  request.set_prompt("a");
  EXPECT_EQ(Run(request).error_code(), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(Run(request, nullptr, "Bearer secret").error_code(), grpc::StatusCode::UNAVAILABLE);
  server_->FinishLoading();
  EXPECT_TRUE(Run(request, nullptr, "Bearer secret").ok());
}

TEST_F(GrpcServerTest, CancelFreesTheBlocks) {
  Begin();
  grpc::ClientContext context;
  const auto reader = stub_->Generate(&context, Endless());
  v1::GenerateResponse response;
  ASSERT_TRUE(reader->Read(&response));
  EXPECT_EQ(server_->scheduler().Stats().running, 1);
  context.TryCancel();
  EXPECT_TRUE(server_->WaitIdle());
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(GrpcServerTest, SlowReaderIsDropped) {
  Begin();
  v1::GenerateRequest request = Endless();
  request.mutable_sampling()->set_logprobs(20);
  grpc::ClientContext context;
  const auto reader = stub_->Generate(&context, request);
  v1::GenerateResponse response;
  ASSERT_TRUE(reader->Read(&response));  // and no more
  EXPECT_TRUE(server_->WaitIdle());
  while (reader->Read(&response)) {
  }
  EXPECT_FALSE(reader->Finish().ok());
}

TEST_F(GrpcServerTest, CallsAreBounded) {
  TestServerOptions options;
  options.server.grpc.max_calls = 2;
  Begin(options);
  server_->worker().Pause();
  grpc::ClientContext contexts[2];
  std::unique_ptr<grpc::ClientReader<v1::GenerateResponse>> readers[2];
  for (int i = 0; i < 2; ++i) readers[i] = stub_->Generate(&contexts[i], Endless());
  EXPECT_TRUE(TestServer::WaitFor([&] {
    const SchedulerStats stats = server_->scheduler().Stats();
    return stats.running + stats.waiting == 2;
  }));
  v1::GenerateRequest request;
  request.set_prompt("one too many");
  const grpc::Status refused = Run(request);
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_TRUE(absl::StrContains(refused.error_message(), "2")) << refused.error_message();
  contexts[0].TryCancel();
  readers[0]->Finish();
  server_->worker().Resume();
  EXPECT_TRUE(TestServer::WaitFor([&] { return Run(request).ok(); }));
  contexts[1].TryCancel();
  readers[1]->Finish();
  EXPECT_TRUE(server_->WaitIdle());
}

TEST_F(GrpcServerTest, StreamsOfAConnectionAreBounded) {
  TestServerOptions options;
  options.server.grpc.max_streams_per_connection = 1;
  Begin(options);
  grpc::ClientContext context;
  const auto reader = stub_->Generate(&context, Endless());
  v1::GenerateResponse response;
  ASSERT_TRUE(reader->Read(&response));
  v1::GenerateRequest request;
  request.set_prompt("waits");
  grpc::ClientContext impatient;
  impatient.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(100));
  const auto waiting = stub_->Generate(&impatient, request);
  EXPECT_FALSE(waiting->Read(&response));
  EXPECT_EQ(waiting->Finish().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  context.TryCancel();
  reader->Finish();
  EXPECT_TRUE(Run(request).ok());
}

TEST_F(GrpcServerTest, LargeMessagesAreRefused) {
  TestServerOptions options;
  options.server.grpc.max_message_bytes = 1000;
  Begin(options);
  v1::GenerateRequest request;
  request.set_prompt(std::string(2000, 'a'));
  EXPECT_EQ(Run(request).error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  request.set_prompt("small");
  EXPECT_TRUE(Run(request).ok());
}

TEST_F(GrpcServerTest, HealthIsThatOfHttp) {
  TestServerOptions options;
  options.load = false;
  options.server.front_end.stall_timeout = std::chrono::milliseconds(500);
  options.server.grpc.health_interval = std::chrono::milliseconds(5);
  Begin(options);
  EXPECT_FALSE(Serving()) << "loading";
  server_->FinishLoading();
  EXPECT_TRUE(Serving()) << "at once, as the ready line is printed next";
  server_->worker().Pause();
  grpc::ClientContext context;
  const auto reader = stub_->Generate(&context, Endless());
  EXPECT_TRUE(TestServer::WaitFor([&] { return !Serving(); })) << "stalled";
  EXPECT_FALSE(Healthy());
  server_->worker().Resume();
  EXPECT_TRUE(TestServer::WaitFor([&] { return Serving() && Healthy(); }));
  server_->worker().Die();
  EXPECT_TRUE(TestServer::WaitFor([&] { return !Serving(); })) << "failed";
  EXPECT_FALSE(Healthy());
  v1::GenerateResponse response;
  while (reader->Read(&response)) {
  }
  EXPECT_FALSE(reader->Finish().ok());
}

TEST_F(GrpcServerTest, NotServingWhileDraining) {
  Begin();
  server_->worker().Pause();
  grpc::ClientContext context;
  v1::GenerateRequest request;
  request.set_prompt("finish me");
  const auto reader = stub_->Generate(&context, request);
  EXPECT_TRUE(TestServer::WaitFor([&] { return server_->scheduler().Stats().running == 1; }));
  EXPECT_TRUE(Serving());
  std::future<void> drained = std::async(std::launch::async, [&] { server_->server().Shutdown(); });
  EXPECT_TRUE(TestServer::WaitFor([&] { return !Serving(); }));
  server_->worker().Resume();
  v1::GenerateResponse response;
  while (reader->Read(&response)) {
  }
  EXPECT_TRUE(reader->Finish().ok());
  drained.wait();
}

TEST_F(GrpcServerTest, CacheSaltsKeepPromptsApart) {
  Begin();
  v1::GenerateRequest request;
  request.set_prompt("A prompt of more than one block of tokens, so that there is what to keep.");
  request.mutable_sampling()->set_max_tokens(1);
  request.set_cache_salt("");
  EXPECT_EQ(Run(request).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  const auto cached = [&] {
    std::vector<v1::GenerateResponse> responses;
    EXPECT_TRUE(Run(request, &responses).ok());
    return responses.empty() ? -1 : responses.back().usage().cached_tokens();
  };
  for (const char* salt : {"tenant a", "tenant b"}) {
    request.set_cache_salt(salt);
    EXPECT_EQ(cached(), 0) << salt;
    EXPECT_GT(cached(), 0) << salt;
  }
  request.clear_cache_salt();
  EXPECT_EQ(cached(), 0);
}

}  // namespace
}  // namespace switchyard
