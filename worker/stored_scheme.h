// How a checkpoint stores matrices that are quantised: data read from config.json's
// quantization_config. Plain values, immutable after parsing.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace switchyard {

// Which tensors stand for a matrix [n, k] (n outputs, k inputs), and how its codes are packed.
// g counts groups of inputs, p = 32 / bits.
enum class StoredLayout : uint8_t {
  kFp8,     // weight F8_E4M3 [n, k]; weight_scale_inv or weight_scale, a float per block
  kInt8,    // weight I8 [n, k]; weight_scale; weight_zero_point I8 like the scales
  kPacked,  // weight_packed I32 [n, ceil(k/p)], lowest bits first; weight_scale [n, g];
            // weight_zero_point I32 [ceil(n/p), g]; weight_shape [2]
  kGptq,   // qweight I32 [k/p, n], lowest bits first; scales [g, n]; qzeros I32 [g, n/p]; g_idx I32
           // [k]
  kAwq,    // qweight I32 [k, n/8] in AWQ's order of columns; scales [g, n]; qzeros I32 [g, n/8]
  kMxfp4,  // weight_packed U8 [n, k/2], low half first; weight_scale U8 [n, k/32]; or fused
           // experts:
           // *_blocks U8 [experts, n, k/32, 16] and *_scales U8 [experts, n, k/32]
};

struct StoredScheme {
  StoredLayout layout = StoredLayout::kFp8;
  int bits = 8;
  int64_t block_rows = 1;    // outputs that share a scale; 0: all
  int64_t block_cols = 0;    // inputs that share a scale; 0: all
  bool zero_points = false;  // else the codes are symmetric around 2^(bits - 1)
  bool act_order = false;    // the group of an input is in a table of its own
  int zero_offset = 0;       // added to stored zero points (GPTQ's first format keeps zero - 1)
};

struct StoredQuantization {
  std::string method;                 // quant_method; empty: nothing is quantised
  std::vector<StoredScheme> schemes;  // a matrix has the first one that its tensors fit

  bool empty() const { return schemes.empty(); }
};

// For people: "fp8, blocks of 128 x 128", "gptq 4 bits, groups of 128, act-order".
std::string StoredSchemeText(const std::string& method, const StoredScheme& scheme);

}  // namespace switchyard
