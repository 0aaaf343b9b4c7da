// SequenceTable: what an attention worker knows of its sequences: token ids by position, the block
// table and the sampling parameters. Everything is overwritten by position, never appended, so
// running a position again is harmless. Owned by one attention worker, used on its thread only.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "proto/step_plan.h"

namespace switchyard {

struct SequenceState {
  uint32_t run = 0;
  int32_t prompt_length = 0;
  int32_t first_unscored = 1;  // prompt positions before it have their logprobs already
  std::shared_ptr<const SamplingParams> sampling;
  std::vector<int32_t> tokens;       // by position; kUnknownToken where not known yet
  std::vector<int32_t> block_table;  // KV block of positions [i * block_size, …)
};

// What numbers of a plan must stay within.
struct SequenceLimits {
  int32_t vocab_size = 0;
  int32_t max_model_len = 0;
  int32_t block_size = 0;
  int32_t num_blocks = 0;
  uint32_t num_routing_profiles = 1;
};

class SequenceTable {
 public:
  static constexpr int32_t kUnknownToken = -1;

  explicit SequenceTable(const SequenceLimits& limits) : limits_(limits) {}

  // Forgets the ended sequences, then takes over what the plan tells of the others. Errors name the
  // sequence and the number that does not fit; the table is then in an unspecified but valid state.
  absl::Status Apply(const StepPlan& plan);
  // REQUIRES: the sequence was in the last applied plan.
  SequenceState& Get(SequenceId id);
  size_t size() const { return sequences_.size(); }

 private:
  absl::Status ApplyWork(const SequenceWork& work);
  absl::Status Begin(const SequenceWork& work);
  absl::Status SetTokens(const SequenceWork& work, SequenceState* state) const;
  absl::Status SetBlocks(const SequenceWork& work, SequenceState* state) const;

  const SequenceLimits limits_;
  std::unordered_map<SequenceId, SequenceState> sequences_;
};

}  // namespace switchyard
