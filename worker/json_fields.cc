#include "worker/json_fields.h"

#include <cmath>

#include "absl/strings/str_cat.h"

namespace switchyard {

using nlohmann::json;

std::string Shown(const json& value) {
  std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  if (text.size() > 80) text = text.substr(0, 77) + "...";
  return text;
}

const json* JsonFields::Find(const std::string& name) {
  known_.insert(name);
  const auto it = object_.find(name);
  return it == object_.end() || it->is_null() ? nullptr : &*it;
}

void JsonFields::Refuse(const std::string& name, const std::string& why) {
  refusals_->push_back(absl::StrCat(prefix_, name, " ", why));
}

int64_t JsonFields::Int(const std::string& name, int64_t min, int64_t max, int64_t fallback) {
  const json* value = Find(name);
  if (value == nullptr) return fallback;
  const bool is_int =
      value->is_number_integer() &&
      !(value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX));
  if (is_int && value->get<int64_t>() >= min && value->get<int64_t>() <= max)
    return value->get<int64_t>();
  Refuse(name, absl::StrCat("is ", Shown(*value), ", not an integer from ", min, " to ", max));
  return fallback;
}

int64_t JsonFields::RequiredInt(const std::string& name, int64_t min, int64_t max) {
  if (!Has(name)) {
    Refuse(name, "is missing");
    return 0;
  }
  return Int(name, min, max, 0);
}

double JsonFields::Number(const std::string& name, double min, double max, double fallback) {
  const json* value = Find(name);
  if (value == nullptr) return fallback;
  if (value->is_number()) {
    const double number = value->get<double>();
    if (std::isfinite(number) && number >= min && number <= max) return number;
  }
  Refuse(name, absl::StrCat("is ", Shown(*value), ", not a number from ", min, " to ", max));
  return fallback;
}

bool JsonFields::Bool(const std::string& name, bool fallback) {
  const json* value = Find(name);
  if (value == nullptr) return fallback;
  if (value->is_boolean()) return value->get<bool>();
  Refuse(name, absl::StrCat("is ", Shown(*value), ", not true or false"));
  return fallback;
}

std::string JsonFields::String(const std::string& name, const std::string& fallback) {
  const json* value = Find(name);
  if (value == nullptr) return fallback;
  if (value->is_string()) return value->get<std::string>();
  Refuse(name, absl::StrCat("is ", Shown(*value), ", not a string"));
  return fallback;
}

std::vector<int64_t> JsonFields::IntOrList(const std::string& name) {
  const json* value = Find(name);
  if (value == nullptr) return {};
  std::vector<int64_t> out;
  const auto add = [&](const json& item) {
    if (!item.is_number_integer()) return false;
    const bool too_large =
        item.is_number_unsigned() && item.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX);
    out.push_back(too_large ? INT64_MAX : item.get<int64_t>());
    return true;
  };
  bool ok = true;
  if (value->is_array()) {
    for (const json& item : *value) ok = ok && add(item);
  } else {
    ok = add(*value);
  }
  if (!ok)
    Refuse(name, absl::StrCat("is ", Shown(*value), ", not an integer or a list of integers"));
  return ok ? out : std::vector<int64_t>{};
}

std::vector<std::string> JsonFields::Unknown() const {
  std::vector<std::string> out;
  for (const auto& [name, value] : object_.items()) {
    if (!known_.contains(name)) out.push_back(name);
  }
  return out;
}

}  // namespace switchyard
