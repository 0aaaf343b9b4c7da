// Parts of reading config.json that ParseModelConfig puts together: the tables of fields that are
// known without being read, and RoPE. Used on one thread while a config is parsed.
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

}  // namespace switchyard
