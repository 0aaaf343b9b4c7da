// Cuts a template's source into text, statements and expressions, and those into tokens, with
// Jinja2's whitespace rules for trim_blocks = lstrip_blocks = True and keep_trailing_newline =
// False.
//
// Owner: Parse; the result owns its strings. Must never read beyond the source; a construct that
// does not end is an error with its line.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace switchyard::jinja {

enum class TokenKind {
  kText,           // literal output
  kBlockBegin,     // {%
  kBlockEnd,       // %}
  kVariableBegin,  // {{
  kVariableEnd,    // }}
  kName,
  kString,   // decoded
  kInteger,  // digits without underscores, or 0x…
  kFloat,
  kOperator,  // == != <= >= // ** and single characters
  kEnd,
};

struct Token {
  TokenKind kind;
  std::string text;
  int line;
};

absl::StatusOr<std::vector<Token>> Tokenize(std::string_view source);

}  // namespace switchyard::jinja
