// `switchyard generate`: one prompt, answered in this process: text to stdout as it comes, speed to
// stderr. Called by main() with an engine that is running; blocks.
#pragma once

#include <cstdio>

#include "absl/status/status.h"
#include "server/engine.h"
#include "server/generation_request.h"

namespace switchyard {

// What was measured, for those who print it otherwise.
struct GenerateReport {
  int32_t prompt_tokens = 0;
  int32_t output_tokens = 0;
  double first_token_seconds = 0;        // from submission
  double decode_tokens_per_second = 0;   // without the first token; 0 when there was but one
  double prefill_tokens_per_second = 0;  // of the prompt, until the first token
};

// `request` as a protocol would fill it; Validate is called here. Text goes to `out`, flushed piece
// by piece; a missing seed is `default_seed`. Drains the engine's scheduler: one call per process.
absl::StatusOr<GenerateReport> RunGenerate(const GenerationRequest& request, const Engine& engine,
                                           uint64_t default_seed, std::FILE* out);

// One line: "24 tokens in 1.2 s: prefill … tokens per second, decode … tokens per second".
std::string FormatReport(const GenerateReport& report);

}  // namespace switchyard
