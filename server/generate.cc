#include "server/generate.h"

#include <future>
#include <memory>
#include <utility>

#include "absl/strings/str_format.h"
#include "server/generation.h"
#include "server/metrics.h"
#include "server/task_pool.h"

namespace switchyard {
namespace {

using Clock = std::chrono::steady_clock;

double Seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

// Prints the first choice, and keeps the times of its first and last tokens.
class Terminal : public GenerationConsumer {
 public:
  Terminal(std::FILE* out, Clock::time_point begun,
           std::promise<absl::StatusOr<GenerateReport>> result)
      : out_(out), begun_(begun), result_(std::move(result)) {}

  void OnAccepted() override {}

  void OnDeltas(std::vector<ChoiceDelta> deltas) override {
    last_ = Clock::now();
    if (first_ == Clock::time_point()) {
      first_ = last_;
      for (const ChoiceDelta& delta : deltas)
        num_first_ += static_cast<int32_t>(delta.token_ids.size());
    }
    for (const ChoiceDelta& delta : deltas) {
      if (delta.index == 0) std::fwrite(delta.text.data(), 1, delta.text.size(), out_);
    }
    std::fflush(out_);
  }

  void OnDone(const Usage& usage) override {
    GenerateReport report{.prompt_tokens = usage.prompt_tokens,
                          .output_tokens = usage.completion_tokens};
    report.first_token_seconds = Seconds(first_ - begun_);
    if (report.first_token_seconds > 0) {
      report.prefill_tokens_per_second = usage.prompt_tokens / report.first_token_seconds;
    }
    const double decode_seconds = Seconds(last_ - first_);
    if (decode_seconds > 0) {
      report.decode_tokens_per_second = (usage.completion_tokens - num_first_) / decode_seconds;
    }
    result_.set_value(report);
  }

  void OnError(const absl::Status& status) override { result_.set_value(status); }

 private:
  std::FILE* const out_;
  const Clock::time_point begun_;
  std::promise<absl::StatusOr<GenerateReport>> result_;
  Clock::time_point first_;
  Clock::time_point last_;
  int32_t num_first_ = 0;  // tokens of the first step
};

}  // namespace

absl::StatusOr<GenerateReport> RunGenerate(const GenerationRequest& request, const Engine& engine,
                                           uint64_t default_seed, std::FILE* out) {
  GenerationRequest asked = request;
  asked.return_token_ids = true;  // the speed counts tokens, not text
  asked.arrival = Clock::now();
  if (auto status = Validate(asked); !status.ok()) return status;
  auto prepared = Prepare(asked, engine, [default_seed] { return default_seed; });
  if (!prepared.ok()) return prepared.status();

  Metrics metrics;
  TaskPool pool(1);  // destroyed first: its tasks use the metrics
  std::promise<absl::StatusOr<GenerateReport>> promise;
  auto result = promise.get_future();
  const auto generation = Generation::Start(
      {.engine = &engine, .pool = &pool, .metrics = &metrics}, asked, *std::move(prepared),
      std::make_unique<Terminal>(out, asked.arrival, std::move(promise)));
  if (!generation.ok()) return generation.status();
  auto report = result.get();
  // Behind a stop string the scheduler may still deliver: the pool must not go before it is done.
  std::promise<void> drained;
  engine.scheduler->Drain([&drained] { drained.set_value(); });
  drained.get_future().wait();
  return report;
}

std::string FormatReport(const GenerateReport& report) {
  return absl::StrFormat(
      "%d prompt tokens, first token after %.3f s (%.1f prompt tokens per second); %d tokens, "
      "decode %.1f tokens per "
      "second",
      report.prompt_tokens, report.first_token_seconds, report.prefill_tokens_per_second,
      report.output_tokens, report.decode_tokens_per_second);
}

}  // namespace switchyard
