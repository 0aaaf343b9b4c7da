#include "server/text/chat_template.h"

#include <algorithm>
#include <fstream>
#include <sstream>
#include <utility>

#include "server/text/cat.h"
#include "server/text/jinja/builtins.h"
#include "server/text/jinja/template.h"
#include "server/text/jinja/try.h"
#include "server/text/json_fields.h"

namespace switchyard {
namespace {

constexpr std::ptrdiff_t kMaxArgumentMembers = 1000;  // colons in a tool call's arguments

namespace fs = std::filesystem;
using jinja::Str;
using jinja::Value;

absl::StatusOr<std::string> ReadTemplateFile(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(Cat("cannot open the chat template ", path.string()));
  std::ostringstream text;
  text << file.rdbuf();
  if (!file) return absl::DataLossError(Cat("cannot read the chat template ", path.string()));
  return std::move(text).str();
}

// The template sources of a checkpoint by name; empty where there are none.
absl::StatusOr<std::map<std::string, std::string>> FindSources(const fs::path& dir) {
  std::map<std::string, std::string> sources;
  std::error_code error;
  if (fs::exists(dir / "chat_template.jinja", error)) {
    SY_TRY(sources["default"], ReadTemplateFile(dir / "chat_template.jinja"));
  }
  for (fs::directory_iterator it(dir / "additional_chat_templates", error), end;
       !error && it != end; it.increment(error)) {
    if (it->path().extension() != ".jinja") continue;
    SY_TRY(sources[it->path().stem().string()], ReadTemplateFile(it->path()));
  }
  if (!sources.empty() || !fs::exists(dir / "tokenizer_config.json", error)) return sources;
  SY_TRY(const std::string text, ReadTemplateFile(dir / "tokenizer_config.json"));
  const auto config = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!config.is_object())
    return Invalid(dir.string(), "/tokenizer_config.json is not a JSON object");
  const auto& field = FieldOrNull(config, "chat_template");
  if (field.is_string()) {
    sources["default"] = field.get<std::string>();
  } else if (field.is_array()) {
    for (const auto& item : field) {
      std::string name, source;
      SY_OK(ReadField(item, "name", &name));
      SY_OK(ReadField(item, "template", &source));
      if (name.empty()) return absl::InvalidArgumentError("chat_template: an element has no name");
      sources[name] = std::move(source);
    }
  } else if (!field.is_null()) {
    return absl::InvalidArgumentError(
        "chat_template must be a string or a list of named templates");
  }
  return sources;
}

// A message's content as the template expects it: parts joined, everything else as it is.
absl::Status FlattenContent(size_t index, nlohmann::ordered_json* message) {
  const auto content = message->find("content");
  if (content == message->end() || content->is_null() || content->is_string())
    return absl::OkStatus();
  if (!content->is_array())
    return Invalid("messages[", index, "].content must be a string or a list of parts");
  std::string text;
  bool first = true;
  for (const auto& part : *content) {
    const auto type = part.is_object() ? part.find("type") : part.end();
    if (!part.is_object() || type == part.end() || *type != "text") {
      return Invalid("messages[", index, "].content: only parts of the type 'text' are supported");
    }
    const auto value = part.find("text");
    if (value == part.end() || !value->is_string())
      return Invalid("messages[", index, "].content: a part has no text");
    if (!first) text += '\n';
    first = false;
    text += value->get_ref<const std::string&>();
  }
  *content = std::move(text);
  return absl::OkStatus();
}

// The API carries arguments as a string of JSON; templates want the object.
void ParseToolArguments(nlohmann::ordered_json* message) {
  const auto calls = message->find("tool_calls");
  if (calls == message->end() || !calls->is_array()) return;
  for (auto& call : *calls) {
    if (!call.is_object()) continue;
    const auto function = call.find("function");
    if (function == call.end() || !function->is_object()) continue;
    const auto arguments = function->find("arguments");
    if (arguments == function->end() || !arguments->is_string()) continue;
    // Building an ordered object takes quadratic time: what is huge stays text.
    const std::string& text = arguments->get_ref<const std::string&>();
    if (std::count(text.begin(), text.end(), ':') > kMaxArgumentMembers) continue;
    auto parsed = nlohmann::ordered_json::parse(text, nullptr, false);
    if (parsed.is_object()) *arguments = std::move(parsed);
  }
}

// Returns whether there was any.
bool NullContentToEmpty(nlohmann::ordered_json* messages) {
  bool found = false;
  for (auto& message : *messages) {
    const auto content = message.find("content");
    if (content == message.end() || !content->is_null()) continue;
    *content = "";
    found = true;
  }
  return found;
}

// Cuts `prompt` behind the last appearance of the last message's content.
absl::StatusOr<Str> CutBehindFinalMessage(const Str& prompt,
                                          const nlohmann::ordered_json& messages) {
  const auto content = messages.back().find("content");
  if (content == messages.back().end() || !content->is_string()) {
    return absl::InvalidArgumentError("continue_final_message: the last message has no content");
  }
  const std::string& full = content->get_ref<const std::string&>();
  const size_t at_full = full.empty() ? std::string::npos : prompt.text().rfind(full);
  if (at_full != std::string::npos) return prompt.Sub(0, at_full + full.size());
  const std::string trimmed = jinja::Strip(Str::Untrusted(full), nullptr, true, true).text();
  const size_t at = trimmed.empty() ? std::string::npos : prompt.text().rfind(trimmed);
  if (at == std::string::npos) {
    return absl::InvalidArgumentError(
        "continue_final_message: the template does not show the last message's content");
  }
  return prompt.Sub(0, at + trimmed.size());
}

}  // namespace

ChatTemplate::~ChatTemplate() = default;

absl::StatusOr<std::unique_ptr<ChatTemplate>> ChatTemplate::Load(const fs::path& dir,
                                                                 const fs::path& override_file,
                                                                 const Tokenizer& tokenizer) {
  std::map<std::string, std::string> sources;
  if (!override_file.empty()) {
    SY_TRY(sources["default"], ReadTemplateFile(override_file));
  } else {
    SY_TRY(sources, FindSources(dir));
  }
  if (sources.empty()) return absl::NotFoundError(Cat(dir.string(), " has no chat template"));
  if (sources.count("default") == 0) {
    return Invalid(dir.string(), ": none of its ", sources.size(),
                   " chat templates is called 'default'");
  }
  std::unique_ptr<ChatTemplate> result(new ChatTemplate());
  for (const auto& [name, source] : sources) {
    auto parsed = jinja::Template::Parse(source);
    if (!parsed.ok())
      return Invalid("chat template '", name, "': ", std::string(parsed.status().message()));
    result->by_name_[name] = *std::move(parsed);
  }
  for (const auto& [name, text] :
       {std::pair<std::string, std::string>("bos_token", tokenizer.bos_token()),
        {"eos_token", tokenizer.eos_token()},
        {"unk_token", tokenizer.unk_token()},
        {"pad_token", tokenizer.pad_token()}}) {
    if (!text.empty()) result->special_[name] = text;
  }
  return result;
}

absl::StatusOr<std::unique_ptr<ChatTemplate>> ChatTemplate::Parse(
    std::string_view source, std::map<std::string, std::string> special) {
  std::unique_ptr<ChatTemplate> result(new ChatTemplate());
  SY_TRY(result->by_name_["default"], jinja::Template::Parse(source));
  result->special_ = std::move(special);
  return result;
}

absl::StatusOr<std::vector<TextSegment>> ChatTemplate::Render(const ChatPrompt& prompt) const {
  if (!prompt.messages.is_array() || prompt.messages.empty()) {
    return absl::InvalidArgumentError("messages must be a list with at least one message");
  }
  if (prompt.add_generation_prompt && prompt.continue_final_message) {
    return absl::InvalidArgumentError(
        "add_generation_prompt and continue_final_message exclude each other");
  }
  nlohmann::ordered_json messages = prompt.messages;
  for (size_t i = 0; i < messages.size(); ++i) {
    if (!messages[i].is_object()) return Invalid("messages[", i, "] must be an object");
    SY_OK(FlattenContent(i, &messages[i]));
    ParseToolArguments(&messages[i]);
  }
  // Later entries hide earlier ones, as keyword arguments of apply_chat_template do.
  std::vector<std::pair<std::string, Value>> variables;
  const auto set = [&](const std::string& name, Value value) {
    const auto same = [&](const auto& variable) { return variable.first == name; };
    const auto it = std::find_if(variables.begin(), variables.end(), same);
    if (it != variables.end()) {
      it->second = std::move(value);
    } else {
      variables.emplace_back(name, std::move(value));
    }
  };
  for (const auto& [name, text] : special_) set(name, Value(Str::Trusted(text)));
  SY_TRY(Value message_list, Value::FromJson(messages));
  set("messages", std::move(message_list));
  SY_TRY(Value tools, Value::FromJson(prompt.tools));
  set("tools", std::move(tools));
  set("documents", Value());
  set("add_generation_prompt", Value(prompt.add_generation_prompt));
  if (!prompt.kwargs.is_null() && !prompt.kwargs.is_object()) {
    return absl::InvalidArgumentError("chat_template_kwargs must be an object");
  }
  for (const auto& [name, json] : prompt.kwargs.items()) {
    if (special_.count(name) > 0 || name == "messages") {
      return Invalid("chat_template_kwargs must not set '", name, "'");
    }
    SY_TRY(Value value, Value::FromJson(json));
    set(name, std::move(value));
  }
  const bool for_tools =
      prompt.tools.is_array() && !prompt.tools.empty() && by_name_.count("tool_use") > 0;
  const jinja::Template& chosen = *by_name_.at(for_tools ? "tool_use" : "default");
  auto text = chosen.Render(variables, prompt.now_unix_seconds, jinja::Limits());
  if (!text.ok() && NullContentToEmpty(&messages)) {
    // Clients send content: null beside tool calls. Some templates ask for exactly that, others
    // cannot take it.
    SY_TRY(Value without_null, Value::FromJson(messages));
    set("messages", std::move(without_null));
    auto again = chosen.Render(variables, prompt.now_unix_seconds, jinja::Limits());
    if (again.ok()) text = std::move(again);
  }
  if (!text.ok()) return Invalid("chat template: ", std::string(text.status().message()));
  if (!prompt.continue_final_message) return text->Segments();
  SY_TRY(const Str cut, CutBehindFinalMessage(*text, messages));
  return cut.Segments();
}

std::string JoinSegments(const std::vector<TextSegment>& segments) {
  std::string text;
  for (const TextSegment& segment : segments) text += segment.text;
  return text;
}

}  // namespace switchyard
