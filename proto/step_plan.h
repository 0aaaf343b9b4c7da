// StepPlan, StepResult: what the scheduler sends a worker for one step and what comes back, as
// plain structs. Values: whoever holds one owns it. On the wire between processes they are
// control-plane messages; tensors never are.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace switchyard {

using SequenceId = uint64_t;  // never reused

// The numeric sampling parameters of one sequence. Immutable after admission.
struct SamplingParams {
  float temperature = 1.0f;  // 0: greedy
  float top_p = 1.0f;
  float min_p = 0.0f;
  int32_t top_k = 0;  // 0: off
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  float repetition_penalty = 1.0f;
  uint64_t seed = 0;                       // always set: a missing seed is drawn at admission
  uint32_t choice = 0;                     // index among the n choices of its prompt
  int32_t min_tokens = 0;                  // banned_before_min may not be drawn earlier
  std::vector<int32_t> banned_before_min;  // the ids that would end the sequence
  std::vector<std::pair<int32_t, float>> logit_bias;
  int32_t num_logprobs = -1;         // -1: none; 0: the chosen token's; n: and the n best
  int32_t num_prompt_logprobs = -1;  // the same for the prompt's tokens (echo with logprobs)
  uint32_t routing_profile = 0;      // RoutingPolicy profile of every token of this sequence
};

// Sent once per (sequence, run), or again after an epoch change: everything a worker must know of a
// sequence.
struct SequenceStart {
  std::vector<int32_t> tokens;  // prompt, then what was generated so far
  int32_t prompt_length = 0;
  // Prompt tokens from this position on still need their logprobs (where asked for); those before
  // got them in an earlier run.
  int32_t first_unscored = 1;
  std::shared_ptr<const SamplingParams> sampling;
};

// Rows of one sequence in one step: positions [start, start + count).
struct SequenceWork {
  SequenceId sequence = 0;
  uint32_t run = 0;  // raised by preemption or a move; results of another run are dropped
  std::shared_ptr<const SequenceStart>
      begin;  // set when the worker does not know (sequence, run) yet
  int32_t start = 0;
  int32_t count = 0;
  int32_t block_table_start = 0;  // new_blocks overwrite the table from this index on
  std::vector<int32_t> new_blocks;
  // Token ids at positions [token_start, token_start + tokens.size()): those the worker may not
  // know. The worker keeps ids by position and overwrites.
  int32_t token_start = 0;
  std::vector<int32_t> tokens;
  bool sample = false;  // draw the token at position start + count from the last row
};

struct SequenceEnd {
  SequenceId sequence = 0;
};

// Stands in every StepPlan and every data header of the step.
struct StepHeader {
  uint64_t epoch = 0;
  uint64_t step = 0;
  std::vector<int32_t> participants;  // ranks of the attention workers with rows, ascending
  uint32_t micro_batches = 1;         // 1, or 2 under way at a time
  uint64_t slots_generation = 0;
};

struct StepPlan {
  StepHeader header;
  std::vector<SequenceWork> work;  // empty for expert workers
  // Forget these; applied before the work. May name sequences that are unknown to the worker, and
  // one that begins anew in the same plan: after an aborted step with the same run, its KV still in
  // the blocks of its table.
  std::vector<SequenceEnd> ended;
};

struct TokenLogprob {
  int32_t token = -1;
  float logprob = 0.0f;
  std::vector<std::pair<int32_t, float>> top;  // descending, ties to the lower id
};

struct SequenceResult {
  SequenceId sequence = 0;
  uint32_t run = 0;
  int32_t computed = 0;  // positions [0, computed) now have KV
  int32_t token = -1;    // the sampled token, -1 when none was asked for
  bool finite = true;    // false: the logits were not finite; the request fails alone
  TokenLogprob logprob;  // when num_logprobs >= 0
  // Of the prompt tokens at positions prompt_logprobs_start, …; the first token of a prompt has
  // none.
  int32_t prompt_logprobs_start = 0;
  std::vector<TokenLogprob> prompt_logprobs;
};

struct StepResult {
  uint64_t epoch = 0;
  uint64_t step = 0;
  int32_t worker = 0;  // attention worker index
  std::string error;   // not empty: the worker failed in this step; nothing of it counts
  bool fatal = false;  // with an error: every later step would fail too
  std::vector<SequenceResult> results;
  // What the step took here, and how much of that the worker waited for its peers.
  int64_t step_ns = 0;
  int64_t wait_ns = 0;
};

}  // namespace switchyard
