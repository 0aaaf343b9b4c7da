// The global functions.
#include <time.h>

#include "server/text/cat.h"
#include "server/text/jinja/builtins.h"
#include "server/text/jinja/try.h"

namespace switchyard::jinja {
namespace {

constexpr int64_t kMaxRange = 100000;  // Jinja2's sandbox has the same

absl::StatusOr<Value> Range(Evaluator& evaluator, const CallArgs& args) {
  int64_t numbers[3] = {0, 0, 1};
  const size_t n = args.positional.size();
  if (n < 1 || n > 3) return absl::InvalidArgumentError("range() takes 1 to 3 integers");
  for (size_t i = 0; i < n; ++i) {
    SY_TRY(numbers[n == 1 ? 1 : i], IntArg(&args.positional[i], 0, "range()"));
  }
  const auto [begin, end, step] = numbers;
  if (step == 0) return absl::InvalidArgumentError("range(): the step cannot be zero");
  std::vector<Value> items;
  for (int64_t i = begin; step > 0 ? i < end : i > end;) {
    if (static_cast<int64_t>(items.size()) >= kMaxRange)
      return Invalid("range() is longer than ", kMaxRange);
    items.emplace_back(i);
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  SY_OK(evaluator.Charge(items.size() * sizeof(Value)));
  return Value::MakeList(std::move(items));
}

absl::StatusOr<Dict> DictOf(const CallArgs& args, std::string_view what) {
  Dict dict;
  for (const Value& value : args.positional) {
    if (value.is_dict()) {
      for (const auto& [key, item] : value.as_dict().entries()) dict.Set(key, item);
    } else if (value.is_list()) {
      for (const Value& pair : value.items()) {
        if (!pair.is_list() || pair.items().size() != 2)
          return Invalid(what, "() takes dicts or lists of pairs");
        dict.Set(pair.items()[0], pair.items()[1]);
      }
    } else {
      return Invalid(what, "() takes dicts or lists of pairs");
    }
  }
  for (const auto& [name, value] : args.named) dict.Set(Value(Str::Trusted(name)), value);
  return dict;
}

absl::StatusOr<Value> MakeDict(Evaluator& evaluator, const CallArgs& args) {
  SY_TRY(Dict dict, DictOf(args, "dict"));
  return evaluator.Bounded(Value::MakeDict(std::move(dict)));
}

absl::StatusOr<Value> MakeNamespace(Evaluator& evaluator, const CallArgs& args) {
  auto space = std::make_shared<Namespace>();
  SY_TRY(space->values, DictOf(args, "namespace"));
  KeepNamespace(evaluator, space);
  return Value::MakeNamespace(std::move(space));
}

absl::StatusOr<Value> RaiseException(Evaluator&, const CallArgs& args) {
  const Value* message = args.Get(0, "message");
  return Invalid("the template refuses: ", message == nullptr ? "" : message->ToStr().text());
}

absl::StatusOr<Value> StrftimeNow(Evaluator& evaluator, const CallArgs& args) {
  const Value* format = args.Get(0, "format");
  if (format == nullptr || !format->is_string())
    return absl::InvalidArgumentError("strftime_now() needs a format");
  const time_t now = static_cast<time_t>(evaluator.now_unix_seconds());
  struct tm utc = {};
  if (gmtime_r(&now, &utc) == nullptr)
    return absl::InvalidArgumentError("strftime_now(): no such time");
  char buffer[1024];
  const size_t size = strftime(buffer, sizeof(buffer), format->text().c_str(), &utc);
  return Value(Str::Trusted(std::string_view(buffer, size)));
}

}  // namespace

std::optional<Value> FindFunction(std::string_view name) {
  if (name == "range") return Value::MakeCallable("range", &Range);
  if (name == "dict") return Value::MakeCallable("dict", &MakeDict);
  if (name == "namespace") return Value::MakeCallable("namespace", &MakeNamespace);
  if (name == "raise_exception") return Value::MakeCallable("raise_exception", &RaiseException);
  if (name == "strftime_now") return Value::MakeCallable("strftime_now", &StrftimeNow);
  return std::nullopt;
}

}  // namespace switchyard::jinja
