// The attention role's RoleHost: the KV cache and the weights stay, sequences do not.
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "worker/attention_worker.h"
#include "worker/kv_cache.h"
#include "worker/role_host.h"

namespace switchyard {
namespace {

class AttentionHost final : public RoleHost {
 public:
  AttentionHost(const HostContext& context, std::shared_ptr<const AttentionWeights> weights,
                int32_t kv_blocks)
      : context_(context),
        weights_(std::move(weights)),
        kv_(MakeKvCacheShape(context.model->config, context.model->dtype, kv_blocks),
            context.model->info.num_layers, *MakeBackend()),
        counters_(std::make_shared<WorkerCounters>()) {}

  v1::WorkerRole role() const override { return v1::WORKER_ROLE_ATTENTION; }

  void Describe(v1::Register* registration) const override {
    registration->set_num_kv_blocks(kv_.shape().num_blocks);
    registration->set_max_model_len(context_.model->info.max_model_len);
  }

  absl::Status Prepare(int32_t max_rows, int32_t /*foreign_slots*/) override {
    max_rows_ = max_rows;
    return context_.memory->Change([&](MemoryUse* use) { use->max_rows = max_rows; });
  }

  absl::Status Assign(const v1::Assign& assign, LoadedCallback) override {
    return absl::InvalidArgumentError(
        absl::StrCat("assignment ", assign.assignment(), " is for an expert worker"));
  }
  void CancelAssignment() override {}

  absl::Status Begin(const RankEpoch& epoch, Communicator* communicator,
                     Callbacks callbacks) override {
    SY_CHECK(worker_ == nullptr);
    const absl::Status memory =
        context_.memory->Change([&](MemoryUse* use) { use->ranks = epoch.ranks; });
    if (!memory.ok()) return memory;
    const ModelInfo& info = context_.model->info;
    worker_ = std::make_unique<AttentionWorker>(
        AttentionWorkerOptions{.index = epoch.group.rank,
                               .max_rows = max_rows_,
                               .limits = {.vocab_size = info.vocab_size,
                                          .max_model_len = info.max_model_len,
                                          .block_size = info.block_size,
                                          .num_blocks = kv_.shape().num_blocks},
                               .exchange = MakeExchangeShape(*context_.model, max_rows_),
                               .ranks = epoch.ranks,
                               .planner = epoch.planner,
                               .counters = counters_,
                               .pool = context_.pool,
                               .kv = &kv_,
                               .communicator = communicator},
        context_.model->config, weights_, epoch.placement, MakeBackend(),
        AttentionWorker::Callbacks{
            // A failed step has been reported as the epoch's failure.
            .on_result =
                [on_result = std::move(callbacks.on_result)](StepResult result) {
                  if (result.error.empty()) on_result(std::move(result));
                },
            .on_failure = std::move(callbacks.on_failure)});
    return absl::OkStatus();
  }

  void Execute(StepPlan plan) override { worker_->Execute(std::move(plan)); }
  void End() override { worker_.reset(); }

  const WorkerCounters& counters() const override { return *counters_; }
  bool loading() const override { return false; }
  uint64_t loaded() const override { return 0; }

 private:
  std::unique_ptr<ComputeBackend> MakeBackend() const {
    std::string error;  // the path was checked when the model was opened
    std::unique_ptr<ComputeBackend> backend = MakeCpuBackend(context_.pool, context_.isa, &error);
    SY_CHECK(backend != nullptr);
    return backend;
  }

  const HostContext context_;
  const std::shared_ptr<const AttentionWeights> weights_;
  KvCache kv_;
  const std::shared_ptr<WorkerCounters> counters_;
  int32_t max_rows_ = 0;
  std::unique_ptr<AttentionWorker> worker_;  // of the epoch that runs
};

}  // namespace

std::unique_ptr<RoleHost> MakeAttentionHost(const HostContext& context,
                                            std::shared_ptr<const AttentionWeights> weights,
                                            int32_t kv_blocks) {
  return std::make_unique<AttentionHost>(context, std::move(weights), kv_blocks);
}

}  // namespace switchyard
