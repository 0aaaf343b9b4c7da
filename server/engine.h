// Engine: what the front end needs of a loaded model, bound by main(). A plain value of pointers:
// immutable, shared by all threads; what it points at outlives the server.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/model_info.h"
#include "scheduler/scheduler.h"
#include "server/text/chat_template.h"
#include "server/text/tokenizer.h"

namespace switchyard {

// What generation_config.json says for requests that leave these out; unset: the OpenAI API's own
// defaults.
struct SamplingDefaults {
  std::optional<float> temperature;
  std::optional<float> top_p;
  std::optional<float> min_p;
  std::optional<int32_t> top_k;
  std::optional<float> repetition_penalty;
};

struct Engine {
  ModelInfo model;
  const Tokenizer* tokenizer = nullptr;
  // Renders a conversation, on any thread. Empty: the checkpoint has no chat template, chats are
  // refused.
  std::function<absl::StatusOr<std::vector<TextSegment>>(const ChatPrompt&)> render_chat;
  Scheduler* scheduler = nullptr;  // started
  SamplingDefaults defaults;
};

}  // namespace switchyard
