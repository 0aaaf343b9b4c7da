// Same tokens, same logprobs, bit for bit: a request alone on one attention and one expert worker
// with one thread is the reference; the same request among others must give the same bytes with any
// chunk size, prefix-cache hits, preemption, worker counts, threads, micro-batches, steps in
// flight, expert placement, balancing and spilled weights. Greedy and sampled. Once per instruction
// path of this CPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <iostream>
#include <memory>
#include <random>

#include "absl/strings/str_cat.h"
#include "comm/test_problems.h"
#include "kernels/backend.h"
#include "tests/cell.h"

namespace switchyard {
namespace {

constexpr int32_t kMaxModelLen = 300;  // beyond one attention split of 256
constexpr int32_t kLongPrompt = 262;

struct BitsParam {
  std::string fixture;
  std::string isa;
  bool long_prompt = false;  // some fixtures end at 256 positions
};
void PrintTo(const BitsParam& param, std::ostream* out) {
  *out << param.fixture << "/" << param.isa;
}

std::vector<BitsParam> AllParams() {
  std::vector<BitsParam> params;
  for (const std::string& isa : CpuIsaPaths()) {
    params.push_back({"qwen3_moe", isa, true});  // a dense layer in the middle
    params.push_back({"qwen3_moe_tied_bf16", isa, true});
    params.push_back({"qwen2_moe", isa});  // shared expert
    params.push_back({"mixtral", isa});
    params.push_back({"olmoe", isa});  // q/k norm over the whole projection
  }
  return params;
}

float Uniform(std::mt19937& rng, float low, float high) {
  return low + (high - low) * static_cast<float>(Below(rng, 1001)) / 1000.0f;
}

SamplingParams RandomSampling(std::mt19937& rng, int32_t vocab_size) {
  SamplingParams sampling;
  sampling.temperature = Below(rng, 5) < 2 ? 0.0f : Uniform(rng, 0.4f, 1.5f);
  if (Below(rng, 3) == 0) sampling.top_k = 1 + Below(rng, 60);
  if (Below(rng, 3) == 0) sampling.top_p = Uniform(rng, 0.5f, 1.0f);
  if (Below(rng, 4) == 0) sampling.min_p = Uniform(rng, 0.0f, 0.05f);
  if (Below(rng, 4) == 0) sampling.presence_penalty = Uniform(rng, -1.0f, 1.0f);
  if (Below(rng, 4) == 0) sampling.frequency_penalty = Uniform(rng, -1.0f, 1.0f);
  if (Below(rng, 4) == 0) sampling.repetition_penalty = Uniform(rng, 0.8f, 1.5f);
  if (Below(rng, 4) == 0)
    sampling.logit_bias.emplace_back(Below(rng, vocab_size), Uniform(rng, -5.0f, 5.0f));
  sampling.seed = (static_cast<uint64_t>(rng()) << 32) | rng();
  constexpr int32_t kNumLogprobs[] = {-1, 0, 1, 5, 20};
  sampling.num_logprobs = kNumLogprobs[Below(rng, 5)];
  if (Below(rng, 4) == 0) sampling.num_prompt_logprobs = Below(rng, 4);
  return sampling;
}

std::vector<int32_t> RandomTokens(std::mt19937& rng, int32_t n, int32_t vocab_size) {
  std::vector<int32_t> tokens;
  for (int32_t i = 0; i < n; ++i) tokens.push_back(Below(rng, vocab_size));
  return tokens;
}

// Some prompts share a beginning; some requests have several choices or may stop early.
std::vector<Request> RandomRequests(std::mt19937& rng, int32_t num, bool long_prompt,
                                    int32_t vocab_size) {
  const std::vector<int32_t> shared = RandomTokens(rng, 100, vocab_size);
  std::vector<Request> requests;
  for (int32_t i = 0; i < num; ++i) {
    Request& request = requests.emplace_back();
    if (Below(rng, 2) == 0)
      request.prompt.assign(shared.begin(), shared.begin() + 1 + Below(rng, 100));
    const int32_t own =
        i == 0 && long_prompt ? kLongPrompt : 1 + Below(rng, Below(rng, 3) == 0 ? 90 : 20);
    if (i == 0) request.prompt.clear();
    const std::vector<int32_t> tokens = RandomTokens(rng, own, vocab_size);
    request.prompt.insert(request.prompt.end(), tokens.begin(), tokens.end());
    request.choices.assign(1, RandomSampling(rng, vocab_size));
    request.max_tokens = 1 + Below(rng, 20);
    if (Below(rng, 3) == 0) request.stop_token_ids = RandomTokens(rng, 20, vocab_size);
    if (Below(rng, 4) == 0) {
      request.choices[0].min_tokens = Below(rng, 4);
      request.choices[0].banned_before_min = request.stop_token_ids;
    }
    for (uint32_t choice = 1; choice < 3 && Below(rng, 4) == 0; ++choice) {
      request.choices.push_back(request.choices[0]);
      request.choices.back().choice = choice;
    }
  }
  return requests;
}

// Costs at which spilling a few copies pays, so that weights move in most steps.
PlannerOptions RandomPlanner(std::mt19937& rng) {
  constexpr BalanceMode kModes[] = {BalanceMode::kNone, BalanceMode::kEplb, BalanceMode::kLlep,
                                    BalanceMode::kAuto};
  PlannerOptions options;
  options.mode = kModes[Below(rng, 4)];
  options.foreign_slots_per_rank = Below(rng, 4);
  options.costs = {.token_ps = 1000,
                   .expert_read_ps = Below(rng, 2) * 2000,
                   .expert_move_ps = 1 + Below(rng, 2000),
                   .exact_plan_ps = 0};
  options.llep = {.alpha_percent = 100, .min_chunk = 1, .lambda_percent = 101};
  return options;
}

// The choices of a request, one string each.
std::vector<std::string> BitsOf(const std::vector<ChoiceReply>& choices) {
  std::vector<std::string> bits;
  for (const ChoiceReply& choice : choices) {
    EXPECT_TRUE(choice.error.ok()) << choice.error;
    bits.push_back(choice.Bits());
  }
  return bits;
}

class BitsTest : public testing::TestWithParam<BitsParam> {
 protected:
  BitsTest() {
    base_.model_dir = FixtureDir(GetParam().fixture);
    base_.attention_workers = 1;
    base_.expert_workers = 1;
    base_.threads = 1;
    base_.isa = GetParam().isa;
    base_.max_model_len = GetParam().long_prompt ? kMaxModelLen : 256;
    base_.max_num_seqs = 64;
    base_.max_num_batched_tokens = 512;
  }

  // Everything that must not matter, at random.
  CellOptions RandomOptions(std::mt19937& rng, int attention_workers, int expert_workers,
                            const ModelInfo& model) {
    CellOptions options = base_;
    options.attention_workers = attention_workers;
    options.expert_workers = expert_workers;
    constexpr int kThreads[] = {1, 2, 4};
    options.threads = kThreads[Below(rng, 3)];
    constexpr int kBatchedTokens[] = {2, 5, 16, 37, 128, 512};
    options.max_num_batched_tokens = kBatchedTokens[Below(rng, 6)];
    options.max_num_seqs = Below(rng, 3) == 0 ? 5 : 64;
    if (Below(rng, 2) == 0) {
      options.placement = std::make_shared<ExpertPlacement>(
          RandomPlacement(rng, model.num_moe_layers, model.num_experts, expert_workers));
    }
    options.planner = RandomPlanner(rng);
    if (Below(rng, 2) == 0) {
      // Hardly more than the longest sequence needs: the others are preempted.
      const int64_t blocks =
          (options.max_model_len + model.block_size - 1) / model.block_size + Below(rng, 4);
      options.kv_cache_memory =
          blocks * model.block_size * model.kv_bytes_per_token * attention_workers;
    }
    return options;
  }

  static std::string Describe(const CellOptions& options, const SchedulerOptions& scheduler) {
    return absl::StrCat(
        options.attention_workers, "x", options.expert_workers, " workers, ", options.threads,
        " threads, ", options.max_num_batched_tokens, " tokens a step, ", options.max_num_seqs,
        " sequences, ", options.kv_cache_memory, " bytes of KV, ",
        options.placement ? "random" : "even", " placement, balance ",
        BalanceModeName(options.planner.mode), " with ", options.planner.foreign_slots_per_rank,
        " foreign slots, prefix cache ", scheduler.enable_prefix_caching ? "on" : "off",
        ", micro-batches mode ", static_cast<int>(scheduler.micro_batches), ", ",
        scheduler.max_steps_in_flight, " steps in flight");
  }

  CellOptions base_;
};

TEST_P(BitsTest, NothingAroundARequestChangesItsBits) {
  std::mt19937 rng = SeededRng();
  SchedulerOptions no_cache;
  no_cache.enable_prefix_caching = false;
  no_cache.micro_batches = MicroBatchMode::kOne;
  no_cache.max_steps_in_flight = 1;
  Cell alone(base_, no_cache);
  const ModelInfo model = alone.model();
  const std::vector<Request> requests =
      RandomRequests(rng, 10, GetParam().long_prompt, model.vocab_size);
  std::vector<std::vector<std::string>> want;
  for (const Request& request : requests) want.push_back(BitsOf(alone.Run(request)));
  const SchedulerStats reference = alone.Stats();
  EXPECT_EQ(reference.preemptions, 0u);

  uint64_t preemptions = 0, cached_tokens = 0, moved = 0;
  const std::pair<int, int> shapes[] = {{1, 1}, {1, 4}, {2, 3}};
  for (int trial = 0; trial < 6; ++trial) {
    const auto [attention_workers, expert_workers] = shapes[trial % 3];
    const CellOptions options = RandomOptions(rng, attention_workers, expert_workers, model);
    SchedulerOptions scheduler;
    scheduler.enable_prefix_caching = Below(rng, 4) != 0;
    constexpr MicroBatchMode kMicroBatches[] = {MicroBatchMode::kOne, MicroBatchMode::kTwo,
                                                MicroBatchMode::kAuto};
    scheduler.micro_batches = kMicroBatches[Below(rng, 3)];
    scheduler.max_steps_in_flight = 1 + Below(rng, 2);
    SCOPED_TRACE(Describe(options, scheduler));
    Cell cell(options, scheduler);
    for (int round = 0; round < 2; ++round) {  // the second round finds the first one's blocks
      std::vector<size_t> order(requests.size());
      for (size_t i = 0; i < order.size(); ++i) order[i] = i;
      std::ranges::shuffle(order, rng);
      std::vector<std::shared_ptr<Reply>> replies(requests.size());
      for (size_t i : order) {
        auto submitted = cell.Submit(requests[i]);
        ASSERT_TRUE(submitted.ok()) << submitted.status();
        replies[i] = submitted->reply;
      }
      for (size_t i = 0; i < requests.size(); ++i) {
        EXPECT_TRUE(BitsOf(replies[i]->Wait()) == want[i])
            << "request " << i << ", round " << round;
      }
    }
    cell.Drain();
    EXPECT_EQ(cell.Stats().kv_usage, 0);
    preemptions += cell.Stats().preemptions;
    cached_tokens += cell.Stats().cached_tokens;
    moved += cell.weights_moved();
    if (HasFailure()) return;
  }
  std::cout << preemptions << " preemptions, " << cached_tokens << " cached tokens, " << moved
            << " experts moved\n";
  EXPECT_GT(preemptions + cached_tokens, 0u);
}

// Every step moves weights: greedily balanced by both planners that spill, over hosts that hold
// little, with slots that are overwritten all the time.
TEST_P(BitsTest, SpilledExpertsChangeNothing) {
  std::mt19937 rng = SeededRng();
  Cell alone(base_);
  const ModelInfo model = alone.model();
  const std::vector<Request> requests =
      RandomRequests(rng, 6, GetParam().long_prompt, model.vocab_size);
  std::vector<std::vector<std::string>> want;
  for (const Request& request : requests) want.push_back(BitsOf(alone.Run(request)));
  for (BalanceMode mode : {BalanceMode::kLlep, BalanceMode::kAuto}) {
    CellOptions options = base_;
    options.attention_workers = 2;
    options.expert_workers = 3;
    options.planner = RandomPlanner(rng);
    options.planner.mode = mode;
    options.planner.foreign_slots_per_rank = 1 + Below(rng, 2);
    // All experts at home on one rank.
    options.placement = std::make_shared<ExpertPlacement>(*ExpertPlacement::Create(
        3,
        std::vector(static_cast<size_t>(model.num_moe_layers),
                    std::vector(static_cast<size_t>(model.num_experts), std::vector<int32_t>{1}))));
    SCOPED_TRACE(Describe(options, {}));
    Cell cell(options);
    std::vector<std::shared_ptr<Reply>> replies;
    for (const Request& request : requests) {
      auto submitted = cell.Submit(request);
      ASSERT_TRUE(submitted.ok()) << submitted.status();
      replies.push_back(submitted->reply);
    }
    for (size_t i = 0; i < requests.size(); ++i) {
      EXPECT_TRUE(BitsOf(replies[i]->Wait()) == want[i]) << "request " << i;
    }
    std::cout << BalanceModeName(mode) << ": " << cell.weights_moved() << " experts moved\n";
    EXPECT_GT(cell.weights_moved(), 0u);
  }
}

INSTANTIATE_TEST_SUITE_P(Fixtures, BitsTest, testing::ValuesIn(AllParams()), [](const auto& info) {
  return info.param.fixture + "_" + info.param.isa;
});

}  // namespace
}  // namespace switchyard
