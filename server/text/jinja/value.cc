#include "server/text/jinja/value.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "absl/strings/str_format.h"
#include "server/text/cat.h"
#include "server/text/jinja/try.h"
#include "server/text/unicode.h"

namespace switchyard::jinja {
namespace {

int64_t AddWeight(int64_t a, int64_t b) { return std::min(a + b, 2 * kMaxWeight); }

}  // namespace

const Value* CallArgs::Get(size_t index, std::string_view name) const {
  if (index < positional.size()) return &positional[index];
  for (const auto& [key, value] : named) {
    if (key == name) return &value;
  }
  return nullptr;
}

Value Value::MakeUndefined(std::string what) {
  Value v;
  v.data_ = Undefined{std::make_shared<const std::string>(std::move(what))};
  return v;
}

Value Value::MakeList(std::vector<Value> items, bool tuple) {
  auto list = std::make_shared<List>();
  for (const Value& item : items) {
    list->depth = std::max(list->depth, item.depth() + 1);
    list->weight = AddWeight(list->weight, item.weight());
  }
  list->items = std::move(items);
  list->tuple = tuple;
  Value v;
  v.data_ = std::shared_ptr<const List>(std::move(list));
  return v;
}

Value Value::MakeDict(Dict dict) {
  Value v;
  v.data_ = std::shared_ptr<const Dict>(std::make_shared<Dict>(std::move(dict)));
  return v;
}

Value Value::MakeNamespace(std::shared_ptr<Namespace> space) {
  Value v;
  v.data_ = std::move(space);
  return v;
}

Value Value::MakeCallable(std::string name,
                          std::function<absl::StatusOr<Value>(Evaluator&, const CallArgs&)> call,
                          int depth) {
  Value v;
  v.data_ = std::shared_ptr<const Callable>(
      std::make_shared<Callable>(Callable{std::move(name), std::move(call), depth}));
  return v;
}

absl::StatusOr<Value> Value::FromJson(const nlohmann::ordered_json& json, int depth) {
  if (depth >= kMaxDepth - 10) return absl::InvalidArgumentError("a value is nested too deeply");
  if (json.is_null()) return Value();
  if (json.is_boolean()) return Value(json.get<bool>());
  if (json.is_number_unsigned() && json.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) {
    return Value(static_cast<double>(json.get<uint64_t>()));
  }
  if (json.is_number_integer()) return Value(json.get<int64_t>());
  if (json.is_number_float()) return Value(json.get<double>());
  if (json.is_string()) {
    const auto& text = json.get_ref<const std::string&>();
    if (!unicode::IsValidUtf8(text))
      return absl::InvalidArgumentError("a string is not valid UTF-8");
    return Value(Str::Untrusted(text));
  }
  if (json.is_array()) {
    std::vector<Value> items;
    items.reserve(json.size());
    for (const auto& element : json) {
      SY_TRY(Value item, FromJson(element, depth + 1));
      items.push_back(std::move(item));
    }
    return MakeList(std::move(items));
  }
  if (json.is_object()) {
    Dict dict;
    for (const auto& [key, element] : json.items()) {
      if (!unicode::IsValidUtf8(key)) return absl::InvalidArgumentError("a key is not valid UTF-8");
      SY_TRY(Value item, FromJson(element, depth + 1));
      dict.Set(Value(Str::Untrusted(key)), std::move(item));
    }
    return MakeDict(std::move(dict));
  }
  return absl::InvalidArgumentError("not a JSON value");
}

const std::vector<Value>& Value::items() const {
  return std::get<std::shared_ptr<const List>>(data_)->items;
}
bool Value::is_tuple() const {
  return is_list() && std::get<std::shared_ptr<const List>>(data_)->tuple;
}

int Value::depth() const {
  if (is_list()) return std::get<std::shared_ptr<const List>>(data_)->depth;
  if (is_dict()) return as_dict().depth();
  if (is_namespace()) return as_namespace().depth;
  return is_callable() ? as_callable().depth : 0;
}

int64_t Value::weight() const {
  if (is_list()) return std::get<std::shared_ptr<const List>>(data_)->weight;
  if (is_dict()) return as_dict().weight();
  return is_string() ? 1 + static_cast<int64_t>(as_str().size()) : 1;
}

bool Value::Truthy() const {
  if (is_undefined() || is_none()) return false;
  if (is_float()) return as_double() != 0;
  if (is_integral()) return as_int() != 0;
  if (is_string()) return !as_str().empty();
  if (is_list()) return !items().empty();
  if (is_dict()) return !as_dict().entries().empty();
  return true;
}

std::string Value::TypeName() const {
  if (is_undefined()) return "Undefined";
  if (is_none()) return "NoneType";
  if (is_bool()) return "bool";
  if (is_int()) return "int";
  if (is_float()) return "float";
  if (is_string()) return "str";
  if (is_list()) return is_tuple() ? "tuple" : "list";
  if (is_dict()) return "dict";
  if (is_namespace()) return "Namespace";
  return "function";
}

Str Value::ToStr() const {
  if (is_string()) return as_str();
  if (is_undefined()) return Str();
  // Numbers and the like cannot spell anything by themselves; containers hold the request's words.
  return is_list() || is_dict() ? Str::Untrusted(Repr()) : Str::Trusted(Repr());
}

namespace {

std::string QuoteLikePython(std::string_view text) {
  const bool use_double =
      text.find('\'') != std::string_view::npos && text.find('"') == std::string_view::npos;
  const char quote = use_double ? '"' : '\'';
  std::string out(1, quote);
  for (size_t pos = 0, size = 0; pos < text.size(); pos += size) {
    const char32_t c = unicode::CharAt(text, pos, &size);
    if (c == static_cast<char32_t>(quote) || c == '\\') {
      out += '\\';
      out += static_cast<char>(c);
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '\r') {
      out += "\\r";
    } else if (c == '\t') {
      out += "\\t";
    } else if (c < 0x20 || (c >= 0x7F && c < 0xA1) || c == 0xAD) {
      out += absl::StrFormat("\\x%02x", static_cast<uint32_t>(c));
    } else if (unicode::IsPrintable(c)) {
      out += text.substr(pos, size);
    } else {
      const auto value = static_cast<uint32_t>(c);
      out += c < 0x10000 ? absl::StrFormat("\\u%04x", value) : absl::StrFormat("\\U%08x", value);
    }
  }
  return out + quote;
}

}  // namespace

std::string Value::Repr() const {
  if (is_undefined()) return "Undefined";
  if (is_none()) return "None";
  if (is_bool()) return as_int() != 0 ? "True" : "False";
  if (is_int()) return std::to_string(as_int());
  if (is_float()) return FloatRepr(as_double());
  if (is_string()) return QuoteLikePython(text());
  if (is_list()) {
    std::string out = is_tuple() ? "(" : "[";
    for (size_t i = 0; i < items().size(); ++i) out += Cat(i > 0 ? ", " : "", items()[i].Repr());
    if (is_tuple()) return out + (items().size() == 1 ? ",)" : ")");
    return out + "]";
  }
  if (is_dict()) {
    std::string out = "{";
    for (const auto& [key, value] : as_dict().entries()) {
      if (out.size() > 1) out += ", ";
      out += Cat(key.Repr(), ": ", value.Repr());
    }
    return out + "}";
  }
  return is_namespace() ? "<Namespace>" : Cat("<function ", as_callable().name, ">");
}

std::string Dict::IndexKey(const Value& key) {
  if (key.is_string()) return Cat("s", key.text());
  if (key.is_integral()) return Cat("n", key.as_int());
  return Cat("r", key.Repr());
}

const Value* Dict::Find(const Value& key) const {
  const auto it = index_.find(IndexKey(key));
  return it == index_.end() ? nullptr : &entries_[it->second].second;
}

const Value* Dict::Find(std::string_view key) const {
  const auto it = index_.find(Cat("s", key));
  return it == index_.end() ? nullptr : &entries_[it->second].second;
}

void Dict::Set(Value key, Value value) {
  depth_ = std::max(depth_, value.depth() + 1);
  weight_ = AddWeight(AddWeight(weight_, key.weight()), value.weight());
  const auto [it, fresh] = index_.try_emplace(IndexKey(key), entries_.size());
  if (fresh) {
    entries_.emplace_back(std::move(key), std::move(value));
  } else {
    entries_[it->second].second = std::move(value);
  }
}

bool Equal(const Value& a, const Value& b) {
  if (a.is_number() && b.is_number()) {
    return a.is_float() || b.is_float() ? a.as_double() == b.as_double() : a.as_int() == b.as_int();
  }
  if (a.is_string() && b.is_string()) return a.text() == b.text();
  if (a.is_none() || a.is_undefined()) return a.is_none() ? b.is_none() : b.is_undefined();
  if (a.is_list() && b.is_list()) {
    return a.is_tuple() == b.is_tuple() && std::equal(a.items().begin(), a.items().end(),
                                                      b.items().begin(), b.items().end(), Equal);
  }
  if (a.is_dict() && b.is_dict()) {
    if (a.as_dict().entries().size() != b.as_dict().entries().size()) return false;
    for (const auto& [key, value] : a.as_dict().entries()) {
      const Value* other = b.as_dict().Find(key);
      if (other == nullptr || !Equal(value, *other)) return false;
    }
    return true;
  }
  if (a.is_namespace() && b.is_namespace()) return &a.as_namespace() == &b.as_namespace();
  if (a.is_callable() && b.is_callable()) return &a.as_callable() == &b.as_callable();
  return false;
}

absl::StatusOr<int> Compare(const Value& a, const Value& b) {
  if (a.is_number() && b.is_number()) {
    if (!a.is_float() && !b.is_float())
      return a.as_int() < b.as_int() ? -1 : a.as_int() > b.as_int() ? 1 : 0;
    return a.as_double() < b.as_double() ? -1 : a.as_double() > b.as_double() ? 1 : 0;
  }
  if (a.is_string() && b.is_string())
    return a.text().compare(b.text());  // UTF-8 sorts as its code points do
  if (a.is_list() && b.is_list()) {
    for (size_t i = 0; i < std::min(a.items().size(), b.items().size()); ++i) {
      if (!Equal(a.items()[i], b.items()[i])) return Compare(a.items()[i], b.items()[i]);
    }
    return static_cast<int>(a.items().size() > b.items().size()) -
           static_cast<int>(a.items().size() < b.items().size());
  }
  if (a.is_undefined()) return absl::InvalidArgumentError(a.undefined_what());
  if (b.is_undefined()) return absl::InvalidArgumentError(b.undefined_what());
  return Invalid("'", a.TypeName(), "' and '", b.TypeName(), "' have no order");
}

std::string FloatRepr(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  char buffer[64];
  const auto result =
      std::to_chars(buffer, buffer + sizeof(buffer), value, std::chars_format::scientific);
  const std::string_view text(buffer, static_cast<size_t>(result.ptr - buffer));
  const size_t e = text.find('e');
  std::string digits;
  for (const char c : text.substr(0, e)) {
    if (c >= '0' && c <= '9') digits += c;
  }
  int exponent = 0;
  std::from_chars(text.data() + e + (text[e + 1] == '+' ? 2 : 1), text.data() + text.size(),
                  exponent);
  const std::string sign = text[0] == '-' ? "-" : "";
  const int n = static_cast<int>(digits.size());
  if (exponent < -4 || exponent >= 16) {
    std::string out = Cat(sign, digits.substr(0, 1), n > 1 ? "." : "", digits.substr(1));
    return out + absl::StrFormat("e%c%02d", exponent < 0 ? '-' : '+', std::abs(exponent));
  }
  if (exponent < 0)
    return Cat(sign, "0.", std::string(static_cast<size_t>(-exponent - 1), '0'), digits);
  if (n <= exponent + 1)
    return sign + digits + std::string(static_cast<size_t>(exponent + 1 - n), '0') + ".0";
  const auto split = static_cast<size_t>(exponent + 1);
  return Cat(sign, digits.substr(0, split), ".", digits.substr(split));
}

namespace {

void JsonString(std::string_view text, bool ensure_ascii, std::string* out) {
  *out += '"';
  for (size_t pos = 0, size = 0; pos < text.size(); pos += size) {
    const char32_t c = unicode::CharAt(text, pos, &size);
    switch (c) {
      case '"':
        *out += "\\\"";
        break;
      case '\\':
        *out += "\\\\";
        break;
      case '\n':
        *out += "\\n";
        break;
      case '\r':
        *out += "\\r";
        break;
      case '\t':
        *out += "\\t";
        break;
      case '\b':
        *out += "\\b";
        break;
      case '\f':
        *out += "\\f";
        break;
      default:
        if (c < 0x20 || (ensure_ascii && c >= 0x7F && c < 0x10000 && c != 0x7F)) {
          *out += absl::StrFormat("\\u%04x", static_cast<uint32_t>(c));
        } else if (ensure_ascii && c >= 0x10000) {
          const uint32_t v = static_cast<uint32_t>(c) - 0x10000;
          *out += absl::StrFormat("\\u%04x\\u%04x", 0xD800 + (v >> 10), 0xDC00 + (v & 0x3FF));
        } else {
          *out += text.substr(pos, size);
        }
    }
  }
  *out += '"';
}

std::string JsonKey(const Value& key) {
  if (key.is_string()) return key.text();
  if (key.is_bool()) return key.as_int() != 0 ? "true" : "false";
  return key.is_none() ? "null" : key.Repr();
}

}  // namespace

absl::Status ToJson(const Value& value, const JsonStyle& style, int level, std::string* out) {
  const auto newline = [&](int at) {
    if (!style.pretty) return;
    *out += '\n';
    for (int i = 0; i < at; ++i) *out += style.indent;
  };
  if (value.is_none()) {
    *out += "null";
  } else if (value.is_bool()) {
    *out += value.as_int() != 0 ? "true" : "false";
  } else if (value.is_int()) {
    *out += std::to_string(value.as_int());
  } else if (value.is_float()) {
    const double d = value.as_double();
    *out += std::isnan(d)   ? "NaN"
            : std::isinf(d) ? (d < 0 ? "-Infinity" : "Infinity")
                            : FloatRepr(d);
  } else if (value.is_string()) {
    JsonString(value.text(), style.ensure_ascii, out);
  } else if (value.is_list()) {
    *out += '[';
    bool first = true;
    for (const Value& item : value.items()) {
      if (!first) *out += style.item_separator;
      first = false;
      newline(level + 1);
      SY_OK(ToJson(item, style, level + 1, out));
    }
    if (!first) newline(level);
    *out += ']';
  } else if (value.is_dict()) {
    auto entries = value.as_dict().entries();
    if (style.sort_keys) {
      std::stable_sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) {
        return JsonKey(a.first) < JsonKey(b.first);
      });
    }
    *out += '{';
    bool first = true;
    for (const auto& [key, item] : entries) {
      if (!first) *out += style.item_separator;
      first = false;
      newline(level + 1);
      JsonString(JsonKey(key), style.ensure_ascii, out);
      *out += style.key_separator;
      SY_OK(ToJson(item, style, level + 1, out));
    }
    if (!first) newline(level);
    *out += '}';
  } else if (value.is_undefined()) {
    return Invalid("cannot write as JSON: ", value.undefined_what());
  } else {
    return Invalid("a ", value.TypeName(), " cannot be written as JSON");
  }
  return absl::OkStatus();
}

size_t NumChars(std::string_view text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  }));
}

size_t ByteOffset(std::string_view text, size_t char_index) {
  size_t pos = 0;
  while (char_index > 0 && pos < text.size()) {
    pos += unicode::CharSize(static_cast<unsigned char>(text[pos]));
    --char_index;
  }
  return std::min(pos, text.size());
}

}  // namespace switchyard::jinja
