#include "worker/worker_process.h"

#include <unistd.h>

#include <algorithm>
#include <random>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "comm/data_plane.h"
#include "spdlog/spdlog.h"
#include "worker/kv_cache.h"
#include "worker/plan_cost_probe.h"
#include "worker/weights.h"

namespace switchyard {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxNumSeqs = 256;  // the scheduler's default: bounds the default of the KV cache
// Until the scheduler tells: its defaults, and a cell of this size.
constexpr int32_t kAssumedRows = 2048;
constexpr CellRanks kAssumedRanks = {.num_attention = 8, .num_experts = 8};

bool Has(const WorkerProcessOptions& options, v1::WorkerRole role) {
  return std::count(options.roles.begin(), options.roles.end(), role) > 0;
}

absl::Status CheckOptions(const WorkerProcessOptions& options) {
  if (options.roles.empty() || options.roles.size() > 2 ||
      (options.roles.size() == 2 && options.roles[0] == options.roles[1])) {
    return absl::InvalidArgumentError(
        absl::StrCat("a worker has one role, or both: not ", options.roles.size(), " roles"));
  }
  if (options.threads < 0 || options.threads > kMaxThreads) {
    return absl::InvalidArgumentError(
        absl::StrCat("threads is ", options.threads, ", not from 0 to ", kMaxThreads));
  }
  if (options.kv_cache_memory < 0 || options.expert_memory < 0)
    return absl::InvalidArgumentError("memory cannot be negative");
  return absl::OkStatus();
}

// What this machine takes for the planner's unit operations; nothing for a model without experts.
v1::PlanCosts MeasureCosts(const OpenedModel& model, const std::string& data_host,
                           ComputeBackend* backend) {
  v1::PlanCosts out;
  if (model.info.num_moe_layers == 0) return out;
  auto link = MoveLink::Create(data_host);
  if (!link.ok()) {
    spdlog::warn("moving an expert between workers cannot be measured, so none will move: {}",
                 std::string(link.status().message()));
  }
  PlanCosts costs = MeasurePlanCosts({.hidden = model.config.hidden_size,
                                      .width = model.config.moe.expert_width,
                                      .dtype = model.dtype,
                                      .format = SlotFormats(model).front()},
                                     backend, link.ok() ? link->get() : nullptr);
  if (!link.ok()) costs.expert_move_ps = 0;
  spdlog::info("plan costs: {} ns to read an expert, {} ns per row, {} ns to move an expert",
               costs.expert_read_ps / 1000, costs.token_ps / 1000, costs.expert_move_ps / 1000);
  out.set_token_ps(costs.token_ps);
  out.set_expert_read_ps(costs.expert_read_ps);
  out.set_expert_move_ps(costs.expert_move_ps);
  return out;
}

}  // namespace

// Everything that is known before the scheduler is: weights, experts by --expert-memory, buffers
// for steps of the default size; KV gets its share of the rest.
absl::Status WorkerProcess::PlanMemory(const WorkerProcessOptions& options) {
  MemoryUse use = {.attention_workers = Has(options, v1::WORKER_ROLE_ATTENTION) ? 1 : 0,
                   .expert_workers = Has(options, v1::WORKER_ROLE_EXPERT) ? 1 : 0,
                   .expert_weights_bytes = 0,
                   .kv_bytes = 0,
                   .ranks = kAssumedRanks,
                   .max_rows = kAssumedRows,
                   .threads = pool_->num_threads(),
                   .eager_bytes = static_cast<int64_t>(DataPlaneOptions{}.eager_bytes)};
  const int64_t slot_bytes = model_.expert_bytes * model_.info.num_moe_layers;
  if (use.expert_workers > 0 && options.expert_memory > 0 && slot_bytes > 0) {
    home_slots_ = static_cast<int32_t>(
        std::min<int64_t>(options.expert_memory / slot_bytes, model_.info.num_experts));
    if (home_slots_ == 0) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "--expert-memory ", options.expert_memory, " holds no expert: one in each of ",
          model_.info.num_moe_layers, " MoE layers takes ", slot_bytes, " bytes"));
    }
    use.expert_weights_bytes = home_slots_ * slot_bytes;
  }
  const int64_t available = AvailableMemoryBytes();
  absl::StatusOr<int64_t> left = MemoryLeft(model_, use, *backend_, available);
  if (!left.ok()) return left.status();
  if (use.attention_workers > 0) {
    const absl::StatusOr<int32_t> blocks =
        PlanKvBlocks({.requested_bytes = options.kv_cache_memory,
                      .available_bytes = *left,
                      .bytes_per_block = model_.kv_bytes_per_block,
                      .max_model_len = model_.info.max_model_len,
                      .max_num_seqs = kMaxNumSeqs,
                      .num_workers = 1});
    if (!blocks.ok()) return blocks.status();
    kv_blocks_ = *blocks;
    use.kv_bytes = kv_blocks_ * model_.kv_bytes_per_block;
  }
  memory_ = std::make_unique<ProcessMemory>(&model_, backend_.get(), use, available);
  return absl::OkStatus();
}

std::unique_ptr<RoleHost> WorkerProcess::MakeHost(v1::WorkerRole role,
                                                  const WorkerProcessOptions& options) {
  const HostContext context = {
      .model = &model_, .pool = pool_.get(), .memory = memory_.get(), .isa = options.model.isa};
  if (role == v1::WORKER_ROLE_EXPERT)
    return MakeExpertHost(context, home_slots_,
                          MeasureCosts(model_, options.data_host, backend_.get()));
  const int64_t total = StoredAttentionBytes(model_.checkpoint, model_.config);
  int64_t done = 0;
  const LoadProgress progress = [&](int64_t bytes) {
    done += bytes;
    if (options.progress) options.progress(done, total);
  };
  return MakeAttentionHost(context, LoadAttentionWeights(model_, backend_.get(), progress),
                           kv_blocks_);
}

absl::StatusOr<std::unique_ptr<WorkerProcess>> WorkerProcess::Create(
    const WorkerProcessOptions& options) {
  if (absl::Status status = CheckOptions(options); !status.ok()) return status;
  absl::StatusOr<OpenedModel> model = OpenModel(options.model);
  if (!model.ok()) return model.status();
  const absl::StatusOr<uint64_t> hash = ModelHash(options.model.model_dir, *model);
  if (!hash.ok()) return hash.status();
  // The constructor is private, so make_unique cannot reach it.
  std::unique_ptr<WorkerProcess> process(new WorkerProcess());
  process->model_ = *std::move(model);
  const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  process->pool_ = std::make_unique<ThreadPool>(options.threads > 0 ? options.threads : cores);
  std::string error;
  process->backend_ = MakeCpuBackend(process->pool_.get(), options.model.isa, &error);
  if (process->backend_ == nullptr) return absl::InvalidArgumentError(error);
  if (absl::Status status = process->PlanMemory(options); !status.ok()) return status;

  std::random_device random;
  v1::Register registration;
  registration.set_version(SWITCHYARD_VERSION);
  registration.set_name(options.name);
  registration.set_incarnation((uint64_t{random()} << 32) | random());
  registration.set_model_hash(*hash);
  registration.set_numerics_id(process->model_.info.numerics_id);
  registration.set_device("cpu");
  registration.set_pid(getpid());
  registration.set_threads(process->pool_->num_threads());
  registration.set_memory_bytes(process->memory_->available_bytes());

  std::vector<std::unique_ptr<RoleHost>> hosts;
  for (v1::WorkerRole role : options.roles) {
    hosts.push_back(process->MakeHost(role, options));
    if (options.wrap_host) hosts.back() = options.wrap_host(std::move(hosts.back()));
  }
  WorkerProcess* self = process.get();
  for (std::unique_ptr<RoleHost>& host : hosts) {
    process->sessions_.push_back(
        std::make_unique<RoleSession>(RoleSessionOptions{.control = options.control,
                                                         .data_host = options.data_host,
                                                         .model = process->model_.info,
                                                         .pool = process->pool_.get(),
                                                         .registration = registration,
                                                         .on_registered = options.on_registered,
                                                         .on_end =
                                                             [self] {
                                                               MutexLock lock(self->mu_);
                                                               self->changed_.NotifyAll();
                                                             }},
                                      std::move(host)));
  }
  return process;
}

WorkerProcess::~WorkerProcess() = default;

std::optional<absl::Status> WorkerProcess::WaitFor(std::chrono::milliseconds time) {
  const auto deadline = std::chrono::steady_clock::now() + time;
  MutexLock lock(mu_);
  for (;;) {
    size_t ended = 0;
    for (const std::unique_ptr<RoleSession>& session : sessions_) {
      const std::optional<absl::Status> result = session->result();
      if (!result) continue;
      if (!result->ok()) {
        for (const std::unique_ptr<RoleSession>& other : sessions_) other->Stop();
        return result;
      }
      ++ended;
    }
    if (ended == sessions_.size()) return absl::OkStatus();
    if (!changed_.WaitUntil(mu_, deadline)) return std::nullopt;
  }
}

void WorkerProcess::Drain() {
  for (const std::unique_ptr<RoleSession>& session : sessions_) session->Drain();
}

}  // namespace switchyard
