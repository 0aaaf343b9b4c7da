// Parts of reading config.json that ParseModelConfig puts together: the tables of fields that are
// known without being read, RoPE and quantisation. Used on one thread while a config is parsed.
#pragma once

#include <string>
#include <vector>

#include "worker/json_fields.h"
#include "worker/model_config.h"

namespace switchyard {

constexpr int64_t kMaxPositions = 1 << 27;

// Refuses fields that change the maths and are not implemented, unless their value changes nothing.
void RefuseUnimplementedFields(JsonFields& fields);
// Marks the fields that say nothing about the maths of inference as known.
void SkipIrrelevantFields(JsonFields& fields);
// Reads rope_scaling (older) or rope_parameters (newer) and the fields beside them. REQUIRES:
// head_dim and max_position of `config` are read.
void ReadRope(JsonFields& fields, double default_theta, ModelConfig* config, ConfigReport* report);
// Reads quantization_config (compression_config in older compressed-tensors files). What is not
// implemented is refused by name; what inference may leave out (quantised activations) is noted.
void ReadQuantization(JsonFields& fields, StoredQuantization* quantization, ConfigReport* report);

}  // namespace switchyard
