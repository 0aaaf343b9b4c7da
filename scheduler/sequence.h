// Sequence: one choice of a request on its way through the scheduler. Owned by the SchedulerCore,
// on its thread. It is three integers and a block table:
//
//   position  0 ............. computed ............. total ............. limit
//             | KV in the blocks | ids known, no KV yet | not drawn yet    |
//             | = prompt, then what was generated ......|
//
// computed ≤ total ≤ limit. Changed only when a result is applied, or by preemption. It never
// decides anything.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "proto/step_plan.h"
#include "scheduler/block_hash.h"
#include "scheduler/request.h"

namespace switchyard {

class Sequence {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;

  // `choice`: index in its request. `limit`: total may grow up to it. REQUIRES: limit ≥ prompt
  // length ≥ 1.
  Sequence(SequenceId id, RequestId request, int32_t choice, std::span<const int32_t> prompt,
           int32_t limit, std::shared_ptr<const SamplingParams> sampling);

  SequenceId id() const { return id_; }
  RequestId request() const { return request_; }
  const SamplingParams& sampling() const { return *sampling_; }
  int32_t choice() const { return choice_; }
  int32_t prompt_length() const { return prompt_length_; }
  int32_t computed() const { return computed_; }
  int32_t total() const { return static_cast<int32_t>(tokens_.size()); }
  int32_t limit() const { return limit_; }
  int32_t generated() const { return total() - prompt_length_; }
  int32_t pending() const { return total() - computed_; }
  bool running() const { return worker_ >= 0; }
  int32_t worker() const { return worker_; }  // rank; -1 while it waits
  uint32_t run() const { return run_; }
  const std::vector<int32_t>& blocks() const { return blocks_; }
  std::span<const int32_t> tokens() const { return tokens_; }
  // The first prompt position whose token's logprob, if it was asked for, is missing: each one is
  // computed with the position before it, in whichever run came that far.
  int32_t first_unscored() const { return std::min(highest_computed_ + 1, prompt_length_); }
  bool needs_prompt_logprobs() const {
    return sampling_->num_prompt_logprobs >= 0 && first_unscored() < prompt_length_;
  }

  // Hashes of the first `num_blocks` blocks. REQUIRES: num_blocks * block_size ≤ total.
  std::span<const BlockHash> Hashes(const BlockHasher& hasher, const BlockHash& root,
                                    int32_t block_size, int32_t num_blocks);

  // Waiting → running on `worker`; the first `computed` positions lie in blocks of the prefix
  // cache.
  void Start(int32_t worker, int32_t computed, std::vector<int32_t> blocks);
  // Its worker has this rank from now on. REQUIRES: running().
  void Move(int32_t worker);
  // Running → waiting; returns the blocks, which the caller releases. Everything is computed again,
  // as another run.
  std::vector<int32_t> Stop();
  std::vector<int32_t>* mutable_blocks() { return &blocks_; }  // to append to

  // The plan's entry for `count` rows from `start` on, with all that the worker does not know yet.
  // Beyond computed() and total() lies what steps in flight compute and draw: `total` counts the
  // ids when those have been applied.
  SequenceWork MakeWork(int32_t start, int32_t count, int32_t total);
  bool told() const { return told_.begun; }  // the worker knows this run
  // The worker may have lost what it was told (an aborted step): the next plan tells it all again.
  void ForgetTold() { told_ = {}; }

  // Commits. `computed`: positions [0, computed) have KV now.
  void Advance(int32_t computed);
  void Append(int32_t token);
  void SetPromptLogprob(int32_t position, TokenLogprob logprob);  // of the token at `position`
  bool has_prompt_logprobs() const { return !prompt_logprobs_.empty(); }  // not taken yet
  std::vector<TokenLogprob> TakePromptLogprobs();

  // Strikes: aborted steps since the highest committed position last rose.
  int32_t strikes() const { return strikes_; }
  void Strike() { ++strikes_; }

  void CheckInvariants() const;

  // Bookkeeping of the core, for events, fairness and statistics.
  bool admitted = false;      // has run before, perhaps was preempted since
  int32_t cached_tokens = 0;  // prompt tokens found in the prefix cache when first admitted
  uint64_t last_step = 0;     // in which it last had rows
  TimePoint first_scheduled;
  TimePoint prefill_done;

 private:
  // What the worker knows of this run.
  struct Told {
    bool begun = false;
    int32_t blocks = 0;  // table entries
    int32_t tokens = 0;  // ids
  };

  // Constant after construction.
  const SequenceId id_;
  const RequestId request_;
  const int32_t choice_;
  const std::shared_ptr<const SamplingParams> sampling_;
  const int32_t prompt_length_;
  const int32_t limit_;

  int32_t computed_ = 0;
  std::vector<int32_t> tokens_;  // [total]
  std::vector<int32_t> blocks_;  // the block table
  std::vector<BlockHash> hashes_;
  int32_t worker_ = -1;
  uint32_t run_ = 0;
  Told told_;
  int32_t strikes_ = 0;
  int32_t highest_computed_ = 0;
  std::vector<TokenLogprob>
      prompt_logprobs_;  // [prompt_length - 1] until taken; empty when not asked for
};

}  // namespace switchyard
