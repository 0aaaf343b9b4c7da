// TestDriver: plays the scheduler for one cell in tests: it owns the KV blocks, sends step plans
// and waits for the results. Sequences may be cut into any chunks and put on any attention worker.
// Used on the test's thread; results arrive through a lock.
#pragma once

#include <algorithm>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/mutex.h"
#include "worker/local_cell.h"

namespace switchyard {

// What one sequence produced.
struct TestOutput {
  std::vector<int32_t> tokens;
  std::vector<TokenLogprob> logprobs;
  std::vector<TokenLogprob> prompt_logprobs;
  bool finite = true;
};

// What computes: a LocalCell, or workers of other processes.
struct TestTarget {
  ModelInfo model;
  int num_attention_workers = 1;
  std::function<void(int worker, StepPlan plan)> execute;
};

class TestDriver {
 public:
  explicit TestDriver(TestTarget target)
      : target_(std::move(target)), free_(static_cast<size_t>(target_.num_attention_workers)) {
    for (std::vector<int32_t>& blocks : free_) {
      for (int32_t b = target_.model.num_kv_blocks - 1; b >= 0; --b) blocks.push_back(b);
    }
  }
  explicit TestDriver(LocalCell* cell)
      : TestDriver(TestTarget{.model = cell->model_info(),
                              .num_attention_workers = cell->num_attention_workers(),
                              .execute = [cell](int worker, StepPlan plan) {
                                cell->Execute(worker, std::move(plan));
                              }}) {
    cell->SetResultCallback([this](StepResult result) { OnResult(std::move(result)); });
  }

  // Any thread. Results of another epoch are dropped.
  void OnResult(StepResult result) {
    MutexLock lock(mu_);
    if (result.epoch != epoch_) return;
    results_.push_back(std::move(result));
    changed_.NotifyAll();
  }

  // What is in flight is lost, and every worker is told everything anew.
  void BeginEpoch(uint64_t epoch) {
    MutexLock lock(mu_);
    epoch_ = epoch;
    last_participants_.clear();
    results_.clear();
    plans_.clear();
    for (auto& [id, sequence] : sequences_) sequence.begun = false;
  }

  const TestTarget& target() const { return target_; }

  SequenceId Add(int worker, std::vector<int32_t> prompt, const SamplingParams& sampling,
                 int32_t first_unscored = 1) {
    Sequence s;
    s.worker = worker;
    s.start = std::make_shared<SequenceStart>(
        SequenceStart{.tokens = prompt,
                      .prompt_length = static_cast<int32_t>(prompt.size()),
                      .first_unscored = first_unscored,
                      .sampling = std::make_shared<SamplingParams>(sampling)});
    s.length = static_cast<int32_t>(prompt.size());
    sequences_[next_id_] = std::move(s);
    return next_id_++;
  }

  // Rows of one sequence in the next step: min(count, what is left of the known tokens).
  void Plan(SequenceId id, int32_t count) {
    Sequence& s = sequences_.at(id);
    const int32_t known = s.length + static_cast<int32_t>(s.output.tokens.size());
    SequenceWork work;
    work.sequence = id;
    work.start = s.computed;
    work.count = std::min(count, known - s.computed);
    if (!s.begun) {
      SequenceStart start = *s.start;
      start.tokens.insert(start.tokens.end(), s.output.tokens.begin(), s.output.tokens.end());
      work.begin = std::make_shared<SequenceStart>(std::move(start));
      work.new_blocks = s.blocks;
    } else if (s.computed >= s.length) {
      work.token_start = s.computed;
      work.tokens = {s.output.tokens[static_cast<size_t>(s.computed - s.length)]};
    }
    const int32_t end = work.start + work.count;
    work.block_table_start = s.begun ? static_cast<int32_t>(s.blocks.size()) : 0;
    s.begun = true;
    std::vector<int32_t>& blocks = free_[static_cast<size_t>(s.worker)];
    while (static_cast<int32_t>(s.blocks.size()) * target_.model.block_size < end) {
      s.blocks.push_back(blocks.back());
      work.new_blocks.push_back(blocks.back());
      blocks.pop_back();
    }
    work.sample = end == known;
    plans_[s.worker].work.push_back(std::move(work));
  }

  // The row of the token that the step in flight draws: the worker knows it, the driver does not.
  void PlanAhead(SequenceId id) {
    Sequence& s = sequences_.at(id);
    SequenceWork work;
    work.sequence = id;
    work.start = s.length + static_cast<int32_t>(s.output.tokens.size());
    work.count = 1;
    work.block_table_start = static_cast<int32_t>(s.blocks.size());
    std::vector<int32_t>& blocks = free_[static_cast<size_t>(s.worker)];
    while (static_cast<int32_t>(s.blocks.size()) * target_.model.block_size <= work.start) {
      s.blocks.push_back(blocks.back());
      work.new_blocks.push_back(blocks.back());
      blocks.pop_back();
    }
    work.sample = true;
    plans_[s.worker].work.push_back(std::move(work));
  }

  void SetMicroBatches(uint32_t micro_batches) { micro_batches_ = micro_batches; }  // from now on

  // Sends the planned rows as one step and applies the results. Returns the first error.
  std::string Step() {
    const size_t expected = Send();
    return Collect(expected);
  }

  // Only sends; returns how many results there will be.
  size_t Send() {
    StepHeader header;
    {
      MutexLock lock(mu_);
      header.epoch = epoch_;
    }
    header.step = ++step_;
    header.micro_batches = micro_batches_;
    for (const auto& [worker, plan] : plans_) header.participants.push_back(worker);
    // What the foreign slots hold is known to those who saw all steps of a generation.
    if (!std::ranges::includes(last_participants_, header.participants)) ++slots_generation_;
    header.slots_generation = slots_generation_;
    last_participants_ = header.participants;
    const size_t expected = plans_.size();
    for (auto& [worker, plan] : plans_) {
      plan.header = header;
      plan.ended = std::move(ended_[worker]);
      ended_[worker].clear();
      target_.execute(worker, std::move(plan));
    }
    plans_.clear();
    return expected;
  }

  // Waits for the results of a step and applies them. Returns the first error.
  std::string Collect(size_t expected) {
    std::vector<StepResult> results;
    {
      MutexLock lock(mu_);
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(120);
      while (results_.size() < expected) {
        if (!changed_.WaitUntil(mu_, deadline)) return "no result in 120 s";
      }
      results.swap(results_);
    }
    for (const StepResult& result : results) {
      if (!result.error.empty()) return result.error;
      for (const SequenceResult& r : result.results) Apply(r);
    }
    return "";
  }

  // Gives the blocks back and tells the worker with its next plan.
  void End(SequenceId id) {
    Sequence& s = sequences_.at(id);
    std::vector<int32_t>& blocks = free_[static_cast<size_t>(s.worker)];
    blocks.insert(blocks.end(), s.blocks.rbegin(), s.blocks.rend());
    ended_[s.worker].push_back({id});
    sequences_.erase(id);
  }

  const TestOutput& output(SequenceId id) const { return sequences_.at(id).output; }

  // One sequence alone, in chunks of at most `chunk`, until `num_tokens` are drawn.
  TestOutput Generate(std::vector<int32_t> prompt, const SamplingParams& sampling,
                      size_t num_tokens, int32_t chunk = 64, int worker = 0) {
    const SequenceId id = Add(worker, std::move(prompt), sampling);
    while (output(id).tokens.size() < num_tokens && output(id).finite) {
      Plan(id, chunk);
      const std::string error = Step();
      EXPECT_EQ(error, "");
      if (!error.empty()) break;
    }
    TestOutput out = output(id);
    End(id);
    return out;
  }

 private:
  struct Sequence {
    int worker = 0;
    bool begun = false;
    std::shared_ptr<SequenceStart> start;
    int32_t length = 0;    // of the prompt
    int32_t computed = 0;  // positions with KV
    std::vector<int32_t> blocks;
    TestOutput output;
  };

  void Apply(const SequenceResult& r) {
    Sequence& s = sequences_.at(r.sequence);
    s.computed = r.computed;
    s.output.finite = s.output.finite && r.finite;
    s.output.prompt_logprobs.insert(s.output.prompt_logprobs.end(), r.prompt_logprobs.begin(),
                                    r.prompt_logprobs.end());
    if (r.token < 0) return;
    s.output.tokens.push_back(r.token);
    s.output.logprobs.push_back(r.logprob);
  }

  const TestTarget target_;
  std::vector<std::vector<int32_t>> free_;  // KV blocks, per attention worker
  std::map<SequenceId, Sequence> sequences_;
  std::map<int, StepPlan> plans_;
  std::map<int, std::vector<SequenceEnd>> ended_;
  SequenceId next_id_ = 1;
  uint64_t step_ = 0;
  uint64_t slots_generation_ = 0;
  std::vector<int32_t> last_participants_;
  uint32_t micro_batches_ = 1;

  Mutex mu_;
  CondVar changed_;
  uint64_t epoch_ SY_GUARDED_BY(mu_) = 0;
  std::vector<StepResult> results_ SY_GUARDED_BY(mu_);
};

}  // namespace switchyard
