// FakeWorker: an attention worker for the scheduler's tests. It runs no model, but it keeps KV
// slots and token ids as a worker does, and its "hidden state" is a hash of the whole prefix,
// computed from the KV of the position before. So a token is right only when every position of its
// prefix was. It checks every plan it gets; a wrong one fails the test. Used from one thread at a
// time.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/epoch.h"
#include "proto/model_info.h"
#include "proto/step_plan.h"

namespace switchyard {

// Epoch 1 of `num_workers` equal workers, whose ids are their ranks + 1.
inline EpochView FirstEpoch(const ModelInfo& model, int32_t num_workers) {
  EpochView view{.epoch = 1, .attention = {}};
  for (int32_t rank = 0; rank < num_workers; ++rank)
    view.attention.push_back({static_cast<uint64_t>(rank) + 1, model.num_kv_blocks});
  return view;
}

// The fake model, a pure function of the sequence.
struct FakeModel {
  static uint64_t Mix(uint64_t h, uint64_t x) {
    h = (h ^ x) * 0x9e3779b97f4a7c15ull;
    return h ^ (h >> 29);
  }
  static uint64_t Root(const SamplingParams& s) { return Mix(77, s.routing_profile); }
  static float Logprob(uint64_t state) { return -static_cast<float>(state % 4096) / 256; }
  // Draws the token after a prefix of hash `state`.
  static int32_t Draw(uint64_t state, const SamplingParams& s, int32_t generated, int32_t vocab) {
    uint64_t h = Mix(Mix(state, s.seed), s.choice);
    const auto& banned = s.banned_before_min;
    for (;; h = Mix(h, 1)) {
      const int32_t token = static_cast<int32_t>((h >> 7) % vocab);
      if (generated >= s.min_tokens ||
          std::find(banned.begin(), banned.end(), token) == banned.end()) {
        return token;
      }
    }
  }
  // Requests whose seeds say so break their step, or have logits that are not finite at their third
  // token.
  static bool Poisoned(const SamplingParams& s) { return s.seed % 1000 == 666; }
  static bool NonFinite(const SamplingParams& s) { return s.seed % 1000 == 777; }
};

class FakeWorker {
 public:
  FakeWorker(const ModelInfo& model, int32_t rank)
      : block_size_(model.block_size),
        vocab_(model.vocab_size),
        rank_(rank),
        slots_(static_cast<size_t>(model.block_size) * model.num_kv_blocks),
        table_refs_(model.num_kv_blocks) {}

  StepResult Run(const StepPlan& plan) {
    StepResult result{plan.header.epoch, plan.header.step, rank_, "", false, {}};
    EXPECT_EQ(plan.header.epoch, epoch_);
    EXPECT_GT(plan.header.step, last_step_);
    last_step_ = plan.header.step;
    EXPECT_TRUE(std::binary_search(plan.header.participants.begin(), plan.header.participants.end(),
                                   rank_));
    EXPECT_FALSE(plan.work.empty());
    for (const SequenceEnd& end : plan.ended) known_.erase(end.sequence);
    for (const SequenceWork& work : plan.work) Learn(work);
    CountTables();
    for (const SequenceWork& work : plan.work) {
      const Known& k = known_.at(work.sequence);
      if (FakeModel::Poisoned(*k.begin->sampling)) {
        result.error = absl::StrCat("sequence ", work.sequence, " is poisoned");
        result.results.clear();
        return result;
      }
      result.results.push_back(Compute(work));
    }
    return result;
  }

  // From now on it takes steps of `epoch` as `rank`. It keeps its KV, and forgets the rest if it is
  // to: it must be told everything again in either case.
  void Install(uint64_t epoch, int32_t rank, bool forget) {
    epoch_ = epoch;
    rank_ = rank;
    if (forget) known_.clear();
    fresh_.clear();
  }

  // Sequences that it has been told of and that have not been ended.
  size_t num_known() const { return known_.size(); }
  size_t num_scored() const { return num_scored_; }  // prompt logprobs computed

 private:
  struct Known {
    uint32_t run = 0;
    std::shared_ptr<const SequenceStart> begin;
    std::vector<int32_t> table;
    std::vector<int32_t> tokens;
  };
  struct Slot {
    uint64_t state = 0;
    bool written = false;
  };

  void Learn(const SequenceWork& work) {
    if (work.begin) {
      EXPECT_FALSE(known_.contains(work.sequence)) << "begun twice";
      EXPECT_EQ(work.block_table_start, 0);
      known_[work.sequence] = {work.run, work.begin, {}, work.begin->tokens};
      fresh_.insert(work.sequence);
    }
    EXPECT_TRUE(fresh_.contains(work.sequence)) << "not begun in this epoch";
    ASSERT_TRUE(known_.contains(work.sequence)) << "never begun";
    Known& k = known_[work.sequence];
    ASSERT_EQ(k.run, work.run);
    ASSERT_EQ(static_cast<size_t>(work.block_table_start), k.table.size());
    k.table.insert(k.table.end(), work.new_blocks.begin(), work.new_blocks.end());
    k.tokens.resize(std::max(k.tokens.size(), work.token_start + work.tokens.size()), -1);
    std::copy(work.tokens.begin(), work.tokens.end(), k.tokens.begin() + work.token_start);
    ASSERT_GE(work.count, 1);
    ASSERT_LE(work.start + work.count, static_cast<int32_t>(k.tokens.size())) << "unknown token";
    ASSERT_LE(work.start + work.count, static_cast<int32_t>(k.table.size()) * block_size_);
    if (work.sample) {
      ASSERT_EQ(work.start + work.count, static_cast<int32_t>(k.tokens.size()));
    }
    // What it drew itself in the step before, it knows already.
    for (int32_t p = work.start; p < work.start + work.count; ++p) ASSERT_GE(k.tokens[p], 0);
  }

  void CountTables() {
    std::fill(table_refs_.begin(), table_refs_.end(), 0);
    for (const auto& [id, k] : known_) {
      for (int32_t block : k.table) ++table_refs_.at(block);
    }
  }

  Slot& SlotAt(const Known& k, int32_t position) {
    return slots_[static_cast<size_t>(k.table[position / block_size_]) * block_size_ +
                  position % block_size_];
  }

  SequenceResult Compute(const SequenceWork& work) {
    Known& k = known_.at(work.sequence);
    const SamplingParams& sampling = *k.begin->sampling;
    const int32_t end = work.start + work.count;
    SequenceResult result;
    result.sequence = work.sequence;
    result.run = work.run;
    result.computed = end;
    const int32_t first_scored = std::max(work.start + 1, k.begin->first_unscored);
    result.prompt_logprobs_start = first_scored;
    uint64_t state = FakeModel::Root(sampling);
    for (int32_t p = 0; p < end; ++p) {
      const uint64_t expected = FakeModel::Mix(state, k.tokens[p]);
      Slot& slot = SlotAt(k, p);
      if (p >= work.start) {
        if (table_refs_[k.table[p / block_size_]] != 1) {
          ADD_FAILURE() << "sequence " << work.sequence << " writes a shared block";
        }
        slot = {expected, true};
      }
      if (!slot.written || slot.state != expected) {
        ADD_FAILURE() << "sequence " << work.sequence << " run " << work.run << " reads position "
                      << p << " that holds something else";
      }
      state = slot.state;
      if (sampling.num_prompt_logprobs >= 0 && p + 1 >= first_scored &&
          p + 1 < k.begin->prompt_length) {
        ++num_scored_;
        result.prompt_logprobs.push_back({k.tokens[p + 1], FakeModel::Logprob(state), {}});
      }
    }
    if (!work.sample) return result;
    const int32_t generated = end - k.begin->prompt_length;
    result.token = FakeModel::Draw(state, sampling, generated, vocab_);
    result.logprob = {result.token, FakeModel::Logprob(state), {}};
    if (FakeModel::NonFinite(sampling) && generated == 2) {
      result.finite = false;
      result.token = -1;
    }
    // The next step may have its row before the scheduler has told this worker.
    k.tokens.push_back(std::max(result.token, 0));
    return result;
  }

  const int32_t block_size_;
  const int32_t vocab_;
  int32_t rank_;
  uint64_t epoch_ = 1;
  std::vector<Slot> slots_;
  std::vector<int32_t> table_refs_;
  std::map<SequenceId, Known> known_;
  std::set<SequenceId> fresh_;  // begun in this epoch
  uint64_t last_step_ = 0;
  size_t num_scored_ = 0;
};

// What a choice must give, from the request alone.
struct ExpectedChoice {
  std::vector<int32_t> tokens;
  std::vector<TokenLogprob> logprobs;
  std::vector<TokenLogprob> prompt_logprobs;
  bool stopped = false;  // by an id; otherwise by length
};

// `limit`: prompt and output together.
inline ExpectedChoice Expect(std::span<const int32_t> prompt, SamplingParams sampling,
                             std::span<const int32_t> stop_ids, int32_t limit, int32_t vocab) {
  ExpectedChoice expected;
  if (sampling.min_tokens > 0) sampling.banned_before_min.assign(stop_ids.begin(), stop_ids.end());
  uint64_t state = FakeModel::Root(sampling);
  for (size_t p = 0; p < prompt.size(); ++p) {
    state = FakeModel::Mix(state, prompt[p]);
    if (p + 1 < prompt.size() && sampling.num_prompt_logprobs >= 0) {
      expected.prompt_logprobs.push_back({prompt[p + 1], FakeModel::Logprob(state), {}});
    }
  }
  while (static_cast<int32_t>(prompt.size() + expected.tokens.size()) < limit) {
    const int32_t generated = static_cast<int32_t>(expected.tokens.size());
    const int32_t token = FakeModel::Draw(state, sampling, generated, vocab);
    expected.tokens.push_back(token);
    if (sampling.num_logprobs >= 0) {
      expected.logprobs.push_back({token, FakeModel::Logprob(state), {}});
    }
    expected.stopped = generated >= sampling.min_tokens &&
                       std::find(stop_ids.begin(), stop_ids.end(), token) != stop_ids.end();
    if (expected.stopped) break;
    state = FakeModel::Mix(state, token);
  }
  return expected;
}

}  // namespace switchyard
