// The values of a template: Python's, as far as templates see them.
//
// Owner: one rendering; values share immutable contents by reference count and stay on the
// rendering's thread. Only namespaces are mutable. Must never nest deeper than kMaxDepth
// (destruction and comparison recurse).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"
#include "server/text/jinja/str.h"

namespace switchyard::jinja {

class Evaluator;
class Value;
struct List;
struct Namespace;
class Dict;

constexpr int kMaxDepth = 200;
constexpr int64_t kMaxWeight = int64_t{64} << 20;

struct CallArgs {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;

  // The argument at `index` or called `name`; nullptr when not given.
  const Value* Get(size_t index, std::string_view name) const;
};

struct Callable {
  std::string name;
  std::function<absl::StatusOr<Value>(Evaluator&, const CallArgs&)> call;
  int depth = 0;  // of the values it holds
};

struct None {};
struct Undefined {
  std::shared_ptr<const std::string> what;  // "'x' is undefined"
};

class Value {
 public:
  // Implicit, as the alternatives of a variant are.
  // NOLINTBEGIN(google-explicit-constructor)
  Value() : data_(None{}) {}
  Value(bool b) : data_(b) {}
  Value(int64_t i) : data_(i) {}
  Value(double d) : data_(d) {}
  Value(Str s) : data_(std::make_shared<const Str>(std::move(s))) {}
  // NOLINTEND(google-explicit-constructor)
  Value(const char*) = delete;
  static Value MakeUndefined(std::string what);
  static Value MakeList(std::vector<Value> items, bool tuple = false);
  static Value MakeDict(Dict dict);
  static Value MakeNamespace(std::shared_ptr<Namespace> space);
  static Value MakeCallable(std::string name,
                            std::function<absl::StatusOr<Value>(Evaluator&, const CallArgs&)> call,
                            int depth = 0);
  // All strings of it untrusted. InvalidArgument when nested deeper than kMaxDepth.
  static absl::StatusOr<Value> FromJson(const nlohmann::ordered_json& json, int depth = 0);

  bool is_undefined() const { return std::holds_alternative<Undefined>(data_); }
  bool is_none() const { return std::holds_alternative<None>(data_); }
  bool is_bool() const { return std::holds_alternative<bool>(data_); }
  bool is_int() const { return std::holds_alternative<int64_t>(data_); }
  bool is_float() const { return std::holds_alternative<double>(data_); }
  bool is_number() const { return is_bool() || is_int() || is_float(); }
  bool is_integral() const { return is_bool() || is_int(); }
  bool is_string() const { return std::holds_alternative<std::shared_ptr<const Str>>(data_); }
  bool is_list() const { return std::holds_alternative<std::shared_ptr<const List>>(data_); }
  bool is_dict() const { return std::holds_alternative<std::shared_ptr<const Dict>>(data_); }
  bool is_namespace() const { return std::holds_alternative<std::shared_ptr<Namespace>>(data_); }
  bool is_callable() const {
    return std::holds_alternative<std::shared_ptr<const Callable>>(data_);
  }

  // REQUIRES: the matching is_…() holds.
  int64_t as_int() const {
    return is_bool() ? (std::get<bool>(data_) ? 1 : 0) : std::get<int64_t>(data_);
  }
  double as_double() const {
    return is_float() ? std::get<double>(data_) : static_cast<double>(as_int());
  }
  const Str& as_str() const { return *std::get<std::shared_ptr<const Str>>(data_); }
  const std::string& text() const { return as_str().text(); }
  const std::vector<Value>& items() const;
  bool is_tuple() const;
  const Dict& as_dict() const { return *std::get<std::shared_ptr<const Dict>>(data_); }
  Namespace& as_namespace() const { return *std::get<std::shared_ptr<Namespace>>(data_); }
  const Callable& as_callable() const { return *std::get<std::shared_ptr<const Callable>>(data_); }
  const std::string& undefined_what() const { return *std::get<Undefined>(data_).what; }

  bool Truthy() const;
  std::string TypeName() const;  // Python's
  int depth() const;
  int64_t weight() const;  // about the bytes that repr() or a comparison must visit, shared parts
                           // counted each time

  // str(x) and repr(x). Strings keep their provenance in str(); everything else of the request's is
  // untrusted.
  Str ToStr() const;
  std::string Repr() const;

 private:
  std::variant<Undefined, None, bool, int64_t, double, std::shared_ptr<const Str>,
               std::shared_ptr<const List>, std::shared_ptr<const Dict>, std::shared_ptr<Namespace>,
               std::shared_ptr<const Callable>>
      data_;
};

struct List {
  std::vector<Value> items;
  bool tuple = false;
  int depth = 1;
  int64_t weight = 1;
};

// Insertion-ordered. Keys are strings, numbers or None.
class Dict {
 public:
  const Value* Find(const Value& key) const;
  const Value* Find(std::string_view key) const;
  void Set(Value key, Value value);
  const std::vector<std::pair<Value, Value>>& entries() const { return entries_; }
  int depth() const { return depth_; }
  int64_t weight() const { return weight_; }

 private:
  static std::string IndexKey(const Value& key);
  std::vector<std::pair<Value, Value>> entries_;
  absl::flat_hash_map<std::string, size_t> index_;  // IndexKey → position
  int depth_ = 1;
  int64_t weight_ = 1;
};

struct Namespace {
  Dict values;
  // Attributes that are computed (`loop`); empty for a template's own namespaces.
  std::function<std::optional<Value>(std::string_view)> computed;
  int depth = 0;  // of the values behind `computed`
};

bool Equal(const Value& a, const Value& b);
// < 0, 0, > 0. InvalidArgument where Python has no order ('str' and 'int').
absl::StatusOr<int> Compare(const Value& a, const Value& b);

struct JsonStyle {
  bool ensure_ascii = false;
  bool sort_keys = false;
  bool pretty = false;  // with `indent` per level
  std::string indent;
  std::string item_separator = ", ";
  std::string key_separator = ": ";
};
// json.dumps(). InvalidArgument for what is not JSON (undefined, functions).
absl::Status ToJson(const Value& value, const JsonStyle& style, int level, std::string* out);
std::string FloatRepr(double value);  // Python's repr()

// Characters (code points) and their place in bytes. REQUIRES: valid UTF-8.
size_t NumChars(std::string_view text);
size_t ByteOffset(std::string_view text, size_t char_index);  // text.size() beyond the end

}  // namespace switchyard::jinja
