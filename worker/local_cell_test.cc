#include "worker/local_cell.h"

#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "absl/strings/str_cat.h"
#include "comm/routing_trace.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/test_seed.h"
#include "worker/safetensors.h"
#include "worker/test_cases.h"
#include "worker/test_driver.h"

namespace switchyard {
namespace {

using testing::HasSubstr;

CellOptions Options(const std::string& fixture) {
  CellOptions options;
  options.model_dir = absl::StrCat(SWITCHYARD_SOURCE_DIR, "/tests/fixtures/", fixture);
  options.threads = 2;
  options.kv_cache_memory = 8 << 20;
  options.max_num_batched_tokens = 256;
  return options;
}

class CellFamilyTest : public testing::TestWithParam<std::string> {};

TEST_P(CellFamilyTest, BitsDoNotDependOnBatchChunksWorkersOrPlacement) {
  std::mt19937 random(TestSeed());
  CellOptions options = Options(GetParam());
  options.expert_workers = 1;
  std::unique_ptr<LocalCell> reference = MakeCell(options);
  ASSERT_NE(reference, nullptr);
  const std::vector<Case> cases = RandomCases(9, reference->model_info(), random);
  TestDriver alone(reference.get());
  const std::vector<TestOutput> expected = RunAlone(alone, cases);
  ExpectSameBits(expected, RunMixed(alone, cases, random), "1x1 batched");
  for (const auto& [attention, experts, threads] : {std::array{1, 4, 1}, {2, 3, 2}, {3, 2, 4}}) {
    options.attention_workers = attention;
    options.expert_workers = experts;
    options.threads = threads;
    options.placement = nullptr;
    if (experts != 4) options.placement = RandomPlacement(reference->model_info(), experts, random);
    std::unique_ptr<LocalCell> cell = MakeCell(options);
    ASSERT_NE(cell, nullptr);
    TestDriver driver(cell.get());
    ExpectSameBits(expected, RunMixed(driver, cases, random),
                   absl::StrCat(attention, "x", experts));
  }
}

// What a cell of this shape records while it runs the cases one after another, in chunks of `chunk`
// rows, on its attention workers in turn. Its bits are those without a recorder.
RoutingTrace RecordCases(CellOptions options, const std::vector<Case>& cases, int32_t chunk,
                         const std::vector<TestOutput>& expected) {
  options.recorder.path = absl::StrCat(testing::TempDir(), "/cell.", getpid(), ".trace");
  options.recorder.wait_when_full = true;
  const std::unique_ptr<LocalCell> cell = MakeCell(options);
  if (cell == nullptr) return {};
  TestDriver driver(cell.get());
  driver.SetMicroBatches(cell->num_attention_workers() > 1 ? 2 : 1);
  for (size_t i = 0; i < cases.size(); ++i) {
    const TestOutput out =
        driver.Generate(cases[i].prompt, cases[i].sampling, cases[i].num_tokens, chunk,
                        static_cast<int>(i) % cell->num_attention_workers());
    ExpectSameBits(expected[i], out, absl::StrCat("recorded, case ", i));
  }
  EXPECT_TRUE(cell->recorder()->Close().ok());
  absl::StatusOr<RoutingTrace> trace = ReadRoutingTrace(options.recorder.path);
  EXPECT_TRUE(trace.ok()) << trace.status();
  std::filesystem::remove(options.recorder.path);
  if (!trace.ok()) return {};
  // The experts were really asked for what the trace says.
  std::vector<uint64_t> copies(
      static_cast<size_t>(cell->model_info().num_moe_layers * cell->model_info().num_experts));
  for (size_t row = 0; row < trace->rows.size(); ++row) {
    for (int32_t layer = 0; layer < trace->shape.num_layers; ++layer) {
      for (uint16_t e : trace->Experts(row, layer)) {
        ++copies[static_cast<size_t>(layer * trace->shape.num_experts) + e];
      }
    }
  }
  for (size_t i = 0; i < copies.size(); ++i) {
    uint64_t computed = 0;
    for (int w = 0; w < cell->num_expert_workers(); ++w)
      computed += cell->expert_counters(w).expert_copies[i].load();
    EXPECT_EQ(copies[i], computed) << "load " << i;
  }
  return *std::move(trace);
}

TEST_P(CellFamilyTest, RecordedRoutingIsWhatWasComputedWithoutTouchingTheBits) {
  std::mt19937 random(TestSeed());
  CellOptions options = Options(GetParam());
  options.expert_workers = 1;
  std::vector<Case> cases;
  std::vector<TestOutput> expected;
  {
    const std::unique_ptr<LocalCell> plain = MakeCell(options);
    ASSERT_NE(plain, nullptr);
    EXPECT_EQ(plain->recorder(), nullptr);
    cases = RandomCases(5, plain->model_info(), random);
    TestDriver driver(plain.get());
    for (const Case& c : cases)
      expected.push_back(driver.Generate(c.prompt, c.sampling, c.num_tokens));
  }
  const RoutingTrace one = RecordCases(options, cases, 256, expected);
  options.attention_workers = 2;
  options.expert_workers = 3;
  const RoutingTrace many = RecordCases(options, cases, 7, expected);
  EXPECT_EQ(one.rows, many.rows);
  EXPECT_EQ(one.ids, many.ids);
  ASSERT_EQ(one.weights.size(), many.weights.size());
  EXPECT_EQ(std::memcmp(one.weights.data(), many.weights.data(), one.weights.size() * 4), 0);
  size_t rows = 0;
  for (const Case& c : cases) rows += c.prompt.size() + c.num_tokens - 1;  // the last is not run
  EXPECT_EQ(one.rows.size(), rows);
}

INSTANTIATE_TEST_SUITE_P(Families, CellFamilyTest,
                         testing::Values("qwen3_moe", "olmoe", "mixtral", "qwen2_moe",
                                         "qwen3_moe_tied_bf16"),
                         [](const auto& info) { return info.param; });

TEST(LocalCellTest, ModelInfo) {
  int64_t last = 0, total = 0;
  CellOptions options = Options("qwen3_moe");
  options.progress = [&](int64_t done, int64_t all) {
    EXPECT_GT(done, last);
    last = done;
    total = all;
  };
  const std::unique_ptr<LocalCell> cell = MakeCell(options);
  ASSERT_NE(cell, nullptr);
  EXPECT_EQ(last, total);
  const ModelInfo& info = cell->model_info();
  EXPECT_EQ(info.name, "qwen3_moe");
  EXPECT_EQ(info.architecture, "Qwen3MoeForCausalLM");
  EXPECT_EQ(info.dtype, "float32");
  EXPECT_EQ(info.num_layers, 3);
  EXPECT_EQ(info.num_moe_layers, 2);
  EXPECT_EQ(info.max_model_len, 512);
  EXPECT_GE(info.kv_bytes_per_token, 3 * 2 * 2 * 24 * 4);
  EXPECT_GT(info.num_kv_blocks, 32);
}

TEST(LocalCellTest, BadOptionsAreErrorsWithNumbers) {
  const auto error_of = [](const CellOptions& options) {
    return std::string(LocalCell::Create(options).status().message());
  };
  CellOptions options = Options("qwen3_moe");
  options.kv_cache_memory = 1000;
  EXPECT_THAT(error_of(options), HasSubstr("there are 1000 bytes"));
  options = Options("qwen3_moe");
  options.max_model_len = 513;
  EXPECT_THAT(error_of(options), HasSubstr("513 exceeds the model's max_position_embeddings 512"));
  options = Options("qwen3_moe");
  options.dtype = "int8";
  EXPECT_THAT(error_of(options), HasSubstr("\"int8\""));
  options = Options("qwen3_moe");
  options.isa = "sse9";
  EXPECT_THAT(error_of(options), HasSubstr("sse9"));
  options = Options("qwen3_moe");
  options.attention_workers = 0;
  EXPECT_THAT(error_of(options), HasSubstr("attention workers is 0"));
  options = Options("nowhere");
  EXPECT_THAT(error_of(options), HasSubstr("cannot open"));
  options = Options("qwen3_moe");
  options.placement = std::make_shared<ExpertPlacement>(ExpertPlacement::Even(2, 8, 5));
  EXPECT_THAT(error_of(options), HasSubstr("5 ranks"));
}

TEST(LocalCellTest, EveryDTypeRunsOnEveryCheckpoint) {
  for (const char* fixture : {"qwen3_moe", "qwen3_moe_tied_bf16"}) {
    for (const char* dtype : {"auto", "float32", "bfloat16"}) {
      CellOptions options = Options(fixture);
      options.dtype = dtype;
      const std::unique_ptr<LocalCell> cell = MakeCell(options);
      ASSERT_NE(cell, nullptr);
      SamplingParams greedy;
      greedy.temperature = 0.0f;
      EXPECT_EQ(TestDriver(cell.get()).Generate({1, 2, 3, 4, 5}, greedy, 4).tokens.size(), 4u)
          << fixture << dtype;
    }
  }
}

TEST(LocalCellTest, BadPlansFailTheCellWithAReason) {
  const std::unique_ptr<LocalCell> cell = MakeCell(Options("qwen3_moe"));
  ASSERT_NE(cell, nullptr);
  TestDriver driver(cell.get());
  driver.Plan(driver.Add(0, {5, 310}, SamplingParams{}), 2);
  EXPECT_THAT(driver.Step(), HasSubstr("token 310 of a vocabulary of 310"));
  driver.Plan(driver.Add(0, {5}, SamplingParams{}), 2);
  EXPECT_THAT(driver.Step(), HasSubstr("token 310"));  // the cell is over
}

TEST(LocalCellTest, OneParticipantsErrorReachesTheOthers) {
  CellOptions options = Options("qwen3_moe");
  options.attention_workers = 2;
  const std::unique_ptr<LocalCell> cell = MakeCell(options);
  ASSERT_NE(cell, nullptr);
  TestDriver driver(cell.get());
  driver.Plan(driver.Add(0, {5, 6}, SamplingParams{}), 2);
  driver.Plan(driver.Add(1, {5, -1}, SamplingParams{}), 2);
  EXPECT_THAT(driver.Step(), HasSubstr("token -1"));
}

TEST(LocalCellTest, PromptLogprobsOfTheWholeVocabulary) {
  const std::unique_ptr<LocalCell> cell = MakeCell(Options("mixtral"));
  ASSERT_NE(cell, nullptr);
  SamplingParams sampling;
  sampling.temperature = 0.0f;
  sampling.num_prompt_logprobs = cell->model_info().vocab_size;
  const TestOutput out = TestDriver(cell.get()).Generate({1, 2, 3, 4}, sampling, 1);
  ASSERT_EQ(out.prompt_logprobs.size(), 3u);
  double sum = 0;
  for (const auto& [token, logprob] : out.prompt_logprobs[0].top)
    sum += std::exp(static_cast<double>(logprob));
  EXPECT_NEAR(sum, 1.0, 1e-5);
  EXPECT_EQ(out.prompt_logprobs[0].token, 2);
}

TEST(LocalCellTest, PromptTokensScoredInAnEarlierRunAreNotScoredAgain) {
  const std::unique_ptr<LocalCell> cell = MakeCell(Options("mixtral"));
  ASSERT_NE(cell, nullptr);
  SamplingParams sampling;
  sampling.temperature = 0.0f;
  sampling.num_prompt_logprobs = 2;
  TestDriver driver(cell.get());
  const std::vector<int32_t> prompt = {1, 2, 3, 4, 5, 6, 7};
  const std::vector<TokenLogprob> all = driver.Generate(prompt, sampling, 1).prompt_logprobs;
  ASSERT_EQ(all.size(), 6u);
  for (int32_t first = 1; first <= 7; ++first) {
    for (int32_t chunk : {2, 7}) {
      const SequenceId id = driver.Add(0, prompt, sampling, first);
      while (driver.output(id).tokens.empty()) {
        driver.Plan(id, chunk);
        ASSERT_EQ(driver.Step(), "");
      }
      const std::vector<TokenLogprob>& got = driver.output(id).prompt_logprobs;
      ASSERT_EQ(got.size(), static_cast<size_t>(7 - first));
      for (size_t i = 0; i < got.size(); ++i) {
        EXPECT_TRUE(SameBits(got[i], all[static_cast<size_t>(first) - 1 + i])) << first << " " << i;
      }
      driver.End(id);
    }
  }
}

TEST(LocalCellTest, TheMemorySumHasTheScratchOfEveryExpertRank) {
  CellOptions options = Options("qwen3_moe");
  options.expert_workers = 256;
  options.max_num_batched_tokens = 1 << 20;  // more than any memory holds
  const std::string message(LocalCell::Create(options).status().message());
  long long weights = 0, buffers = 0;
  ASSERT_EQ(std::sscanf(message.c_str(),
                        "weights of %lld bytes, a KV cache of 0 bytes and buffers of %lld",
                        &weights, &buffers),
            2)
      << message;
  const ModelConfig config = *LoadModelConfig(options.model_dir);
  const ExchangeShape shape = {.row_bytes = static_cast<int32_t>(config.hidden_size * 4),
                               .num_experts = config.moe.routing.num_experts,
                               .top_k = config.moe.routing.top_k,
                               .max_rows = options.max_num_batched_tokens};
  const CellRanks ranks = {.num_attention = 1, .num_experts = 256};
  ThreadPool pool(1);
  std::string error;
  const int64_t scratch = MakeCpuBackend(&pool, "auto", &error)
                              ->MaxScratch(ExpertRank::MaxCalls(
                                  shape, DType::kF32, config.hidden_size, config.moe.expert_width))
                              .backend;
  EXPECT_GE(scratch, int64_t{shape.max_rows} * shape.top_k * shape.row_bytes);
  EXPECT_GE(buffers, 256 * (ExpertRank::BufferBytes(shape, ranks) + scratch));
}

// A checkpoint in which one token's embedding is NaN.
TEST(LocalCellTest, NonFiniteLogitsFailOnlyTheirSequence) {
  const CellOptions good = Options("mixtral");
  const std::string dir = absl::StrCat(testing::TempDir(), "/nan_model");
  std::filesystem::remove_all(dir);
  std::filesystem::copy(good.model_dir, dir);
  {
    const std::string path = dir + "/model.safetensors";
    const auto file = SafetensorsFile::Open(path);
    ASSERT_TRUE(file.ok()) << file.status();
    const StoredTensor embedding = (*file)->tensors().at("model.embed_tokens.weight");
    std::fstream bytes(path, std::ios::in | std::ios::out | std::ios::binary);
    bytes.seekp(static_cast<std::streamoff>(embedding.begin +
                                            7 * static_cast<uint64_t>(embedding.shape[1]) * 4));
    const float nan = std::nanf("");
    bytes.write(reinterpret_cast<const char*>(&nan), 4);
  }
  CellOptions options = good;
  options.model_dir = dir;
  const std::unique_ptr<LocalCell> cell = MakeCell(options);
  ASSERT_NE(cell, nullptr);
  SamplingParams sampling;
  sampling.temperature = 0.0f;
  sampling.num_logprobs = 1;
  sampling.num_prompt_logprobs = 0;
  TestDriver driver(cell.get());
  const TestOutput expected = driver.Generate({1, 2, 3}, sampling, 2);
  const SequenceId healthy = driver.Add(0, {1, 2, 3}, sampling);
  const SequenceId sick = driver.Add(0, {1, 7, 3}, sampling);
  driver.Plan(sick, 3);
  driver.Plan(healthy, 3);
  size_t results = driver.Send();
  // The step after it was sent before anybody knew.
  driver.PlanAhead(sick);
  driver.PlanAhead(healthy);
  results += driver.Send();
  ASSERT_EQ(driver.Collect(results), "");
  EXPECT_FALSE(driver.output(sick).finite);
  EXPECT_TRUE(driver.output(sick).tokens.empty());
  EXPECT_TRUE(driver.output(healthy).finite);
  ExpectSameBits(driver.output(healthy), expected, "beside a sick sequence");
  std::filesystem::remove_all(dir);
}

TEST(LocalCellTest, ATraceThatCannotBeMadeIsAnErrorAtStart) {
  CellOptions options = Options("qwen3_moe");
  options.recorder.path = "/nowhere/routing.trace";
  EXPECT_THAT(std::string(LocalCell::Create(options).status().message()),
              HasSubstr("cannot make /nowhere/routing.trace"));
}

TEST(LocalCellTest, TooLittleMemoryIsAnErrorAtStart) {
  CellOptions options = Options("qwen3_moe");
  options.kv_cache_memory = int64_t{1} << 50;
  EXPECT_THAT(std::string(LocalCell::Create(options).status().message()),
              HasSubstr("1125899906842624 bytes"));
  options = Options("qwen3_moe");
  options.attention_workers = 200;
  options.expert_workers = 200;
  options.max_num_batched_tokens = 1 << 20;
  EXPECT_THAT(std::string(LocalCell::Create(options).status().message()),
              HasSubstr("1048576 rows a step"));
}

TEST(LocalCellTest, DestructionEndsStepsUnderWay) {
  for (int round = 0; round < 5; ++round) {
    std::unique_ptr<LocalCell> cell = MakeCell(Options("olmoe"));
    ASSERT_NE(cell, nullptr);
    cell->SetResultCallback([](const StepResult&) {});
    StepPlan plan;
    plan.header.step = 1;
    plan.header.participants = {0};
    SequenceWork work;
    work.sequence = 1;
    work.count = 200;
    SequenceStart start{.tokens = std::vector<int32_t>(200, 7),
                        .prompt_length = 200,
                        .sampling = std::make_shared<SamplingParams>()};
    work.begin = std::make_shared<SequenceStart>(start);
    for (int32_t b = 0; b < 13; ++b) work.new_blocks.push_back(b);
    plan.work.push_back(work);
    cell->Execute(0, plan);
    cell.reset();
  }
}

}  // namespace
}  // namespace switchyard
