// JsonObject: typed access to the members of a parsed JSON object, with errors that name the field.
// Wraps simdjson for the request parsers; include it in their .cc files only. Members that are
// missing or null leave the target as it is. The first error sticks: read everything, then look at
// status().
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "nlohmann/json.hpp"
#include "simdjson.h"

namespace switchyard {

class JsonObject {
 public:
  explicit JsonObject(simdjson::dom::object object) : object_(object) {}

  // False when missing or null.
  bool Find(std::string_view key, simdjson::dom::element* value) const;

  void Read(std::string_view key, bool* target);
  void Read(std::string_view key, float* target);
  void Read(std::string_view key, int32_t* target);
  void Read(std::string_view key, std::string* target);
  void Read(std::string_view key, std::optional<float>* target);
  void Read(std::string_view key, std::optional<int32_t>* target);
  void Read(std::string_view key, std::optional<int64_t>* target);
  void Read(std::string_view key, std::vector<int32_t>* target);

  void Fail(absl::Status status) { status_.Update(std::move(status)); }
  const absl::Status& status() const { return status_; }

 private:
  simdjson::dom::object object_;
  absl::Status status_;
};

// Parses `body` with `parser`, which owns what the element points at. The root must be an object.
absl::Status ParseJsonBody(const std::string& body, int max_depth, simdjson::dom::parser* parser,
                           simdjson::dom::element* root);

// "a string", "an object", …
std::string_view JsonTypeName(simdjson::dom::element value);
absl::Status WrongType(std::string_view field, std::string_view expected,
                       simdjson::dom::element value);
// A whole number, written as an integer or as a float without fraction.
absl::Status ReadInteger(std::string_view field, simdjson::dom::element value, int64_t low,
                         int64_t high, int64_t* target);
absl::Status ReadTokenIds(std::string_view field, simdjson::dom::array array,
                          std::vector<int32_t>* target);
nlohmann::ordered_json ToNlohmann(simdjson::dom::element value);

}  // namespace switchyard
