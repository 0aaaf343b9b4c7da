#include "server/text/jinja/parser.h"

#include <charconv>
#include <set>

#include "server/text/cat.h"
#include "server/text/jinja/lexer.h"
#include "server/text/jinja/try.h"

namespace switchyard::jinja {
namespace {

constexpr int kMaxParseDepth = 100;
constexpr size_t kMaxSourceBytes = 4 << 20;

using Kind = Expr::Kind;

class Parser {
 public:
  explicit Parser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  absl::StatusOr<Body> Run() {
    SY_TRY(Body body, ParseBody({}));
    return body;
  }

 private:
  // Counts nesting while it lives.
  struct Nest {
    explicit Nest(int* depth) : depth(depth) { ++*depth; }
    ~Nest() { --*depth; }
    int* depth;
  };

  const Token& Peek() const { return tokens_[pos_]; }
  const Token& PeekNext() const { return tokens_[std::min(pos_ + 1, tokens_.size() - 1)]; }
  Token Take() { return tokens_[pos_ + 1 < tokens_.size() ? pos_++ : pos_]; }
  bool At(std::string_view op) const {
    return Peek().kind == TokenKind::kOperator && Peek().text == op;
  }
  bool AtName(std::string_view name) const {
    return Peek().kind == TokenKind::kName && Peek().text == name;
  }
  bool Accept(std::string_view op) { return At(op) && (Take(), true); }
  bool AcceptName(std::string_view name) { return AtName(name) && (Take(), true); }
  absl::Status Error(std::string_view what) const {
    return Invalid("line ", Peek().line, ": ", what);
  }

  std::string Found() const {
    switch (Peek().kind) {
      case TokenKind::kEnd:
        return "the end of the template";
      case TokenKind::kText:
        return "text";
      case TokenKind::kBlockEnd:
        return "'%}'";
      case TokenKind::kVariableEnd:
        return "'}}'";
      default:
        return Cat("'", Peek().text, "'");
    }
  }
  absl::Status Expect(std::string_view op) {
    if (Accept(op)) return absl::OkStatus();
    return Error(Cat("expected '", op, "', found ", Found()));
  }
  absl::Status ExpectBlockEnd() {
    if (Peek().kind != TokenKind::kBlockEnd) return Error(Cat("expected '%}', found ", Found()));
    Take();
    return absl::OkStatus();
  }
  absl::StatusOr<std::string> ExpectName() {
    if (Peek().kind != TokenKind::kName) return Error(Cat("expected a name, found ", Found()));
    return Take().text;
  }

  ExprPtr Make(Kind kind) const {
    auto expr = std::make_unique<Expr>();
    expr->kind = kind;
    expr->line = Peek().line;
    return expr;
  }
  static ExprPtr Wrap(ExprPtr outer, ExprPtr first) {
    outer->line = first->line;
    outer->children.insert(outer->children.begin(), std::move(first));
    return outer;
  }

  // Statements up to a block whose name is in `ends`; that name is consumed and left in end_name_.
  absl::StatusOr<Body> ParseBody(const std::set<std::string>& ends) {
    const Nest nest(&depth_);
    if (depth_ > kMaxParseDepth) return Error("blocks are nested too deeply");
    Body body;
    const int begin_line = Peek().line;
    while (Peek().kind != TokenKind::kEnd) {
      const Token token = Take();
      auto stmt = std::make_unique<Stmt>();
      stmt->line = token.line;
      if (token.kind == TokenKind::kText) {
        stmt->kind = Stmt::Kind::kText;
        stmt->text = Str::Trusted(token.text);
      } else if (token.kind == TokenKind::kVariableBegin) {
        stmt->kind = Stmt::Kind::kOutput;
        SY_TRY(stmt->expr, ParseTuple());
        if (Peek().kind != TokenKind::kVariableEnd)
          return Error(Cat("expected '}}', found ", Found()));
        Take();
      } else {
        SY_TRY(const std::string name, ExpectName());
        if (ends.count(name) > 0) {
          end_name_ = name;
          return body;
        }
        SY_OK(ParseStatement(name, stmt.get()));
      }
      body.push_back(std::move(stmt));
    }
    if (!ends.empty())
      return Invalid("line ", begin_line, ": {% ", *ends.begin(), " %} is missing");
    return body;
  }

  absl::Status ParseStatement(const std::string& name, Stmt* stmt) {
    if (name == "if") return ParseIf(stmt);
    if (name == "for") return ParseFor(stmt);
    if (name == "set") return ParseSet(stmt);
    if (name == "macro") return ParseMacro(stmt);
    if (name == "with") return ParseWith(stmt);
    if (name == "filter") {
      stmt->kind = Stmt::Kind::kFilterBlock;
      SY_TRY(stmt->expr, ParseFilter(Make(Kind::kName)));
      SY_TRY(stmt->expr, ParseFilterChain(std::move(stmt->expr), /*tests=*/false));
      return ParseBlock("endfilter", &stmt->body);
    }
    if (name == "generation") {
      stmt->kind = Stmt::Kind::kScopeless;
      return ParseBlock("endgeneration", &stmt->body);
    }
    if (name == "break" || name == "continue") {
      if (loops_ == 0) return Error(Cat("'", name, "' outside a loop"));
      stmt->kind = name == "break" ? Stmt::Kind::kBreak : Stmt::Kind::kContinue;
      return ExpectBlockEnd();
    }
    return Error(Cat("{% ", name, " %} is not supported here"));
  }

  // "%}" body "{% end %}".
  absl::Status ParseBlock(const std::string& end, Body* body) {
    SY_OK(ExpectBlockEnd());
    SY_TRY(*body, ParseBody({end}));
    return ExpectBlockEnd();
  }

  absl::Status ParseIf(Stmt* stmt) {
    stmt->kind = Stmt::Kind::kIf;
    std::string name = "if";
    while (name != "endif") {
      ExprPtr condition;
      if (name != "else") {
        SY_TRY(condition, ParseTuple());
      }
      SY_OK(ExpectBlockEnd());
      SY_TRY(Body body,
             name == "else" ? ParseBody({"endif"}) : ParseBody({"elif", "else", "endif"}));
      stmt->branches.emplace_back(std::move(condition), std::move(body));
      name = end_name_;
    }
    return ExpectBlockEnd();
  }

  // name or (name, name); with `attributes`, ns.name too.
  absl::Status ParseTargets(bool attributes, std::vector<std::string>* targets) {
    const bool parenthesized = Accept("(");
    do {
      if (parenthesized && At(")")) break;
      SY_TRY(std::string name, ExpectName());
      if (attributes && Accept(".")) {
        SY_TRY(const std::string attribute, ExpectName());
        name += "." + attribute;
      }
      targets->push_back(std::move(name));
    } while (Accept(","));
    if (targets->empty()) return Error("expected a name");
    return parenthesized ? Expect(")") : absl::OkStatus();
  }

  absl::Status ParseFor(Stmt* stmt) {
    stmt->kind = Stmt::Kind::kFor;
    SY_OK(ParseTargets(/*attributes=*/false, &stmt->targets));
    if (!AcceptName("in")) return Error(Cat("expected 'in', found ", Found()));
    no_condition_ = true;  // the `if` behind it filters
    auto iterable = ParseTuple();
    no_condition_ = false;
    SY_TRY(stmt->expr, std::move(iterable));
    if (AcceptName("if")) {
      SY_TRY(stmt->filter, ParseExpression());
    }
    if (AtName("recursive")) return Error("recursive loops are not supported");
    SY_OK(ExpectBlockEnd());
    ++loops_;
    SY_TRY(stmt->body, ParseBody({"else", "endfor"}));
    --loops_;
    if (end_name_ == "else") return ParseBlock("endfor", &stmt->else_body);
    return ExpectBlockEnd();
  }

  absl::Status ParseSet(Stmt* stmt) {
    SY_OK(ParseTargets(/*attributes=*/true, &stmt->targets));
    if (Accept("=")) {
      stmt->kind = Stmt::Kind::kSet;
      SY_TRY(stmt->expr, ParseTuple());
      return ExpectBlockEnd();
    }
    stmt->kind = Stmt::Kind::kSetBlock;
    if (stmt->targets.size() != 1) return Error("a set block takes one name");
    if (At("|")) {
      SY_TRY(stmt->expr, ParseFilterChain(Make(Kind::kName), /*tests=*/false));
    }
    return ParseBlock("endset", &stmt->body);
  }

  absl::Status ParseMacro(Stmt* stmt) {
    stmt->kind = Stmt::Kind::kMacro;
    SY_TRY(stmt->name, ExpectName());
    SY_OK(Expect("("));
    while (!At(")")) {
      SY_TRY(std::string name, ExpectName());
      stmt->targets.push_back(std::move(name));
      ExprPtr preset;
      if (Accept("=")) {
        SY_TRY(preset, ParseExpression());
      } else if (!stmt->defaults.empty() && stmt->defaults.back() != nullptr) {
        return Error("a parameter without a default follows one with a default");
      }
      stmt->defaults.push_back(std::move(preset));
      if (!Accept(",")) break;
    }
    SY_OK(Expect(")"));
    const int loops = std::exchange(loops_, 0);
    SY_OK(ParseBlock("endmacro", &stmt->body));
    loops_ = loops;
    return absl::OkStatus();
  }

  absl::Status ParseWith(Stmt* stmt) {
    stmt->kind = Stmt::Kind::kWith;
    while (Peek().kind != TokenKind::kBlockEnd) {
      SY_TRY(std::string name, ExpectName());
      SY_OK(Expect("="));
      SY_TRY(ExprPtr value, ParseExpression());
      stmt->targets.push_back(std::move(name));
      stmt->defaults.push_back(std::move(value));
      if (!Accept(",")) break;
    }
    return ParseBlock("endwith", &stmt->body);
  }

  // Expressions, from the loosest binding to the tightest.

  // a, b → a tuple; a → a.
  absl::StatusOr<ExprPtr> ParseTuple() {
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

  bool AtExpressionEnd() const {
    return Peek().kind == TokenKind::kBlockEnd || Peek().kind == TokenKind::kVariableEnd ||
           At(")") || At("=") || AtName("in") || AtName("if");
  }

  absl::StatusOr<ExprPtr> ParseExpression() {
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

  absl::StatusOr<ExprPtr> ParseOr() {
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

  absl::StatusOr<ExprPtr> ParseAnd() {
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

  absl::StatusOr<ExprPtr> ParseNot() {
    const Nest nest(&depth_);
    if (depth_ > kMaxParseDepth) return Error("expressions are nested too deeply");
    if (!AtName("not")) return ParseCompare();
    ExprPtr expr = Make(Kind::kUnary);
    expr->name = Take().text;
    SY_TRY(ExprPtr operand, ParseNot());
    expr->children.push_back(std::move(operand));
    return expr;
  }

  absl::StatusOr<ExprPtr> ParseCompare() {
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

  // Levels: 0: + -; 1: ~; 2: * / // %; 3: **; all associate to the left, as in Jinja2.
  absl::StatusOr<ExprPtr> ParseBinary(int level) {
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

  absl::StatusOr<ExprPtr> ParseUnary(bool with_filter) {
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

  absl::StatusOr<ExprPtr> ParsePrimary() {
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
        if (result.ec != std::errc() || result.ptr != end)
          return Error("an integer is out of range");
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

  absl::StatusOr<ExprPtr> ParseBracket() {
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

  absl::StatusOr<ExprPtr> ParsePostfix(ExprPtr expr) {
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

  absl::StatusOr<ExprPtr> ParseSubscript(ExprPtr expr) {
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

  // "(" … ")" into children and named.
  absl::Status ParseArguments(Expr* call) {
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

  // A filter's name and arguments, applied to `expr`.
  absl::StatusOr<ExprPtr> ParseFilter(ExprPtr expr) {
    ExprPtr filter = Wrap(Make(Kind::kFilter), std::move(expr));
    SY_TRY(filter->name, ExpectName());
    if (At("(")) SY_OK(ParseArguments(filter.get()));
    return filter;
  }

  absl::StatusOr<ExprPtr> ParseFilterChain(ExprPtr expr, bool tests) {
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

  absl::StatusOr<ExprPtr> ParseTest(ExprPtr expr) {
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

  const std::vector<Token> tokens_;
  size_t pos_ = 0;
  int depth_ = 0;
  int loops_ = 0;
  bool no_condition_ = false;
  std::string end_name_;
};

}  // namespace

absl::StatusOr<Body> ParseTemplate(std::string_view source) {
  if (source.size() > kMaxSourceBytes)
    return Invalid("a template of ", source.size(), " bytes exceeds ", kMaxSourceBytes);
  SY_TRY(std::vector<Token> tokens, Tokenize(source));
  return Parser(std::move(tokens)).Run();
}

}  // namespace switchyard::jinja
