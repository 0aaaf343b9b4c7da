// The {"String": …} or {"Regex": …} patterns of tokenizer.json.
//
// Owner: the component that holds it; immutable after Create, any thread. Must never find
// overlapping matches.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"
#include "server/text/regex.h"

namespace switchyard {

class Pattern {
 public:
  static absl::StatusOr<Pattern> Create(const nlohmann::json& spec);

  // Appends the [begin, end) of every match. An empty literal matches nowhere.
  absl::Status FindAll(std::string_view text,
                       std::vector<std::pair<size_t, size_t>>* matches) const;
  absl::Status ReplaceAll(std::string_view replacement, std::string* text) const;

  // The literal, where it is one.
  const std::string* literal() const { return regex_.has_value() ? nullptr : &literal_; }

 private:
  std::string literal_;
  std::optional<Regex> regex_;
};

}  // namespace switchyard
