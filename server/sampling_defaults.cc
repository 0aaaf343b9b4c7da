#include "server/sampling_defaults.h"

#include <cmath>
#include <fstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"

namespace switchyard {
namespace {

// Reads a number in [low, high] into `target`; missing and null leave it unset.
template <typename T>
absl::Status Read(const nlohmann::json& config, const std::string& field, double low, double high,
                  std::optional<T>* target) {
  const auto it = config.find(field);
  if (it == config.end() || it->is_null()) return absl::OkStatus();
  if (!it->is_number())
    return absl::InvalidArgumentError(absl::StrCat(field, " is not a number: ", it->dump()));
  const double value = it->get<double>();
  if (!(value >= low && value <= high)) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, " is ", value, ", not in [", low, ", ", high, "]"));
  }
  *target = static_cast<T>(value);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<SamplingDefaults> LoadSamplingDefaults(const std::filesystem::path& model_dir) {
  SamplingDefaults defaults;
  const std::filesystem::path path = model_dir / "generation_config.json";
  std::ifstream in(path);
  if (!in) return defaults;
  const nlohmann::json config = nlohmann::json::parse(in, nullptr, /*allow_exceptions=*/false);
  if (!config.is_object())
    return absl::InvalidArgumentError(absl::StrCat(path.string(), " is not a JSON object"));

  absl::Status status = Read(config, "temperature", 0, 2, &defaults.temperature);
  status.Update(Read(config, "top_p", 1e-6, 1, &defaults.top_p));
  status.Update(Read(config, "min_p", 0, 1, &defaults.min_p));
  status.Update(Read(config, "top_k", 0, 1e9, &defaults.top_k));
  status.Update(Read(config, "repetition_penalty", 0.01, 100, &defaults.repetition_penalty));
  if (!status.ok())
    return absl::InvalidArgumentError(absl::StrCat(path.string(), ": ", status.message()));
  const auto do_sample = config.find("do_sample");
  if (do_sample != config.end() && do_sample->is_boolean() && !do_sample->get<bool>())
    defaults.temperature = 0.0f;
  return defaults;
}

}  // namespace switchyard
