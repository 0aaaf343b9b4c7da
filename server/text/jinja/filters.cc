// The filters: `x | name(…)`.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>

#include "server/text/cat.h"
#include "server/text/jinja/builtins.h"
#include "server/text/jinja/try.h"
#include "server/text/unicode.h"

namespace switchyard::jinja {
namespace {

using Filter = absl::StatusOr<Value> (*)(Evaluator&, const Value&, const CallArgs&);

bool Flag(const Value* value, bool preset) { return value == nullptr ? preset : value->Truthy(); }

// "a.b.0" looked up step by step, or an integer index.
absl::StatusOr<Value> LookUp(Evaluator& evaluator, const Value& object, const Value& path) {
  if (!path.is_string()) return evaluator.GetItem(object, path);
  Value current = object;
  std::string_view rest = path.text();
  while (true) {
    const size_t dot = rest.find('.');
    const std::string_view name = rest.substr(0, dot);
    int64_t index = 0;
    const auto parsed = std::from_chars(name.data(), name.data() + name.size(), index);
    const bool is_index = !name.empty() && name[0] != '-' && parsed.ec == std::errc() &&
                          parsed.ptr == name.data() + name.size();
    SY_TRY(current,
           evaluator.GetItem(current, is_index ? Value(index) : Value(Str::Trusted(name))));
    if (dot == std::string_view::npos) return current;
    rest = rest.substr(dot + 1);
  }
}

// What sorting and the like compare: the attribute of the item, without its case unless
// `case_sensitive`.
absl::StatusOr<Value> SortKey(Evaluator& evaluator, const Value& item, const Value* attribute,
                              bool case_sensitive) {
  Value key = item;
  if (attribute != nullptr && !attribute->is_none()) {
    SY_TRY(key, LookUp(evaluator, item, *attribute));
  }
  if (!case_sensitive && key.is_string()) return Value(ChangeCase(key.as_str(), "lower"));
  return key;
}

struct Keyed {
  Value key, item;
};

absl::StatusOr<std::vector<Keyed>> KeyedItems(Evaluator& evaluator, const Value& input,
                                              const Value* attribute, bool case_sensitive) {
  SY_TRY(const std::vector<Value> items, evaluator.Iterate(input));
  std::vector<Keyed> keyed;
  for (const Value& item : items) {
    SY_TRY(Value key, SortKey(evaluator, item, attribute, case_sensitive));
    keyed.push_back({std::move(key), item});
  }
  return keyed;
}

absl::Status SortKeyed(std::vector<Keyed>* keyed, bool reverse) {
  absl::Status status;
  std::stable_sort(keyed->begin(), keyed->end(), [&](const Keyed& a, const Keyed& b) {
    auto order = Compare(reverse ? b.key : a.key, reverse ? a.key : b.key);
    if (!order.ok()) {
      status = order.status();
      return false;
    }
    return *order < 0;
  });
  return status;
}

Value ItemsOf(std::vector<Keyed> keyed) {
  std::vector<Value> items;
  for (Keyed& k : keyed) items.push_back(std::move(k.item));
  return Value::MakeList(std::move(items));
}

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

absl::StatusOr<Value> JoinFilter(Evaluator& evaluator, const Value& input, const CallArgs& args) {
  const Value* separator = args.Get(0, "d");
  const Value* attribute = args.Get(1, "attribute");
  SY_TRY(std::vector<Value> items, evaluator.Iterate(input));
  if (attribute != nullptr && !attribute->is_none()) {
    for (Value& item : items) {
      SY_TRY(item, LookUp(evaluator, item, *attribute));
    }
  }
  return JoinList(evaluator, items, separator == nullptr ? Str() : separator->ToStr());
}

absl::StatusOr<Value> FirstFilter(Evaluator& evaluator, const Value& input, const CallArgs&) {
  SY_TRY(const std::vector<Value> items, evaluator.Iterate(input));
  return items.empty() ? Value::MakeUndefined("no first item, the sequence is empty")
                       : items.front();
}

absl::StatusOr<Value> LastFilter(Evaluator& evaluator, const Value& input, const CallArgs&) {
  SY_TRY(const std::vector<Value> items, evaluator.Iterate(input));
  return items.empty() ? Value::MakeUndefined("no last item, the sequence is empty") : items.back();
}

absl::StatusOr<Value> DefaultFilter(Evaluator&, const Value& input, const CallArgs& args) {
  const Value* preset = args.Get(0, "default_value");
  const bool use = input.is_undefined() || (Flag(args.Get(1, "boolean"), false) && !input.Truthy());
  if (!use) return input;
  return preset == nullptr ? Value(Str()) : *preset;
}

absl::StatusOr<Value> ListFilter(Evaluator& evaluator, const Value& input, const CallArgs&) {
  SY_TRY(std::vector<Value> items, evaluator.Iterate(input));
  return Value::MakeList(std::move(items));
}

absl::StatusOr<Value> ItemsFilter(Evaluator& evaluator, const Value& input, const CallArgs&) {
  if (input.is_undefined()) return Value::MakeList({});
  if (!input.is_dict()) return Invalid("items needs a mapping, not ", input.TypeName());
  const std::optional<Value> items = FindMethod(input, "items");
  return evaluator.Call(*items, {});
}

absl::StatusOr<Value> DictSortFilter(Evaluator& evaluator, const Value& input,
                                     const CallArgs& args) {
  if (!input.is_dict()) return Invalid("dictsort needs a mapping, not ", input.TypeName());
  const bool case_sensitive = Flag(args.Get(0, "case_sensitive"), false);
  const Value* by = args.Get(1, "by");
  if (by != nullptr && (!by->is_string() || (by->text() != "key" && by->text() != "value"))) {
    return absl::InvalidArgumentError("dictsort: by must be 'key' or 'value'");
  }
  const bool by_value = by != nullptr && by->text() == "value";
  SY_TRY(const Value pairs, ItemsFilter(evaluator, input, {}));
  const Value index(int64_t{by_value ? 1 : 0});
  SY_TRY(std::vector<Keyed> keyed, KeyedItems(evaluator, pairs, &index, case_sensitive));
  SY_OK(SortKeyed(&keyed, Flag(args.Get(2, "reverse"), false)));
  return ItemsOf(std::move(keyed));
}

absl::StatusOr<Value> SortFilter(Evaluator& evaluator, const Value& input, const CallArgs& args) {
  SY_TRY(std::vector<Keyed> keyed, KeyedItems(evaluator, input, args.Get(2, "attribute"),
                                              Flag(args.Get(1, "case_sensitive"), false)));
  SY_OK(SortKeyed(&keyed, Flag(args.Get(0, "reverse"), false)));
  return ItemsOf(std::move(keyed));
}

absl::StatusOr<Value> UniqueFilter(Evaluator& evaluator, const Value& input, const CallArgs& args) {
  SY_TRY(std::vector<Keyed> keyed, KeyedItems(evaluator, input, args.Get(1, "attribute"),
                                              Flag(args.Get(0, "case_sensitive"), false)));
  Dict seen;
  std::vector<Value> items;
  for (Keyed& k : keyed) {
    if (seen.Find(k.key) != nullptr) continue;
    seen.Set(k.key, Value());
    items.push_back(std::move(k.item));
  }
  return Value::MakeList(std::move(items));
}

template <bool kMax>
absl::StatusOr<Value> ExtremeFilter(Evaluator& evaluator, const Value& input,
                                    const CallArgs& args) {
  SY_TRY(std::vector<Keyed> keyed, KeyedItems(evaluator, input, args.Get(1, "attribute"),
                                              Flag(args.Get(0, "case_sensitive"), false)));
  if (keyed.empty()) return Value::MakeUndefined("no aggregated item, the sequence is empty");
  size_t best = 0;
  for (size_t i = 1; i < keyed.size(); ++i) {
    SY_TRY(const int order, Compare(keyed[i].key, keyed[best].key));
    if (kMax ? order > 0 : order < 0) best = i;
  }
  return keyed[best].item;
}

absl::StatusOr<Value> SumFilter(Evaluator& evaluator, const Value& input, const CallArgs& args) {
  const Value* attribute = args.Get(0, "attribute");
  const Value* start = args.Get(1, "start");
  Value sum = start == nullptr ? Value(int64_t{0}) : *start;
  SY_TRY(const std::vector<Value> items, evaluator.Iterate(input));
  for (Value item : items) {
    if (attribute != nullptr && !attribute->is_none()) {
      SY_TRY(item, LookUp(evaluator, item, *attribute));
    }
    SY_TRY(sum, evaluator.Binary("+", sum, item));
  }
  return sum;
}

absl::StatusOr<Value> MapFilter(Evaluator& evaluator, const Value& input, const CallArgs& args) {
  SY_TRY(const std::vector<Value> items, evaluator.Iterate(input));
  std::vector<Value> mapped;
  if (args.positional.empty()) {
    const Value* attribute = args.Get(0, "attribute");
    const Value* preset = args.Get(1, "default");
    if (attribute == nullptr) return absl::InvalidArgumentError("map needs a filter or attribute=");
    for (const Value& item : items) {
      SY_TRY(Value value, LookUp(evaluator, item, *attribute));
      mapped.push_back(value.is_undefined() && preset != nullptr ? *preset : std::move(value));
    }
  } else {
    if (!args.positional[0].is_string())
      return absl::InvalidArgumentError("map: the filter's name must be a string");
    CallArgs rest{{args.positional.begin() + 1, args.positional.end()}, args.named};
    for (const Value& item : items) {
      SY_TRY(Value value, ApplyFilter(evaluator, args.positional[0].text(), item, rest));
      mapped.push_back(std::move(value));
    }
  }
  return evaluator.Bounded(Value::MakeList(std::move(mapped)));
}

// select, reject, selectattr, rejectattr: keep the items whose test, without one whose truth,
// equals kKeep.
template <bool kKeep, bool kAttribute>
absl::StatusOr<Value> SelectFilter(Evaluator& evaluator, const Value& input, const CallArgs& args) {
  const size_t test_at = kAttribute ? 1 : 0;
  if (args.positional.size() < test_at)
    return absl::InvalidArgumentError("selectattr and rejectattr need an attribute");
  const bool has_test = args.positional.size() > test_at;
  if (has_test && !args.positional[test_at].is_string()) {
    return absl::InvalidArgumentError("select: the test's name must be a string");
  }
  CallArgs rest;
  if (has_test) {
    rest.positional.assign(args.positional.begin() + static_cast<ptrdiff_t>(test_at) + 1,
                           args.positional.end());
    rest.named = args.named;
  }
  SY_TRY(const std::vector<Value> items, evaluator.Iterate(input));
  std::vector<Value> kept;
  for (const Value& item : items) {
    Value subject = item;
    if (kAttribute) {
      SY_TRY(subject, LookUp(evaluator, item, args.positional[0]));
    }
    bool holds = subject.Truthy();
    if (has_test) {
      SY_TRY(holds, ApplyTest(evaluator, args.positional[test_at].text(), subject, rest));
    }
    if (holds == kKeep) kept.push_back(item);
  }
  return Value::MakeList(std::move(kept));
}

absl::StatusOr<Value> GroupByFilter(Evaluator& evaluator, const Value& input,
                                    const CallArgs& args) {
  const Value* attribute = args.Get(0, "attribute");
  if (attribute == nullptr) return absl::InvalidArgumentError("groupby needs an attribute");
  SY_TRY(std::vector<Keyed> keyed,
         KeyedItems(evaluator, input, attribute, /*case_sensitive=*/false));
  SY_OK(SortKeyed(&keyed, /*reverse=*/false));
  std::vector<Value> groups;
  for (size_t i = 0; i < keyed.size();) {
    std::vector<Value> members;
    size_t end = i;
    for (; end < keyed.size() && Equal(keyed[end].key, keyed[i].key); ++end)
      members.push_back(keyed[end].item);
    SY_TRY(Value grouper, LookUp(evaluator, keyed[i].item, *attribute));
    groups.push_back(
        Value::MakeList({std::move(grouper), Value::MakeList(std::move(members))}, /*tuple=*/true));
    i = end;
  }
  return evaluator.Bounded(Value::MakeList(std::move(groups)));
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

absl::StatusOr<Value> ReverseFilter(Evaluator& evaluator, const Value& input, const CallArgs&) {
  SY_TRY(std::vector<Value> items, evaluator.Iterate(input));
  std::reverse(items.begin(), items.end());
  if (input.is_string()) return JoinList(evaluator, items, Str());
  return Value::MakeList(std::move(items));
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
      {"abs", &AbsFilter},
      {"attr", &AttrFilter},
      {"capitalize", &CaseFilter<2>},
      {"count", &LengthFilter},
      {"d", &DefaultFilter},
      {"default", &DefaultFilter},
      {"dictsort", &DictSortFilter},
      {"first", &FirstFilter},
      {"float", &FloatFilter},
      {"format", &FormatFilter},
      {"groupby", &GroupByFilter},
      {"indent", &IndentFilter},
      {"int", &IntFilter},
      {"items", &ItemsFilter},
      {"join", &JoinFilter},
      {"last", &LastFilter},
      {"length", &LengthFilter},
      {"list", &ListFilter},
      {"lower", &CaseFilter<1>},
      {"map", &MapFilter},
      {"max", &ExtremeFilter<true>},
      {"min", &ExtremeFilter<false>},
      {"reject", &SelectFilter<false, false>},
      {"rejectattr", &SelectFilter<false, true>},
      {"replace", &ReplaceFilter},
      {"reverse", &ReverseFilter},
      {"round", &RoundFilter},
      {"safe", &SafeFilter},
      {"select", &SelectFilter<true, false>},
      {"selectattr", &SelectFilter<true, true>},
      {"sort", &SortFilter},
      {"string", &StringFilter},
      {"sum", &SumFilter},
      {"title", &CaseFilter<3>},
      {"tojson", &ToJsonFilter},
      {"trim", &TrimFilter},
      {"unique", &UniqueFilter},
      {"upper", &CaseFilter<0>},
  };
  for (const auto& [key, filter] : table) {
    if (key == name) return filter;
  }
  return nullptr;
}

}  // namespace

absl::StatusOr<Value> ApplyFilter(Evaluator& evaluator, std::string_view name, const Value& input,
                                  const CallArgs& args) {
  const Filter filter = FindFilter(name);
  if (filter == nullptr) return Invalid("unknown filter '", name, "'");
  return filter(evaluator, input, args);
}

}  // namespace switchyard::jinja
