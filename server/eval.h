// `switchyard eval`: scores a running OpenAI-compatible server on a file of questions with
// checkable answers. Called by main(); blocks; a few threads of its own, one connection each.
#pragma once

#include <cstdint>
#include <cstdio>
#include <map>
#include <string>

#include "absl/status/statusor.h"

namespace switchyard {

struct EvalOptions {
  std::string url = "http://127.0.0.1:8000";  // with or without /v1
  std::string items = {};    // file of {"domain": …, "messages": […], "answer": …} lines
  std::string model = {};    // empty: left out of the requests
  std::string api_key = {};  // empty: none
  int concurrency = 8;       // requests at once
  int max_tokens = 64;
  int timeout_seconds = 600;  // per request
  bool json = false;          // print JSON alone on stdout
};

struct EvalScore {
  int64_t correct = 0;
  int64_t total = 0;
  double accuracy() const {
    return total == 0 ? 0 : static_cast<double>(correct) / static_cast<double>(total);
  }
};

struct EvalResult {
  EvalScore overall;
  std::map<std::string, EvalScore> domains;
};

// Asks every item at temperature 0; an answer counts when the reply, stripped of white space at
// both ends, equals the item's. The first request that fails ends the run with its error. Progress
// goes to stderr.
absl::StatusOr<EvalResult> RunEval(const EvalOptions& options);

// A table, or with `json` one JSON object; without the last line's end.
std::string FormatEval(const EvalResult& result, bool json);

}  // namespace switchyard
