// The evaluation client and one-shot generation, against a model that repeats the prompt.
#include "server/eval.h"

#include <gtest/gtest.h>

#include <fstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/fake_engine.h"
#include "server/generate.h"

namespace switchyard {
namespace {

std::string WriteItems(const std::string& name, const std::string& lines) {
  const std::string path = testing::TempDir() + name;
  std::ofstream(path) << lines;
  return path;
}

TEST(EvalTest, ScoresByDomain) {
  TestServer server;
  std::string lines;
  for (int i = 0; i < 20; ++i) {
    absl::StrAppend(&lines, R"({"domain":")", i % 2 ? "odd" : "even",
                    R"(","messages":[{"role":"user","content":"w)", i, R"("}],"answer":"w)",
                    i == 3 ? 4 : i, R"("})", "\n");
  }
  EvalOptions options{.url = server.url() + "/v1/", .items = WriteItems("items.jsonl", lines)};
  const auto result = RunEval(options);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->overall.total, 20);
  EXPECT_EQ(result->overall.correct, 19);
  EXPECT_EQ(result->domains.at("odd").correct, 9);
  EXPECT_TRUE(absl::StrContains(FormatEval(*result, true),
                                R"("overall":{"accuracy":0.95,"correct":19,"total":20})"));
}

TEST(EvalTest, ErrorsAreOneLine) {
  EvalOptions options{.url = "http://127.0.0.1:9",
                      .items = WriteItems("one.jsonl", R"({"messages":[],"answer":""})")};
  EXPECT_TRUE(absl::StrContains(RunEval(options).status().message(), "127.0.0.1:9"))
      << RunEval(options).status();
  options.url = "ftp://a";
  EXPECT_EQ(RunEval(options).status().code(), absl::StatusCode::kInvalidArgument);
  options.items = WriteItems("bad.jsonl", "{\"messages\":[],\"answer\":\"\"}\n{\n");
  EXPECT_TRUE(absl::StrContains(RunEval(options).status().message(), ":2:"));
  options.items = "/nowhere";
  EXPECT_EQ(RunEval(options).status().code(), absl::StatusCode::kNotFound);
}

TEST(GenerateTest, PrintsTheTextAndTheSpeed) {
  TestServer server;
  Engine engine;
  engine.model = server.model();
  engine.tokenizer = &server.tokenizer();
  engine.render_chat = RenderPlainChat;
  engine.scheduler = &server.scheduler();
  GenerationRequest request;
  request.prompts.push_back({.text = "say this STOP not this", .ids = {}});
  request.max_tokens = 100;
  request.stop = {" STOP"};
  std::FILE* out = std::tmpfile();
  const auto report = RunGenerate(request, engine, 1, out);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_GT(report->output_tokens, 1);
  EXPECT_TRUE(absl::StrContains(FormatReport(*report), "tokens per second"));
  std::rewind(out);
  char text[100] = {};
  EXPECT_EQ(std::fread(text, 1, sizeof(text) - 1, out), 8u);
  EXPECT_STREQ(text, "say this");
  std::fclose(out);
  request.temperature = -1;
  EXPECT_EQ(RunGenerate(request, engine, 1, stdout).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace switchyard
