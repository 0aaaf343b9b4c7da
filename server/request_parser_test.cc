// The request parsers: types, ranges, what is accepted; and thousands of mutated bodies that must
// never do worse than kInvalidArgument.
#include "server/request_parser.h"

#include <gtest/gtest.h>

#include <random>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace switchyard {
namespace {

TEST(RequestParserTest, AllParameters) {
  const auto request = ParseCompletionRequest(R"({
    "model": "m", "prompt": ["a", "b"], "max_tokens": 7, "min_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 40,
    "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.5, "seed": -9223372036854775808,
    "stop": ["x", "y"], "stop_token_ids": [3, 4], "ignore_eos": true, "include_stop_str_in_output": true, "n": 3,
    "logprobs": 4, "echo": true, "logit_bias": {"5": -100, "6": 2.5}, "stream": true,
    "stream_options": {"include_usage": true}, "user": "u", "unknown": {"deep": [1]}, "return_token_ids": true,
    "add_special_tokens": false, "cache_salt": "tenant", "response_format": {"type": "text"}})");
  ASSERT_TRUE(request.ok()) << request.status();
  EXPECT_EQ(request->model, "m");
  EXPECT_EQ(request->prompts.size(), 2u);
  EXPECT_EQ(request->max_tokens, 7);
  EXPECT_EQ(request->min_tokens, 2);
  EXPECT_EQ(request->temperature, 0.5f);
  EXPECT_EQ(request->top_p, 0.9f);
  EXPECT_EQ(request->top_k, 40);
  EXPECT_EQ(request->min_p, 0.1f);
  EXPECT_EQ(request->presence_penalty, 1);
  EXPECT_EQ(request->frequency_penalty, -1);
  EXPECT_EQ(request->repetition_penalty, 1.5f);
  EXPECT_EQ(request->seed, INT64_MIN);
  EXPECT_EQ(request->stop, (std::vector<std::string>{"x", "y"}));
  EXPECT_EQ(request->stop_token_ids, (std::vector<int32_t>{3, 4}));
  EXPECT_TRUE(request->ignore_eos && request->include_stop && request->echo && request->stream);
  EXPECT_TRUE(request->include_usage && request->return_token_ids && !request->add_special_tokens);
  EXPECT_EQ(request->cache_salt, "tenant");
  EXPECT_EQ(request->n, 3);
  EXPECT_EQ(request->logprobs, 4);
  EXPECT_EQ(request->logit_bias, (std::vector<std::pair<int32_t, float>>{{5, -100.0f}, {6, 2.5f}}));
}

TEST(RequestParserTest, DefaultsAndNulls) {
  const auto request = ParseCompletionRequest(
      R"({"prompt":"a","temperature":null,"n":null,"stop":null,"logprobs":null,"max_tokens":null,"stream_options":null})");
  ASSERT_TRUE(request.ok()) << request.status();
  EXPECT_FALSE(request->temperature || request->max_tokens || request->seed);
  EXPECT_EQ(request->n, 1);
  EXPECT_EQ(request->logprobs, -1);
  EXPECT_TRUE(request->add_special_tokens);
}

TEST(RequestParserTest, PromptForms) {
  const auto ids = ParseCompletionRequest(R"({"prompt":[1,2.0,3]})");
  ASSERT_TRUE(ids.ok());
  ASSERT_EQ(ids->prompts.size(), 1u);
  EXPECT_EQ(ids->prompts[0].ids, (std::vector<int32_t>{1, 2, 3}));
  const auto lists = ParseCompletionRequest(R"({"prompt":[[1],[2,3]]})");
  ASSERT_TRUE(lists.ok());
  EXPECT_EQ(lists->prompts.size(), 2u);
}

TEST(RequestParserTest, NestingUpTo64IsLegal) {
  const auto body = [](int levels) {  // with the body's own object
    return absl::StrCat(R"({"prompt":"a","x":)", std::string(levels - 1, '['),
                        std::string(levels - 1, ']'), "}");
  };
  EXPECT_TRUE(ParseCompletionRequest(body(64)).ok());
  const auto deep = ParseCompletionRequest(body(65));
  EXPECT_EQ(deep.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(absl::StrContains(deep.status().message(), "64")) << deep.status();
}

TEST(RequestParserTest, ErrorsNameTheFieldAndTheNumber) {
  struct Case {
    const char* members;
    const char* needle;
  };
  for (const Case& c : {
           Case{R"("temperature":-0.5)", "-0.5"},
           Case{R"("temperature":"hot")", "a string"},
           Case{R"("temperature":1e300)", "temperature"},
           Case{R"("top_p":0)", "top_p"},
           Case{R"("top_p":1.5)", "1.5"},
           Case{R"("top_k":-2)", "-2"},
           Case{R"("n":0)", "128"},
           Case{R"("n":1.5)", "1.5"},
           Case{R"("max_tokens":0)", "max_tokens"},
           Case{R"("max_tokens":99999999999)", "99999999999"},
           Case{R"("min_tokens":5,"max_tokens":4)", "min_tokens (5)"},
           Case{R"("seed":9223372036854775808)", "9223372036854775808"},
           Case{R"("seed":1e30)", "seed"},
           Case{R"("stop":[1])", "a number"},
           Case{R"("stop":"")", "empty"},
           Case{R"("cache_salt":"")", "cache_salt"},
           Case{R"("cache_salt":7)", "a number"},
           Case{R"("logit_bias":{"a":1})", "'a'"},
           Case{R"("logit_bias":{"1":101})", "101"},
           Case{R"("logprobs":21)", "21"},
           Case{R"("logprobs":-1)", "-1"},
           Case{R"("stream_options":{})", "stream: true"},
           Case{R"("response_format":{"type":"json_object"})", "json_object"},
           Case{R"("suffix":"x")", "suffix"},
           Case{R"("user":1)", "user"},
       }) {
    const auto request = ParseCompletionRequest(absl::StrCat(R"({"prompt":"a",)", c.members, "}"));
    EXPECT_EQ(request.status().code(), absl::StatusCode::kInvalidArgument) << c.members;
    EXPECT_TRUE(absl::StrContains(request.status().message(), c.needle))
        << c.members << ": " << request.status();
  }
}

TEST(RequestParserTest, ChatErrors) {
  for (
      const char* body : {
          R"({})",
          R"({"messages":null})",
          R"({"messages":[]})",
          R"({"messages":["a"]})",
          R"({"messages":[{}]})",
          R"({"messages":[{"role":1}]})",
          R"({"messages":[{"role":"user","content":1}]})",
          R"({"messages":[{"role":"user","content":["a"]}]})",
          R"({"messages":[{"role":"user","content":[{"type":"image_url"}]}]})",
          R"({"messages":[{"role":"user","content":"a"}],"add_generation_prompt":true,"continue_final_message":true})",
          R"({"messages":[{"role":"user","content":"a"}],"top_logprobs":2})",
          R"({"messages":[{"role":"user","content":"a"}],"logprobs":true,"top_logprobs":21})",
          R"({"messages":[{"role":"user","content":"a"}],"chat_template_kwargs":[]})",
          R"({"messages":[{"role":"user","content":"a"}],"max_tokens":0})",
      }) {
    EXPECT_EQ(ParseChatRequest(body).status().code(), absl::StatusCode::kInvalidArgument) << body;
  }
  EXPECT_TRUE(
      ParseChatRequest(
          R"({"messages":[{"role":"user","content":[{"type":"text","text":"a"}]}],"max_completion_tokens":3})")
          .ok());
}

TEST(RequestParserTest, MutatedBodiesNeverCrash) {
  const uint32_t seed = 20240611;
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937 random(seed);
  const std::vector<std::string> bodies = {
      R"({"prompt":["a","b"],"stop":["x"],"logit_bias":{"5":-1},"stream":true,"stream_options":{"include_usage":true}})",
      R"({"prompt":[[1,2],[3]],"seed":12345678901,"n":2,"logprobs":3,"temperature":1e-3,"response_format":{"type":"text"}})",
      R"({"messages":[{"role":"user","content":[{"type":"text","text":"h\u00e9"}]},{"role":"assistant","content":null}],
          "tools":[{}],"chat_template_kwargs":{"a":[true,null,1.5]},"logprobs":true,"top_logprobs":2})",
      R"({"tokens":[1,2,3]})"};
  const std::string alphabet = "{}[]\",:0123456789.eE+-\\ntrufalse \x00\xff\xc3";
  for (int round = 0; round < 50000; ++round) {
    std::string body = bodies[random() % bodies.size()];
    for (int edit = static_cast<int>(random() % 4); edit >= 0; --edit) {
      const size_t at = random() % (body.size() + 1);
      switch (random() % 4) {
        case 0:
          body.insert(at, 1, alphabet[random() % alphabet.size()]);
          break;
        case 1:
          if (at < body.size()) body[at] = alphabet[random() % alphabet.size()];
          break;
        case 2:
          body.erase(at, random() % 8);
          break;
        default:
          body.insert(at, body.substr(random() % (body.size() + 1), random() % 16));
      }
    }
    for (const absl::Status& status :
         {ParseCompletionRequest(body).status(), ParseChatRequest(body).status(),
          ParseTokenizeRequest(body).status(), ParseDetokenizeRequest(body).status()}) {
      ASSERT_TRUE(status.ok() || status.code() == absl::StatusCode::kInvalidArgument)
          << body << ": " << status;
    }
  }
}

}  // namespace
}  // namespace switchyard
