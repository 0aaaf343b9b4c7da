// Reading typed fields of a parsed JSON file without exceptions: a field that is absent or null
// keeps the default, one of the wrong type is an InvalidArgument that names it.
//
// Owner: server/text. Free functions, no state, any thread. Must never throw.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace switchyard {

absl::Status ReadField(const nlohmann::json& object, std::string_view key, bool* out);
absl::Status ReadField(const nlohmann::json& object, std::string_view key, std::string* out);
absl::Status ReadField(const nlohmann::json& object, std::string_view key, int64_t* out);

// The member `key`, or a shared null where `object` is no object or has no such member.
const nlohmann::json& FieldOrNull(const nlohmann::json& object, std::string_view key);

// The "type" of a component ("BPE", "ByteLevel", …); an error that names `where` when there is
// none.
absl::StatusOr<std::string> ComponentType(const nlohmann::json& object, std::string_view where);

}  // namespace switchyard
