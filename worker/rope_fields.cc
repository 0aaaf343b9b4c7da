// Reads the RoPE fields of config.json, both spellings.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "worker/config_fields.h"

namespace switchyard {
namespace {

using nlohmann::json;

void ReadRopeType(JsonFields& rope, const json& source, RopeConfig* out) {
  std::string type = rope.String("type", "default");
  type = rope.String("rope_type", type);
  if (type == "default") {
    out->type = RopeType::kDefault;
  } else if (type == "linear") {
    out->type = RopeType::kLinear;
  } else if (type == "dynamic") {
    out->type = RopeType::kDynamicNtk;
  } else if (type == "yarn") {
    out->type = RopeType::kYarn;
  } else if (type == "llama3") {
    out->type = RopeType::kLlama3;
  } else {
    rope.Refuse(
        "rope_type",
        absl::StrCat("= ", Shown(json(type)),
                     " is not implemented (default, linear, dynamic, yarn and llama3 are)"));
  }
  for (const auto& [name, value] : source.items()) {
    if (value.is_object()) rope.Refuse(name, "is nested: RoPE per layer type is not implemented");
  }
}

void ReadLlama3(JsonFields& rope, RopeConfig* out) {
  for (const char* field : {"low_freq_factor", "high_freq_factor"}) {
    if (!rope.Has(field)) rope.Refuse(field, "is missing");
  }
  out->low_freq_factor = rope.Number("low_freq_factor", 1e-6, 1e6, 1.0);
  out->high_freq_factor = rope.Number("high_freq_factor", 1e-6, 1e6, 4.0);
  if (out->high_freq_factor <= out->low_freq_factor) {
    rope.Refuse("high_freq_factor",
                absl::StrCat("= ", out->high_freq_factor,
                             " is not above low_freq_factor = ", out->low_freq_factor));
  }
}

void ReadYarn(JsonFields& rope, RopeConfig* out) {
  out->attention_factor = rope.Number("attention_factor", 0.0, 1e6, -1.0);
  out->beta_fast = rope.Number("beta_fast", 1e-6, 1e6, 32.0);
  out->beta_slow = rope.Number("beta_slow", 1e-6, 1e6, 1.0);
  out->mscale = rope.Number("mscale", 0.0, 1e6, 0.0);
  out->mscale_all_dim = rope.Number("mscale_all_dim", 0.0, 1e6, 0.0);
  out->truncate = rope.Bool("truncate", true);
}

}  // namespace

void ReadRope(JsonFields& fields, double default_theta, ModelConfig* config, ConfigReport* report) {
  const json* scaling = fields.Find("rope_scaling");
  if (scaling != nullptr && scaling->empty()) scaling = nullptr;
  const json* parameters = fields.Find("rope_parameters");
  const char* name = scaling != nullptr ? "rope_scaling" : "rope_parameters";
  const json* chosen = scaling != nullptr ? scaling : parameters;
  static const json kEmpty = json::object();
  if (chosen != nullptr && !chosen->is_object()) {
    fields.Refuse(name, absl::StrCat("is ", Shown(*chosen), ", not an object"));
    chosen = nullptr;
  }
  const json& source = chosen == nullptr ? kEmpty : *chosen;
  JsonFields rope(source, absl::StrCat(name, "."), &report->refusals);
  RopeConfig* out = &config->attention.rope;
  ReadRopeType(rope, source, out);

  const double theta = fields.Number("rope_theta", 1.0 + 1e-6, 1e15, default_theta);
  out->theta = rope.Number("rope_theta", 1.0 + 1e-6, 1e15, theta);
  double partial = fields.Number("partial_rotary_factor", 1e-6, 1.0, 1.0);
  partial = rope.Number("partial_rotary_factor", 1e-6, 1.0, partial);
  out->rotary_dim = static_cast<int64_t>(static_cast<double>(config->attention.head_dim) * partial);
  if (config->attention.head_dim > 0 && (out->rotary_dim % 2 != 0 || out->rotary_dim == 0)) {
    fields.Refuse("head_dim",
                  absl::StrCat("= ", config->attention.head_dim, " gives a rotary dimension of ",
                               out->rotary_dim, ", which must be even and positive"));
  }

  int64_t original =
      rope.Int("original_max_position_embeddings", 1, kMaxPositions, config->max_position);
  original = fields.Int("original_max_position_embeddings", 1, kMaxPositions, original);
  out->original_max_position = std::max<int64_t>(original, 1);
  const bool scaled = out->type != RopeType::kDefault;
  if (scaled && !rope.Has("factor") && out->type != RopeType::kYarn)
    rope.Refuse("factor", "is missing");
  const double implied = static_cast<double>(std::max<int64_t>(config->max_position, 1)) /
                         static_cast<double>(out->original_max_position);
  out->factor = rope.Number("factor", 1e-3, 1e6, implied);
  if (out->type == RopeType::kLlama3) ReadLlama3(rope, out);
  if (out->type == RopeType::kYarn) ReadYarn(rope, out);
  rope.Find("finetuned");
  for (const std::string& unknown : rope.Unknown()) {
    if (!source[unknown].is_null() && !source[unknown].is_object()) {
      rope.Refuse(unknown, absl::StrCat("= ", Shown(source[unknown]),
                                        " is not implemented for this rope_type"));
    }
  }
}

}  // namespace switchyard
