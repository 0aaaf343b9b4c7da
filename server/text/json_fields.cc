#include "server/text/json_fields.h"

#include "server/text/cat.h"

namespace switchyard {
namespace {

absl::Status WrongType(std::string_view key, std::string_view wanted, const nlohmann::json& found) {
  return absl::InvalidArgumentError(
      Cat("field '", key, "' must be ", wanted, ", not ", found.type_name()));
}

}  // namespace

const nlohmann::json& FieldOrNull(const nlohmann::json& object, std::string_view key) {
  static const nlohmann::json null;
  if (!object.is_object()) return null;
  const auto it = object.find(std::string(key));
  return it == object.end() ? null : *it;
}

absl::Status ReadField(const nlohmann::json& object, std::string_view key, bool* out) {
  const auto& field = FieldOrNull(object, key);
  if (field.is_null()) return absl::OkStatus();
  if (!field.is_boolean()) return WrongType(key, "true or false", field);
  *out = field.get<bool>();
  return absl::OkStatus();
}

absl::Status ReadField(const nlohmann::json& object, std::string_view key, std::string* out) {
  const auto& field = FieldOrNull(object, key);
  if (field.is_null()) return absl::OkStatus();
  if (!field.is_string()) return WrongType(key, "a string", field);
  *out = field.get_ref<const std::string&>();
  return absl::OkStatus();
}

absl::Status ReadField(const nlohmann::json& object, std::string_view key, int64_t* out) {
  const auto& field = FieldOrNull(object, key);
  if (field.is_null()) return absl::OkStatus();
  if (!field.is_number_integer()) return WrongType(key, "an integer", field);
  *out = field.get<int64_t>();
  return absl::OkStatus();
}

absl::StatusOr<std::string> ComponentType(const nlohmann::json& object, std::string_view where) {
  if (!object.is_object()) return absl::InvalidArgumentError(Cat(where, " must be an object"));
  const auto& type = FieldOrNull(object, "type");
  if (!type.is_string()) return absl::InvalidArgumentError(Cat(where, " has no 'type'"));
  return type.get<std::string>();
}

}  // namespace switchyard
