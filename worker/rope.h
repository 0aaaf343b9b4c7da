// RoPE tables: cosines and sines of every position, for each scaling that a config can ask for.
// Pure; the tables are immutable and shared. Formulas: RoFormer (arXiv 2104.09864), linear
// interpolation (2306.15595), YaRN (2309.00071), and Llama 3's frequency bands.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/tensor.h"
#include "worker/model_config.h"

namespace switchyard {

// Rotations per position of each dimension pair, and the factor that scales cosines and sines.
struct RopeFrequencies {
  std::vector<float> inv_freq;  // [rotary_dim / 2]
  float attention_factor = 1.0f;
};
RopeFrequencies ComputeRopeFrequencies(const RopeConfig& rope);

struct RopeTables {
  Buffer cos_storage;
  Buffer sin_storage;
  Tensor cos;  // [num_positions, rotary_dim / 2] float32
  Tensor sin;  // [num_positions, rotary_dim / 2] float32
};
RopeTables MakeRopeTables(const RopeConfig& rope, int64_t num_positions);

}  // namespace switchyard
