// JsonFields: reads typed fields of one JSON object, notes every complaint with the field's name
// and value, and knows which fields were asked for. Used on one thread while a config is parsed.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "nlohmann/json.hpp"

namespace switchyard {

class JsonFields {
 public:
  // `object` and `refusals` must outlive this. `prefix` stands before field names in messages
  // ("rope_scaling.").
  JsonFields(const nlohmann::json& object, std::string prefix, std::vector<std::string>* refusals)
      : object_(object), prefix_(std::move(prefix)), refusals_(refusals) {}

  // Null counts as absent. The value is marked as known either way.
  const nlohmann::json* Find(const std::string& name);
  bool Has(const std::string& name) { return Find(name) != nullptr; }

  // An integer in [min, max]. Absent or bad: `fallback`, with a refusal when bad.
  int64_t Int(const std::string& name, int64_t min, int64_t max, int64_t fallback);
  // The same, but absence is a refusal too.
  int64_t RequiredInt(const std::string& name, int64_t min, int64_t max);
  // A finite number in [min, max].
  double Number(const std::string& name, double min, double max, double fallback);
  bool Bool(const std::string& name, bool fallback);
  std::string String(const std::string& name, const std::string& fallback);
  // An integer or a list of integers; anything else is refused.
  std::vector<int64_t> IntOrList(const std::string& name);

  void Refuse(const std::string& name, const std::string& why);
  // Fields that nobody asked for.
  std::vector<std::string> Unknown() const;

 private:
  const nlohmann::json& object_;
  const std::string prefix_;
  std::vector<std::string>* refusals_;
  std::set<std::string> known_;
};

// A value as it stands in messages: its JSON, cut to 80 bytes.
std::string Shown(const nlohmann::json& value);

}  // namespace switchyard
