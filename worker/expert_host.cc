// The expert role's RoleHost: loaded experts stay.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "worker/expert_store.h"
#include "worker/expert_worker.h"
#include "worker/role_host.h"

namespace switchyard {
namespace {

class ExpertHost final : public RoleHost {
 public:
  ExpertHost(const HostContext& context, int32_t home_slots, const v1::PlanCosts& costs)
      : context_(context),
        home_slots_(home_slots),
        costs_(costs),
        counters_(std::make_shared<WorkerCounters>(
            static_cast<size_t>(context.model->info.num_moe_layers) *
            static_cast<size_t>(context.model->info.num_experts))),
        store_(context.model, MakeBackend(), counters_) {}

  v1::WorkerRole role() const override { return v1::WORKER_ROLE_EXPERT; }

  void Describe(v1::Register* registration) const override {
    registration->set_home_slots(home_slots_);
    *registration->mutable_costs() = costs_;
  }

  absl::Status Prepare(int32_t max_rows, int32_t foreign_slots) override {
    max_rows_ = max_rows;
    foreign_bytes_ = SlotBytes() * foreign_slots;
    if (absl::Status status = CheckForeignSlots(*context_.model, foreign_slots); !status.ok())
      return status;
    return context_.memory->Change([&](MemoryUse* use) {
      use->max_rows = max_rows;
      use->expert_weights_bytes = SlotBytes() * home_slots_ + foreign_bytes_;
    });
  }

  absl::Status Assign(const v1::Assign& assign, LoadedCallback done) override {
    absl::StatusOr<ExpertStore::ExpertLists> experts = ParseAssign(assign, context_.model->info);
    if (!experts.ok()) return experts.status();
    // Within the home slots as a rule; for the time of a change, and without --expert-memory, more.
    const int64_t bytes = store_.CountWith(*experts) * context_.model->expert_bytes;
    const absl::Status memory = context_.memory->Change([&](MemoryUse* use) {
      use->expert_weights_bytes = std::max(SlotBytes() * home_slots_, bytes) + foreign_bytes_;
    });
    if (!memory.ok()) return memory;
    if (assign.bytes_per_step() < 0) {
      return absl::InvalidArgumentError(absl::StrCat("assignment ", assign.assignment(), ": ",
                                                     assign.bytes_per_step(), " bytes per step"));
    }
    store_.Assign(*std::move(experts), assign.bytes_per_step(),
                  [assignment = assign.assignment(),
                   done = std::move(done)](const std::vector<ExpertStore::Sum>& sums) {
                    v1::Loaded loaded;
                    loaded.set_assignment(assignment);
                    for (const ExpertStore::Sum& sum : sums) {
                      v1::ExpertSum* out = loaded.add_sums();
                      out->set_layer(sum.layer);
                      out->set_expert(sum.expert);
                      out->set_checksum(sum.checksum);
                    }
                    done(loaded);
                  });
    return absl::OkStatus();
  }
  void CancelAssignment() override { store_.CancelAssignment(); }

  absl::Status Begin(const RankEpoch& epoch, Communicator* communicator,
                     Callbacks callbacks) override {
    SY_CHECK(worker_ == nullptr);
    const absl::Status memory =
        context_.memory->Change([&](MemoryUse* use) { use->ranks = epoch.ranks; });
    if (!memory.ok()) return memory;
    const int32_t expert_rank = epoch.group.rank - epoch.ranks.num_attention;
    auto weights = store_.Install(*epoch.placement, expert_rank);
    if (!weights.ok()) return weights.status();
    std::vector<std::unique_ptr<ExpertRank>> ranks;
    ranks.push_back(std::make_unique<ExpertRank>(
        ExpertRankOptions{.expert_rank = expert_rank,
                          .num_moe_layers = context_.model->info.num_moe_layers,
                          .hidden = context_.model->config.hidden_size,
                          .expert_width = context_.model->config.moe.expert_width,
                          .slot_formats = SlotFormats(*context_.model),
                          .exchange = MakeExchangeShape(*context_.model, max_rows_),
                          .ranks = epoch.ranks,
                          .planner = epoch.planner,
                          .counters = counters_},
        *std::move(weights), epoch.placement, MakeBackend(), context_.pool, communicator));
    worker_ = std::make_unique<ExpertWorker>(std::move(ranks), context_.pool,
                                             std::move(callbacks.on_failure));
    return absl::OkStatus();
  }

  void Execute(StepPlan plan) override {
    store_.CountStep();
    worker_->Execute(std::move(plan.header));
  }
  void End() override { worker_.reset(); }

  const WorkerCounters& counters() const override { return *counters_; }
  bool loading() const override { return store_.loading(); }
  uint64_t loaded() const override { return store_.progress(); }

 private:
  // One expert in each layer, at most.
  int64_t SlotBytes() const {
    return context_.model->expert_bytes * context_.model->info.num_moe_layers;
  }
  std::unique_ptr<ComputeBackend> MakeBackend() const {
    std::string error;  // the path was checked when the model was opened
    std::unique_ptr<ComputeBackend> backend = MakeCpuBackend(context_.pool, context_.isa, &error);
    SY_CHECK(backend != nullptr);
    return backend;
  }

  const HostContext context_;
  const int32_t home_slots_;
  const v1::PlanCosts costs_;
  const std::shared_ptr<WorkerCounters> counters_;
  ExpertStore store_;
  int32_t max_rows_ = 0;
  int64_t foreign_bytes_ = 0;
  std::unique_ptr<ExpertWorker> worker_;  // of the epoch that runs
};

}  // namespace

std::unique_ptr<RoleHost> MakeExpertHost(const HostContext& context, int32_t home_slots,
                                         const v1::PlanCosts& costs) {
  return std::make_unique<ExpertHost>(context, home_slots, costs);
}

}  // namespace switchyard
