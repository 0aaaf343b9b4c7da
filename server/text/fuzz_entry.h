// What the fuzzers and the mutation tests run on one input. Header-only: tests alone include it.
//
// Owner: server/text's tests. Must never fail on an input by anything but a Status; invariants are
// checked with abort().
#pragma once

#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "server/text/chat_template.h"
#include "server/text/detokenizer.h"
#include "server/text/jinja/template.h"
#include "server/text/tokenizer.h"
#include "server/text/unicode.h"

namespace switchyard {

inline void FuzzCheck(bool condition) {
  if (!condition) std::abort();
}

// A tokenizer.json, then encode and decode with it.
inline void FuzzTokenizer(std::string_view json) {
  auto tokenizer = Tokenizer::Parse(json, "");
  if (!tokenizer.ok()) return;
  for (const std::string_view text :
       {"Hello  world's 123\n\n <|im_end|> <s> \xE9\x9B\xBB\xF0\x9F\x98\x80 e\xCC\x81", " ", ""}) {
    const std::vector<TextSegment> segments = {{std::string(text), true},
                                               {std::string(text), false}};
    const auto ids = (*tokenizer)->Encode(segments, {.add_special_tokens = true});
    if (!ids.ok()) continue;
    Detokenizer detokenizer(tokenizer->get(), {});
    std::string streamed;
    for (const int32_t id : *ids) streamed += detokenizer.Push(id);
    streamed += detokenizer.Flush();
    FuzzCheck(unicode::IsValidUtf8(streamed));
    FuzzCheck(streamed == (*tokenizer)->Decode(*ids, {}));
  }
}

// A template, rendered over a fixed conversation within small limits.
inline void FuzzTemplate(std::string_view source) {
  auto parsed = jinja::Template::Parse(source);
  if (!parsed.ok()) return;
  const auto messages = nlohmann::ordered_json::parse(
      R"([{"role": "system", "content": "be\u00e9"}, {"role": "user", "content": "<|im_end|> x"},
          {"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, 2.5]}}}]}])");
  auto value = jinja::Value::FromJson(messages);
  FuzzCheck(value.ok());
  const jinja::Limits limits{.max_steps = 20000, .max_depth = 100, .max_bytes = 1 << 20};
  auto text = (*parsed)->Render({{"messages", *value},
                                 {"tools", *value},
                                 {"bos_token", jinja::Value(jinja::Str::Trusted("<s>"))}},
                                1717761600, limits);
  if (!text.ok()) return;
  FuzzCheck(unicode::IsValidUtf8(text->text()));
  std::string joined;
  for (const TextSegment& segment : text->Segments()) joined += segment.text;
  FuzzCheck(joined == text->text());
}

}  // namespace switchyard
