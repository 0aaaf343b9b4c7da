// One row of logits to one token. Steps, in this order (as vLLM): logit bias, penalties (repetition
// over prompt and generated tokens, then frequency and presence over generated ones), banned tokens
// to -inf, greedy or: temperature, min-p, top-k, top-p over what is left, draw. Ties go to the
// lower id everywhere. Ids outside the vocabulary are ignored. Thread-safe: scratch is the calling
// thread's own.
#pragma once

#include <span>

#include "kernels/backend.h"
#include "kernels/cpu/kernel_table.h"

namespace switchyard::cpu {

SampledToken SampleRow(const KernelTable& kernels, std::span<const float> logits,
                       const SamplingRow& row);

// `token` scored by the raw logits, with the num_top highest.
SampledToken ScoreRow(const KernelTable& kernels, std::span<const float> logits, int32_t token,
                      int32_t num_top);

// At most what a thread keeps for both.
size_t SamplerScratchBytes(int64_t vocab_size);

}  // namespace switchyard::cpu
