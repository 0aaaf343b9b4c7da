#include "server/prompt_run.h"

#include <ctime>
#include <fstream>
#include <future>
#include <memory>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "kernels/mutex.h"
#include "nlohmann/json.hpp"
#include "server/generation.h"
#include "server/metrics.h"
#include "server/task_pool.h"

namespace switchyard {
namespace {

// What the consumers of a run tell its thread.
struct Progress {
  Mutex mu;
  CondVar changed;
  int64_t begun SY_GUARDED_BY(mu) = 0;
  int64_t ended SY_GUARDED_BY(mu) = 0;
  absl::Status failure SY_GUARDED_BY(mu);
  PromptRunReport report SY_GUARDED_BY(mu);

  void Ended(const absl::Status& status, const Usage& usage) {
    MutexLock lock(mu);
    ++ended;
    failure.Update(status);
    report.prompt_tokens += usage.prompt_tokens;
    report.output_tokens += usage.completion_tokens;
    changed.NotifyAll();
  }
};

class Listener final : public GenerationConsumer {
 public:
  explicit Listener(Progress* progress) : progress_(progress) {}
  void OnAccepted() override {}
  void OnDeltas(std::vector<ChoiceDelta>) override {}
  void OnDone(const Usage& usage) override { progress_->Ended(absl::OkStatus(), usage); }
  void OnError(const absl::Status& status) override { progress_->Ended(status, {}); }

 private:
  Progress* const progress_;
};

absl::Status AddLine(const std::string& line, int32_t max_tokens,
                     std::vector<GenerationRequest>* requests) {
  const auto item = nlohmann::ordered_json::parse(line, nullptr, /*allow_exceptions=*/false);
  GenerationRequest request;
  request.temperature = 0;
  request.max_tokens = max_tokens;
  if (item.is_object() && item.contains("messages") && item["messages"].is_array()) {
    request.chat = true;
    request.conversation.now_unix_seconds = std::time(nullptr);
    request.conversation.messages = item["messages"];
  } else if (item.is_object() && item.contains("prompt") && item["prompt"].is_string()) {
    request.prompts = {PromptInput{.text = item["prompt"].get<std::string>(), .ids = {}}};
  } else {
    return absl::InvalidArgumentError("not an object with messages (a list) or prompt (a string)");
  }
  if (absl::Status status = Validate(request); !status.ok()) return status;
  requests->push_back(std::move(request));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<GenerationRequest>> ReadPrompts(const std::string& path,
                                                           int32_t max_tokens) {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrCat("cannot read '", path, "'"));
  std::vector<GenerationRequest> requests;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    if (absl::StripAsciiWhitespace(line).empty()) continue;
    if (absl::Status status = AddLine(line, max_tokens, &requests); !status.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ":", number, ": ", std::string(status.message())));
    }
  }
  if (requests.empty()) return absl::InvalidArgumentError(absl::StrCat("'", path, "' is empty"));
  return requests;
}

absl::StatusOr<PromptRunReport> RunPrompts(const std::vector<GenerationRequest>& requests,
                                           const Engine& engine, int32_t concurrency,
                                           const std::function<void(int64_t done)>& progress) {
  Metrics metrics;
  Progress run;  // outlives the pool: its tasks tell it
  TaskPool pool(1);
  // Waits while more than `most` run; the number that has ended, or the first error.
  const auto wait = [&](int64_t most) -> absl::Status {
    for (int64_t told = -1;;) {
      {
        MutexLock lock(run.mu);
        if (!run.failure.ok()) return run.failure;
        if (run.begun - run.ended <= most) return absl::OkStatus();
        while (run.ended == told && run.failure.ok()) run.changed.Wait(run.mu);
        told = run.ended;
      }
      progress(told);
    }
  };
  absl::Status status;
  for (size_t i = 0; i < requests.size() && status.ok(); ++i) {
    auto prepared = Prepare(requests[i], engine, [] { return uint64_t{0}; });
    if (!prepared.ok()) {
      status = absl::Status(
          prepared.status().code(),
          absl::StrCat("prompt ", i + 1, ": ", std::string(prepared.status().message())));
      break;
    }
    {
      MutexLock lock(run.mu);
      ++run.begun;
    }
    const auto generation =
        Generation::Start({.engine = &engine, .pool = &pool, .metrics = &metrics}, requests[i],
                          *std::move(prepared), std::make_unique<Listener>(&run));
    status = generation.ok() ? wait(concurrency - 1) : generation.status();
  }
  if (status.ok()) status = wait(0);
  // Also after an error: the scheduler's events go to the pool until it is done.
  std::promise<void> drained;
  engine.scheduler->Drain([&drained] { drained.set_value(); });
  drained.get_future().wait();
  if (!status.ok()) return status;
  MutexLock lock(run.mu);
  progress(run.ended);
  return run.report;
}

}  // namespace switchyard
