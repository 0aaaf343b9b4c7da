// Cells whose weights are quantised when loaded: the same bits whatever the batch, chunks, workers,
// threads and placement are, also while weights move between ranks; logits near those of floats;
// memory as planned.
#include <array>
#include <cmath>
#include <fstream>
#include <random>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/test_seed.h"
#include "kernels/thread_pool.h"
#include "worker/local_cell.h"
#include "worker/model_facts.h"
#include "worker/test_cases.h"
#include "worker/test_driver.h"
#include "worker/weight_memory.h"
#include "worker/weights.h"

namespace switchyard {
namespace {

using testing::HasSubstr;

struct Param {
  std::string fixture;
  std::string quantization;
  std::string rules;
  std::string isa;
};
void PrintTo(const Param& param, std::ostream* out) {
  *out << param.fixture << "/" << param.quantization << "/" << param.isa << "/" << param.rules;
}

std::string RulesFile(const std::string& rules) {
  if (rules.empty()) return "";
  const std::string path = absl::StrCat(testing::TempDir(), "/quantized_cell_test_",
                                        std::hash<std::string>()(rules), ".json");
  std::ofstream(path) << rules;
  return path;
}

CellOptions Options(const Param& param) {
  CellOptions options;
  options.model_dir = absl::StrCat(SWITCHYARD_SOURCE_DIR, "/tests/fixtures/", param.fixture);
  options.threads = 2;
  options.isa = param.isa;
  options.formats = {param.quantization, RulesFile(param.rules)};
  options.kv_cache_memory = 8 << 20;
  options.max_num_batched_tokens = 256;
  return options;
}

class QuantizedCellTest : public testing::TestWithParam<Param> {};

TEST_P(QuantizedCellTest, BitsDoNotDependOnBatchChunksWorkersThreadsOrPlacement) {
  std::mt19937 random(TestSeed());
  CellOptions options = Options(GetParam());
  options.expert_workers = 1;
  std::unique_ptr<LocalCell> reference = MakeCell(options);
  ASSERT_NE(reference, nullptr);
  const std::vector<Case> cases = RandomCases(6, reference->model_info(), random);
  TestDriver alone(reference.get());
  const std::vector<TestOutput> expected = RunAlone(alone, cases);
  ExpectSameBits(expected, RunMixed(alone, cases, random), "1x1 batched");
  uint64_t moved = 0;
  const bool experts_differ = GetParam().rules.find("\"experts\":") != std::string::npos;
  for (const auto& [attention, experts, threads] : {std::array{1, 4, 1}, {2, 3, 2}, {3, 2, 4}}) {
    options.attention_workers = attention;
    options.expert_workers = experts;
    options.threads = threads;
    options.planner.foreign_slots_per_rank = experts_differ ? 0 : 2;
    // Moving is cheap, so weights do move.
    options.planner.costs = {.token_ps = 1000, .expert_read_ps = 1000000, .expert_move_ps = 1};
    options.placement = nullptr;
    if (experts != 4) options.placement = RandomPlacement(reference->model_info(), experts, random);
    std::unique_ptr<LocalCell> cell = MakeCell(options);
    ASSERT_NE(cell, nullptr);
    TestDriver driver(cell.get());
    ExpectSameBits(expected, RunMixed(driver, cases, random),
                   absl::StrCat(attention, "x", experts));
    for (int e = 0; e < experts; ++e) moved += cell->expert_counters(e).weights_received.load();
  }
  if (GetParam().fixture == "qwen3_moe") {  // the one with enough experts for it to be certain
    EXPECT_GT(moved, 0u);
  }
}

// Log-softmax of every position of a prompt, by token id.
std::vector<std::vector<float>> Logprobs(const CellOptions& options) {
  std::unique_ptr<LocalCell> cell = MakeCell(options);
  TestDriver driver(cell.get());
  std::mt19937 random(7);
  SamplingParams sampling;
  sampling.num_prompt_logprobs = cell->model_info().vocab_size;
  const TestOutput output =
      driver.Generate(RandomTokens(60, cell->model_info().vocab_size, random), sampling, 1, 256);
  std::vector<std::vector<float>> rows;
  for (const TokenLogprob& row : output.prompt_logprobs) {
    std::vector<float>& by_token = rows.emplace_back(row.top.size());
    for (const auto& [token, logprob] : row.top) by_token[static_cast<size_t>(token)] = logprob;
  }
  return rows;
}

// Root mean square of the difference over that of the floats' values around their mean. Random
// weights have no redundancy and a router that is rounded may choose otherwise, so this is far more
// than what a trained model loses (demo_golden_test).
TEST_P(QuantizedCellTest, LogitsAreNearThoseOfFloats) {
  Param plain = GetParam();
  plain.quantization = "none";
  plain.rules = "";
  const auto want = Logprobs(Options(plain));
  const auto got = Logprobs(Options(GetParam()));
  ASSERT_EQ(want.size(), got.size());
  double difference = 0, square = 0, sum = 0, n = 0;
  for (size_t row = 0; row < want.size(); ++row) {
    for (size_t token = 0; token < want[row].size(); ++token) {
      const double x = want[row][token];
      difference += (got[row][token] - x) * (got[row][token] - x);
      square += x * x;
      sum += x;
      ++n;
    }
  }
  const double error = std::sqrt(difference / (square - sum * sum / n));
  std::cout << testing::PrintToString(GetParam()) << ": " << error << "\n";
  EXPECT_GT(error, 0);
  EXPECT_LT(error, GetParam().quantization == "int8" ? 0.15 : 0.5);
}

TEST_P(QuantizedCellTest, MemoryIsWhatWasPlanned) {
  const CellOptions options = Options(GetParam());
  const auto model =
      OpenModel({.model_dir = options.model_dir, .isa = options.isa, .formats = options.formats});
  ASSERT_TRUE(model.ok()) << model.status();
  ThreadPool pool(1);
  std::string error;
  const auto backend = MakeCpuBackend(&pool, options.isa, &error);
  ASSERT_NE(backend, nullptr) << error;
  const auto bytes = [](const PackedMatrix& m) { return static_cast<int64_t>(m.storage.bytes()); };
  const auto mlp = [&](const MlpWeights& m) { return bytes(m.gate_up) + bytes(m.down); };

  const auto attention = LoadAttentionWeights(*model, backend.get(), nullptr);
  int64_t held = static_cast<int64_t>(attention->embedding_storage.bytes()) +
                 bytes(attention->lm_head) +
                 static_cast<int64_t>(attention->final_norm.storage.bytes());
  for (const AttentionLayerWeights& layer : attention->layers) {
    for (const FloatVector* v :
         {&layer.input_norm, &layer.post_attention_norm, &layer.q_norm, &layer.k_norm,
          &layer.q_bias, &layer.k_bias, &layer.v_bias, &layer.o_bias})
      held += static_cast<int64_t>(v->storage.bytes());
    held += bytes(layer.q) + bytes(layer.k) + bytes(layer.v) + bytes(layer.o) +
            bytes(layer.router) + bytes(layer.shared_gate) + mlp(layer.dense) + mlp(layer.shared);
  }
  EXPECT_EQ(held, AttentionWeightBytes(model->config, model->formats, model->dtype, *backend));

  const auto placement =
      ExpertPlacement::Even(model->info.num_moe_layers, model->info.num_experts, 1);
  const auto experts = LoadExpertWeights(*model, placement, 0, backend.get(), nullptr);
  int64_t all = 0, largest = 0;
  for (const auto& layer : experts->experts) {
    for (const auto& expert : layer) {
      all += mlp(*expert);
      largest = std::max(largest, mlp(*expert));
    }
  }
  EXPECT_EQ(all, ExpertMemoryBytes(model->config, model->formats, *backend, placement, 0));
  EXPECT_EQ(all, AllExpertsBytes(model->config, model->formats, *backend));
  EXPECT_EQ(largest, model->expert_bytes);
}

std::vector<Param> Params() {
  std::vector<Param> params;
  for (const std::string& isa : CpuIsaPaths()) {
    for (const char* fixture : {"qwen3_moe", "quantized/source"}) {
      params.push_back({fixture, "int8", "", isa});
      params.push_back({fixture, "int4", "", isa});
    }
    params.push_back({"qwen2_moe", "int4",
                      R"([{"roles": ["attention"], "format": "int8"},
                          {"roles": ["experts"], "layers": [1], "experts": [[0, 2]], "format": "none"},
                          {"roles": ["lm_head"], "format": "none"}])",
                      isa});
    params.push_back({"qwen3_moe_tied_bf16", "int4", "", isa});
    params.push_back({"quantized/awq", "int4", "", isa});
  }
  return params;
}

INSTANTIATE_TEST_SUITE_P(Formats, QuantizedCellTest, testing::ValuesIn(Params()));

TEST(QuantizedModelTest, NumericsIdAndHashTellFormatsApart) {
  const std::string dir = absl::StrCat(SWITCHYARD_SOURCE_DIR, "/tests/fixtures/qwen3_moe");
  const auto facts = [&](const WeightFormatOptions& formats) {
    const auto read = ReadModelFacts({.model_dir = dir, .formats = formats});
    EXPECT_TRUE(read.ok()) << read.status();
    return std::pair(read->info.numerics_id, read->model_hash);
  };
  const auto none = facts({});
  const auto int8 = facts({"int8", ""});
  const auto rules = facts({"int8", RulesFile(R"([{"roles": ["experts"], "format": "int4"}])")});
  EXPECT_NE(none.second, int8.second);
  EXPECT_NE(int8.second, rules.second);
  EXPECT_EQ(int8.first, none.first + "/int8");
  EXPECT_THAT(rules.first, HasSubstr("/int8+"));
}

TEST(QuantizedModelTest, ForeignSlotsNeedOneFormatPerLayer) {
  CellOptions options =
      Options({"qwen3_moe", "int8", R"([{"roles": ["experts"], "experts": [1], "format": "int4"}])",
               "auto"});
  options.planner.foreign_slots_per_rank = 1;
  EXPECT_THAT(std::string(LocalCell::Create(options).status().message()),
              HasSubstr("the experts of layer 0 have several weight formats"));
}

}  // namespace
}  // namespace switchyard
