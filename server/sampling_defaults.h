// What a checkpoint's generation_config.json says about sampling, for requests that leave it out.
// A pure function of the folder; any thread.
#pragma once

#include <filesystem>

#include "absl/status/statusor.h"
#include "server/engine.h"

namespace switchyard {

// All unset without the file, and for `do_sample: false` temperature 0. kInvalidArgument, naming
// the file and the field, for values out of range.
absl::StatusOr<SamplingDefaults> LoadSamplingDefaults(const std::filesystem::path& model_dir);

}  // namespace switchyard
