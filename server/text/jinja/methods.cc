// Python's methods of str, list and dict, as far as an immutable sandbox allows them.
#include <algorithm>
#include <string>

#include "server/text/cat.h"
#include "server/text/jinja/builtins.h"
#include "server/text/jinja/try.h"
#include "server/text/unicode.h"

namespace switchyard::jinja {
namespace {

using Method = absl::StatusOr<Value> (*)(Evaluator&, const Value& self, const CallArgs&);

absl::StatusOr<const Value*> CharsArg(const CallArgs& args) {
  const Value* chars = args.Get(0, "chars");
  if (chars != nullptr && chars->is_none()) chars = nullptr;
  if (chars != nullptr && !chars->is_string())
    return Invalid("strip() needs a string, not ", chars->TypeName());
  return chars;
}

template <bool kLeft, bool kRight>
absl::StatusOr<Value> StripMethod(Evaluator& evaluator, const Value& self, const CallArgs& args) {
  SY_TRY(const Value* chars, CharsArg(args));
  SY_OK(evaluator.Charge(self.text().size()));
  return Value(Strip(self.as_str(), chars, kLeft, kRight));
}

// At most `limit` cuts (< 0: any number), from the left or from the right.
absl::StatusOr<Value> SplitText(Evaluator& evaluator, const Str& text, const Value* separator,
                                int64_t limit, bool from_right) {
  const std::string& bytes = text.text();
  std::vector<std::pair<size_t, size_t>> cuts;  // [begin, end) of what separates
  if (separator != nullptr && !separator->is_none()) {
    if (!separator->is_string())
      return Invalid("split() needs a string, not ", separator->TypeName());
    const std::string& needle = separator->text();
    if (needle.empty()) return absl::InvalidArgumentError("split(): empty separator");
    if (from_right) {
      for (size_t at = bytes.rfind(needle); at != std::string::npos;
           at = bytes.rfind(needle, at - needle.size())) {
        cuts.emplace_back(at, at + needle.size());
        if (at < needle.size()) break;
      }
    } else {
      for (size_t at = bytes.find(needle); at != std::string::npos;
           at = bytes.find(needle, at + needle.size())) {
        cuts.emplace_back(at, at + needle.size());
      }
    }
    if (limit >= 0 && cuts.size() > static_cast<size_t>(limit))
      cuts.resize(static_cast<size_t>(limit));
    if (from_right) std::reverse(cuts.begin(), cuts.end());
    SY_OK(evaluator.Charge(bytes.size() + cuts.size() * sizeof(Value)));
    std::vector<Value> pieces;
    size_t done = 0;
    for (const auto& [begin, end] : cuts) {
      pieces.push_back(Value(text.Sub(done, begin)));
      done = end;
    }
    pieces.push_back(Value(text.Sub(done, bytes.size())));
    return Value::MakeList(std::move(pieces));
  }
  if (from_right && limit >= 0)
    return absl::InvalidArgumentError("rsplit() with a limit needs a separator");
  std::vector<Value> pieces;
  SY_OK(evaluator.Charge(bytes.size()));
  size_t size = 0;
  for (size_t pos = 0; pos < bytes.size();) {
    if (IsPythonSpace(unicode::CharAt(bytes, pos, &size))) {
      pos += size;
      continue;
    }
    size_t end = pos;
    if (limit >= 0 && static_cast<int64_t>(pieces.size()) == limit) {
      pieces.push_back(Value(Strip(text.Sub(pos, bytes.size()), nullptr, false, true)));
      break;
    }
    while (end < bytes.size() && !IsPythonSpace(unicode::CharAt(bytes, end, &size))) end += size;
    SY_OK(evaluator.Charge(sizeof(Value)));
    pieces.push_back(Value(text.Sub(pos, end)));
    pos = end;
  }
  return Value::MakeList(std::move(pieces));
}

template <bool kFromRight>
absl::StatusOr<Value> SplitMethod(Evaluator& evaluator, const Value& self, const CallArgs& args) {
  SY_TRY(const int64_t limit, IntArg(args.Get(1, "maxsplit"), -1, "maxsplit"));
  return SplitText(evaluator, self.as_str(), args.Get(0, "sep"), limit, kFromRight);
}

template <bool kStart>
absl::StatusOr<Value> StartsOrEndsWith(Evaluator&, const Value& self, const CallArgs& args) {
  const Value* what = args.Get(0, "prefix");
  if (what == nullptr)
    return absl::InvalidArgumentError("startswith() and endswith() need an argument");
  const std::vector<Value> options = what->is_tuple() ? what->items() : std::vector<Value>{*what};
  for (const Value& option : options) {
    if (!option.is_string())
      return Invalid("startswith() and endswith() need strings, not ", option.TypeName());
    if (kStart ? self.text().starts_with(option.text()) : self.text().ends_with(option.text()))
      return Value(true);
  }
  return Value(false);
}

template <bool kStart>
absl::StatusOr<Value> RemoveAffix(Evaluator&, const Value& self, const CallArgs& args) {
  const Value* what = args.Get(0, "prefix");
  if (what == nullptr || !what->is_string())
    return absl::InvalidArgumentError("removeprefix() needs a string");
  const size_t size = self.text().size(), cut = what->text().size();
  if (kStart && self.text().starts_with(what->text())) return Value(self.as_str().Sub(cut, size));
  if (!kStart && self.text().ends_with(what->text()))
    return Value(self.as_str().Sub(0, size - cut));
  return self;
}

absl::StatusOr<Value> ReplaceMethod(Evaluator& evaluator, const Value& self, const CallArgs& args) {
  const Value* from = args.Get(0, "old");
  const Value* to = args.Get(1, "new");
  if (from == nullptr || to == nullptr)
    return absl::InvalidArgumentError("replace() needs two strings");
  SY_TRY(const int64_t count, IntArg(args.Get(2, "count"), -1, "count"));
  return ReplaceIn(evaluator, self.as_str(), *from, *to, count);
}

absl::StatusOr<Value> JoinMethod(Evaluator& evaluator, const Value& self, const CallArgs& args) {
  const Value* list = args.Get(0, "iterable");
  if (list == nullptr) return absl::InvalidArgumentError("join() needs a list");
  SY_TRY(const std::vector<Value> items, evaluator.Iterate(*list));
  for (const Value& item : items) {
    if (!item.is_string()) return Invalid("join() needs strings, not ", item.TypeName());
  }
  return JoinList(evaluator, items, self.as_str());
}

enum class Case { kUpper, kLower, kTitle, kCapitalize };
template <Case kCase>
absl::StatusOr<Value> CaseMethod(Evaluator& evaluator, const Value& self, const CallArgs&) {
  static constexpr std::string_view kNames[] = {"upper", "lower", "title", "capitalize"};
  SY_OK(evaluator.Charge(self.text().size()));
  return Value(ChangeCase(self.as_str(), kNames[static_cast<int>(kCase)]));
}

template <bool kLast, bool kMust>
absl::StatusOr<Value> FindMethodOfStr(Evaluator&, const Value& self, const CallArgs& args) {
  const Value* what = args.Get(0, "sub");
  if (what == nullptr || !what->is_string() || args.positional.size() > 1) {
    return absl::InvalidArgumentError("find() needs one string");
  }
  const size_t at = kLast ? self.text().rfind(what->text()) : self.text().find(what->text());
  if (at != std::string::npos)
    return Value(static_cast<int64_t>(NumChars(std::string_view(self.text()).substr(0, at))));
  if (kMust) return absl::InvalidArgumentError("index(): substring not found");
  return Value(int64_t{-1});
}

absl::StatusOr<Value> CountInStr(Evaluator&, const Value& self, const CallArgs& args) {
  const Value* what = args.Get(0, "sub");
  if (what == nullptr || !what->is_string())
    return absl::InvalidArgumentError("count() needs a string");
  if (what->text().empty()) return Value(static_cast<int64_t>(NumChars(self.text()) + 1));
  int64_t count = 0;
  for (size_t at = self.text().find(what->text()); at != std::string::npos;
       at = self.text().find(what->text(), at + what->text().size())) {
    ++count;
  }
  return Value(count);
}

absl::StatusOr<Value> SplitLinesMethod(Evaluator& evaluator, const Value& self,
                                       const CallArgs& args) {
  if (!args.positional.empty() || !args.named.empty())
    return absl::InvalidArgumentError("splitlines() takes no argument");
  SY_OK(evaluator.Charge(self.text().size() * 2));
  std::vector<Value> lines;
  for (Str& line : SplitLines(self.as_str())) lines.push_back(Value(std::move(line)));
  return Value::MakeList(std::move(lines));
}

template <bool (*kIs)(char32_t)>
absl::StatusOr<Value> AllChars(Evaluator&, const Value& self, const CallArgs&) {
  const std::string& text = self.text();
  size_t size = 0;
  for (size_t pos = 0; pos < text.size(); pos += size) {
    if (!kIs(unicode::CharAt(text, pos, &size))) return Value(false);
  }
  return Value(!text.empty());
}
bool IsDigit(char32_t c) { return unicode::IsDecimalDigit(c); }
bool IsAlpha(char32_t c) { return unicode::IsLetter(c); }
bool IsAlnum(char32_t c) { return unicode::IsLetter(c) || unicode::IsNumber(c); }

template <bool kUpper>
absl::StatusOr<Value> IsCase(Evaluator& evaluator, const Value& self, const CallArgs&) {
  SY_TRY(const bool result, ApplyTest(evaluator, kUpper ? "upper" : "lower", self, {}));
  return Value(result);
}

absl::StatusOr<Value> DictItems(Evaluator& evaluator, const Value& self, const CallArgs&) {
  std::vector<Value> items;
  SY_OK(evaluator.Charge(self.as_dict().entries().size() * 3 * sizeof(Value)));
  for (const auto& [key, value] : self.as_dict().entries()) {
    items.push_back(Value::MakeList({key, value}, /*tuple=*/true));
  }
  return evaluator.Bounded(Value::MakeList(std::move(items)));
}

template <bool kKeys>
absl::StatusOr<Value> DictParts(Evaluator& evaluator, const Value& self, const CallArgs&) {
  std::vector<Value> items;
  SY_OK(evaluator.Charge(self.as_dict().entries().size() * sizeof(Value)));
  for (const auto& [key, value] : self.as_dict().entries()) items.push_back(kKeys ? key : value);
  return Value::MakeList(std::move(items));
}

absl::StatusOr<Value> DictGet(Evaluator&, const Value& self, const CallArgs& args) {
  if (args.positional.empty()) return absl::InvalidArgumentError("get() needs a key");
  if (const Value* value = self.as_dict().Find(args.positional[0])) return *value;
  const Value* preset = args.Get(1, "default");
  return preset == nullptr ? Value() : *preset;
}

absl::StatusOr<Value> CopySelf(Evaluator&, const Value& self, const CallArgs&) { return self; }

absl::StatusOr<Value> ListIndex(Evaluator&, const Value& self, const CallArgs& args) {
  if (args.positional.size() != 1) return absl::InvalidArgumentError("index() needs one value");
  for (size_t i = 0; i < self.items().size(); ++i) {
    if (Equal(self.items()[i], args.positional[0])) return Value(static_cast<int64_t>(i));
  }
  return absl::InvalidArgumentError("index(): the value is not in the list");
}

absl::StatusOr<Value> ListCount(Evaluator&, const Value& self, const CallArgs& args) {
  if (args.positional.size() != 1) return absl::InvalidArgumentError("count() needs one value");
  return Value(static_cast<int64_t>(
      std::count_if(self.items().begin(), self.items().end(),
                    [&](const Value& v) { return Equal(v, args.positional[0]); })));
}

Method FindStrMethod(std::string_view name) {
  if (name == "strip") return &StripMethod<true, true>;
  if (name == "lstrip") return &StripMethod<true, false>;
  if (name == "rstrip") return &StripMethod<false, true>;
  if (name == "split") return &SplitMethod<false>;
  if (name == "rsplit") return &SplitMethod<true>;
  if (name == "splitlines") return &SplitLinesMethod;
  if (name == "startswith") return &StartsOrEndsWith<true>;
  if (name == "endswith") return &StartsOrEndsWith<false>;
  if (name == "removeprefix") return &RemoveAffix<true>;
  if (name == "removesuffix") return &RemoveAffix<false>;
  if (name == "replace") return &ReplaceMethod;
  if (name == "join") return &JoinMethod;
  if (name == "upper") return &CaseMethod<Case::kUpper>;
  if (name == "lower") return &CaseMethod<Case::kLower>;
  if (name == "title") return &CaseMethod<Case::kTitle>;
  if (name == "capitalize") return &CaseMethod<Case::kCapitalize>;
  if (name == "find") return &FindMethodOfStr<false, false>;
  if (name == "rfind") return &FindMethodOfStr<true, false>;
  if (name == "index") return &FindMethodOfStr<false, true>;
  if (name == "count") return &CountInStr;
  if (name == "isdigit") return &AllChars<IsDigit>;
  if (name == "isalpha") return &AllChars<IsAlpha>;
  if (name == "isalnum") return &AllChars<IsAlnum>;
  if (name == "isspace") return &AllChars<IsPythonSpace>;
  if (name == "isupper") return &IsCase<true>;
  if (name == "islower") return &IsCase<false>;
  return nullptr;
}

Method FindDictMethod(std::string_view name) {
  if (name == "items") return &DictItems;
  if (name == "keys") return &DictParts<true>;
  if (name == "values") return &DictParts<false>;
  if (name == "get") return &DictGet;
  if (name == "copy") return &CopySelf;
  return nullptr;
}

Method FindListMethod(std::string_view name) {
  if (name == "index") return &ListIndex;
  if (name == "count") return &ListCount;
  return name == "copy" ? &CopySelf : nullptr;
}

}  // namespace

std::optional<Value> FindMethod(const Value& self, std::string_view name) {
  Method method = nullptr;
  if (self.is_string()) method = FindStrMethod(name);
  if (self.is_dict()) method = FindDictMethod(name);
  if (self.is_list()) method = FindListMethod(name);
  if (method == nullptr) return std::nullopt;
  return Value::MakeCallable(
      std::string(name),
      [self, method](Evaluator& evaluator, const CallArgs& args) {
        return method(evaluator, self, args);
      },
      self.depth() + 1);
}

}  // namespace switchyard::jinja
