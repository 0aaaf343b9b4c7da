// Synth: writes a checkpoint of any supported config with random weights and a byte-level
// tokenizer, so that shapes can be served and measured without the real weights. Streams to disk in
// bounded memory; config.json is written last, so a folder with one is complete. The same seed
// gives the same bytes whatever the number of threads.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"

namespace switchyard {

struct SynthOptions {
  std::string config_path;  // a config.json
  std::string out_dir;      // created; must not hold a config.json yet
  uint64_t seed = 0;
  std::string dtype =
      "auto";       // "auto": as the config states (float16 becomes float32); "float32", "bfloat16"
  int threads = 0;  // 0: all cores
  int64_t max_file_bytes = 4'000'000'000;  // of tensors in one file; more files get an index
  std::function<void(int64_t done, int64_t total)> progress;  // bytes written
};

// kNotFound or kInvalidArgument for the config, kResourceExhausted when the disk is too small (with
// both numbers).
absl::Status Synthesize(const SynthOptions& options);

}  // namespace switchyard
