#include "worker/weight_formats.h"

#include <algorithm>
#include <array>
#include <set>
#include <span>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "comm/hash64.h"
#include "nlohmann/json.hpp"
#include "worker/json_fields.h"

namespace switchyard {
namespace {

using nlohmann::json;

constexpr int64_t kMaxFileBytes = 16 << 20;
constexpr int32_t kSmallGroup = 32;  // the packed groups of kernels/
constexpr int32_t kLargeGroup = 128;

// The three matrices of an MLP share a format: they go by the last one.
TensorKey FormatKey(TensorKey key) {
  switch (key.role) {
    case TensorRole::kExpertGate:
    case TensorRole::kExpertUp:
      key.role = TensorRole::kExpertDown;
      break;
    case TensorRole::kSharedGateProj:
    case TensorRole::kSharedUp:
      key.role = TensorRole::kSharedDown;
      break;
    case TensorRole::kDenseGate:
    case TensorRole::kDenseUp:
      key.role = TensorRole::kDenseDown;
      break;
    default:
      break;
  }
  return key;
}

// The packed format of a stored matrix that is to have integers of `type`; nothing when it has to
// be rounded again.
std::optional<WeightFormat> KeptFormat(const StoredMatrix* matrix, WeightType type) {
  if (matrix == nullptr || !matrix->is_integer() || !matrix->input_group.empty() ||
      matrix->scheme.block_rows != 1)
    return std::nullopt;
  const bool same_bits = matrix->scheme.bits == (type == WeightType::kInt4 ? 4 : 8);
  // Zero points of 8 bits are kept in a byte; one more than 255 does not fit.
  const bool zeros_fit = type == WeightType::kInt4 || matrix->scheme.zero_offset == 0;
  const int64_t group = matrix->scheme.block_cols;
  const bool whole = group == 0 || group >= matrix->k;
  if (!same_bits || !zeros_fit || (!whole && group % kSmallGroup != 0)) return std::nullopt;
  return WeightFormat{.type = type,
                      .group = whole || group % kLargeGroup == 0 ? kLargeGroup : kSmallGroup,
                      .zero_points = matrix->scheme.zero_points};
}

struct RoleName {
  std::string_view name;
  std::vector<WeightRole> roles;
};
const std::vector<RoleName>& RoleNames() {
  static const std::vector<RoleName> names = {
      {"attention",
       {WeightRole::kQuery, WeightRole::kKey, WeightRole::kValue, WeightRole::kOutput}},
      {"q_proj", {WeightRole::kQuery}},
      {"k_proj", {WeightRole::kKey}},
      {"v_proj", {WeightRole::kValue}},
      {"o_proj", {WeightRole::kOutput}},
      {"experts", {WeightRole::kExpert}},
      {"shared", {WeightRole::kShared}},
      {"dense", {WeightRole::kDense}},
      {"lm_head", {WeightRole::kLmHead}}};
  return names;
}

// Nothing for what is never quantised.
std::optional<WeightRole> RoleOf(TensorRole role) {
  switch (role) {
    case TensorRole::kQuery:
      return WeightRole::kQuery;
    case TensorRole::kKey:
      return WeightRole::kKey;
    case TensorRole::kValue:
      return WeightRole::kValue;
    case TensorRole::kOutput:
      return WeightRole::kOutput;
    case TensorRole::kExpertGate:
    case TensorRole::kExpertUp:
    case TensorRole::kExpertDown:
      return WeightRole::kExpert;
    case TensorRole::kSharedGateProj:
    case TensorRole::kSharedUp:
    case TensorRole::kSharedDown:
      return WeightRole::kShared;
    case TensorRole::kDenseGate:
    case TensorRole::kDenseUp:
    case TensorRole::kDenseDown:
      return WeightRole::kDense;
    case TensorRole::kLmHead:
      return WeightRole::kLmHead;
    default:
      return std::nullopt;
  }
}

std::optional<WeightFormat> FormatByName(std::string_view name, DType dtype) {
  if (name == "none") return FormatOf(dtype);
  if (name == "int8") return kInt8Weights;
  if (name == "int4") return kInt4Weights;
  return std::nullopt;
}

// The line, from 1, of entry `index` of a valid JSON list of objects.
size_t LineOfEntry(std::string_view text, size_t index) {
  size_t line = 1, entry = 0;
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '\n') ++line;
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth == 2 && entry == index) return line;
    } else if (c == ']' || c == '}') {
      --depth;
    } else if (c == ',' && depth == 1) {
      ++entry;
    }
  }
  return line;
}

// The line where a text stops being JSON.
size_t LineOfError(std::string_view text) {
  try {
    const json unused = json::parse(text);  // the only way that the library tells a position
  } catch (const json::parse_error& error) {
    const size_t end = std::min<size_t>(error.byte, text.size());
    return 1 + static_cast<size_t>(
                   std::count(text.begin(), text.begin() + static_cast<int64_t>(end), '\n'));
  }
  return 1;
}

}  // namespace

// Reads the entries of an overrides file one by one.
class RuleParser {
 public:
  RuleParser(const ModelConfig& config, DType dtype) : config_(config), dtype_(dtype) {}

  // On failure the reason is in `error`.
  bool Parse(const json& entry, WeightFormats::Rule* rule, std::string* error) {
    std::vector<std::string> refusals;
    JsonFields fields(entry, "", &refusals);
    ReadRoles(fields, rule);
    ReadRanges(fields, "layers", config_.num_layers, &rule->layers);
    ReadRanges(fields, "experts", config_.moe.routing.num_experts, &rule->experts);
    const std::string format = fields.String("format", "");
    if (const auto found = FormatByName(format, dtype_)) {
      rule->format = *found;
    } else {
      fields.Refuse("format", absl::StrCat("is ", Shown(json(format)), ", not none, int8 or int4"));
    }
    for (const std::string& name : fields.Unknown())
      refusals.push_back(absl::StrCat("field ", Shown(json(name)), " is not known"));
    if (refusals.empty()) CheckMeaning(*rule, &refusals);
    *error = absl::StrJoin(refusals, "; ");
    return refusals.empty();
  }

 private:
  static void ReadRoles(JsonFields& fields, WeightFormats::Rule* rule) {
    const json* roles = fields.Find("roles");
    if (roles == nullptr || !roles->is_array() || roles->empty()) {
      fields.Refuse("roles", "is missing or not a list of names");
      return;
    }
    for (const json& role : *roles) {
      const auto it = std::ranges::find_if(RoleNames(), [&](const RoleName& known) {
        return role.is_string() && role.get<std::string>() == known.name;
      });
      if (it == RoleNames().end()) {
        std::vector<std::string> known;
        for (const RoleName& name : RoleNames()) known.emplace_back(name.name);
        fields.Refuse("roles", absl::StrCat("has ", Shown(role), ", not one of ",
                                            absl::StrJoin(known, ", ")));
        continue;
      }
      rule->roles.insert(rule->roles.end(), it->roles.begin(), it->roles.end());
    }
  }

  // A list of numbers and of pairs [first, last], all below `end`.
  static void ReadRanges(JsonFields& fields, const std::string& name, int64_t end,
                         std::vector<WeightFormats::Range>* out) {
    const json* list = fields.Find(name);
    if (list == nullptr) return;
    const auto in_range = [&](const json& value) {
      return value.is_number_unsigned() && value.get<uint64_t>() < static_cast<uint64_t>(end);
    };
    if (!list->is_array() || list->empty()) {
      fields.Refuse(name, "is not a list of numbers and pairs [first, last]");
      return;
    }
    for (const json& item : *list) {
      const bool pair = item.is_array() && item.size() == 2;
      const json& first = pair ? item[0] : item;
      const json& last = pair ? item[1] : item;
      if (!in_range(first) || !in_range(last) || first.get<uint64_t>() > last.get<uint64_t>()) {
        fields.Refuse(name,
                      absl::StrCat("has ", Shown(item), ", not a number or a pair below ", end));
        continue;
      }
      out->push_back({first.get<int32_t>(), last.get<int32_t>()});
    }
  }

  void CheckMeaning(const WeightFormats::Rule& rule, std::vector<std::string>* refusals) const {
    for (const WeightRole role : rule.roles) {
      if (role != WeightRole::kExpert && !rule.experts.empty())
        refusals->emplace_back("experts stands beside a role that is not experts");
      if (role == WeightRole::kLmHead && !rule.layers.empty())
        refusals->emplace_back("layers stands beside lm_head, which is in none");
      if (role == WeightRole::kShared && config_.moe.shared_width == 0)
        refusals->emplace_back("the model has no shared expert");
      if (role == WeightRole::kDense && config_.dense_width == 0)
        refusals->emplace_back("the model has no dense layers");
    }
  }

  const ModelConfig& config_;
  const DType dtype_;
};

absl::StatusOr<WeightFormats> WeightFormats::Create(const WeightFormatOptions& options,
                                                    const ModelConfig& config, DType dtype) {
  std::string text;
  if (!options.overrides_file.empty()) {
    absl::StatusOr<std::string> read = ReadSmallFile(options.overrides_file, kMaxFileBytes);
    if (!read.ok()) return read.status();
    text = *std::move(read);
    if (text.empty())
      return absl::InvalidArgumentError(absl::StrCat(options.overrides_file, " is empty"));
  }
  return Parse(options.quantization, text, options.overrides_file, config, dtype);
}

absl::StatusOr<WeightFormats> WeightFormats::Parse(const std::string& quantization,
                                                   std::string_view text, const std::string& name,
                                                   const ModelConfig& config, DType dtype) {
  const std::optional<WeightFormat> standard = FormatByName(quantization, dtype);
  if (!standard.has_value()) {
    return absl::InvalidArgumentError(
        absl::StrCat("quantization \"", quantization, "\" is not one of none, int8, int4"));
  }
  WeightFormats formats;
  formats.dtype_ = dtype;
  formats.standard_ = *standard;
  // Logits feel the rounding of this one matrix most, and it is read once a step.
  formats.lm_head_ = *standard == kInt4Weights ? kInt8Weights : *standard;
  if (quantization != "none") formats.name_ = quantization;
  if (text.empty()) return formats;

  const auto bad = [&](size_t line, const std::string& why) {
    return absl::InvalidArgumentError(absl::StrCat(name, ", line ", line, ": ", why));
  };
  const json rules = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (rules.is_discarded()) return bad(LineOfError(text), "not JSON");
  if (!rules.is_array()) return bad(1, "not a list of rules");
  RuleParser parser(config, dtype);
  for (size_t i = 0; i < rules.size(); ++i) {
    if (!rules[i].is_object())
      return bad(LineOfEntry(text, i), absl::StrCat("rule ", i + 1, " is not an object"));
    std::string error;
    if (!parser.Parse(rules[i], &formats.rules_.emplace_back(), &error))
      return bad(LineOfEntry(text, i), error);
  }
  if (formats.rules_.empty()) return formats;
  Hash64 hash;
  hash.Text(rules.dump());
  formats.name_ = absl::StrFormat("%s+%016x", quantization, hash.value());
  return formats;
}

void WeightFormats::KeepStored(const Checkpoint& checkpoint, const ModelConfig& config) {
  if (checkpoint.num_quantized() == 0) return;
  std::map<TensorKey, WeightFormat> found;
  std::set<TensorKey> refused;
  for (const TensorSpec& spec : ModelTensors(config)) {
    const WeightFormat format = Of(spec.key);
    if (format.type != WeightType::kInt4 && format.type != WeightType::kInt8) continue;
    const TensorKey key = FormatKey(spec.key);
    const std::optional<WeightFormat> kept =
        KeptFormat(checkpoint.Quantized(spec.key), format.type);
    if (!kept.has_value() || found.emplace(key, *kept).first->second != *kept) refused.insert(key);
  }
  for (const TensorKey& key : refused) found.erase(key);
  kept_ = std::move(found);
}

bool WeightFormats::keeps_stored(const TensorKey& key) const {
  return kept_.contains(FormatKey(key));
}

WeightFormat WeightFormats::Of(const TensorKey& key) const {
  if (const auto kept = kept_.find(FormatKey(key)); kept != kept_.end()) return kept->second;
  const std::optional<WeightRole> role = RoleOf(key.role);
  if (!role.has_value()) return FormatOf(dtype_);
  const auto within = [](const std::vector<Range>& ranges, int32_t value) {
    return ranges.empty() || std::ranges::any_of(ranges, [&](const Range& range) {
             return range.first <= value && value <= range.last;
           });
  };
  for (size_t i = rules_.size(); i > 0; --i) {
    const Rule& rule = rules_[i - 1];
    if (std::ranges::find(rule.roles, *role) != rule.roles.end() &&
        within(rule.layers, key.layer) && within(rule.experts, key.expert))
      return rule.format;
  }
  return *role == WeightRole::kLmHead ? lm_head_ : standard_;
}

std::optional<WeightFormat> WeightFormats::OfExperts(const ModelConfig& config,
                                                     int32_t layer) const {
  const WeightFormat first = Of({TensorRole::kExpertDown, layer, 0});
  const bool may_differ = !kept_.empty() || std::ranges::any_of(rules_, [](const Rule& rule) {
    return !rule.experts.empty();
  });
  for (int32_t e = 1; may_differ && e < config.moe.routing.num_experts; ++e) {
    if (Of({TensorRole::kExpertDown, layer, e}) != first) return std::nullopt;
  }
  return first;
}

}  // namespace switchyard
