#include "worker/local_cell.h"

#include <algorithm>
#include <limits>
#include <thread>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "spdlog/spdlog.h"
#include "worker/kv_cache.h"
#include "worker/memory_plan.h"
#include "worker/model_facts.h"
#include "worker/plan_cost_probe.h"
#include "worker/weight_memory.h"
#include "worker/weights.h"

namespace switchyard {
namespace {

constexpr int kMaxWorkers = 256;
constexpr int kMaxThreads = 1024;

absl::Status CheckRange(const char* name, int64_t value, int64_t min, int64_t max) {
  if (value >= min && value <= max) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, " is ", value, ", not from ", min, " to ", max));
}

absl::Status CheckOptions(const CellOptions& options) {
  for (absl::Status status :
       {CheckRange("attention workers", options.attention_workers, 1, kMaxWorkers),
        CheckRange("expert workers", options.expert_workers, 1, kMaxWorkers),
        CheckRange("threads", options.threads, 0, kMaxThreads),
        CheckRange("max_num_seqs", options.max_num_seqs, 1, 1 << 20),
        CheckRange("max_num_batched_tokens", options.max_num_batched_tokens, 1, kMaxBatchedTokens),
        CheckRange("foreign slots per rank", options.planner.foreign_slots_per_rank, 0,
                   kMaxForeignSlots),
        CheckPlanCosts(options.planner.costs),
        CheckRange("kv_cache_memory", options.kv_cache_memory, 0, INT64_MAX / 2)}) {
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace

struct LocalCell::Parts {
  OpenedModel model;
  CellRanks ranks;
  std::unique_ptr<ThreadPool> pool;
  std::vector<std::unique_ptr<ComputeBackend>> backends;  // one per rank
  std::shared_ptr<const ExpertPlacement> placement;
  std::shared_ptr<const AttentionWeights> attention_weights;
  std::vector<std::shared_ptr<const ExpertWeights>> expert_weights;  // one per expert rank
  std::unique_ptr<RoutingRecorder> recorder;

  absl::Status MakeBackends(const CellOptions& options);
  absl::Status ChoosePlacement(const CellOptions& options);
  PlannerOptions Planner(const CellOptions& options) const;
  RoutingTraceShape TraceShape(const CellOptions& options) const;
  absl::Status MakeRecorder(const CellOptions& options);
};

absl::Status LocalCell::Parts::MakeBackends(const CellOptions& options) {
  const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  pool = std::make_unique<ThreadPool>(options.threads > 0 ? options.threads : cores);
  for (int i = 0; i < ranks.num_attention + ranks.num_experts; ++i) {
    std::string error;
    backends.push_back(MakeCpuBackend(pool.get(), options.isa, &error));
    if (backends.back() == nullptr) return absl::InvalidArgumentError(error);
  }
  return absl::OkStatus();
}

absl::Status LocalCell::Parts::ChoosePlacement(const CellOptions& options) {
  const int32_t layers = model.info.num_moe_layers;
  const int32_t experts = model.info.num_experts;
  placement = options.placement;
  if (placement == nullptr) {
    placement = std::make_shared<ExpertPlacement>(
        ExpertPlacement::Even(layers, experts, ranks.num_experts));
  }
  if (placement->num_ranks() != ranks.num_experts || placement->num_layers() != layers ||
      (layers > 0 && placement->num_experts() != experts)) {
    return absl::InvalidArgumentError(
        absl::StrCat("the placement is for ", placement->num_layers(), " layers, ",
                     placement->num_experts(), " experts and ", placement->num_ranks(),
                     " ranks, not ", layers, ", ", experts, " and ", ranks.num_experts));
  }
  return placement->Validate();
}

RoutingTraceShape LocalCell::Parts::TraceShape(const CellOptions& options) const {
  return {.num_layers = model.info.num_moe_layers,
          .num_experts = model.info.num_experts,
          .top_k = model.info.top_k,
          .has_weights = options.recorder.has_weights};
}

absl::Status LocalCell::Parts::MakeRecorder(const CellOptions& options) {
  if (options.recorder.path.empty()) return absl::OkStatus();
  auto made = RoutingRecorder::Create(options.recorder, TraceShape(options),
                                      options.max_num_batched_tokens, ranks.num_attention);
  if (!made.ok()) return made.status();
  recorder = *std::move(made);
  return absl::OkStatus();
}

absl::Status LocalCell::Load(const CellOptions& options, Parts* parts) {
  absl::StatusOr<OpenedModel> model = OpenModel({.model_dir = options.model_dir,
                                                 .dtype = options.dtype,
                                                 .isa = options.isa,
                                                 .max_model_len = options.max_model_len,
                                                 .formats = options.formats});
  if (!model.ok()) return model.status();
  parts->model = *std::move(model);
  if (absl::Status status = parts->ChoosePlacement(options); !status.ok()) return status;
  if (absl::Status status = parts->MakeBackends(options); !status.ok()) return status;
  if (absl::Status status = PlanMemory(options, parts); !status.ok()) return status;
  if (absl::Status status = parts->MakeRecorder(options); !status.ok()) return status;

  const Checkpoint& checkpoint = parts->model.checkpoint;
  const ModelConfig& config = parts->model.config;
  int64_t total = StoredAttentionBytes(checkpoint, config);
  for (int32_t e = 0; e < parts->ranks.num_experts; ++e) {
    total += StoredExpertBytes(checkpoint, config, *parts->placement, e);
  }
  int64_t done = 0;
  const LoadProgress progress = [&](int64_t bytes) {
    done += bytes;
    if (options.progress) options.progress(done, total);
  };
  ComputeBackend* backend = parts->backends.front().get();
  parts->attention_weights = LoadAttentionWeights(parts->model, backend, progress);
  for (int32_t e = 0; e < parts->ranks.num_experts; ++e) {
    parts->expert_weights.push_back(
        LoadExpertWeights(parts->model, *parts->placement, e, backend, progress));
  }
  return absl::OkStatus();
}

absl::Status LocalCell::PlanMemory(const CellOptions& options, Parts* parts) {
  MemoryUse use = {.attention_workers = parts->ranks.num_attention,
                   .expert_workers = parts->ranks.num_experts,
                   .expert_weights_bytes = 0,
                   .kv_bytes = 0,
                   .ranks = parts->ranks,
                   .max_rows = options.max_num_batched_tokens,
                   .threads = parts->pool->num_threads(),
                   .eager_bytes = 0,  // no data plane
                   .recorder_bytes = 0};
  if (!options.recorder.path.empty()) {
    use.recorder_bytes = RoutingRecorder::BufferBytes(
        parts->TraceShape(options), options.max_num_batched_tokens, parts->ranks.num_attention);
  }
  for (int32_t e = 0; e < parts->ranks.num_experts; ++e) {
    use.expert_weights_bytes += ExpertMemoryBytes(parts->model.config, parts->model.formats,
                                                  *parts->backends.front(), *parts->placement, e) +
                                parts->model.expert_bytes * options.planner.foreign_slots_per_rank *
                                    parts->model.info.num_moe_layers;
  }
  if (absl::Status status = CheckForeignSlots(parts->model, options.planner.foreign_slots_per_rank);
      !status.ok()) {
    return status;
  }
  const absl::StatusOr<int64_t> left =
      MemoryLeft(parts->model, use, *parts->backends.front(), AvailableMemoryBytes());
  if (!left.ok()) return left.status();
  const absl::StatusOr<int32_t> blocks =
      PlanKvBlocks({.requested_bytes = options.kv_cache_memory,
                    .available_bytes = *left,
                    .bytes_per_block = parts->model.kv_bytes_per_block,
                    .max_model_len = parts->model.info.max_model_len,
                    .max_num_seqs = options.max_num_seqs,
                    .num_workers = parts->ranks.num_attention});
  if (!blocks.ok()) return blocks.status();
  parts->model.info.num_kv_blocks = *blocks;
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<LocalCell>> LocalCell::Create(const CellOptions& options) {
  if (absl::Status status = CheckOptions(options); !status.ok()) return status;
  Parts parts;
  parts.ranks = {.num_attention = options.attention_workers, .num_experts = options.expert_workers};
  if (absl::Status status = Load(options, &parts); !status.ok()) return status;
  // The constructor is private, so make_unique cannot reach it.
  std::unique_ptr<LocalCell> cell(new LocalCell());
  cell->info_ = parts.model.info;
  cell->StartWorkers(options, &parts);
  return cell;
}

PlannerOptions LocalCell::Parts::Planner(const CellOptions& options) const {
  PlannerOptions planner = options.planner;
  if (options.measure_plan_costs && model.info.num_moe_layers > 0) {
    planner.costs = MeasurePlanCosts(
        {.hidden = model.config.hidden_size,
         .width = model.config.moe.expert_width,
         .dtype = model.dtype,
         .format = model.formats.Of({TensorRole::kExpertDown, LayerOfMoe(model.config, 0), 0})},
        backends.front().get(), /*link=*/nullptr);
    spdlog::info(
        "plan costs: {} ns to read an expert, {} ns per row, {} ns to move an expert (a copy)",
        planner.costs.expert_read_ps / 1000, planner.costs.token_ps / 1000,
        planner.costs.expert_move_ps / 1000);
  }
  return planner;
}

void LocalCell::StartWorkers(const CellOptions& options, Parts* parts) {
  const PlannerOptions planner = parts->Planner(options);
  pool_ = std::move(parts->pool);
  recorder_ = std::move(parts->recorder);
  placement_ = parts->placement;
  attention_weights_ = parts->attention_weights;
  expert_weights_ = parts->expert_weights;
  communicators_ = MakeInProcessCommunicators(parts->ranks.num_attention + parts->ranks.num_experts,
                                              pool_.get());
  const int64_t hidden = parts->model.config.hidden_size;
  const ExchangeShape shape = MakeExchangeShape(parts->model, options.max_num_batched_tokens);
  const auto fail = [this](const absl::Status& reason) { Fail(reason); };
  std::vector<std::unique_ptr<ExpertRank>> expert_ranks;
  for (int32_t e = 0; e < parts->ranks.num_experts; ++e) {
    const size_t rank = static_cast<size_t>(parts->ranks.OfExpert(e));
    expert_counters_.push_back(std::make_shared<WorkerCounters>(
        static_cast<size_t>(info_.num_moe_layers) * static_cast<size_t>(info_.num_experts)));
    expert_ranks.push_back(std::make_unique<ExpertRank>(
        ExpertRankOptions{.expert_rank = e,
                          .num_moe_layers = info_.num_moe_layers,
                          .hidden = hidden,
                          .expert_width = parts->model.config.moe.expert_width,
                          .slot_formats = SlotFormats(parts->model),
                          .exchange = shape,
                          .ranks = parts->ranks,
                          .planner = planner,
                          .counters = expert_counters_.back()},
        parts->expert_weights[static_cast<size_t>(e)], parts->placement,
        std::move(parts->backends[rank]), pool_.get(), communicators_[rank].get()));
  }
  experts_ = std::make_unique<ExpertWorker>(std::move(expert_ranks), pool_.get(), fail);
  for (int32_t a = 0; a < parts->ranks.num_attention; ++a) {
    const size_t rank = static_cast<size_t>(a);
    kv_.push_back(std::make_unique<KvCache>(
        MakeKvCacheShape(parts->model.config, parts->model.dtype, info_.num_kv_blocks),
        info_.num_layers, *parts->backends[rank]));
    counters_.push_back(std::make_shared<WorkerCounters>());
    attention_.push_back(std::make_unique<AttentionWorker>(
        AttentionWorkerOptions{.index = a,
                               .max_rows = options.max_num_batched_tokens,
                               .limits = {.vocab_size = info_.vocab_size,
                                          .max_model_len = info_.max_model_len,
                                          .block_size = info_.block_size,
                                          .num_blocks = info_.num_kv_blocks},
                               .exchange = shape,
                               .ranks = parts->ranks,
                               .planner = planner,
                               .counters = counters_.back(),
                               .pool = pool_.get(),
                               .kv = kv_.back().get(),
                               .communicator = communicators_[rank].get(),
                               .recorder = recorder_.get()},
        parts->model.config, parts->attention_weights, parts->placement,
        std::move(parts->backends[rank]),
        AttentionWorker::Callbacks{
            .on_result = [this](StepResult result) { on_result_(std::move(result)); },
            .on_failure = fail}));
  }
}

LocalCell::~LocalCell() { Fail(absl::CancelledError("the cell is shutting down")); }

void LocalCell::Fail(const absl::Status& reason) {
  failed_.store(true);
  for (const std::unique_ptr<Communicator>& communicator : communicators_)
    communicator->Abort(reason);
}

uint64_t LocalCell::progress() const {
  uint64_t layers = 0;
  for (const std::shared_ptr<WorkerCounters>& worker : counters_)
    layers += worker->progress.load(std::memory_order_relaxed);
  return layers;
}

void LocalCell::SetResultCallback(std::function<void(StepResult)> on_result) {
  on_result_ = std::move(on_result);
}

void LocalCell::Execute(int worker, StepPlan plan) {
  SY_CHECK(worker >= 0 && worker < num_attention_workers());
  SY_CHECK(on_result_ != nullptr);
  if (!any_step_ || plan.header.step != last_step_) {
    any_step_ = true;
    last_step_ = plan.header.step;
    sent_.assign(attention_.size(), 0);
    // After a failure the attention workers answer with the error at once; experts take no part.
    if (!failed_.load()) experts_->Execute(plan.header);
  }
  // A second plan of one step would wait for experts that were never told.
  SY_CHECK_EQ(static_cast<int>(sent_[static_cast<size_t>(worker)]), 0);
  sent_[static_cast<size_t>(worker)] = 1;
  attention_[static_cast<size_t>(worker)]->Execute(std::move(plan));
}

}  // namespace switchyard
