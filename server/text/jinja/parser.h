// From source to tree. Statements: if, for (with a filter, else, break, continue), set (also
// blocks, tuples, namespace attributes), macro, with, filter, raw, generation; others (block,
// include, import, extends, call, do, …) are refused by name.
//
// Owner: server/text/jinja. A pure function. Must never recurse deeper than its limit.
#pragma once

#include <string_view>

#include "absl/status/statusor.h"
#include "server/text/jinja/ast.h"

namespace switchyard::jinja {

absl::StatusOr<Body> ParseTemplate(std::string_view source);  // InvalidArgument: "line N: …"

}  // namespace switchyard::jinja
