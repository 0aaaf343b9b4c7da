#include "proto/step_wire.h"

#include <algorithm>
#include <memory>
#include <vector>

namespace switchyard {
namespace {

void Append(const std::vector<int32_t>& from, google::protobuf::RepeatedField<int32_t>* to) {
  to->Add(from.begin(), from.end());
}

std::vector<int32_t> Values(const google::protobuf::RepeatedField<int32_t>& from) {
  return {from.begin(), from.end()};
}

void ToWire(const SamplingParams& from, v1::SamplingParams* to) {
  to->set_temperature(from.temperature);
  to->set_top_p(from.top_p);
  to->set_min_p(from.min_p);
  to->set_top_k(from.top_k);
  to->set_presence_penalty(from.presence_penalty);
  to->set_frequency_penalty(from.frequency_penalty);
  to->set_repetition_penalty(from.repetition_penalty);
  to->set_seed(from.seed);
  to->set_choice(from.choice);
  to->set_min_tokens(from.min_tokens);
  Append(from.banned_before_min, to->mutable_banned_before_min());
  for (const auto& [token, bias] : from.logit_bias) {
    v1::TokenBias* entry = to->add_logit_bias();
    entry->set_token(token);
    entry->set_bias(bias);
  }
  to->set_num_logprobs(from.num_logprobs);
  to->set_num_prompt_logprobs(from.num_prompt_logprobs);
  to->set_routing_profile(from.routing_profile);
}

SamplingParams FromWire(const v1::SamplingParams& from) {
  SamplingParams to{.temperature = from.temperature(),
                    .top_p = from.top_p(),
                    .min_p = from.min_p(),
                    .top_k = from.top_k(),
                    .presence_penalty = from.presence_penalty(),
                    .frequency_penalty = from.frequency_penalty(),
                    .repetition_penalty = from.repetition_penalty(),
                    .seed = from.seed(),
                    .choice = from.choice(),
                    .min_tokens = from.min_tokens(),
                    .banned_before_min = Values(from.banned_before_min()),
                    .logit_bias = {},
                    .num_logprobs = from.num_logprobs(),
                    .num_prompt_logprobs = from.num_prompt_logprobs(),
                    .routing_profile = from.routing_profile()};
  for (const v1::TokenBias& entry : from.logit_bias())
    to.logit_bias.emplace_back(entry.token(), entry.bias());
  return to;
}

void ToWire(const TokenLogprob& from, v1::TokenLogprob* to) {
  to->set_token(from.token);
  to->set_logprob(from.logprob);
  for (const auto& [token, logprob] : from.top) {
    to->add_top_tokens(token);
    to->add_top_logprobs(logprob);
  }
}

TokenLogprob FromWire(const v1::TokenLogprob& from) {
  TokenLogprob to{.token = from.token(), .logprob = from.logprob(), .top = {}};
  const int count = std::min(from.top_tokens_size(), from.top_logprobs_size());
  for (int i = 0; i < count; ++i) to.top.emplace_back(from.top_tokens(i), from.top_logprobs(i));
  return to;
}

StepHeader FromWire(const v1::StepHeader& from) {
  return {.epoch = from.epoch(),
          .step = from.step(),
          .participants = Values(from.participants()),
          .micro_batches = from.micro_batches(),
          .slots_generation = from.slots_generation()};
}

void ToWire(const SequenceWork& from, v1::SequenceWork* to) {
  to->set_sequence(from.sequence);
  to->set_run(from.run);
  if (from.begin != nullptr) {
    v1::SequenceStart* begin = to->mutable_begin();
    Append(from.begin->tokens, begin->mutable_tokens());
    begin->set_prompt_length(from.begin->prompt_length);
    begin->set_first_unscored(from.begin->first_unscored);
    ToWire(*from.begin->sampling, begin->mutable_sampling());
  }
  to->set_start(from.start);
  to->set_count(from.count);
  to->set_block_table_start(from.block_table_start);
  Append(from.new_blocks, to->mutable_new_blocks());
  to->set_token_start(from.token_start);
  Append(from.tokens, to->mutable_tokens());
  to->set_sample(from.sample);
}

SequenceWork FromWire(const v1::SequenceWork& from) {
  SequenceWork to{.sequence = from.sequence(),
                  .run = from.run(),
                  .begin = nullptr,
                  .start = from.start(),
                  .count = from.count(),
                  .block_table_start = from.block_table_start(),
                  .new_blocks = Values(from.new_blocks()),
                  .token_start = from.token_start(),
                  .tokens = Values(from.tokens()),
                  .sample = from.sample()};
  if (from.has_begin()) {
    to.begin = std::make_shared<SequenceStart>(SequenceStart{
        .tokens = Values(from.begin().tokens()),
        .prompt_length = from.begin().prompt_length(),
        .first_unscored = from.begin().first_unscored(),
        .sampling = std::make_shared<SamplingParams>(FromWire(from.begin().sampling()))});
  }
  return to;
}

}  // namespace

void ToWire(const StepHeader& from, v1::StepHeader* to) {
  to->set_epoch(from.epoch);
  to->set_step(from.step);
  Append(from.participants, to->mutable_participants());
  to->set_micro_batches(from.micro_batches);
  to->set_slots_generation(from.slots_generation);
}

void ToWire(const StepPlan& from, v1::StepPlan* to) {
  ToWire(from.header, to->mutable_header());
  for (const SequenceWork& work : from.work) ToWire(work, to->add_work());
  for (const SequenceEnd& end : from.ended) to->add_ended(end.sequence);
}

StepPlan FromWire(const v1::StepPlan& from) {
  StepPlan to{.header = FromWire(from.header()), .work = {}, .ended = {}};
  to.work.reserve(static_cast<size_t>(from.work_size()));
  for (const v1::SequenceWork& work : from.work()) to.work.push_back(FromWire(work));
  for (uint64_t sequence : from.ended()) to.ended.push_back({sequence});
  return to;
}

void ToWire(const StepResult& from, v1::StepResult* to) {
  to->set_epoch(from.epoch);
  to->set_step(from.step);
  to->set_worker(from.worker);
  to->set_error(from.error);
  to->set_fatal(from.fatal);
  to->set_step_ns(from.step_ns);
  to->set_wait_ns(from.wait_ns);
  for (const SequenceResult& result : from.results) {
    v1::SequenceResult* out = to->add_results();
    out->set_sequence(result.sequence);
    out->set_run(result.run);
    out->set_computed(result.computed);
    out->set_token(result.token);
    out->set_finite(result.finite);
    ToWire(result.logprob, out->mutable_logprob());
    out->set_prompt_logprobs_start(result.prompt_logprobs_start);
    for (const TokenLogprob& logprob : result.prompt_logprobs)
      ToWire(logprob, out->add_prompt_logprobs());
  }
}

StepResult FromWire(const v1::StepResult& from) {
  StepResult to{.epoch = from.epoch(),
                .step = from.step(),
                .worker = from.worker(),
                .error = from.error(),
                .fatal = from.fatal(),
                .results = {},
                .step_ns = from.step_ns(),
                .wait_ns = from.wait_ns()};
  to.results.reserve(static_cast<size_t>(from.results_size()));
  for (const v1::SequenceResult& result : from.results()) {
    SequenceResult& out = to.results.emplace_back();
    out.sequence = result.sequence();
    out.run = result.run();
    out.computed = result.computed();
    out.token = result.token();
    out.finite = result.finite();
    out.logprob = FromWire(result.logprob());
    out.prompt_logprobs_start = result.prompt_logprobs_start();
    for (const v1::TokenLogprob& logprob : result.prompt_logprobs())
      out.prompt_logprobs.push_back(FromWire(logprob));
  }
  return to;
}

}  // namespace switchyard
