// For tests of the server: a WorkerClient whose model repeats the prompt, then ends; and a whole
// Server over the real Scheduler with it. The tokenizer is the Qwen3-MoE fixture's.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "scheduler/scheduler.h"
#include "scheduler/worker_client.h"
#include "server/http_client.h"
#include "server/server.h"

namespace switchyard {

// After n generated tokens comes prompt[n], after the whole prompt the end id, then the prompt
// again. The logprob of token t is -t/256; the alternatives are t, t+1, …. Runs on a thread of its
// own.
class EchoWorker : public WorkerClient {
 public:
  EchoWorker(int32_t end_id, const ModelInfo& model)
      : end_id_(end_id),
        vocab_size_(model.vocab_size),
        num_kv_blocks_(model.num_kv_blocks),
        thread_([this] { Run(); }) {}
  ~EchoWorker() override {
    {
      std::lock_guard lock(mu_);
      stop_ = true;
    }
    wake_.notify_all();
    thread_.join();
  }

  uint64_t progress() const override { return 0; }
  void SetEventCallback(std::function<void(WorkerEvent)> on_event) override {
    on_event_ = std::move(on_event);
    on_event_(EpochView{.epoch = 1, .attention = {{.worker = 1, .num_kv_blocks = num_kv_blocks_}}});
  }
  void Paused(uint64_t) override {}
  void Execute(int32_t, StepPlan plan) override {
    std::lock_guard lock(mu_);
    plans_.push_back(std::move(plan));
    wake_.notify_all();
  }

  // While paused, steps wait.
  void Pause() { SetPaused(true); }
  void Resume() { SetPaused(false); }
  // From the next step on nothing works any more.
  void Die() { dead_.store(true); }
  // The next `num_steps` steps fail as a whole.
  void FailSteps(int num_steps) { num_to_fail_.store(num_steps); }

 private:
  void SetPaused(bool paused) {
    std::lock_guard lock(mu_);
    paused_ = paused;
    wake_.notify_all();
  }

  void Run() {
    while (true) {
      StepPlan plan;
      {
        std::unique_lock lock(mu_);
        wake_.wait(lock, [this] { return stop_ || (!paused_ && !plans_.empty()); });
        if (stop_) return;
        plan = std::move(plans_.front());
        plans_.pop_front();
      }
      on_event_(Compute(plan));
    }
  }

  TokenLogprob Score(int32_t token, int32_t num_top) const {
    TokenLogprob score{token, -static_cast<float>(token) / 256, {}};
    for (int32_t i = 0; i < num_top; ++i) {
      const int32_t other = (token + i) % vocab_size_;
      score.top.emplace_back(other, score.logprob - static_cast<float>(i));
    }
    return score;
  }

  StepResult Compute(const StepPlan& plan) {
    StepResult result;
    result.epoch = plan.header.epoch;
    result.step = plan.header.step;
    result.step_ns = 1000;
    result.wait_ns = 400;
    if (dead_.load()) {
      result.error = "planted";
      result.fatal = true;
      return result;
    }
    if (num_to_fail_.load() > 0) {
      num_to_fail_.fetch_sub(1);
      result.error = "planted";
      return result;
    }
    for (const SequenceEnd& end : plan.ended) known_.erase(end.sequence);
    for (const SequenceWork& work : plan.work) {
      if (work.begin) known_[work.sequence] = work.begin;
      const auto known = known_.find(work.sequence);
      if (known == known_.end()) {  // its first step failed, and this one was sent before that
        result.error = "unknown sequence";
        return result;
      }
      const SequenceStart& begin = *known->second;
      const SamplingParams& sampling = *begin.sampling;
      SequenceResult& out = result.results.emplace_back();
      out.sequence = work.sequence;
      out.run = work.run;
      out.computed = work.start + work.count;
      out.prompt_logprobs_start = std::max(work.start + 1, begin.first_unscored);
      if (sampling.num_prompt_logprobs >= 0) {
        const int32_t end = std::min(out.computed + 1, begin.prompt_length);
        for (int32_t p = out.prompt_logprobs_start; p < end; ++p) {
          out.prompt_logprobs.push_back(Score(begin.tokens[p], sampling.num_prompt_logprobs));
        }
      }
      if (!work.sample) continue;
      const int32_t generated = out.computed - begin.prompt_length;
      const int32_t at = generated % (begin.prompt_length + 1);
      out.token = at < begin.prompt_length ? begin.tokens[at] : end_id_;
      for (const int32_t banned : sampling.banned_before_min) {
        if (out.token == banned && generated < sampling.min_tokens) out.token = begin.tokens[0];
      }
      if (sampling.num_logprobs >= 0) out.logprob = Score(out.token, sampling.num_logprobs);
    }
    return result;
  }

  const int32_t end_id_;
  const int32_t vocab_size_;
  const int32_t num_kv_blocks_;
  std::function<void(WorkerEvent)> on_event_;
  std::map<SequenceId, std::shared_ptr<const SequenceStart>> known_;  // worker's thread only
  std::atomic<int> num_to_fail_{0};
  std::atomic<bool> dead_{false};
  std::mutex mu_;
  std::condition_variable wake_;
  std::deque<StepPlan> plans_;
  bool paused_ = false;
  bool stop_ = false;
  std::thread thread_;  // last
};

// The conversation as "role: content\n" lines, then "assistant: ".
inline absl::StatusOr<std::vector<TextSegment>> RenderPlainChat(const ChatPrompt& prompt) {
  std::vector<TextSegment> segments;
  for (const auto& message : prompt.messages) {
    if (message["role"] == "raise")
      return absl::InvalidArgumentError("the template raised: no such role");
    if (!message.contains("content") || !message["content"].is_string()) continue;
    segments.push_back({message["content"].get<std::string>(), false});
  }
  return segments;
}

struct TestServerOptions {
  ServerOptions server = {};
  SchedulerOptions scheduler = {};
  int32_t max_model_len = 1 << 20;
  int32_t num_kv_blocks = 1 << 17;
  bool load = true;  // false: SetEngine is left to the test
};

// A server on a free port. Members are destroyed in reverse: the scheduler before the server.
class TestServer {
 public:
  explicit TestServer(TestServerOptions options = {})
      : options_(Quick(options)), server_(options_.server) {
    auto tokenizer =
        Tokenizer::Load(std::string(SWITCHYARD_SOURCE_DIR) + "/tests/fixtures/qwen3_moe");
    EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizer_ = *std::move(tokenizer);
    const absl::Status started = server_.Start();
    EXPECT_TRUE(started.ok()) << started;
    const int32_t end_id = tokenizer_->TokenToId("<|im_end|>").value_or(0);
    model_.name = "org/echo";
    model_.vocab_size = tokenizer_->vocab_size() + 10;
    model_.max_model_len = options_.max_model_len;
    model_.block_size = 16;
    model_.num_kv_blocks = options_.num_kv_blocks;
    model_.eos_token_ids = {end_id};
    worker_ = std::make_unique<EchoWorker>(end_id, model_);
    scheduler_ = std::make_unique<Scheduler>(options_.scheduler, model_, worker_.get());
    scheduler_->SetStepObserver(server_.step_observer());
    scheduler_->Start();
    if (options_.load) FinishLoading();
  }
  ~TestServer() { server_.Shutdown(); }

  void FinishLoading() {
    Engine engine;
    engine.model = model_;
    engine.tokenizer = tokenizer_.get();
    engine.render_chat = RenderPlainChat;
    engine.scheduler = scheduler_.get();
    server_.SetEngine(std::move(engine));
  }

  Server& server() { return server_; }
  EchoWorker& worker() { return *worker_; }
  Scheduler& scheduler() { return *scheduler_; }
  const Tokenizer& tokenizer() const { return *tokenizer_; }
  const ModelInfo& model() const { return model_; }
  std::string url() const { return "http://127.0.0.1:" + std::to_string(server_.http_port()); }

  HttpReply Send(const std::string& method, const std::string& target, const std::string& body = "",
                 std::vector<std::pair<std::string, std::string>> headers = {
                     {"Content-Type", "application/json"}}) {
    auto client = HttpClient::Create(url());
    auto reply = (*client)->Send(method, target, headers, body, std::chrono::seconds(30));
    EXPECT_TRUE(reply.ok()) << reply.status();
    return reply.ok() ? *std::move(reply) : HttpReply();
  }
  HttpReply Post(const std::string& target, const std::string& body) {
    return Send("POST", target, body);
  }

  // Waits until `condition` holds, at most 30 s.
  static bool WaitFor(const std::function<bool()>& condition) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
    while (!condition()) {
      if (std::chrono::steady_clock::now() > deadline) return false;
      std::this_thread::yield();
    }
    return true;
  }
  bool WaitIdle() {
    return WaitFor([this] {
      const SchedulerStats stats = scheduler_->Stats();
      return stats.running == 0 && stats.waiting == 0 && stats.kv_usage == 0;
    });
  }

 private:
  static TestServerOptions Quick(TestServerOptions options) {
    options.server.http.port = 0;
    options.server.grpc.port = 0;
    return options;
  }

  const TestServerOptions options_;
  Server server_;
  std::unique_ptr<Tokenizer> tokenizer_;
  ModelInfo model_;
  std::unique_ptr<EchoWorker> worker_;
  std::unique_ptr<Scheduler> scheduler_;
};

}  // namespace switchyard
