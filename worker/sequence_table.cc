#include "worker/sequence_table.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace switchyard {
namespace {

template <typename... Parts>
absl::Status Bad(const SequenceWork& work, const Parts&... parts) {
  return absl::InvalidArgumentError(
      absl::StrCat("step plan: sequence ", work.sequence, " run ", work.run, ": ", parts...));
}

}  // namespace

absl::Status SequenceTable::Apply(const StepPlan& plan) {
  for (const SequenceEnd& end : plan.ended) sequences_.erase(end.sequence);
  for (const SequenceWork& work : plan.work) {
    if (absl::Status status = ApplyWork(work); !status.ok()) return status;
  }
  return absl::OkStatus();
}

SequenceState& SequenceTable::Get(SequenceId id) {
  const auto it = sequences_.find(id);
  SY_CHECK(it != sequences_.end());
  return it->second;
}

absl::Status SequenceTable::ApplyWork(const SequenceWork& work) {
  if (work.count < 1 || work.start < 0 || work.count > limits_.max_model_len - work.start) {
    return Bad(work, "positions [", work.start, ", ", int64_t{work.start} + work.count,
               ") are not within [0, ", limits_.max_model_len, ")");
  }
  if (work.begin != nullptr) {
    if (absl::Status status = Begin(work); !status.ok()) return status;
  }
  const auto it = sequences_.find(work.sequence);
  if (it == sequences_.end()) return Bad(work, "unknown, and the plan does not begin it");
  SequenceState* state = &it->second;
  if (state->run != work.run) return Bad(work, "this worker knows run ", state->run);
  if (absl::Status status = SetTokens(work, state); !status.ok()) return status;
  if (absl::Status status = SetBlocks(work, state); !status.ok()) return status;

  const size_t end = static_cast<size_t>(work.start + work.count);
  if (state->tokens.size() < end) state->tokens.resize(end, kUnknownToken);
  for (size_t p = static_cast<size_t>(work.start); p < end; ++p) {
    if (state->tokens[p] == kUnknownToken)
      return Bad(work, "the token at position ", p, " is not known");
  }
  return absl::OkStatus();
}

absl::Status SequenceTable::Begin(const SequenceWork& work) {
  const SequenceStart& begin = *work.begin;
  if (begin.sampling == nullptr) return Bad(work, "begins without sampling parameters");
  if (begin.prompt_length < 1 || static_cast<size_t>(begin.prompt_length) > begin.tokens.size()) {
    return Bad(work, "prompt_length ", begin.prompt_length, " of ", begin.tokens.size(), " tokens");
  }
  if (begin.first_unscored < 1 || begin.first_unscored > begin.prompt_length) {
    return Bad(work, "first_unscored ", begin.first_unscored, " of a prompt of ",
               begin.prompt_length);
  }
  if (begin.tokens.size() > static_cast<size_t>(limits_.max_model_len)) {
    return Bad(work, begin.tokens.size(), " tokens exceed max_model_len ", limits_.max_model_len);
  }
  if (begin.sampling->routing_profile >= limits_.num_routing_profiles) {
    return Bad(work, "routing profile ", begin.sampling->routing_profile, " of ",
               limits_.num_routing_profiles);
  }
  for (int32_t token : begin.tokens) {
    if (token < 0 || token >= limits_.vocab_size)
      return Bad(work, "token ", token, " of a vocabulary of ", limits_.vocab_size);
  }
  SequenceState& state = sequences_[work.sequence];
  state = {.run = work.run,
           .prompt_length = begin.prompt_length,
           .first_unscored = begin.first_unscored,
           .sampling = begin.sampling,
           .tokens = begin.tokens,
           .block_table = {}};
  return absl::OkStatus();
}

absl::Status SequenceTable::SetTokens(const SequenceWork& work, SequenceState* state) const {
  if (work.tokens.empty()) return absl::OkStatus();
  const size_t count = work.tokens.size();
  if (work.token_start < 0 || count > static_cast<size_t>(limits_.max_model_len) ||
      static_cast<size_t>(work.token_start) > static_cast<size_t>(limits_.max_model_len) - count) {
    return Bad(work, count, " tokens from position ", work.token_start, " exceed max_model_len ",
               limits_.max_model_len);
  }
  const size_t begin = static_cast<size_t>(work.token_start);
  if (state->tokens.size() < begin + count) state->tokens.resize(begin + count, kUnknownToken);
  for (size_t i = 0; i < count; ++i) {
    const int32_t token = work.tokens[i];
    if (token < 0 || token >= limits_.vocab_size)
      return Bad(work, "token ", token, " of a vocabulary of ", limits_.vocab_size);
    state->tokens[begin + i] = token;
  }
  return absl::OkStatus();
}

absl::Status SequenceTable::SetBlocks(const SequenceWork& work, SequenceState* state) const {
  const size_t max_blocks =
      static_cast<size_t>((limits_.max_model_len + limits_.block_size - 1) / limits_.block_size);
  const size_t count = work.new_blocks.size();
  if (count > 0) {
    const size_t first = static_cast<size_t>(std::max(work.block_table_start, 0));
    if (work.block_table_start < 0 || first > state->block_table.size() ||
        first + count > max_blocks) {
      return Bad(work, count, " blocks from index ", work.block_table_start, " of a table of ",
                 state->block_table.size(), " (at most ", max_blocks, ")");
    }
    if (state->block_table.size() < first + count) state->block_table.resize(first + count);
    for (size_t i = 0; i < count; ++i) {
      const int32_t block = work.new_blocks[i];
      if (block < 0 || block >= limits_.num_blocks)
        return Bad(work, "block ", block, " of ", limits_.num_blocks);
      state->block_table[first + i] = block;
    }
  }
  const int64_t covered = static_cast<int64_t>(state->block_table.size()) * limits_.block_size;
  if (covered < int64_t{work.start} + work.count) {
    return Bad(work, "blocks cover ", covered, " of ", work.start + work.count, " positions");
  }
  return absl::OkStatus();
}

}  // namespace switchyard
