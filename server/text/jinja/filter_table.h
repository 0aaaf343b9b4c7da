// The seam between the two files of filters.
//
// Owner: server/text/jinja. Stateless. Must never be included outside filters.cc and
// sequence_filters.cc.
#pragma once

#include <string_view>

#include "absl/status/statusor.h"
#include "server/text/jinja/evaluator.h"
#include "server/text/jinja/value.h"

namespace switchyard::jinja {

using Filter = absl::StatusOr<Value> (*)(Evaluator&, const Value&, const CallArgs&);

// Filters of lists and mappings; nullptr for other names.
Filter FindSequenceFilter(std::string_view name);

inline bool Flag(const Value* value, bool preset) {
  return value == nullptr ? preset : value->Truthy();
}

}  // namespace switchyard::jinja
