// Runs a parsed template: scopes, statements, expressions, calls. The built-in filters, tests and
// methods are in builtins.h.
//
// Owner: one rendering on one thread; use once. Must never exceed its limits: steps (nodes
// evaluated), nesting, and the bytes of all strings it makes.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/text/jinja/ast.h"
#include "server/text/jinja/value.h"

namespace switchyard::jinja {

struct Limits {
  int64_t max_steps = 5'000'000;
  int max_depth = 300;  // of nested expressions, blocks and macro calls
  int64_t max_bytes = int64_t{256} << 20;
};

class Evaluator {
 public:
  Evaluator(const Limits& limits, int64_t now_unix_seconds);
  ~Evaluator();
  Evaluator(const Evaluator&) = delete;
  Evaluator& operator=(const Evaluator&) = delete;

  // What the template prints. Errors are InvalidArgument with "line N: …".
  absl::StatusOr<Str> Run(const Body& body, std::vector<std::pair<std::string, Value>> variables);

  // For the built-ins:
  absl::Status Charge(size_t bytes);           // an operation makes this many bytes
  absl::StatusOr<Value> Bounded(Value value);  // the value, unless it nests or weighs too much
  absl::StatusOr<Value> Call(const Value& callee, const CallArgs& args);
  absl::StatusOr<Value> GetAttribute(const Value& object, std::string_view name);
  absl::StatusOr<Value> GetItem(const Value& object, const Value& key);
  // The elements of a list, the keys of a dict, the characters of a string, nothing of undefined.
  absl::StatusOr<std::vector<Value>> Iterate(const Value& value);
  absl::StatusOr<bool> Contains(const Value& container, const Value& item);
  absl::StatusOr<Value> Binary(std::string_view op, const Value& left, const Value& right);
  int64_t now_unix_seconds() const { return now_unix_seconds_; }

 private:
  struct Scope {
    Scope* parent = nullptr;
    std::vector<std::pair<std::string, Value>> variables;
    bool captured = false;  // a macro refers to it
  };
  enum class Flow { kNext, kBreak, kContinue };
  // Counts nesting while it lives.
  struct Deeper {
    explicit Deeper(int* depth) : depth(depth) { ++*depth; }
    ~Deeper() { --*depth; }
    int* depth;
  };

  Value* Find(std::string_view name);
  void Assign(const std::string& name, Value value);
  void PushScope(Scope* parent);
  void PopScope(Scope* previous);

  absl::StatusOr<Flow> RunBody(const Body& body);
  absl::StatusOr<Flow> RunStmt(const Stmt& stmt);
  absl::StatusOr<Flow> RunFor(const Stmt& stmt);
  absl::StatusOr<Flow> RunWith(const Stmt& stmt);
  absl::Status RunSet(const Stmt& stmt);
  absl::Status DefineMacro(const Stmt& stmt);
  absl::StatusOr<Value> CallMacro(const Stmt& macro, Scope* closure, const CallArgs& args);
  // Runs `body` and returns what it prints, through the filters of `filters` (null: none).
  absl::StatusOr<Value> Capture(const Body& body, const Expr* filters);
  absl::Status AssignTargets(const std::vector<std::string>& targets, const Value& value);
  absl::Status Print(const Value& value);

  absl::StatusOr<Value> Eval(const Expr& expr);
  absl::StatusOr<Value> EvalName(const std::string& name);
  absl::StatusOr<Value> EvalList(const Expr& expr);
  absl::StatusOr<Value> EvalDict(const Expr& expr);
  absl::StatusOr<Value> EvalSlice(const Expr& expr);
  absl::StatusOr<Value> EvalUnary(const Expr& expr);
  absl::StatusOr<Value> EvalCompare(const Expr& expr);
  absl::StatusOr<CallArgs> EvalArgs(const Expr& expr);

  absl::Status Step(int line);

  const Limits limits_;
  const int64_t now_unix_seconds_;
  int64_t steps_ = 0;
  int64_t bytes_ = 0;
  int depth_ = 0;
  int line_ = 0;
  std::deque<Scope> scopes_;  // stable addresses; captured ones stay until the end
  Scope* scope_ = nullptr;
  Str* out_ = nullptr;
  const Str* filter_input_ = nullptr;  // what stands for the empty name in a filter chain
  std::vector<std::shared_ptr<Namespace>>
      namespaces_;  // emptied at the end: they may refer to themselves

  friend void KeepNamespace(Evaluator&, std::shared_ptr<Namespace>);
};

// Registers a namespace for emptying.
void KeepNamespace(Evaluator& evaluator, std::shared_ptr<Namespace> space);

}  // namespace switchyard::jinja
