#include "server/json_object.h"

#include <algorithm>
#include <cmath>
#include <unordered_map>

#include "absl/strings/str_cat.h"
#include "server/api_error.h"

namespace switchyard {
namespace {

using simdjson::dom::element;
using simdjson::dom::element_type;

absl::string_view View(std::string_view text) { return {text.data(), text.size()}; }

// The deepest level of brackets outside strings. For well-formed JSON exact; the parser finds the
// rest.
int Nesting(const std::string& body) {
  int depth = 0;
  int deepest = 0;
  bool in_string = false;
  for (size_t i = 0; i < body.size(); ++i) {
    const char c = body[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      deepest = std::max(deepest, ++depth);
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return deepest;
}

}  // namespace

absl::Status ParseJsonBody(const std::string& body, int max_depth, simdjson::dom::parser* parser,
                           element* root) {
  if (Nesting(body) > max_depth) {
    return absl::InvalidArgumentError(
        absl::StrCat("the body's JSON is nested deeper than ", max_depth, " levels"));
  }
  // simdjson refuses at its limit, which is one more than ours, and does not count empty
  // containers.
  simdjson::error_code error =
      parser->allocate(std::max<size_t>(body.size(), 1), static_cast<size_t>(max_depth) + 1);
  if (!error) {
    error = parser->parse(body.data(), body.size(), /*realloc_if_needed=*/true).get(*root);
  }
  if (error == simdjson::UTF8_ERROR)
    return absl::InvalidArgumentError("the body is not valid UTF-8");
  if (error) {
    return absl::InvalidArgumentError(
        absl::StrCat("the body is not valid JSON: ", simdjson::error_message(error)));
  }
  if (!root->is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the body must be a JSON object, not ", View(JsonTypeName(*root))));
  }
  return absl::OkStatus();
}

std::string_view JsonTypeName(element value) {
  switch (value.type()) {
    case element_type::ARRAY:
      return "a list";
    case element_type::OBJECT:
      return "an object";
    case element_type::STRING:
      return "a string";
    case element_type::BOOL:
      return "a boolean";
    case element_type::NULL_VALUE:
      return "null";
    default:
      return "a number";
  }
}

absl::Status WrongType(std::string_view field, std::string_view expected, element value) {
  return ParamError(field, absl::StrCat(View(field), " must be ", View(expected), ", not ",
                                        View(JsonTypeName(value))));
}

absl::Status ReadInteger(std::string_view field, element value, int64_t low, int64_t high,
                         int64_t* target) {
  int64_t number = 0;
  if (value.is_uint64() && !value.is_int64()) {
    return ParamError(field, absl::StrCat(View(field), " must be between ", low, " and ", high,
                                          ", got ", uint64_t{value}));
  }
  if (value.is_int64()) {
    number = int64_t{value};
  } else if (value.is_double()) {
    const double real = double{value};
    if (real != std::floor(real)) {
      return ParamError(field, absl::StrCat(View(field), " must be an integer, got ", real));
    }
    // 2^63 is exact as a double; int64's highest value is not.
    if (!(real >= -9223372036854775808.0 && real < 9223372036854775808.0)) {
      return ParamError(field, absl::StrCat(View(field), " must be between ", low, " and ", high,
                                            ", got ", real));
    }
    number = static_cast<int64_t>(real);
  } else {
    return WrongType(field, "an integer", value);
  }
  if (number < low || number > high) {
    return ParamError(field, absl::StrCat(View(field), " must be between ", low, " and ", high,
                                          ", got ", number));
  }
  *target = number;
  return absl::OkStatus();
}

absl::Status ReadTokenIds(std::string_view field, simdjson::dom::array array,
                          std::vector<int32_t>* target) {
  for (const element item : array) {
    int64_t id = 0;
    if (auto status = ReadInteger(field, item, INT32_MIN, INT32_MAX, &id); !status.ok())
      return status;
    target->push_back(static_cast<int32_t>(id));
  }
  return absl::OkStatus();
}

nlohmann::ordered_json ToNlohmann(element value) {
  switch (value.type()) {
    case element_type::ARRAY: {
      auto out = nlohmann::ordered_json::array();
      for (const element item : simdjson::dom::array(value)) out.push_back(ToNlohmann(item));
      return out;
    }
    case element_type::OBJECT: {
      // An ordered_json finds a key by looking at all: appended here, with an index of our own, so
      // that a huge object takes linear time. The last of equal keys wins.
      auto out = nlohmann::ordered_json::object();
      auto& members = out.get_ref<nlohmann::ordered_json::object_t&>();
      std::unordered_map<std::string_view, size_t> index;
      for (const auto& [key, item] : simdjson::dom::object(value)) {
        const auto [at, is_new] = index.emplace(key, members.size());
        if (is_new) {
          members.emplace_back(std::string(key), ToNlohmann(item));
        } else {
          (members.begin() + static_cast<std::ptrdiff_t>(at->second))->second = ToNlohmann(item);
        }
      }
      return out;
    }
    case element_type::STRING:
      return std::string(std::string_view(value));
    case element_type::BOOL:
      return bool{value};
    case element_type::INT64:
      return int64_t{value};
    case element_type::UINT64:
      return uint64_t{value};
    case element_type::DOUBLE:
      return double{value};
    case element_type::NULL_VALUE:
      break;
  }
  return nullptr;
}

bool JsonObject::Find(std::string_view key, element* value) const {
  return !object_.at_key(key).get(*value) && !value->is_null();
}

void JsonObject::Read(std::string_view key, bool* target) {
  element value;
  if (Find(key, &value) && value.get(*target)) Fail(WrongType(key, "a boolean", value));
}

void JsonObject::Read(std::string_view key, float* target) {
  element value;
  if (!Find(key, &value)) return;
  double number = 0;
  if (!value.is_number() || value.get(number)) {
    Fail(WrongType(key, "a number", value));
    return;
  }
  *target = static_cast<float>(number);
}

void JsonObject::Read(std::string_view key, std::optional<float>* target) {
  element value;
  if (!Find(key, &value)) return;
  target->emplace(0.0f);
  Read(key, &**target);
}

void JsonObject::Read(std::string_view key, int32_t* target) {
  element value;
  if (!Find(key, &value)) return;
  int64_t number = 0;
  Fail(ReadInteger(key, value, INT32_MIN, INT32_MAX, &number));
  *target = static_cast<int32_t>(number);
}

void JsonObject::Read(std::string_view key, std::optional<int32_t>* target) {
  element value;
  if (!Find(key, &value)) return;
  target->emplace(0);
  Read(key, &**target);
}

void JsonObject::Read(std::string_view key, std::optional<int64_t>* target) {
  element value;
  if (!Find(key, &value)) return;
  Fail(ReadInteger(key, value, INT64_MIN, INT64_MAX, &target->emplace(0)));
}

void JsonObject::Read(std::string_view key, std::string* target) {
  element value;
  if (!Find(key, &value)) return;
  std::string_view text;
  if (value.get(text)) {
    Fail(WrongType(key, "a string", value));
    return;
  }
  *target = std::string(text);
}

void JsonObject::Read(std::string_view key, std::vector<int32_t>* target) {
  element value;
  if (!Find(key, &value)) return;
  simdjson::dom::array array;
  if (value.get(array)) {
    Fail(WrongType(key, "a list of integers", value));
    return;
  }
  Fail(ReadTokenIds(key, array, target));
}

}  // namespace switchyard
