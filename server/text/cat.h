// String pieces for error messages and string-keyed maps. (Debian's abseil is built with its own
// string_view, so absl::StrCat and its maps' heterogeneous look-up do not take std::string_view.)
//
// Owner: server/text. Free functions, no state, any thread. Must never be used for user-visible
// number formats.
#pragma once

#include <concepts>
#include <cstddef>
#include <functional>
#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace switchyard {

inline void AppendPiece(std::string* out, std::string_view piece) { out->append(piece); }
inline void AppendPiece(std::string* out, std::integral auto number) {
  out->append(std::to_string(number));
}

template <typename... Pieces>
std::string Cat(const Pieces&... pieces) {
  std::string out;
  (AppendPiece(&out, pieces), ...);
  return out;
}

template <typename... Pieces>
absl::Status Invalid(const Pieces&... pieces) {
  return absl::InvalidArgumentError(Cat(pieces...));
}

// Hash and equality for maps keyed by std::string that are asked with std::string_view.
struct ViewHash {
  using is_transparent = void;
  size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
};
struct ViewEq {
  using is_transparent = void;
  bool operator()(std::string_view a, std::string_view b) const { return a == b; }
};

}  // namespace switchyard
