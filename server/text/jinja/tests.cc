// The tests: `x is name`.
#include <cmath>

#include "server/text/cat.h"
#include "server/text/jinja/builtins.h"
#include "server/text/jinja/try.h"
#include "server/text/unicode.h"

namespace switchyard::jinja {
namespace {

absl::StatusOr<int64_t> Integer(const Value& value, std::string_view test) {
  if (value.is_undefined()) return absl::InvalidArgumentError(value.undefined_what());
  return IntArg(&value, 0, Cat("what '", test, "' tests"));
}

bool IsCased(const std::string& text, bool upper) {
  return text == (upper ? unicode::Uppercase(text) : unicode::Lowercase(text)) &&
         unicode::Uppercase(text) != unicode::Lowercase(text);
}

}  // namespace

absl::StatusOr<bool> ApplyTest(Evaluator& evaluator, std::string_view name, const Value& v,
                               const CallArgs& args) {
  if (name == "defined") return !v.is_undefined();
  if (name == "undefined") return v.is_undefined();
  if (name == "none") return v.is_none();
  if (name == "string") return v.is_string();
  if (name == "mapping") return v.is_dict();
  if (name == "sequence") return v.is_list() || v.is_dict() || v.is_string() || v.is_undefined();
  if (name == "iterable") return v.is_list() || v.is_dict() || v.is_string() || v.is_undefined();
  if (name == "number") return v.is_number();
  if (name == "integer") return v.is_int();
  if (name == "float") return v.is_float();
  if (name == "boolean") return v.is_bool();
  if (name == "true") return v.is_bool() && v.as_int() != 0;
  if (name == "false") return v.is_bool() && v.as_int() == 0;
  if (name == "callable") return v.is_callable();
  if (name == "escaped") return false;
  if (name == "upper") return IsCased(v.ToStr().text(), /*upper=*/true);
  if (name == "lower") return IsCased(v.ToStr().text(), /*upper=*/false);
  if (name == "odd" || name == "even") {
    SY_TRY(const int64_t number, Integer(v, name));
    return (number % 2 != 0) == (name == "odd");
  }
  if (args.positional.size() != 1)
    return Invalid("unknown test '", name, "', or it takes another number of arguments");
  const Value& other = args.positional[0];
  if (name == "divisibleby") {
    SY_TRY(const int64_t number, Integer(v, name));
    SY_TRY(const int64_t divisor, Integer(other, name));
    if (divisor == 0) return absl::InvalidArgumentError("divisibleby zero");
    return divisor == -1 || number % divisor == 0;
  }
  if (name == "equalto" || name == "eq" || name == "==") return Equal(v, other);
  if (name == "ne" || name == "!=") return !Equal(v, other);
  if (name == "sameas") return v.TypeName() == other.TypeName() && Equal(v, other);
  if (name == "in") return evaluator.Contains(other, v);
  const bool lt = name == "lt" || name == "lessthan" || name == "<";
  const bool gt = name == "gt" || name == "greaterthan" || name == ">";
  const bool le = name == "le" || name == "<=";
  const bool ge = name == "ge" || name == ">=";
  if (lt || gt || le || ge) {
    SY_TRY(const int order, Compare(v, other));
    return (lt && order < 0) || (gt && order > 0) || (le && order <= 0) || (ge && order >= 0);
  }
  return Invalid("unknown test '", name, "'");
}

}  // namespace switchyard::jinja
