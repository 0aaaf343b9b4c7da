#include "server/text/jinja/parser.h"

#include <set>

#include "server/text/cat.h"
#include "server/text/jinja/expression_parser.h"
#include "server/text/jinja/lexer.h"
#include "server/text/jinja/try.h"

namespace switchyard::jinja {
namespace {

constexpr size_t kMaxSourceBytes = 4 << 20;

class Parser : public ExpressionParser {
 public:
  explicit Parser(std::vector<Token> tokens) : ExpressionParser(std::move(tokens)) {}

  absl::StatusOr<Body> Run() { return ParseBody({}); }

 private:
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

  int loops_ = 0;
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
