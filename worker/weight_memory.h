// Bytes that weights take in memory in their formats, before anything is loaded. Pure functions;
// any thread.
#pragma once

#include <cstdint>

#include "comm/expert_placement.h"
#include "kernels/backend.h"
#include "worker/model_config.h"
#include "worker/weight_formats.h"

namespace switchyard {

// What an attention worker holds besides its tables of RoPE; the workers of a process share it.
int64_t AttentionWeightBytes(const ModelConfig& config, const WeightFormats& formats, DType dtype,
                             const ComputeBackend& backend);
// The tables of RoPE for `max_model_len` positions.
int64_t RopeTableBytes(const ModelConfig& config, int64_t max_model_len);

// `layer`: of the model, one with experts.
int64_t ExpertBytes(const ModelConfig& config, const WeightFormats& formats,
                    const ComputeBackend& backend, int32_t layer, int32_t expert);
// Of the model; 0 without experts.
int64_t LargestExpertBytes(const ModelConfig& config, const WeightFormats& formats,
                           const ComputeBackend& backend);
int64_t AllExpertsBytes(const ModelConfig& config, const WeightFormats& formats,
                        const ComputeBackend& backend);
// The experts of one rank.
int64_t ExpertMemoryBytes(const ModelConfig& config, const WeightFormats& formats,
                          const ComputeBackend& backend, const ExpertPlacement& placement,
                          int32_t rank);

}  // namespace switchyard
