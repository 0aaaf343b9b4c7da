#include "server/text/jinja/expression_parser.h"

#include <charconv>
#include <set>

#include "server/text/jinja/try.h"

namespace switchyard::jinja {

absl::StatusOr<ExprPtr> ExpressionParser::ParseTuple() {
  SY_TRY(ExprPtr first, ParseExpression());
  if (!At(",")) return first;
  ExprPtr tuple = Wrap(Make(Kind::kTuple), std::move(first));
  while (Accept(",")) {
    if (AtExpressionEnd()) break;
    SY_TRY(ExprPtr next, ParseExpression());
    tuple->children.push_back(std::move(next));
  }
  return tuple;
}

bool ExpressionParser::AtExpressionEnd() const {
  return Peek().kind == TokenKind::kBlockEnd || Peek().kind == TokenKind::kVariableEnd || At(")") ||
         At("=") || AtName("in") || AtName("if");
}

absl::StatusOr<ExprPtr> ExpressionParser::ParseExpression() {
  const Nest nest(&depth_);
  if (depth_ > kMaxParseDepth) return Error("expressions are nested too deeply");
  SY_TRY(ExprPtr expr, ParseOr());
  while (!no_condition_ && AtName("if")) {
    ExprPtr condition = Make(Kind::kCondition);
    Take();
    condition->children.push_back(std::move(expr));
    SY_TRY(ExprPtr test, ParseOr());
    condition->children.push_back(std::move(test));
    ExprPtr otherwise;
    if (AcceptName("else")) {
      SY_TRY(otherwise, ParseExpression());
    }
    condition->children.push_back(std::move(otherwise));
    expr = std::move(condition);
  }
  return expr;
}

absl::StatusOr<ExprPtr> ExpressionParser::ParseOr() {
  SY_TRY(ExprPtr left, ParseAnd());
  for (int count = 0; AtName("or"); ++count) {
    if (count > kMaxParseDepth) return Error("too many operators in a row");
    ExprPtr both = Make(Kind::kOr);
    Take();
    SY_TRY(ExprPtr right, ParseAnd());
    both->children.push_back(std::move(left));
    both->children.push_back(std::move(right));
    left = std::move(both);
  }
  return left;
}

absl::StatusOr<ExprPtr> ExpressionParser::ParseAnd() {
  SY_TRY(ExprPtr left, ParseNot());
  for (int count = 0; AtName("and"); ++count) {
    if (count > kMaxParseDepth) return Error("too many operators in a row");
    ExprPtr both = Make(Kind::kAnd);
    Take();
    SY_TRY(ExprPtr right, ParseNot());
    both->children.push_back(std::move(left));
    both->children.push_back(std::move(right));
    left = std::move(both);
  }
  return left;
}

absl::StatusOr<ExprPtr> ExpressionParser::ParseNot() {
  const Nest nest(&depth_);
  if (depth_ > kMaxParseDepth) return Error("expressions are nested too deeply");
  if (!AtName("not")) return ParseCompare();
  ExprPtr expr = Make(Kind::kUnary);
  expr->name = Take().text;
  SY_TRY(ExprPtr operand, ParseNot());
  expr->children.push_back(std::move(operand));
  return expr;
}

absl::StatusOr<ExprPtr> ExpressionParser::ParseCompare() {
  SY_TRY(ExprPtr left, ParseBinary(0));
  ExprPtr compare;
  while (true) {
    std::string op;
    if (At("==") || At("!=") || At("<") || At("<=") || At(">") || At(">=")) {
      op = Take().text;
    } else if (AtName("in")) {
      op = Take().text;
    } else if (AtName("not") && PeekNext().kind == TokenKind::kName && PeekNext().text == "in") {
      Take();
      Take();
      op = "notin";
    } else {
      break;
    }
    if (compare == nullptr) {
      compare = Make(Kind::kCompare);
      compare->children.push_back(std::move(left));
    }
    SY_TRY(ExprPtr right, ParseBinary(0));
    compare->ops.push_back(std::move(op));
    compare->children.push_back(std::move(right));
  }
  return compare != nullptr ? std::move(compare) : std::move(left);
}

absl::StatusOr<ExprPtr> ExpressionParser::ParseBinary(int level) {
  static const std::vector<std::vector<std::string>> kOps = {
      {"+", "-"}, {"~"}, {"*", "/", "//", "%"}, {"**"}};
  if (level == 4) return ParseUnary(/*with_filter=*/true);
  SY_TRY(ExprPtr left, ParseBinary(level + 1));
  for (int count = 0;; ++count) {
    if (count > kMaxParseDepth) return Error("too many operators in a row");
    bool found = false;
    for (const std::string& op : kOps[static_cast<size_t>(level)]) found = found || At(op);
    if (!found) return left;
    ExprPtr both = Make(Kind::kBinary);
    both->name = Take().text;
    SY_TRY(ExprPtr right, ParseBinary(level + 1));
    both->children.push_back(std::move(left));
    both->children.push_back(std::move(right));
    left = std::move(both);
  }
}

absl::StatusOr<ExprPtr> ExpressionParser::ParseUnary(bool with_filter) {
  const Nest nest(&depth_);
  if (depth_ > kMaxParseDepth) return Error("expressions are nested too deeply");
  ExprPtr expr;
  if (At("-") || At("+")) {
    expr = Make(Kind::kUnary);
    expr->name = Take().text;
    SY_TRY(ExprPtr operand, ParseUnary(/*with_filter=*/false));
    expr->children.push_back(std::move(operand));
  } else {
    SY_TRY(expr, ParsePrimary());
  }
  SY_TRY(expr, ParsePostfix(std::move(expr)));
  if (with_filter) {
    SY_TRY(expr, ParseFilterChain(std::move(expr), /*tests=*/true));
  }
  return expr;
}

absl::StatusOr<ExprPtr> ExpressionParser::ParsePrimary() {
  ExprPtr expr = Make(Kind::kConstant);
  const Token token = Peek();
  switch (token.kind) {
    case TokenKind::kName:
      Take();
      if (token.text == "true" || token.text == "True") {
        expr->constant = Value(true);
      } else if (token.text == "false" || token.text == "False") {
        expr->constant = Value(false);
      } else if (token.text != "none" && token.text != "None") {
        expr->kind = Kind::kName;
        expr->name = token.text;
      }
      return expr;
    case TokenKind::kString: {
      std::string text;
      while (Peek().kind == TokenKind::kString) text += Take().text;
      expr->constant = Value(Str::Trusted(text));
      return expr;
    }
    case TokenKind::kInteger: {
      Take();
      int64_t value = 0;
      const bool hex = token.text.starts_with("0x");
      const char* begin = token.text.data() + (hex ? 2 : 0);
      const char* end = token.text.data() + token.text.size();
      const auto result = std::from_chars(begin, end, value, hex ? 16 : 10);
      if (result.ec != std::errc() || result.ptr != end) return Error("an integer is out of range");
      expr->constant = Value(value);
      return expr;
    }
    case TokenKind::kFloat: {
      Take();
      double value = 0;
      std::from_chars(token.text.data(), token.text.data() + token.text.size(), value);
      expr->constant = Value(value);
      return expr;
    }
    default:
      break;
  }
  const bool no_condition =
      std::exchange(no_condition_, false);  // within brackets `if` is an expression again
  absl::StatusOr<ExprPtr> bracket = ParseBracket();
  no_condition_ = no_condition;
  return bracket;
}

absl::StatusOr<ExprPtr> ExpressionParser::ParseBracket() {
  if (Accept("(")) {
    if (Accept(")")) return Make(Kind::kTuple);
    SY_TRY(ExprPtr inner, ParseTuple());
    SY_OK(Expect(")"));
    return inner;
  }
  if (At("[")) {
    ExprPtr list = Make(Kind::kList);
    Take();
    while (!At("]")) {
      SY_TRY(ExprPtr item, ParseExpression());
      list->children.push_back(std::move(item));
      if (!Accept(",")) break;
    }
    SY_OK(Expect("]"));
    return list;
  }
  if (At("{")) {
    ExprPtr dict = Make(Kind::kDict);
    Take();
    while (!At("}")) {
      SY_TRY(ExprPtr key, ParseExpression());
      SY_OK(Expect(":"));
      SY_TRY(ExprPtr value, ParseExpression());
      dict->children.push_back(std::move(key));
      dict->children.push_back(std::move(value));
      if (!Accept(",")) break;
    }
    SY_OK(Expect("}"));
    return dict;
  }
  return Error(Cat("expected an expression, found ", Found()));
}

absl::StatusOr<ExprPtr> ExpressionParser::ParsePostfix(ExprPtr expr) {
  for (int count = 0;; ++count) {
    if (count > kMaxParseDepth) return Error("too many calls or subscripts in a row");
    if (Accept(".")) {
      if (Peek().kind == TokenKind::kInteger) {
        ExprPtr item = Wrap(Make(Kind::kItem), std::move(expr));
        SY_TRY(ExprPtr index, ParsePrimary());
        item->children.push_back(std::move(index));
        expr = std::move(item);
        continue;
      }
      ExprPtr attribute = Wrap(Make(Kind::kAttribute), std::move(expr));
      SY_TRY(attribute->name, ExpectName());
      expr = std::move(attribute);
    } else if (At("[")) {
      SY_TRY(expr, ParseSubscript(std::move(expr)));
    } else if (At("(")) {
      ExprPtr call = Wrap(Make(Kind::kCall), std::move(expr));
      SY_OK(ParseArguments(call.get()));
      expr = std::move(call);
    } else {
      return expr;
    }
  }
}

absl::StatusOr<ExprPtr> ExpressionParser::ParseSubscript(ExprPtr expr) {
  const bool no_condition = std::exchange(no_condition_, false);
  Take();  // [
  std::vector<ExprPtr> parts(1);
  while (!At("]")) {
    if (Accept(":")) {
      if (parts.size() == 3) return Error("a slice has at most three parts");
      parts.emplace_back();
      continue;
    }
    if (parts.back() != nullptr) return Error(Cat("expected ']', found ", Found()));
    SY_TRY(parts.back(), ParseExpression());
  }
  SY_OK(Expect("]"));
  no_condition_ = no_condition;
  if (parts.size() == 1 && parts[0] == nullptr) return Error("expected a subscript");
  ExprPtr item = Wrap(Make(parts.size() == 1 ? Kind::kItem : Kind::kSlice), std::move(expr));
  if (parts.size() > 1) parts.resize(3);
  for (ExprPtr& part : parts) item->children.push_back(std::move(part));
  return item;
}

absl::Status ExpressionParser::ParseArguments(Expr* call) {
  const bool no_condition = std::exchange(no_condition_, false);
  SY_OK(Expect("("));
  while (!At(")")) {
    if (At("*") || At("**")) return Error("* and ** arguments are not supported");
    if (Peek().kind == TokenKind::kName && PeekNext().kind == TokenKind::kOperator &&
        PeekNext().text == "=") {
      std::string name = Take().text;
      Take();
      SY_TRY(ExprPtr value, ParseExpression());
      call->named.emplace_back(std::move(name), std::move(value));
    } else {
      if (!call->named.empty()) return Error("a positional argument follows a named one");
      SY_TRY(ExprPtr value, ParseExpression());
      call->children.push_back(std::move(value));
    }
    if (!Accept(",")) break;
  }
  no_condition_ = no_condition;
  return Expect(")");
}

absl::StatusOr<ExprPtr> ExpressionParser::ParseFilter(ExprPtr expr) {
  ExprPtr filter = Wrap(Make(Kind::kFilter), std::move(expr));
  SY_TRY(filter->name, ExpectName());
  if (At("(")) SY_OK(ParseArguments(filter.get()));
  return filter;
}

absl::StatusOr<ExprPtr> ExpressionParser::ParseFilterChain(ExprPtr expr, bool tests) {
  for (int count = 0;; ++count) {
    if (count > kMaxParseDepth) return Error("too many filters in a row");
    if (Accept("|")) {
      SY_TRY(expr, ParseFilter(std::move(expr)));
    } else if (tests && AcceptName("is")) {
      SY_TRY(expr, ParseTest(std::move(expr)));
    } else if (tests && At("(")) {  // a filter's result may be called
      ExprPtr call = Wrap(Make(Kind::kCall), std::move(expr));
      SY_OK(ParseArguments(call.get()));
      expr = std::move(call);
    } else {
      return expr;
    }
  }
}

absl::StatusOr<ExprPtr> ExpressionParser::ParseTest(ExprPtr expr) {
  const bool negated = AcceptName("not");
  ExprPtr test = Wrap(Make(Kind::kTest), std::move(expr));
  SY_TRY(test->name, ExpectName());
  static const std::set<std::string> kNotAnArgument = {"else", "or", "and", "if",
                                                       "is",   "in", "not", "recursive"};
  if (At("(")) {
    SY_OK(ParseArguments(test.get()));
  } else if ((Peek().kind == TokenKind::kName && kNotAnArgument.count(Peek().text) == 0) ||
             Peek().kind == TokenKind::kString || Peek().kind == TokenKind::kInteger ||
             Peek().kind == TokenKind::kFloat || At("[") || At("{")) {
    SY_TRY(ExprPtr argument, ParsePrimary());
    SY_TRY(argument, ParsePostfix(std::move(argument)));
    test->children.push_back(std::move(argument));
  }
  if (!negated) return test;
  ExprPtr inverse = Wrap(Make(Kind::kUnary), std::move(test));
  inverse->name = "not";
  return inverse;
}

}  // namespace switchyard::jinja
