// The filters of lists and mappings.
#include <algorithm>
#include <charconv>

#include "server/text/cat.h"
#include "server/text/jinja/builtins.h"
#include "server/text/jinja/filter_table.h"
#include "server/text/jinja/try.h"

namespace switchyard::jinja {
namespace {

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
      if (value.is_undefined() && preset != nullptr) value = *preset;
      mapped.push_back(std::move(value));
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

absl::StatusOr<Value> ReverseFilter(Evaluator& evaluator, const Value& input, const CallArgs&) {
  SY_TRY(std::vector<Value> items, evaluator.Iterate(input));
  std::reverse(items.begin(), items.end());
  if (input.is_string()) return JoinList(evaluator, items, Str());
  return Value::MakeList(std::move(items));
}

}  // namespace

Filter FindSequenceFilter(std::string_view name) {
  static const auto& table = *new std::vector<std::pair<std::string_view, Filter>>{
      {"dictsort", &DictSortFilter},
      {"first", &FirstFilter},
      {"groupby", &GroupByFilter},
      {"items", &ItemsFilter},
      {"join", &JoinFilter},
      {"last", &LastFilter},
      {"list", &ListFilter},
      {"map", &MapFilter},
      {"max", &ExtremeFilter<true>},
      {"min", &ExtremeFilter<false>},
      {"reject", &SelectFilter<false, false>},
      {"rejectattr", &SelectFilter<false, true>},
      {"reverse", &ReverseFilter},
      {"select", &SelectFilter<true, false>},
      {"selectattr", &SelectFilter<true, true>},
      {"sort", &SortFilter},
      {"sum", &SumFilter},
      {"unique", &UniqueFilter},
  };
  for (const auto& [key, filter] : table) {
    if (key == name) return filter;
  }
  return nullptr;
}

}  // namespace switchyard::jinja
