// A parsed template: source in, provenance-carrying text out.
//
// Owner: ChatTemplate; immutable after Parse, Render is thread-safe. Must never keep anything of a
// rendering: its values die with it.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "server/text/jinja/ast.h"
#include "server/text/jinja/evaluator.h"

namespace switchyard::jinja {

class Template {
 public:
  static absl::StatusOr<std::unique_ptr<Template>> Parse(std::string_view source);

  absl::StatusOr<Str> Render(std::vector<std::pair<std::string, Value>> variables,
                             int64_t now_unix_seconds, const Limits& limits) const;

 private:
  explicit Template(Body body) : body_(std::move(body)) {}
  const Body body_;
};

}  // namespace switchyard::jinja
