// The `normalizer` of tokenizer.json: rewrites text before it is cut. Known: NFC, NFD, NFKC, NFKD,
// Lowercase, Prepend, Replace, Strip, Sequence; anything else is refused by name.
//
// Owner: the Tokenizer; immutable after Create, any thread. Must never change what it is not asked
// to: null is identity.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace switchyard {

class Normalizer {
 public:
  virtual ~Normalizer() = default;
  // REQUIRES: *text is valid UTF-8; it stays so.
  virtual absl::Status Apply(std::string* text) const = 0;

  static absl::StatusOr<std::unique_ptr<Normalizer>> Create(
      const nlohmann::json& spec);  // null: an empty Sequence
};

}  // namespace switchyard
