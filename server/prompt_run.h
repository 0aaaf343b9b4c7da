// Prompts from a file, answered in this process many at a time, for what happens on the way
// (`trace` records their routing): the text is not kept. Called by a subcommand with an engine that
// is running; blocks.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/engine.h"
#include "server/generation_request.h"

namespace switchyard {

// One request per line that is not blank: a JSON object with "messages" (a chat) or "prompt" (a
// text); other fields are ignored. Greedy, at most `max_tokens` each. Errors name the line.
absl::StatusOr<std::vector<GenerationRequest>> ReadPrompts(const std::string& path,
                                                           int32_t max_tokens);

struct PromptRunReport {
  int64_t prompt_tokens = 0;
  int64_t output_tokens = 0;
};

// All of them, submitted in order, at most `concurrency` at once; `progress` is called with how
// many have ended, on this thread. The first error ends the run. Drains the engine's scheduler: one
// call per process.
absl::StatusOr<PromptRunReport> RunPrompts(const std::vector<GenerationRequest>& requests,
                                           const Engine& engine, int32_t concurrency,
                                           const std::function<void(int64_t done)>& progress);

}  // namespace switchyard
