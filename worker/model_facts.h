// ModelFacts: what is known of a checkpoint before any weight is packed. Every process of a cell
// derives them from its own copy of the folder: equal facts on every machine are what lets workers
// and scheduler work together. OpenModel maps the files and checks them; ModelHash touches one page
// per tensor. Pure functions of the folder and the options; any thread.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "proto/model_info.h"
#include "worker/checkpoint.h"
#include "worker/model_config.h"
#include "worker/weight_formats.h"

namespace switchyard {

struct ModelFactsOptions {
  std::string model_dir;
  std::string dtype = "auto";  // "auto": as stored; "float32", "bfloat16"
  std::string isa = "auto";    // of the CPU back end: "auto", "avx512", "avx2", "portable"
  int max_model_len = 0;       // tokens; 0: max_position_embeddings
  WeightFormatOptions formats = {};
};

struct ModelFacts {
  ModelInfo info;  // without num_kv_blocks
  uint64_t model_hash =
      0;  // of config.json, the tensor table, a sample of each tensor, the formats
  int64_t expert_bytes = 0;  // of the largest expert in memory
};
absl::StatusOr<ModelFacts> ReadModelFacts(const ModelFactsOptions& options);

// The same with the checkpoint still open, for whoever loads weights next.
struct OpenedModel {
  ModelConfig config;
  Checkpoint checkpoint;
  DType dtype = DType::kF32;  // of activations and of what is not quantised
  WeightFormats formats;
  ModelInfo info;  // without num_kv_blocks
  int64_t kv_bytes_per_block = 0;
  int64_t expert_bytes = 0;  // of the largest expert in memory
};
absl::StatusOr<OpenedModel> OpenModel(const ModelFactsOptions& options);

// REQUIRES: `model` was opened from `model_dir`.
absl::StatusOr<uint64_t> ModelHash(const std::string& model_dir, const OpenedModel& model);

}  // namespace switchyard
