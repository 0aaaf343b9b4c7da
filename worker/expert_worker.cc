#include "worker/expert_worker.h"

#include <optional>
#include <utility>

#include "kernels/check.h"
#include "kernels/float_mode.h"

namespace switchyard {

ExpertWorker::ExpertWorker(std::vector<std::unique_ptr<ExpertRank>> ranks, ThreadPool* pool,
                           std::function<void(const absl::Status&)> on_failure)
    : ranks_(std::move(ranks)), on_failure_(std::move(on_failure)), queue_(pool) {
  SY_CHECK(!ranks_.empty());
  thread_ = std::thread([this, pool] {
    const ThreadPool::Owner owner(pool);
    Run();
  });
}

ExpertWorker::~ExpertWorker() {
  queue_.Stop();
  thread_.join();
  CountSteps(-static_cast<int64_t>(queue_.size()));
}

void ExpertWorker::Execute(StepHeader step) {
  CountSteps(1);
  queue_.Push(std::move(step));
}

void ExpertWorker::CountSteps(int64_t change) {
  for (const std::unique_ptr<ExpertRank>& rank : ranks_) rank->counters().steps.fetch_add(change);
}

void ExpertWorker::Run() {
  const FlushDenormals flush;
  absl::Status failed;
  while (const std::optional<StepHeader> step = queue_.Pop()) {
    if (failed.ok()) {  // else the epoch has failed: nobody waits for an answer
      failed = RunStep(*step);
      if (!failed.ok()) {
        on_failure_(failed);  // first: a peer that finds a rank gone will blame it
        // The other micro-batch may have receives under way, the other ranks too.
        for (const std::unique_ptr<ExpertRank>& rank : ranks_) rank->Quit(failed);
      }
    }
    CountSteps(-1);
  }
}

absl::Status ExpertWorker::RunStep(const StepHeader& step) {
  absl::Status status;
  for (const std::unique_ptr<ExpertRank>& rank : ranks_) {
    if (status.ok()) status = rank->BeginStep(step);
  }
  const auto micro_batches = static_cast<int32_t>(step.micro_batches);
  for (int32_t layer = 0; status.ok() && layer < ranks_.front()->num_moe_layers(); ++layer) {
    for (int32_t m = 0; status.ok() && m < micro_batches; ++m) {
      const ExchangeKey key{.step = &step, .layer = layer, .micro_batch = m};
      // All ranks' moves of weights are under way before one waits for them.
      for (const std::unique_ptr<ExpertRank>& rank : ranks_) {
        if (status.ok()) status = rank->Compute(key);
      }
      for (const std::unique_ptr<ExpertRank>& rank : ranks_) {
        if (status.ok()) status = rank->Answer(key);
      }
    }
  }
  return status;
}

}  // namespace switchyard
