// Expressions of the template language, and the token cursor under them. The statements are in
// parser.cc.
//
// Owner: one call of ParseTemplate. Must never recurse deeper than kMaxParseDepth.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/text/cat.h"
#include "server/text/jinja/ast.h"
#include "server/text/jinja/lexer.h"

namespace switchyard::jinja {

constexpr int kMaxParseDepth = 100;

class ExpressionParser {
 protected:
  using Kind = Expr::Kind;
  explicit ExpressionParser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

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

  // a, b → a tuple; a → a.
  absl::StatusOr<ExprPtr> ParseTuple();
  absl::StatusOr<ExprPtr> ParseExpression();
  // A filter's name and arguments, applied to `expr`.
  absl::StatusOr<ExprPtr> ParseFilter(ExprPtr expr);
  absl::StatusOr<ExprPtr> ParseFilterChain(ExprPtr expr, bool tests);

  int depth_ = 0;
  bool no_condition_ = false;  // an `if` ends the expression

 private:
  bool AtExpressionEnd() const;
  absl::StatusOr<ExprPtr> ParseOr();
  absl::StatusOr<ExprPtr> ParseAnd();
  absl::StatusOr<ExprPtr> ParseNot();
  absl::StatusOr<ExprPtr> ParseCompare();
  // Levels: 0: + -; 1: ~; 2: * / // %; 3: **; all associate to the left, as in Jinja2.
  absl::StatusOr<ExprPtr> ParseBinary(int level);
  absl::StatusOr<ExprPtr> ParseUnary(bool with_filter);
  absl::StatusOr<ExprPtr> ParsePrimary();
  absl::StatusOr<ExprPtr> ParseBracket();
  absl::StatusOr<ExprPtr> ParsePostfix(ExprPtr expr);
  absl::StatusOr<ExprPtr> ParseSubscript(ExprPtr expr);
  // "(" … ")" into children and named.
  absl::Status ParseArguments(Expr* call);
  absl::StatusOr<ExprPtr> ParseTest(ExprPtr expr);

  const std::vector<Token> tokens_;
  size_t pos_ = 0;
};

}  // namespace switchyard::jinja
