#include "server/text/jinja/template.h"

#include "server/text/jinja/parser.h"
#include "server/text/jinja/try.h"

namespace switchyard::jinja {

absl::StatusOr<std::unique_ptr<Template>> Template::Parse(std::string_view source) {
  SY_TRY(Body body, ParseTemplate(source));
  return std::unique_ptr<Template>(new Template(std::move(body)));
}

absl::StatusOr<Str> Template::Render(std::vector<std::pair<std::string, Value>> variables,
                                     int64_t now_unix_seconds, const Limits& limits) const {
  Evaluator evaluator(limits, now_unix_seconds);
  return evaluator.Run(body_, std::move(variables));
}

}  // namespace switchyard::jinja
