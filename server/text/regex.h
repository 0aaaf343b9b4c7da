// Patterns of tokenizer.json, written for Oniguruma (Ruby syntax), run by PCRE2.
//
// Owner: server/text. A Regex is immutable after Compile; any number of threads may search with it.
// What the two engines understand differently is translated (\s, \d, \w, \h, \uXXXX, ^ and $) or
// refused by name (&& and nested classes). Must never run away: a search beyond PCRE2's match limit
// is a ResourceExhausted.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace switchyard {

class Regex {
 public:
  static absl::StatusOr<Regex> Compile(std::string_view pattern);

  // Appends the [begin, end) of every match, left to right, not overlapping. An empty match right
  // behind another match does not count. REQUIRES: valid UTF-8.
  absl::Status FindAll(std::string_view text,
                       std::vector<std::pair<size_t, size_t>>* matches) const;

 private:
  std::shared_ptr<const void> code_;  // pcre2_code, constant after construction
};

}  // namespace switchyard
