#include "server/text/jinja/evaluator.h"

#include <algorithm>

#include "server/text/cat.h"
#include "server/text/jinja/builtins.h"
#include "server/text/jinja/try.h"
#include "server/text/unicode.h"

namespace switchyard::jinja {
namespace {

// What `loop` knows; shared by the iterations of one loop.
struct LoopState {
  std::vector<Value> items;
  size_t index = 0;
  int depth = 1;  // of the items, and one
  std::optional<Value> last_changed;
};

std::optional<Value> LoopAttribute(const std::shared_ptr<LoopState>& state, std::string_view name) {
  const auto index = static_cast<int64_t>(state->index);
  const auto count = static_cast<int64_t>(state->items.size());
  if (name == "index") return Value(index + 1);
  if (name == "index0") return Value(index);
  if (name == "revindex") return Value(count - index);
  if (name == "revindex0") return Value(count - index - 1);
  if (name == "first") return Value(index == 0);
  if (name == "last") return Value(index + 1 == count);
  if (name == "length") return Value(count);
  if (name == "depth") return Value(int64_t{1});
  if (name == "depth0") return Value(int64_t{0});
  if (name == "previtem") {
    return index == 0 ? Value::MakeUndefined("there is no previous item")
                      : state->items[state->index - 1];
  }
  if (name == "nextitem") {
    return index + 1 == count ? Value::MakeUndefined("there is no next item")
                              : state->items[state->index + 1];
  }
  if (name == "cycle") {
    return Value::MakeCallable(
        "cycle",
        [state](Evaluator&, const CallArgs& args) -> absl::StatusOr<Value> {
          if (args.positional.empty())
            return absl::InvalidArgumentError("loop.cycle() needs items");
          return args.positional[state->index % args.positional.size()];
        },
        state->depth);
  }
  if (name == "changed") {
    return Value::MakeCallable(
        "changed",
        [state](Evaluator&, const CallArgs& args) -> absl::StatusOr<Value> {
          Value now = Value::MakeList(args.positional, /*tuple=*/true);
          if (now.depth() > kMaxDepth)
            return absl::InvalidArgumentError("a value nests too deeply");
          const bool changed = !state->last_changed || !Equal(*state->last_changed, now);
          state->last_changed = std::move(now);
          return Value(changed);
        },
        state->depth);
  }
  return std::nullopt;
}

}  // namespace

Evaluator::Evaluator(const Limits& limits, int64_t now_unix_seconds)
    : limits_(limits), now_unix_seconds_(now_unix_seconds) {}

Evaluator::~Evaluator() {
  scopes_.clear();
  for (const auto& space : namespaces_) space->values = Dict();
}

void KeepNamespace(Evaluator& evaluator, std::shared_ptr<Namespace> space) {
  evaluator.namespaces_.push_back(std::move(space));
}

absl::StatusOr<Str> Evaluator::Run(const Body& body,
                                   std::vector<std::pair<std::string, Value>> variables) {
  Str out;
  out_ = &out;
  PushScope(nullptr);
  scope_->variables = std::move(variables);
  PushScope(scope_);
  auto flow = RunBody(body);
  if (!flow.ok()) return Invalid("line ", line_, ": ", std::string(flow.status().message()));
  return out;
}

absl::Status Evaluator::Step(int line) {
  line_ = line;
  if (++steps_ > limits_.max_steps)
    return Invalid("the template takes more than ", limits_.max_steps, " steps");
  if (depth_ > limits_.max_depth)
    return Invalid("the template nests deeper than ", limits_.max_depth);
  return absl::OkStatus();
}

absl::Status Evaluator::Charge(size_t bytes) {
  if (bytes > static_cast<size_t>(limits_.max_bytes) ||
      (bytes_ += static_cast<int64_t>(bytes)) > limits_.max_bytes) {
    return Invalid("the template makes more than ", limits_.max_bytes, " bytes of text");
  }
  return absl::OkStatus();
}

absl::StatusOr<Value> Evaluator::Bounded(Value value) {
  if (value.depth() > kMaxDepth) return Invalid("a value nests deeper than ", kMaxDepth);
  if (value.weight() > kMaxWeight) return Invalid("a value is larger than ", kMaxWeight, " bytes");
  return value;
}

Value* Evaluator::Find(std::string_view name) {
  for (Scope* scope = scope_; scope != nullptr; scope = scope->parent) {
    for (auto& [key, value] : scope->variables) {
      if (key == name) return &value;
    }
  }
  return nullptr;
}

void Evaluator::Assign(const std::string& name, Value value) {
  for (auto& [key, old] : scope_->variables) {
    if (key == name) {
      old = std::move(value);
      return;
    }
  }
  scope_->variables.emplace_back(name, std::move(value));
}

void Evaluator::PushScope(Scope* parent) {
  scopes_.emplace_back();
  scopes_.back().parent = parent;
  scope_ = &scopes_.back();
}

void Evaluator::PopScope(Scope* previous) {
  // A captured scope stays, and so do those below it in the deque.
  if (&scopes_.back() == scope_ && !scope_->captured) scopes_.pop_back();
  scope_ = previous;
}

absl::StatusOr<Evaluator::Flow> Evaluator::RunBody(const Body& body) {
  const Deeper deeper(&depth_);
  for (const auto& stmt : body) {
    SY_TRY(const Flow flow, RunStmt(*stmt));
    if (flow != Flow::kNext) return flow;
  }
  return Flow::kNext;
}

absl::Status Evaluator::Print(const Value& value) {
  if (value.is_string()) {
    SY_OK(Charge(value.as_str().size()));
    out_->Append(value.as_str());
    return absl::OkStatus();
  }
  const Str text = value.ToStr();
  SY_OK(Charge(text.size()));
  out_->Append(text);
  return absl::OkStatus();
}

absl::StatusOr<Evaluator::Flow> Evaluator::RunStmt(const Stmt& stmt) {
  SY_OK(Step(stmt.line));
  switch (stmt.kind) {
    case Stmt::Kind::kText:
      SY_OK(Charge(stmt.text.size()));
      out_->Append(stmt.text);
      return Flow::kNext;
    case Stmt::Kind::kOutput: {
      SY_TRY(const Value value, Eval(*stmt.expr));
      SY_OK(Print(value));
      return Flow::kNext;
    }
    case Stmt::Kind::kIf:
      for (const auto& [condition, body] : stmt.branches) {
        if (condition != nullptr) {
          SY_TRY(const Value value, Eval(*condition));
          if (!value.Truthy()) continue;
        }
        return RunBody(body);
      }
      return Flow::kNext;
    case Stmt::Kind::kFor:
      return RunFor(stmt);
    case Stmt::Kind::kSet:
    case Stmt::Kind::kSetBlock:
      SY_OK(RunSet(stmt));
      return Flow::kNext;
    case Stmt::Kind::kMacro:
      SY_OK(DefineMacro(stmt));
      return Flow::kNext;
    case Stmt::Kind::kWith:
      return RunWith(stmt);
    case Stmt::Kind::kFilterBlock: {
      SY_TRY(const Value value, Capture(stmt.body, stmt.expr.get()));
      SY_OK(Print(value));
      return Flow::kNext;
    }
    case Stmt::Kind::kBreak:
      return Flow::kBreak;
    case Stmt::Kind::kContinue:
      return Flow::kContinue;
    case Stmt::Kind::kScopeless:
      return RunBody(stmt.body);
  }
  return Flow::kNext;
}

absl::Status Evaluator::AssignTargets(const std::vector<std::string>& targets, const Value& value) {
  const auto assign = [&](const std::string& target, const Value& v) -> absl::Status {
    const size_t dot = target.find('.');
    if (dot == std::string::npos) {
      Assign(target, v);
      return absl::OkStatus();
    }
    const Value* object = Find(target.substr(0, dot));
    if (object == nullptr || !object->is_namespace()) {
      return absl::InvalidArgumentError("only the attributes of a namespace can be set");
    }
    SY_TRY(Value checked, Bounded(v));
    object->as_namespace().values.Set(Value(Str::Trusted(target.substr(dot + 1))),
                                      std::move(checked));
    return absl::OkStatus();
  };
  if (targets.size() == 1) return assign(targets[0], value);
  SY_TRY(const std::vector<Value> parts, Iterate(value));
  if (parts.size() != targets.size()) {
    return Invalid("cannot unpack ", parts.size(), " values into ", targets.size(), " names");
  }
  for (size_t i = 0; i < targets.size(); ++i) SY_OK(assign(targets[i], parts[i]));
  return absl::OkStatus();
}

absl::Status Evaluator::RunSet(const Stmt& stmt) {
  if (stmt.kind == Stmt::Kind::kSetBlock) {
    SY_TRY(const Value value, Capture(stmt.body, stmt.expr.get()));
    return AssignTargets(stmt.targets, value);
  }
  SY_TRY(const Value value, Eval(*stmt.expr));
  return AssignTargets(stmt.targets, value);
}

absl::StatusOr<Value> Evaluator::Capture(const Body& body, const Expr* filters) {
  Str text;
  Str* const outer = std::exchange(out_, &text);
  Scope* const previous = scope_;
  PushScope(scope_);
  auto flow = RunBody(body);
  PopScope(previous);
  out_ = outer;
  if (!flow.ok()) return flow.status();
  if (filters == nullptr) return Value(std::move(text));
  const Str* const outer_input = std::exchange(filter_input_, &text);
  auto result = Eval(*filters);
  filter_input_ = outer_input;
  return result;
}

absl::StatusOr<Evaluator::Flow> Evaluator::RunWith(const Stmt& stmt) {
  std::vector<Value> values;
  for (const ExprPtr& expr : stmt.defaults) {
    SY_TRY(Value value, Eval(*expr));
    values.push_back(std::move(value));
  }
  Scope* const previous = scope_;
  PushScope(scope_);
  for (size_t i = 0; i < values.size(); ++i) Assign(stmt.targets[i], std::move(values[i]));
  auto flow = RunBody(stmt.body);
  PopScope(previous);
  return flow;
}

absl::StatusOr<Evaluator::Flow> Evaluator::RunFor(const Stmt& stmt) {
  SY_TRY(const Value iterable, Eval(*stmt.expr));
  SY_TRY(std::vector<Value> items, Iterate(iterable));
  Scope* const previous = scope_;
  if (stmt.filter != nullptr) {
    std::vector<Value> kept;
    for (Value& item : items) {
      PushScope(previous);
      absl::Status status = AssignTargets(stmt.targets, item);
      absl::StatusOr<Value> wanted =
          status.ok() ? Eval(*stmt.filter) : absl::StatusOr<Value>(status);
      PopScope(previous);
      if (!wanted.ok()) return wanted.status();
      if (wanted->Truthy()) kept.push_back(std::move(item));
    }
    items = std::move(kept);
  }
  if (items.empty()) return RunBody(stmt.else_body);
  auto state = std::make_shared<LoopState>();
  state->items = std::move(items);
  for (const Value& item : state->items) state->depth = std::max(state->depth, item.depth() + 1);
  auto loop = std::make_shared<Namespace>();
  loop->computed = [state](std::string_view name) { return LoopAttribute(state, name); };
  loop->depth = state->depth;
  const Value loop_value = Value::MakeNamespace(std::move(loop));
  for (state->index = 0; state->index < state->items.size(); ++state->index) {
    SY_OK(Step(stmt.line));
    PushScope(previous);
    Assign("loop", loop_value);
    absl::StatusOr<Flow> flow = Flow::kNext;
    if (absl::Status status = AssignTargets(stmt.targets, state->items[state->index]);
        status.ok()) {
      flow = RunBody(stmt.body);
    } else {
      flow = status;
    }
    PopScope(previous);
    if (!flow.ok()) return flow;
    if (*flow == Flow::kBreak) break;
  }
  return Flow::kNext;
}

absl::Status Evaluator::DefineMacro(const Stmt& stmt) {
  for (Scope* scope = scope_; scope != nullptr; scope = scope->parent) scope->captured = true;
  Scope* const closure = scope_;
  Assign(stmt.name, Value::MakeCallable(
                        stmt.name, [&stmt, closure](Evaluator& evaluator, const CallArgs& args) {
                          return evaluator.CallMacro(stmt, closure, args);
                        }));
  return absl::OkStatus();
}

absl::StatusOr<Value> Evaluator::CallMacro(const Stmt& macro, Scope* closure,
                                           const CallArgs& args) {
  if (args.positional.size() > macro.targets.size()) {
    return Invalid("macro '", macro.name, "' takes at most ", macro.targets.size(), " arguments");
  }
  for (const auto& [name, value] : args.named) {
    const auto it = std::find(macro.targets.begin(), macro.targets.end(), name);
    if (it == macro.targets.end())
      return Invalid("macro '", macro.name, "' takes no argument '", name, "'");
    if (static_cast<size_t>(it - macro.targets.begin()) < args.positional.size()) {
      return Invalid("macro '", macro.name, "' got two values for the argument '", name, "'");
    }
  }
  Scope* const previous = scope_;
  PushScope(closure);
  Str text;
  Str* const outer = std::exchange(out_, &text);
  const auto run = [&]() -> absl::Status {
    for (size_t i = 0; i < macro.targets.size(); ++i) {
      if (const Value* given = args.Get(i, macro.targets[i])) {
        Assign(macro.targets[i], *given);
      } else if (macro.defaults[i] != nullptr) {
        SY_TRY(Value preset, Eval(*macro.defaults[i]));
        Assign(macro.targets[i], std::move(preset));
      } else {
        Assign(macro.targets[i],
               Value::MakeUndefined(Cat("parameter '", macro.targets[i], "' was not provided")));
      }
    }
    return RunBody(macro.body).status();
  };
  absl::Status status = run();
  out_ = outer;
  PopScope(previous);
  if (!status.ok()) return status;
  return Value(std::move(text));
}

absl::StatusOr<Value> Evaluator::Call(const Value& callee, const CallArgs& args) {
  if (callee.is_undefined()) return absl::InvalidArgumentError(callee.undefined_what());
  if (!callee.is_callable()) return Invalid("'", callee.TypeName(), "' object is not callable");
  return callee.as_callable().call(*this, args);
}

absl::StatusOr<Value> Evaluator::GetAttribute(const Value& object, std::string_view name) {
  if (object.is_undefined()) return absl::InvalidArgumentError(object.undefined_what());
  if (object.is_namespace()) {
    const Namespace& space = object.as_namespace();
    if (space.computed) {
      if (std::optional<Value> value = space.computed(name)) return *value;
    }
    if (const Value* value = space.values.Find(name)) return *value;
  } else if (std::optional<Value> method = FindMethod(object, name)) {
    return *method;
  } else if (object.is_dict()) {
    if (const Value* value = object.as_dict().Find(name)) return *value;
  }
  return Value::MakeUndefined(
      Cat("'", object.TypeName(), " object' has no attribute '", name, "'"));
}

absl::StatusOr<Value> Evaluator::GetItem(const Value& object, const Value& key) {
  if (object.is_undefined()) return absl::InvalidArgumentError(object.undefined_what());
  if (object.is_dict()) {
    if (const Value* value = object.as_dict().Find(key)) return *value;
  }
  if (key.is_integral() && (object.is_list() || object.is_string())) {
    const auto size =
        static_cast<int64_t>(object.is_list() ? object.items().size() : NumChars(object.text()));
    int64_t index = key.as_int();
    if (index < 0) index += size;
    if (index < 0 || index >= size)
      return Value::MakeUndefined(Cat("index ", key.as_int(), " of ", size, " is out of range"));
    if (object.is_list()) return object.items()[static_cast<size_t>(index)];
    const size_t begin = ByteOffset(object.text(), static_cast<size_t>(index));
    return Value(object.as_str().Sub(
        begin, begin + unicode::CharSize(static_cast<unsigned char>(object.text()[begin]))));
  }
  if (key.is_string()) return GetAttribute(object, key.text());
  return Value::MakeUndefined(Cat("'", object.TypeName(), " object' has no element ", key.Repr()));
}

absl::StatusOr<std::vector<Value>> Evaluator::Iterate(const Value& value) {
  std::vector<Value> items;
  if (value.is_list()) {
    SY_OK(Charge(value.items().size() * sizeof(Value)));
    items = value.items();
  } else if (value.is_dict()) {
    SY_OK(Charge(value.as_dict().entries().size() * sizeof(Value)));
    for (const auto& entry : value.as_dict().entries()) items.push_back(entry.first);
  } else if (value.is_string()) {
    const std::string& text = value.text();
    SY_OK(Charge(text.size() * 64));
    const Str& source = value.as_str();
    // Split run by run: Sub() looks for its place from the start.
    for (const TextSegment& segment : source.Segments()) {
      for (size_t pos = 0, size = 0; pos < segment.text.size(); pos += size) {
        size = unicode::CharSize(static_cast<unsigned char>(segment.text[pos]));
        const std::string_view piece = std::string_view(segment.text).substr(pos, size);
        items.push_back(Value(segment.trusted ? Str::Trusted(piece) : Str::Untrusted(piece)));
      }
    }
  } else if (!value.is_undefined()) {
    return Invalid("'", value.TypeName(), "' object is not iterable");
  }
  return items;
}

absl::StatusOr<bool> Evaluator::Contains(const Value& container, const Value& item) {
  if (container.is_string()) {
    if (!item.is_string()) return Invalid("'in <string>' requires a string, not ", item.TypeName());
    return container.text().find(item.text()) != std::string::npos;
  }
  if (container.is_list()) {
    const auto& items = container.items();
    return std::any_of(items.begin(), items.end(), [&](const Value& v) { return Equal(v, item); });
  }
  if (container.is_dict()) return container.as_dict().Find(item) != nullptr;
  if (container.is_undefined()) return false;
  return Invalid("'", container.TypeName(), "' object is not a container");
}

}  // namespace switchyard::jinja
