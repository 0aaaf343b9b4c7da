// Inspect: what a model folder holds and what it takes to serve it, without loading weights:
// architecture, parameters, memory per role, KV bytes per token, and whatever is not supported
// (also for a config that is refused). Pure apart from reading the folder.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "worker/weight_formats.h"

namespace switchyard {

struct InspectOptions {
  std::string model_dir;
  std::string dtype = "auto";        // the type that the memory figures are for
  WeightFormatOptions formats = {};  // the same
};

struct InspectReport {
  bool supported = false;  // the config is accepted and every tensor is there
  std::string text;        // for people, several lines
  std::string json;        // one object, the same facts
};

// An error only when there is no config.json to read, or for a bad dtype.
absl::StatusOr<InspectReport> Inspect(const InspectOptions& options);

}  // namespace switchyard
