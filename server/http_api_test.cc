// The HTTP API over loopback, with the real scheduler and a model that repeats the prompt: shapes,
// streams, statuses.
#include <gtest/gtest.h>

#include "absl/strings/str_split.h"
#include "nlohmann/json.hpp"
#include "server/fake_engine.h"

namespace switchyard {
namespace {

using Json = nlohmann::json;

class HttpApiTest : public testing::Test {
 protected:
  static void SetUpTestSuite() { server_ = new TestServer; }
  static void TearDownTestSuite() {
    delete server_;
    server_ = nullptr;
  }
  void TearDown() override { EXPECT_TRUE(server_->WaitIdle()); }

  static Json PostOk(const std::string& target, const Json& body) {
    const HttpReply reply = server_->Post(target, body.dump());
    EXPECT_EQ(reply.status, 200) << reply.body;
    return Json::parse(reply.body, nullptr, false);
  }
  // The events of a stream; checks the frame.
  static std::vector<Json> Stream(const std::string& target, Json body) {
    body["stream"] = true;
    const HttpReply reply = server_->Post(target, body.dump());
    EXPECT_EQ(reply.status, 200) << reply.body;
    EXPECT_EQ(reply.Header("Content-Type"), "text/event-stream; charset=utf-8");
    EXPECT_EQ(reply.Header("Cache-Control"), "no-cache");
    EXPECT_EQ(reply.Header("X-Accel-Buffering"), "no");
    std::vector<Json> events;
    bool done = false;
    for (const absl::string_view block : absl::StrSplit(reply.body, "\n\n", absl::SkipEmpty())) {
      EXPECT_FALSE(done) << "an event after [DONE]";
      EXPECT_EQ(block.substr(0, 6), "data: ");
      done = block == "data: [DONE]";
      if (!done) events.push_back(Json::parse(std::string(block.substr(6))));
    }
    EXPECT_TRUE(done);
    return events;
  }

  static TestServer* server_;
};

TestServer* HttpApiTest::server_ = nullptr;

TEST_F(HttpApiTest, ChatShape) {
  const Json answer = PostOk("/v1/chat/completions",
                             {{"messages", {{{"role", "user"}, {"content", "Hello you"}}}}});
  EXPECT_EQ(answer["object"], "chat.completion");
  EXPECT_EQ(answer["model"], "org/echo");
  EXPECT_TRUE(answer["created"].is_number_integer());
  EXPECT_EQ(answer["id"].get<std::string>().substr(0, 9), "chatcmpl-");
  ASSERT_EQ(answer["choices"].size(), 1u);
  const Json& choice = answer["choices"][0];
  EXPECT_EQ(choice["message"],
            Json({{"role", "assistant"}, {"content", "Hello you"}, {"refusal", nullptr}}));
  EXPECT_EQ(choice["finish_reason"], "stop");
  EXPECT_TRUE(choice["logprobs"].is_null());
  const Json& usage = answer["usage"];
  EXPECT_EQ(usage["completion_tokens"].get<int>(),
            usage["prompt_tokens"].get<int>() + 1);  // and the end
  EXPECT_EQ(usage["total_tokens"].get<int>(),
            usage["prompt_tokens"].get<int>() + usage["completion_tokens"].get<int>());
  EXPECT_TRUE(usage["prompt_tokens_details"]["cached_tokens"].is_number_integer());
}

TEST_F(HttpApiTest, ChatStream) {
  const Json body = {{"messages", {{{"role", "user"}, {"content", "Hello you"}}}}, {"n", 2}};
  const std::vector<Json> events = Stream("/v1/chat/completions", body);
  std::map<int, std::string> text;
  std::map<int, int> roles;
  std::map<int, std::string> finish;
  for (const Json& event : events) {
    EXPECT_EQ(event["object"], "chat.completion.chunk");
    EXPECT_EQ(event["id"], events[0]["id"]);
    EXPECT_FALSE(event.contains("usage"));
    const Json& choice = event["choices"][0];
    const int index = choice["index"];
    EXPECT_FALSE(finish.contains(index));
    const Json& delta = choice["delta"];
    if (delta.contains("role")) {
      EXPECT_EQ(text.count(index), 0u);
      EXPECT_EQ(delta, Json({{"role", "assistant"}, {"content", ""}}));
      ++roles[index];
    }
    if (delta.contains("content")) text[index] += delta["content"];
    if (!choice["finish_reason"].is_null()) {
      EXPECT_EQ(delta, Json::object());
      finish[index] = choice["finish_reason"];
    }
  }
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(roles[i], 1);
    EXPECT_EQ(text[i], "Hello you");
    EXPECT_EQ(finish[i], "stop");
  }
}

TEST_F(HttpApiTest, UsageChunkOnlyWhenAsked) {
  const Json body = {{"prompt", "abc"}, {"stream_options", {{"include_usage", true}}}};
  const std::vector<Json> events = Stream("/v1/completions", body);
  ASSERT_GE(events.size(), 2u);
  for (size_t i = 0; i + 1 < events.size(); ++i) EXPECT_TRUE(events[i].at("usage").is_null());
  EXPECT_EQ(events.back()["choices"], Json::array());
  EXPECT_GT(events.back()["usage"]["completion_tokens"], 0);
}

TEST_F(HttpApiTest, CompletionListsAndChoices) {
  const Json answer =
      PostOk("/completions", {{"prompt", {"one", "two two"}}, {"n", 2}, {"max_tokens", 40}});
  EXPECT_EQ(answer["object"], "text_completion");
  ASSERT_EQ(answer["choices"].size(), 4u);
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(answer["choices"][i]["index"], i);
    EXPECT_EQ(answer["choices"][i]["text"], i < 2 ? "one" : "two two");
    EXPECT_EQ(answer["choices"][i]["finish_reason"], "stop");
  }
}

TEST_F(HttpApiTest, StopStringsCutStreamAndWholeAlike) {
  for (const bool include : {false, true}) {
    const Json body = {{"prompt", "The quick brown fox jumps"},
                       {"stop", {"own f", "zzz"}},
                       {"max_tokens", 100},
                       {"logprobs", 1},
                       {"include_stop_str_in_output", include},
                       {"return_token_ids", true}};
    const std::string expected = include ? "The quick brown f" : "The quick br";
    const Json whole = PostOk("/v1/completions", body);
    EXPECT_EQ(whole["choices"][0]["text"], expected);
    EXPECT_EQ(whole["choices"][0]["finish_reason"], "stop");
    std::string text;
    std::string tokens;
    std::string finish;
    Json offsets = Json::array();
    for (const Json& event : Stream("/v1/completions", body)) {
      const Json& choice = event["choices"][0];
      text += choice["text"];
      for (const auto& token : choice["logprobs"]["tokens"]) tokens += token;
      for (const auto& offset : choice["logprobs"]["text_offset"]) offsets.push_back(offset);
      if (!choice["finish_reason"].is_null()) finish = choice["finish_reason"];
    }
    EXPECT_EQ(text, expected);
    EXPECT_EQ(tokens, expected);
    EXPECT_EQ(finish, "stop");
    EXPECT_EQ(offsets, whole["choices"][0]["logprobs"]["text_offset"]);
    EXPECT_EQ(whole["usage"]["completion_tokens"].get<size_t>(),
              whole["choices"][0]["token_ids"].size());
  }
}

TEST_F(HttpApiTest, LogprobsOfChats) {
  const Json answer = PostOk("/v1/chat/completions",
                             {{"messages", {{{"role", "user"}, {"content", "Grüße 🙂 ok"}}}},
                              {"logprobs", true},
                              {"top_logprobs", 3}});
  const Json& choice = answer["choices"][0];
  std::string joined;
  std::string bytes;
  for (const Json& token : choice["logprobs"]["content"]) {
    joined += token["token"];
    for (const int byte : token["bytes"]) bytes.push_back(static_cast<char>(byte));
    EXPECT_EQ(token["top_logprobs"].size(), 3u);
    EXPECT_EQ(token["logprob"], token["top_logprobs"][0]["logprob"]);
  }
  EXPECT_EQ(joined, "Grüße 🙂 ok");
  EXPECT_EQ(bytes, "Grüße 🙂 ok");
  EXPECT_EQ(choice["message"]["content"], "Grüße 🙂 ok");
}

TEST_F(HttpApiTest, EchoScoresThePrompt) {
  const Json answer =
      PostOk("/v1/completions",
             {{"prompt", "score me"}, {"echo", true}, {"max_tokens", 0}, {"logprobs", 2}});
  const Json& choice = answer["choices"][0];
  EXPECT_EQ(choice["text"], "score me");
  EXPECT_EQ(choice["finish_reason"], "length");
  const Json& logprobs = choice["logprobs"];
  EXPECT_EQ(logprobs["tokens"].size(), answer["usage"]["prompt_tokens"]);
  EXPECT_TRUE(logprobs["token_logprobs"][0].is_null());
  EXPECT_TRUE(logprobs["top_logprobs"][0].is_null());
  EXPECT_TRUE(logprobs["token_logprobs"][1].is_number());
  EXPECT_EQ(answer["usage"]["completion_tokens"], 0);
}

// Streamed, the prompt comes first, with its logprobs, and everything joined is what is sent whole.
TEST_F(HttpApiTest, EchoStreamedEqualsWhole) {
  for (const bool logprobs : {false, true}) {
    for (const int max_tokens : {0, 5}) {
      Json body = {{"prompt", {"score me, please", "Grüße 🙂"}},
                   {"echo", true},
                   {"n", 2},
                   {"max_tokens", max_tokens}};
      if (logprobs) body["logprobs"] = 2;
      const Json whole = PostOk("/v1/completions", body);
      ASSERT_EQ(whole["choices"].size(), 4u);
      std::map<int, Json> joined;
      for (const Json& event : Stream("/v1/completions", body)) {
        const Json& choice = event["choices"][0];
        const int index = choice["index"];
        const bool first = !joined.contains(index);
        Json& sum = joined.try_emplace(index, Json::object()).first->second;
        if (first) {
          sum = choice;
          EXPECT_EQ(choice["text"].get<std::string>().rfind(body["prompt"][index / 2], 0), 0u)
              << "the first event has the prompt: " << choice;
          continue;
        }
        EXPECT_TRUE(sum["finish_reason"].is_null()) << "an event after the last";
        sum["text"] = sum["text"].get<std::string>() + choice["text"].get<std::string>();
        sum["finish_reason"] = choice["finish_reason"];
        if (choice["logprobs"].is_null()) continue;
        for (const auto& [key, list] : choice["logprobs"].items()) {
          for (const Json& entry : list) sum["logprobs"][key].push_back(entry);
        }
      }
      ASSERT_EQ(joined.size(), 4u);
      for (const auto& [index, choice] : joined) {
        const Json& expected = whole["choices"][index];
        EXPECT_EQ(choice["text"], expected["text"]);
        EXPECT_EQ(choice["finish_reason"], "length");
        EXPECT_EQ(choice["logprobs"], expected["logprobs"]);
        EXPECT_EQ(choice["logprobs"].is_null(), !logprobs);
        if (logprobs) {
          EXPECT_TRUE(choice["logprobs"]["token_logprobs"][0].is_null());
        }
      }
    }
  }
}

TEST_F(HttpApiTest, CacheSaltsKeepPromptsApart) {
  const std::string text =
      "A prompt of more than one block of tokens, so that the cache has something to keep.";
  const auto cached = [&](const char* path, const char* salt) {
    Json body = {{"max_tokens", 1}};
    if (salt != nullptr) body["cache_salt"] = salt;
    if (std::string(path) == "/v1/completions") {
      body["prompt"] = path + text;
    } else {
      body["messages"] = {{{"role", "user"}, {"content", path + text}}};
    }
    return PostOk(path, body)["usage"]["prompt_tokens_details"]["cached_tokens"].get<int>();
  };
  for (const char* path : {"/v1/completions", "/v1/chat/completions"}) {
    for (const char* salt : {"tenant a", "tenant b", static_cast<const char*>(nullptr)}) {
      EXPECT_EQ(cached(path, salt), 0) << path;
      EXPECT_GT(cached(path, salt), 0) << path;
    }
  }
}

TEST_F(HttpApiTest, TokenizeAndBack) {
  const Json ids = PostOk("/tokenize", {{"prompt", "Hello world"}, {"return_token_strs", true}});
  EXPECT_EQ(ids["count"], ids["tokens"].size());
  EXPECT_EQ(ids["token_strs"].size(), ids["tokens"].size());
  EXPECT_EQ(PostOk("/v1/detokenize", {{"tokens", ids["tokens"]}})["prompt"], "Hello world");
}

TEST_F(HttpApiTest, ModelsAndTheRest) {
  EXPECT_EQ(Json::parse(server_->Send("GET", "/v1/models").body)["data"][0]["id"], "org/echo");
  EXPECT_EQ(Json::parse(server_->Send("GET", "/v1/models/org%2Fecho").body)["id"], "org/echo");
  EXPECT_EQ(Json::parse(server_->Send("GET", "/models/org/echo").body)["id"], "org/echo");
  EXPECT_EQ(Json::parse(server_->Send("GET", "/version").body)["version"], SWITCHYARD_VERSION);
  EXPECT_EQ(server_->Send("GET", "/health").status, 200);
  const HttpReply head = server_->Send("HEAD", "/health");
  EXPECT_EQ(head.status, 200);
  EXPECT_EQ(head.body, "");
  const HttpReply options = server_->Send("OPTIONS", "/v1/chat/completions");
  EXPECT_EQ(options.status, 204);
  EXPECT_EQ(options.Header("Access-Control-Allow-Origin"), "*");
}

TEST_F(HttpApiTest, Statuses) {
  struct Case {
    const char* method;
    const char* path;
    const char* body;
    int status;
    const char* needle;
  };
  for (const Case& c : {
           Case{"GET", "/nothing", "", 404, "/nothing"},
           Case{"GET", "/v1/models/other", "", 404, "other"},
           Case{"GET", "/v1/completions", "", 405, "POST"},
           Case{"POST", "/health", "{}", 405, "GET"},
           Case{"POST", "/v1/completions", "{\"prompt\":\"a\"", 400, "JSON"},
           Case{"POST", "/v1/completions", "[]", 400, "object"},
           Case{"POST", "/v1/completions", "{\"prompt\":\"\xff\"}", 400, "UTF-8"},
           Case{"POST", "/v1/completions", "{\"prompt\":\"a\",\"model\":\"other\"}", 404, "other"},
           Case{"POST", "/v1/completions", "{\"prompt\":[1000000]}", 400, "1000000"},
           Case{"POST", "/v1/completions", "{\"prompt\":\"a\",\"max_tokens\":2000000}", 400,
                "2000000"},
           Case{"POST", "/v1/chat/completions", "{\"messages\":[]}", 400, "messages"},
           Case{"POST", "/v1/chat/completions",
                "{\"messages\":[{\"role\":\"raise\",\"content\":\"\"}]}", 400, "raised"},
           Case{"POST", "/v1/chat/completions",
                "{\"messages\":[{\"role\":\"user\",\"content\":\"\"}]}", 400, "empty"},
           Case{"POST", "/v1/completions", "{\"prompt\":\"a\",\"stream\":true,\"top_p\":7}", 400,
                "top_p"},
       }) {
    const HttpReply reply = server_->Send(c.method, c.path, c.body);
    EXPECT_EQ(reply.status, c.status) << c.path << " " << c.body << " " << reply.body;
    EXPECT_NE(reply.body.find(c.needle), std::string::npos) << c.body << " " << reply.body;
    EXPECT_FALSE(reply.Header("X-Request-Id").empty());
    const Json error = Json::parse(reply.body)["error"];
    EXPECT_EQ(error.size(), 4u) << reply.body;
  }
  const HttpReply form = server_->Send(
      "POST", "/v1/completions", "a=b",
      {{"Content-Type", "application/x-www-form-urlencoded"}, {"X-Request-Id", "mine"}});
  EXPECT_EQ(form.status, 415);
  EXPECT_EQ(form.Header("X-Request-Id"), "mine");
}

}  // namespace
}  // namespace switchyard
