#include "server/cli/local_engine.h"

#include <spdlog/spdlog.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/cli/front_end_flags.h"

namespace switchyard {
namespace {

// The scheduler's view of the workers in this process: one epoch that lasts.
class CellClient final : public WorkerClient {
 public:
  explicit CellClient(LocalCell* cell) : cell_(cell) {}
  uint64_t progress() const override { return cell_->progress(); }
  void Execute(int32_t rank, StepPlan plan) override { cell_->Execute(rank, std::move(plan)); }
  void Paused(uint64_t) override {}  // never asked to
  void SetEventCallback(std::function<void(WorkerEvent)> on_event) override {
    cell_->SetResultCallback([on_event](StepResult result) { on_event(std::move(result)); });
    EpochView view{.epoch = 1, .attention = {}};
    for (int rank = 0; rank < cell_->num_attention_workers(); ++rank) {
      view.attention.push_back({.worker = static_cast<uint64_t>(rank) + 1,
                                .num_kv_blocks = cell_->model_info().num_kv_blocks});
    }
    on_event(std::move(view));
  }

 private:
  LocalCell* const cell_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<LocalEngine>> LoadLocalEngine(
    LocalEngineFlags flags, const LocalEngineNames& names,
    const std::function<void(int)>& percent) {
  auto loaded = std::make_unique<LocalEngine>();
  auto text = LoadModelText(flags.cell.model_dir, names.chat_template);
  if (!text.ok()) return text.status();
  loaded->text = *std::move(text);

  flags.cell.max_num_seqs = flags.scheduler.max_num_seqs;
  flags.cell.max_num_batched_tokens = flags.scheduler.max_num_batched_tokens;
  flags.cell.progress = [&percent](int64_t done, int64_t total) {
    percent(total > 0 ? static_cast<int>(done * 100 / total) : 100);
  };
  auto cell = LocalCell::Create(flags.cell);
  if (!cell.ok()) return cell.status();
  loaded->cell = *std::move(cell);
  loaded->client = std::make_unique<CellClient>(loaded->cell.get());

  Engine& engine = loaded->engine;
  engine.model = loaded->cell->model_info();
  if (!names.served_model_name.empty()) engine.model.name = names.served_model_name;
  loaded->text.Bind(&engine);
  loaded->scheduler =
      std::make_unique<Scheduler>(flags.scheduler, engine.model, loaded->client.get());
  engine.scheduler = loaded->scheduler.get();
  spdlog::info("{}: {}, {}, {} attention and {} expert workers, {} KV blocks of {} tokens each",
               engine.model.name, engine.model.architecture, engine.model.numerics_id,
               flags.cell.attention_workers, flags.cell.expert_workers, engine.model.num_kv_blocks,
               engine.model.block_size);
  return loaded;
}

ClusterSnapshot LocalEngine::Snapshot() const {
  ClusterSnapshot snapshot;
  snapshot.epoch = 1;
  snapshot.phase = "running";
  const ModelInfo& model = cell->model_info();
  const int attention = cell->num_attention_workers();
  const ExpertPlacement& placement = cell->placement();
  for (int rank = 0; rank < attention + placement.num_ranks(); ++rank) {
    ClusterSnapshot::Worker& worker = snapshot.workers.emplace_back();
    const bool is_expert = rank >= attention;
    worker.id = static_cast<uint64_t>(rank) + 1;
    worker.role = is_expert ? "expert" : "attention";
    worker.name = absl::StrCat(worker.role, "-", is_expert ? rank - attention : rank);
    worker.pid = getpid();
    worker.address = "in-process";
    worker.transport = "in-process";
    worker.device = "cpu";
    worker.threads = cell->pool()->num_threads();
    worker.state = "serving";
    worker.rank = rank;
    worker.num_kv_blocks = is_expert ? 0 : model.num_kv_blocks;
    for (int32_t l = 0; is_expert && l < placement.num_layers(); ++l)
      worker.num_experts += static_cast<int32_t>(placement.ExpertsOf(l, rank - attention).size());
  }
  return snapshot;
}

void AddComputeFlags(CLI::App* app, CellOptions* cell, std::string* device) {
  app->add_option("--threads", cell->threads, "compute threads in total (0: all cores)")
      ->capture_default_str()
      ->check(CLI::Range(0, 1024));
  app->add_option("--device", *device, "auto or cpu (this build computes on the CPU)")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "cpu"}));
  app->add_option("--isa", cell->isa,
                  "instruction path: auto, avx512, avx2 or portable; equal bits hold within one")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "avx512", "avx2", "portable"}));
  app->add_option("--dtype", cell->dtype, "auto (as stored), float32 or bfloat16")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "float32", "bfloat16"}));
  AddWeightFormatFlags(app, &cell->formats);
}

void AddWeightFormatFlags(CLI::App* app, WeightFormatOptions* formats) {
  app->add_option("--quantization", formats->quantization,
                  "weights in memory: none (as --dtype), int8 or int4")
      ->capture_default_str()
      ->check(CLI::IsMember({"none", "int8", "int4"}));
  app->add_option("--quantization-overrides", formats->overrides_file,
                  "JSON file with other formats for some layers, experts or roles")
      ->check(CLI::ExistingFile);
}

void AddBalanceFlags(CLI::App* app, PlannerOptions* planner) {
  static const std::map<std::string, BalanceMode> kModes = {{"auto", BalanceMode::kAuto},
                                                            {"none", BalanceMode::kNone},
                                                            {"eplb", BalanceMode::kEplb},
                                                            {"llep", BalanceMode::kLlep}};
  app->add_option("--balance", planner->mode,
                  "how expert workers share each layer's work: auto (by measured costs), none "
                  "(plain expert parallelism), eplb (even over replicas) or llep")
      ->transform(CLI::CheckedTransformer(kModes).description("{auto,none,eplb,llep}"))
      ->default_str("auto");
  app->add_option("--expert-foreign-slots", planner->foreign_slots_per_rank,
                  "experts per layer that an expert worker can take over from others for a while "
                  "(0: weights never move)")
      ->capture_default_str()
      ->check(CLI::Range(0, kMaxForeignSlots));
}

void AddLocalEngineFlags(CLI::App* app, LocalEngineFlags* flags) {
  CellOptions& cell = flags->cell;
  AddModelFlag(app, &cell.model_dir);
  app->add_option("--attention-workers", cell.attention_workers,
                  "attention workers; each serves a share of the sequences")
      ->capture_default_str()
      ->check(CLI::Range(1, 64));
  app->add_option("--expert-workers", cell.expert_workers,
                  "expert workers; each holds a share of the experts")
      ->capture_default_str()
      ->check(CLI::Range(1, 256));
  AddBalanceFlags(app, &cell.planner);
  cell.measure_plan_costs = true;
  AddComputeFlags(app, &cell, &flags->device);
  app->add_option("--max-model-len", cell.max_model_len,
                  "prompt + output tokens of a sequence (0: as the model says)")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  app->add_option("--kv-cache-memory", cell.kv_cache_memory,
                  "KV cache of all attention workers, e.g. 2GiB (0: what the sequences can use, at "
                  "most half of the free memory)")
      ->capture_default_str()
      ->transform(CLI::AsSizeValue(false));
  AddStepFlags(app, &flags->scheduler);
}

}  // namespace switchyard
