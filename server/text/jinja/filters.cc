// The filters `x | name(…)` of single values, and the look-up of all.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>

#include "server/text/cat.h"
#include "server/text/jinja/builtins.h"
#include "server/text/jinja/filter_table.h"
#include "server/text/jinja/try.h"
#include "server/text/unicode.h"

namespace switchyard::jinja {
namespace {

absl::StatusOr<Value> ToJsonFilter(Evaluator& evaluator, const Value& input, const CallArgs& args) {
  JsonStyle style;
  style.ensure_ascii = Flag(args.Get(0, "ensure_ascii"), false);
  if (const Value* indent = args.Get(1, "indent"); indent != nullptr && !indent->is_none()) {
    style.pretty = true;
    style.item_separator.resize(1);  // ","
    if (indent->is_string()) {
      style.indent = indent->text();
    } else {
      SY_TRY(const int64_t width, IntArg(indent, 0, "indent"));
      style.indent = std::string(static_cast<size_t>(std::clamp<int64_t>(width, 0, 64)), ' ');
    }
  }
  if (const Value* separators = args.Get(2, "separators");
      separators != nullptr && !separators->is_none()) {
    if (!separators->is_list() || separators->items().size() != 2 ||
        !separators->items()[0].is_string() || !separators->items()[1].is_string()) {
      return absl::InvalidArgumentError("tojson: separators must be two strings");
    }
    style.item_separator = separators->items()[0].text();
    style.key_separator = separators->items()[1].text();
  }
  style.sort_keys = Flag(args.Get(3, "sort_keys"), false);
  if (style.indent.size() > 64 || style.item_separator.size() + style.key_separator.size() > 64) {
    return absl::InvalidArgumentError("tojson: indent and separators are limited to 64 characters");
  }
  SY_OK(evaluator.Charge(static_cast<size_t>(input.weight())));
  std::string out;
  SY_OK(ToJson(input, style, 0, &out));
  SY_OK(evaluator.Charge(out.size()));
  return Value(Str::Untrusted(out));
}

absl::StatusOr<Value> TrimFilter(Evaluator& evaluator, const Value& input, const CallArgs& args) {
  const Value* chars = args.Get(0, "chars");
  if (chars != nullptr && chars->is_none()) chars = nullptr;
  if (chars != nullptr && !chars->is_string())
    return absl::InvalidArgumentError("trim: chars must be a string");
  const Str text = input.ToStr();
  SY_OK(evaluator.Charge(text.size()));
  return Value(Strip(text, chars, true, true));
}

absl::StatusOr<Value> LengthFilter(Evaluator&, const Value& input, const CallArgs&) {
  if (input.is_string()) return Value(static_cast<int64_t>(NumChars(input.text())));
  if (input.is_list()) return Value(static_cast<int64_t>(input.items().size()));
  if (input.is_dict()) return Value(static_cast<int64_t>(input.as_dict().entries().size()));
  if (input.is_undefined()) return Value(int64_t{0});
  return Invalid("object of type '", input.TypeName(), "' has no length");
}

absl::StatusOr<Value> DefaultFilter(Evaluator&, const Value& input, const CallArgs& args) {
  const Value* preset = args.Get(0, "default_value");
  const bool use = input.is_undefined() || (Flag(args.Get(1, "boolean"), false) && !input.Truthy());
  if (!use) return input;
  return preset == nullptr ? Value(Str()) : *preset;
}

absl::StatusOr<Value> ReplaceFilter(Evaluator& evaluator, const Value& input,
                                    const CallArgs& args) {
  const Value* from = args.Get(0, "old");
  const Value* to = args.Get(1, "new");
  if (from == nullptr || to == nullptr)
    return absl::InvalidArgumentError("replace needs two strings");
  const Value* limit = args.Get(2, "count");
  SY_TRY(const int64_t count,
         IntArg(limit == nullptr || limit->is_none() ? nullptr : limit, -1, "count"));
  return ReplaceIn(evaluator, input.ToStr(), Value(from->ToStr()), Value(to->ToStr()), count);
}

absl::StatusOr<Value> IndentFilter(Evaluator& evaluator, const Value& input, const CallArgs& args) {
  Str indentation;
  const Value* width = args.Get(0, "width");
  if (width != nullptr && width->is_string()) {
    indentation = width->as_str();
  } else {
    SY_TRY(const int64_t spaces, IntArg(width, 4, "width"));
    indentation =
        Str::Trusted(std::string(static_cast<size_t>(std::clamp<int64_t>(spaces, 0, 4096)), ' '));
  }
  const bool blank = Flag(args.Get(2, "blank"), false);
  const Str text = input.ToStr();
  Str with_newline = text;
  with_newline.Append("\n", true);
  Str out;
  if (Flag(args.Get(1, "first"), false)) out.Append(indentation);
  bool first = true;
  for (const Str& line : SplitLines(with_newline)) {
    SY_OK(evaluator.Charge(line.size() + indentation.size() + 1));
    if (!first) {
      out.Append("\n", true);
      if (blank || !line.empty()) out.Append(indentation);
    }
    out.Append(line);
    first = false;
  }
  return Value(std::move(out));
}

absl::StatusOr<Value> IntFilter(Evaluator&, const Value& input, const CallArgs& args) {
  const Value* given = args.Get(0, "default");
  const Value preset = given == nullptr ? Value(int64_t{0}) : *given;
  SY_TRY(const int64_t base, IntArg(args.Get(1, "base"), 10, "base"));
  const auto from_double = [&](double d) {
    return std::abs(d) < 9.2e18 ? Value(static_cast<int64_t>(d)) : preset;
  };
  if (input.is_integral()) return Value(input.as_int());
  if (input.is_float()) return from_double(input.as_double());
  if (!input.is_string() || base < 2 || base > 36) return preset;
  std::string text = Strip(input.as_str(), nullptr, true, true).text();
  std::erase(text, '_');
  const char* begin = text.data() + (text.starts_with("+") ? 1 : 0);
  if (base == 16 && (text.starts_with("0x") || text.starts_with("0X"))) begin += 2;
  const char* end = text.data() + text.size();
  int64_t value = 0;
  const auto result = std::from_chars(begin, end, value, static_cast<int>(base));
  if (result.ec == std::errc() && result.ptr == end) return Value(value);
  double d = 0;
  const auto as_double = std::from_chars(begin, end, d);
  return as_double.ec == std::errc() && as_double.ptr == end && std::isfinite(d) ? from_double(d)
                                                                                 : preset;
}

absl::StatusOr<Value> FloatFilter(Evaluator&, const Value& input, const CallArgs& args) {
  const Value* given = args.Get(0, "default");
  if (input.is_number()) return Value(input.as_double());
  if (input.is_string()) {
    const std::string text = Strip(input.as_str(), nullptr, true, true).text();
    const char* begin = text.data() + (text.starts_with("+") ? 1 : 0);
    double d = 0;
    const auto result = std::from_chars(begin, text.data() + text.size(), d);
    if (result.ec == std::errc() && result.ptr == text.data() + text.size()) return Value(d);
  }
  return given == nullptr ? Value(0.0) : *given;
}

absl::StatusOr<Value> AbsFilter(Evaluator&, const Value& input, const CallArgs&) {
  if (input.is_float()) return Value(std::abs(input.as_double()));
  if (!input.is_integral() || input.as_int() == INT64_MIN)
    return Invalid("abs needs a number, not ", input.TypeName());
  return Value(std::abs(input.as_int()));
}

absl::StatusOr<Value> RoundFilter(Evaluator&, const Value& input, const CallArgs& args) {
  if (!input.is_number()) return Invalid("round needs a number, not ", input.TypeName());
  SY_TRY(const int64_t precision, IntArg(args.Get(0, "precision"), 0, "precision"));
  const Value* method = args.Get(1, "method");
  const std::string how = method == nullptr ? "common" : method->ToStr().text();
  const double scale =
      std::pow(10.0, static_cast<double>(std::clamp<int64_t>(precision, -300, 300)));
  const double x = input.as_double();
  if (how == "floor") return Value(std::floor(x * scale) / scale);
  if (how == "ceil") return Value(std::ceil(x * scale) / scale);
  if (how != "common")
    return absl::InvalidArgumentError("round: method must be 'common', 'floor' or 'ceil'");
  if (precision <= 0 || precision > 15) return Value(std::nearbyint(x * scale) / scale);
  char buffer[512];  // correctly rounded, as Python does
  const auto text = std::to_chars(buffer, buffer + sizeof(buffer), x, std::chars_format::fixed,
                                  static_cast<int>(precision));
  double rounded = x;
  std::from_chars(buffer, text.ptr, rounded);
  return Value(rounded);
}

template <int kHow>
absl::StatusOr<Value> CaseFilter(Evaluator& evaluator, const Value& input, const CallArgs&) {
  static constexpr std::string_view kNames[] = {"upper", "lower", "capitalize", "titlefilter"};
  const Str text = input.ToStr();
  SY_OK(evaluator.Charge(text.size()));
  return Value(ChangeCase(text, kNames[kHow]));
}

absl::StatusOr<Value> StringFilter(Evaluator& evaluator, const Value& input, const CallArgs&) {
  SY_OK(evaluator.Charge(static_cast<size_t>(input.weight())));
  return Value(input.ToStr());
}

absl::StatusOr<Value> SafeFilter(Evaluator&, const Value& input, const CallArgs&) { return input; }

absl::StatusOr<Value> AttrFilter(Evaluator& evaluator, const Value& input, const CallArgs& args) {
  const Value* name = args.Get(0, "name");
  if (name == nullptr || !name->is_string()) return absl::InvalidArgumentError("attr needs a name");
  return evaluator.GetAttribute(input, name->text());
}

absl::StatusOr<Value> FormatFilter(Evaluator& evaluator, const Value& input, const CallArgs& args) {
  return FormatPercent(evaluator, input.ToStr(), Value::MakeList(args.positional, /*tuple=*/true));
}

Filter FindFilter(std::string_view name) {
  static const auto& table = *new std::vector<std::pair<std::string_view, Filter>>{
      {"abs", &AbsFilter},         {"attr", &AttrFilter},     {"capitalize", &CaseFilter<2>},
      {"count", &LengthFilter},    {"d", &DefaultFilter},     {"default", &DefaultFilter},
      {"float", &FloatFilter},     {"format", &FormatFilter}, {"indent", &IndentFilter},
      {"int", &IntFilter},         {"length", &LengthFilter}, {"lower", &CaseFilter<1>},
      {"replace", &ReplaceFilter}, {"round", &RoundFilter},   {"safe", &SafeFilter},
      {"string", &StringFilter},   {"title", &CaseFilter<3>}, {"tojson", &ToJsonFilter},
      {"trim", &TrimFilter},       {"upper", &CaseFilter<0>},
  };
  for (const auto& [key, filter] : table) {
    if (key == name) return filter;
  }
  return nullptr;
}

}  // namespace

absl::StatusOr<Value> ApplyFilter(Evaluator& evaluator, std::string_view name, const Value& input,
                                  const CallArgs& args) {
  Filter filter = FindFilter(name);
  if (filter == nullptr) filter = FindSequenceFilter(name);
  if (filter == nullptr) return Invalid("unknown filter '", name, "'");
  return filter(evaluator, input, args);
}

}  // namespace switchyard::jinja
