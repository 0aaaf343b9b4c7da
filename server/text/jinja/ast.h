// The tree of a parsed template.
//
// Owner: jinja::Template; immutable after parsing, any thread. Must never be deeper than the
// parser's limit (evaluation and destruction recurse).
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "server/text/jinja/value.h"

namespace switchyard::jinja {

struct Expr;
using ExprPtr = std::unique_ptr<Expr>;

struct Expr {
  enum class Kind {
    kConstant,   // constant
    kName,       // name
    kList,       // children
    kTuple,      // children
    kDict,       // children: key, value, key, value, …
    kAttribute,  // children[0].name
    kItem,       // children[0][children[1]]
    kSlice,      // children[0][children[1]:children[2]:children[3]], each but the first may be null
    kCall,       // children[0](children[1:], named)
    kFilter,     // children[0] | name(children[1:], named)
    kTest,       // children[0] is name(children[1:], named)
    kUnary,      // name: not, -, +
    kBinary,     // name: + - * / // % ** ~
    kAnd,
    kOr,
    kCompare,    // children[0] ops[0] children[1] ops[1] …; ops: == != < <= > >= in notin
    kCondition,  // children[0] if children[1] else children[2] (may be null)
  };
  Kind kind;
  int line = 0;
  Value constant;
  std::string name;
  std::vector<ExprPtr> children;
  std::vector<std::pair<std::string, ExprPtr>> named;
  std::vector<std::string> ops;
};

struct Stmt;
using Body = std::vector<std::unique_ptr<Stmt>>;

struct Stmt {
  enum class Kind {
    kText,         // text
    kOutput,       // expr
    kIf,           // branches: (condition, body); the last condition is null for else
    kFor,          // targets, expr, filter (may be null), body, else_body
    kSet,          // targets, expr
    kSetBlock,     // targets[0], body, expr: the filters over an empty kName, or null
    kMacro,        // name, targets: parameters, defaults (aligned, may be null), body
    kWith,         // targets, defaults: values; body
    kFilterBlock,  // expr as in kSetBlock, body
    kBreak,
    kContinue,
    kScopeless,  // body; {% generation %}
  };
  Kind kind;
  int line = 0;
  Str text;
  std::string name;
  // "x", or "ns.attribute" of a namespace in kSet.
  std::vector<std::string> targets;
  std::vector<ExprPtr> defaults;
  ExprPtr expr;
  ExprPtr filter;
  std::vector<std::pair<ExprPtr, Body>> branches;
  Body body;
  Body else_body;
};

}  // namespace switchyard::jinja
