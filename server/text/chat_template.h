// A checkpoint's chat template(s): where they are found, and how a conversation becomes the
// segments of a prompt. The language is our own Jinja subset (jinja/); Python's Jinja2, as
// `transformers` configures it, is the oracle.
//
// Owner: the server room; immutable after Load, Render is thread-safe. Rendering is CPU work: never
// on an I/O thread. Must never let a template run without bound: steps, recursion and output are
// limited. Text that came from the request (messages, tools, kwargs) stays untrusted through every
// string operation; only the template's own literals and the tokenizer's bos/eos/unk/pad strings
// are trusted.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"
#include "server/text/tokenizer.h"

namespace switchyard {

namespace jinja {
class Template;
}

struct ChatPrompt {
  // Array of {role, content, …}. `content`: a string, null, or a list of {"type": "text", "text":
  // …} parts, which are joined by newlines. tool_calls[].function.arguments that spell a JSON
  // object are given to the template as one.
  nlohmann::ordered_json messages = nullptr;
  nlohmann::ordered_json tools = nullptr;   // array, or null for none
  nlohmann::ordered_json kwargs = nullptr;  // chat_template_kwargs: an object, or null
  bool add_generation_prompt = true;
  bool continue_final_message = false;  // the prompt ends with the last message's content
  int64_t now_unix_seconds = 0;         // what strftime_now() shows, in UTC
};

class ChatTemplate {
 public:
  // `override_file` (--chat-template), else chat_template.jinja with
  // additional_chat_templates/*.jinja, else tokenizer_config.json's chat_template (a string or a
  // list of named ones). NotFound: the checkpoint has none. InvalidArgument: a template does not
  // parse; the message has the line. Copies the special strings of `tokenizer`.
  static absl::StatusOr<std::unique_ptr<ChatTemplate>> Load(
      const std::filesystem::path& dir, const std::filesystem::path& override_file,
      const Tokenizer& tokenizer);
  // One template from its source; `special` is bos_token → "<s>" and so on.
  static absl::StatusOr<std::unique_ptr<ChatTemplate>> Parse(
      std::string_view source, std::map<std::string, std::string> special);
  ~ChatTemplate();

  // InvalidArgument when the template raises, meets a value it cannot handle or exceeds a limit,
  // and for messages that are not as described above: always the request's fault, never the
  // server's.
  absl::StatusOr<std::vector<TextSegment>> Render(const ChatPrompt& prompt) const;

 private:
  ChatTemplate() = default;
  std::map<std::string, std::unique_ptr<jinja::Template>>
      by_name_;                                 // "default" always; "tool_use" where there
  std::map<std::string, std::string> special_;  // bos_token, eos_token, …
};

// The segments as one string, for logs and tests.
std::string JoinSegments(const std::vector<TextSegment>& segments);

}  // namespace switchyard
