#include "scheduler/sequence.h"

#include <algorithm>
#include <utility>

#include "kernels/check.h"

namespace switchyard {

Sequence::Sequence(SequenceId id, RequestId request, int32_t choice,
                   std::span<const int32_t> prompt, int32_t limit,
                   std::shared_ptr<const SamplingParams> sampling)
    : id_(id),
      request_(request),
      choice_(choice),
      sampling_(std::move(sampling)),
      prompt_length_(static_cast<int32_t>(prompt.size())),
      limit_(limit),
      tokens_(prompt.begin(), prompt.end()) {
  if (sampling_->num_prompt_logprobs >= 0) prompt_logprobs_.resize(prompt.size() - 1);
  CheckInvariants();
}

std::span<const BlockHash> Sequence::Hashes(const BlockHasher& hasher, const BlockHash& root,
                                            int32_t block_size, int32_t num_blocks) {
  SY_CHECK_LE(static_cast<int64_t>(num_blocks) * block_size, total());
  while (static_cast<int32_t>(hashes_.size()) < num_blocks) {
    const BlockHash& previous = hashes_.empty() ? root : hashes_.back();
    hashes_.push_back(
        hasher.Next(previous, tokens().subspan(hashes_.size() * block_size, block_size)));
  }
  return std::span(hashes_).first(num_blocks);
}

void Sequence::Start(int32_t worker, int32_t computed, std::vector<int32_t> blocks) {
  SY_CHECK(!running());
  SY_CHECK_GE(worker, 0);
  SY_CHECK_LT(computed, total());  // its last token is always computed
  worker_ = worker;
  computed_ = computed;
  blocks_ = std::move(blocks);
}

void Sequence::Move(int32_t worker) {
  SY_CHECK(running());
  SY_CHECK_GE(worker, 0);
  worker_ = worker;
}

std::vector<int32_t> Sequence::Stop() {
  SY_CHECK(running());
  worker_ = -1;
  computed_ = 0;
  ++run_;
  told_ = {};
  return std::exchange(blocks_, {});
}

SequenceWork Sequence::MakeWork(int32_t start, int32_t count, int32_t total) {
  SY_CHECK(running());
  SY_CHECK_GE(count, 1);
  SY_CHECK_LE(count, total - start);
  SY_CHECK(told_.begun || start == computed_);
  SequenceWork work;
  work.sequence = id_;
  work.run = run_;
  work.start = start;
  work.count = count;
  work.sample = start + count == total && total < limit_;
  if (!told_.begun) {
    work.begin =
        std::make_shared<const SequenceStart>(SequenceStart{.tokens = tokens_,
                                                            .prompt_length = prompt_length_,
                                                            .first_unscored = first_unscored(),
                                                            .sampling = sampling_});
    told_ = {.begun = true, .blocks = 0, .tokens = this->total()};
  }
  work.block_table_start = told_.blocks;
  work.new_blocks.assign(blocks_.begin() + told_.blocks, blocks_.end());
  told_.blocks = static_cast<int32_t>(blocks_.size());
  work.token_start = told_.tokens;
  work.tokens.assign(tokens_.begin() + told_.tokens, tokens_.end());
  told_.tokens = this->total();
  return work;
}

void Sequence::Advance(int32_t computed) {
  SY_CHECK_GT(computed, computed_);
  SY_CHECK_LE(computed, total());
  computed_ = computed;
  if (computed > highest_computed_) {
    highest_computed_ = computed;
    strikes_ = 0;
  }
}

void Sequence::Append(int32_t token) {
  SY_CHECK_EQ(computed_, total());
  SY_CHECK_LT(total(), limit_);
  tokens_.push_back(token);
}

void Sequence::SetPromptLogprob(int32_t position, TokenLogprob logprob) {
  SY_CHECK_GE(position, 1);
  if (position <= static_cast<int32_t>(prompt_logprobs_.size())) {
    prompt_logprobs_[position - 1] = std::move(logprob);
  }
}

std::vector<TokenLogprob> Sequence::TakePromptLogprobs() {
  return std::exchange(prompt_logprobs_, {});
}

void Sequence::CheckInvariants() const {
  SY_CHECK_GE(prompt_length_, 1);
  SY_CHECK_LE(0, computed_);
  SY_CHECK_LE(computed_, total());
  SY_CHECK_LE(prompt_length_, total());
  SY_CHECK_LE(total(), limit_);
  if (!running()) {
    SY_CHECK_EQ(computed_, 0);
    SY_CHECK(blocks_.empty());
  }
}

}  // namespace switchyard
