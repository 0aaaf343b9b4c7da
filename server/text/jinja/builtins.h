// The language's built-in functions, filters, tests and methods of values. Names and behaviour are
// Jinja2's and Python's. To add one: its function and a line in the table of functions.cc,
// filters.cc, tests.cc or methods.cc.
//
// Owner: server/text/jinja. Stateless; evaluator-bound. Must charge the evaluator for the strings
// they make.
#pragma once

#include <optional>
#include <string_view>

#include "absl/status/statusor.h"
#include "server/text/jinja/evaluator.h"
#include "server/text/jinja/value.h"

namespace switchyard::jinja {

// range, namespace, dict, raise_exception, strftime_now; nullopt for other names.
std::optional<Value> FindFunction(std::string_view name);

// InvalidArgument for an unknown filter.
absl::StatusOr<Value> ApplyFilter(Evaluator& evaluator, std::string_view name, const Value& input,
                                  const CallArgs& args);

absl::StatusOr<bool> ApplyTest(Evaluator& evaluator, std::string_view name, const Value& input,
                               const CallArgs& args);

// str, list and dict methods, bound to `self`; nullopt where Python has none (or a template may not
// use it).
std::optional<Value> FindMethod(const Value& self, std::string_view name);

// Shared by filters and methods.
bool IsPythonSpace(char32_t c);
Str Strip(const Str& text, const Value* chars, bool left, bool right);
std::vector<Str> SplitLines(const Str& text);
Str ChangeCase(const Str& text,
               std::string_view how);  // upper, lower, capitalize, title (str.title), titlefilter
absl::StatusOr<Value> ReplaceIn(Evaluator& evaluator, const Str& text, const Value& from,
                                const Value& to, int64_t count);
absl::StatusOr<Value> JoinList(Evaluator& evaluator, const std::vector<Value>& items,
                               const Str& separator);
absl::StatusOr<Value> FormatPercent(Evaluator& evaluator, const Str& format,
                                    const Value& arguments);
absl::StatusOr<int64_t> IntArg(const Value* value, int64_t preset, std::string_view what);

}  // namespace switchyard::jinja
