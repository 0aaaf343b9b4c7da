// Evaluator: expressions.
#include <algorithm>
#include <cmath>

#include "server/text/cat.h"
#include "server/text/jinja/builtins.h"
#include "server/text/jinja/evaluator.h"
#include "server/text/jinja/try.h"
#include "server/text/unicode.h"

namespace switchyard::jinja {
namespace {

absl::Status Unsupported(std::string_view op, const Value& left, const Value& right) {
  if (left.is_undefined()) return absl::InvalidArgumentError(left.undefined_what());
  if (right.is_undefined()) return absl::InvalidArgumentError(right.undefined_what());
  return Invalid("unsupported operands for ", op, ": '", left.TypeName(), "' and '",
                 right.TypeName(), "'");
}

absl::StatusOr<Value> IntArithmetic(std::string_view op, int64_t a, int64_t b) {
  int64_t result = 0;
  bool overflow = false;
  if (op == "+") {
    overflow = __builtin_add_overflow(a, b, &result);
  } else if (op == "-") {
    overflow = __builtin_sub_overflow(a, b, &result);
  } else if (op == "*") {
    overflow = __builtin_mul_overflow(a, b, &result);
  } else if (op == "**") {
    if (b < 0) return Value(std::pow(static_cast<double>(a), static_cast<double>(b)));
    result = 1;
    for (int64_t i = 0; i < b && !overflow && result != 0 && a != 1; ++i) {
      if (a == -1 && i >= 2) {
        result = b % 2 == 0 ? 1 : -1;
        break;
      }
      overflow = __builtin_mul_overflow(result, a, &result);
    }
  } else {
    if (b == 0) return absl::InvalidArgumentError("division by zero");
    if (op == "/") return Value(static_cast<double>(a) / static_cast<double>(b));
    if (b == -1) {
      if (op == "%") return Value(int64_t{0});
      overflow = __builtin_sub_overflow(int64_t{0}, a, &result);
    } else {
      int64_t quotient = a / b, remainder = a % b;
      if (remainder != 0 && (remainder < 0) != (b < 0)) {
        --quotient;
        remainder += b;
      }
      result = op == "//" ? quotient : remainder;
    }
  }
  if (overflow) return Invalid("integer overflow in ", op);
  return Value(result);
}

absl::StatusOr<Value> FloatArithmetic(std::string_view op, double a, double b) {
  if (op == "+") return Value(a + b);
  if (op == "-") return Value(a - b);
  if (op == "*") return Value(a * b);
  if (op == "**") return Value(std::pow(a, b));
  if (b == 0) return absl::InvalidArgumentError("division by zero");
  if (op == "/") return Value(a / b);
  if (op == "//") return Value(std::floor(a / b));
  double remainder = std::fmod(a, b);
  if (remainder != 0 && (remainder < 0) != (b < 0)) remainder += b;
  return Value(remainder);
}

}  // namespace

absl::StatusOr<Value> Evaluator::Binary(std::string_view op, const Value& left,
                                        const Value& right) {
  if (op == "~") {
    Str text = left.ToStr();
    const Str tail = right.ToStr();
    SY_OK(Charge(text.size() + tail.size()));
    text.Append(tail);
    return Value(std::move(text));
  }
  if (left.is_number() && right.is_number()) {
    return left.is_float() || right.is_float()
               ? FloatArithmetic(op, left.as_double(), right.as_double())
               : IntArithmetic(op, left.as_int(), right.as_int());
  }
  if (op == "+" && left.is_string() && right.is_string()) {
    SY_OK(Charge(left.as_str().size() + right.as_str().size()));
    Str text = left.as_str();
    text.Append(right.as_str());
    return Value(std::move(text));
  }
  if (op == "+" && left.is_list() && right.is_list() && left.is_tuple() == right.is_tuple()) {
    SY_OK(Charge((left.items().size() + right.items().size()) * sizeof(Value)));
    std::vector<Value> items = left.items();
    items.insert(items.end(), right.items().begin(), right.items().end());
    return Bounded(Value::MakeList(std::move(items), left.is_tuple()));
  }
  if (op == "%" && left.is_string()) return FormatPercent(*this, left.as_str(), right);
  if (op == "*" && (left.is_integral() || right.is_integral())) {
    const Value& object = left.is_integral() ? right : left;
    const int64_t count = std::max<int64_t>(0, (left.is_integral() ? left : right).as_int());
    if (object.is_string() || object.is_list()) {
      const auto size =
          object.is_string() ? object.as_str().size() : object.items().size() * sizeof(Value);
      int64_t total = 0;
      if (__builtin_mul_overflow(static_cast<int64_t>(size), count, &total))
        total = limits_.max_bytes + 1;
      SY_OK(Charge(static_cast<size_t>(total)));
      if (object.is_string()) {
        Str text;
        if (size > 0) {
          for (int64_t i = 0; i < count; ++i) text.Append(object.as_str());
        }
        return Value(std::move(text));
      }
      std::vector<Value> items;
      if (size > 0) {
        for (int64_t i = 0; i < count; ++i)
          items.insert(items.end(), object.items().begin(), object.items().end());
      }
      return Bounded(Value::MakeList(std::move(items), object.is_tuple()));
    }
  }
  return Unsupported(op, left, right);
}

absl::StatusOr<Value> Evaluator::Eval(const Expr& expr) {
  const Deeper deeper(&depth_);
  SY_OK(Step(expr.line));
  switch (expr.kind) {
    case Expr::Kind::kConstant:
      return expr.constant;
    case Expr::Kind::kName:
      return EvalName(expr.name);
    case Expr::Kind::kList:
    case Expr::Kind::kTuple:
      return EvalList(expr);
    case Expr::Kind::kDict:
      return EvalDict(expr);
    case Expr::Kind::kAttribute: {
      SY_TRY(const Value object, Eval(*expr.children[0]));
      return GetAttribute(object, expr.name);
    }
    case Expr::Kind::kItem: {
      SY_TRY(const Value object, Eval(*expr.children[0]));
      SY_TRY(const Value key, Eval(*expr.children[1]));
      return GetItem(object, key);
    }
    case Expr::Kind::kSlice:
      return EvalSlice(expr);
    case Expr::Kind::kCall: {
      SY_TRY(const Value callee, Eval(*expr.children[0]));
      SY_TRY(const CallArgs args, EvalArgs(expr));
      line_ = expr.line;
      return Call(callee, args);
    }
    case Expr::Kind::kFilter: {
      SY_TRY(const Value input, Eval(*expr.children[0]));
      SY_TRY(const CallArgs args, EvalArgs(expr));
      return ApplyFilter(*this, expr.name, input, args);
    }
    case Expr::Kind::kTest: {
      SY_TRY(const Value input, Eval(*expr.children[0]));
      SY_TRY(const CallArgs args, EvalArgs(expr));
      SY_TRY(const bool result, ApplyTest(*this, expr.name, input, args));
      return Value(result);
    }
    case Expr::Kind::kUnary:
      return EvalUnary(expr);
    case Expr::Kind::kBinary: {
      SY_TRY(const Value left, Eval(*expr.children[0]));
      SY_TRY(const Value right, Eval(*expr.children[1]));
      return Binary(expr.name, left, right);
    }
    case Expr::Kind::kAnd:
    case Expr::Kind::kOr: {
      SY_TRY(Value left, Eval(*expr.children[0]));
      if (left.Truthy() == (expr.kind == Expr::Kind::kOr)) return left;
      return Eval(*expr.children[1]);
    }
    case Expr::Kind::kCompare:
      return EvalCompare(expr);
    case Expr::Kind::kCondition: {
      SY_TRY(const Value condition, Eval(*expr.children[1]));
      if (condition.Truthy()) return Eval(*expr.children[0]);
      if (expr.children[2] != nullptr) return Eval(*expr.children[2]);
      return Value::MakeUndefined("the condition is false and there is no else");
    }
  }
  return Value();
}

absl::StatusOr<Value> Evaluator::EvalName(const std::string& name) {
  if (name.empty() && filter_input_ != nullptr) return Value(*filter_input_);
  if (const Value* value = Find(name)) return *value;
  if (std::optional<Value> function = FindFunction(name)) return *function;
  return Value::MakeUndefined(Cat("'", name, "' is undefined"));
}

absl::StatusOr<Value> Evaluator::EvalList(const Expr& expr) {
  std::vector<Value> items;
  for (const ExprPtr& child : expr.children) {
    SY_TRY(Value item, Eval(*child));
    items.push_back(std::move(item));
  }
  return Bounded(Value::MakeList(std::move(items), expr.kind == Expr::Kind::kTuple));
}

absl::StatusOr<Value> Evaluator::EvalDict(const Expr& expr) {
  Dict dict;
  for (size_t i = 0; i < expr.children.size(); i += 2) {
    SY_TRY(Value key, Eval(*expr.children[i]));
    SY_TRY(Value value, Eval(*expr.children[i + 1]));
    if (!key.is_string() && !key.is_number() && !key.is_none())
      return Invalid("a ", key.TypeName(), " cannot be a key");
    dict.Set(std::move(key), std::move(value));
  }
  return Bounded(Value::MakeDict(std::move(dict)));
}

absl::StatusOr<CallArgs> Evaluator::EvalArgs(const Expr& expr) {
  CallArgs args;
  for (size_t i = 1; i < expr.children.size(); ++i) {
    SY_TRY(Value value, Eval(*expr.children[i]));
    args.positional.push_back(std::move(value));
  }
  for (const auto& [name, child] : expr.named) {
    SY_TRY(Value value, Eval(*child));
    args.named.emplace_back(name, std::move(value));
  }
  return args;
}

absl::StatusOr<Value> Evaluator::EvalSlice(const Expr& expr) {
  SY_TRY(const Value object, Eval(*expr.children[0]));
  std::optional<int64_t> parts[3];
  for (size_t i = 0; i < 3; ++i) {
    if (expr.children[i + 1] == nullptr) continue;
    SY_TRY(const Value part, Eval(*expr.children[i + 1]));
    if (part.is_none()) continue;
    if (!part.is_integral()) return Invalid("a slice needs integers, not ", part.TypeName());
    parts[i] = part.as_int();
  }
  if (object.is_undefined()) return absl::InvalidArgumentError(object.undefined_what());
  if (!object.is_list() && !object.is_string())
    return Invalid("'", object.TypeName(), "' object cannot be sliced");
  const int64_t step = parts[2].value_or(1);
  if (step == 0) return absl::InvalidArgumentError("slice step cannot be zero");
  const auto size =
      static_cast<int64_t>(object.is_list() ? object.items().size() : NumChars(object.text()));
  const auto clamp = [&](std::optional<int64_t> part, int64_t preset) {
    if (!part) return preset;
    const int64_t index = *part < 0 ? *part + size : *part;
    return step > 0 ? std::clamp<int64_t>(index, 0, size)
                    : std::clamp<int64_t>(index, -1, size - 1);
  };
  const int64_t begin = clamp(parts[0], step > 0 ? 0 : size - 1);
  const int64_t end = clamp(parts[1], step > 0 ? size : -1);
  if (object.is_string() && step == 1) {
    const size_t from = ByteOffset(object.text(), static_cast<size_t>(begin));
    const size_t to =
        std::max(from, ByteOffset(object.text(), static_cast<size_t>(std::max(begin, end))));
    SY_OK(Charge(to - from));
    return Value(object.as_str().Sub(from, to));
  }
  SY_TRY(const std::vector<Value> source, Iterate(object));
  std::vector<Value> items;
  for (int64_t i = begin; step > 0 ? i < end : i > end;) {
    items.push_back(source[static_cast<size_t>(i)]);
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  if (object.is_list()) return Value::MakeList(std::move(items), object.is_tuple());
  return JoinList(*this, items, Str());
}

absl::StatusOr<Value> Evaluator::EvalUnary(const Expr& expr) {
  SY_TRY(const Value operand, Eval(*expr.children[0]));
  if (expr.name == "not") return Value(!operand.Truthy());
  if (!operand.is_number()) {
    if (operand.is_undefined()) return absl::InvalidArgumentError(operand.undefined_what());
    return Invalid("bad operand for unary ", expr.name, ": '", operand.TypeName(), "'");
  }
  if (expr.name == "+") return operand.is_bool() ? Value(operand.as_int()) : operand;
  if (operand.is_float()) return Value(-operand.as_double());
  return IntArithmetic("-", 0, operand.as_int());
}

absl::StatusOr<Value> Evaluator::EvalCompare(const Expr& expr) {
  SY_TRY(Value left, Eval(*expr.children[0]));
  for (size_t i = 0; i < expr.ops.size(); ++i) {
    SY_TRY(Value right, Eval(*expr.children[i + 1]));
    const std::string& op = expr.ops[i];
    bool holds = false;
    if (op == "==" || op == "!=") {
      holds = Equal(left, right) == (op == "==");
    } else if (op == "in" || op == "notin") {
      SY_TRY(const bool inside, Contains(right, left));
      holds = inside == (op == "in");
    } else {
      SY_TRY(const int order, Compare(left, right));
      holds = op == "<" ? order < 0 : op == "<=" ? order <= 0 : op == ">" ? order > 0 : order >= 0;
    }
    if (!holds) return Value(false);
    left = std::move(right);
  }
  return Value(true);
}

}  // namespace switchyard::jinja
