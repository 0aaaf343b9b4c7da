#include "worker/bench_rerouting.h"

#include <time.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "comm/dispatch_planner.h"
#include "comm/workload.h"
#include "kernels/backend.h"
#include "kernels/measure.h"
#include "kernels/thread_pool.h"
#include "worker/move_link.h"
#include "worker/plan_cost_probe.h"

namespace switchyard {
namespace {

double OwnSeconds() { return CpuSeconds(CLOCK_THREAD_CPUTIME_ID); }

absl::Status CheckOptions(const BenchReroutingOptions& o) {
  const auto check = [](const char* what, int64_t value, int64_t min, int64_t max) {
    if (value >= min && value <= max) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(what, " is ", value, ", not from ", min, " to ", max));
  };
  for (const absl::Status& status :
       {check("hidden", o.hidden, 16, 65536), check("width", o.width, 16, 65536),
        check("layers", o.layers, 1, 256), check("ranks", o.ranks, 2, 64),
        check("experts", o.experts, o.ranks, 1024), check("top-k", o.top_k, 1, o.experts),
        check("foreign slots", o.foreign_slots, 1, kMaxForeignSlots),
        check("steps", o.steps, 1, 10000)}) {
    if (!status.ok()) return status;
  }
  if (o.tokens.empty()) return absl::InvalidArgumentError("no tokens per step");
  for (int32_t tokens : o.tokens) {
    if (absl::Status status = check("tokens", tokens, 1, 65536); !status.ok()) return status;
  }
  if (o.dtype != "bfloat16" && o.dtype != "float32") {
    return absl::InvalidArgumentError(absl::StrCat("dtype \"", o.dtype, "\""));
  }
  return absl::OkStatus();
}

// Small random numbers.
void FillRandom(const Tensor& tensor, std::mt19937_64& rng) {
  const auto size = tensor.bytes() / DTypeSize(tensor.dtype);
  for (size_t i = 0; i < size; ++i) {
    const float value = static_cast<float>(rng() >> 40) * 0x1p-27f - 0x1p-4f;
    if (tensor.dtype == DType::kF32) {
      std::memcpy(static_cast<std::byte*>(tensor.data) + i * sizeof(value), &value, sizeof(value));
    } else {
      const auto upper = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
      std::memcpy(static_cast<std::byte*>(tensor.data) + i * sizeof(upper), &upper, sizeof(upper));
    }
  }
}

// The expert layers: homes' weights, and the foreign slots of each rank.
class Layers {
 public:
  Layers(const BenchReroutingOptions& options, DType dtype, ComputeBackend* backend) {
    std::mt19937_64 rng(options.seed);
    const auto elements = static_cast<size_t>(options.hidden * options.width);
    Buffer gate(elements * DTypeSize(dtype)), up(gate.bytes()), down(gate.bytes());
    experts_.resize(static_cast<size_t>(options.layers));
    slots_.resize(experts_.size());
    for (size_t layer = 0; layer < experts_.size(); ++layer) {
      for (int32_t e = 0; e < options.experts; ++e) {
        const Tensor wide[] = {gate.View(dtype, {options.width, options.hidden}),
                               up.View(dtype, {options.width, options.hidden}),
                               down.View(dtype, {options.hidden, options.width})};
        for (const Tensor& tensor : wide) FillRandom(tensor, rng);
        experts_[layer].push_back(backend->PackMlp(wide[0], wide[1], wide[2], FormatOf(dtype)));
      }
      for (int32_t s = 0; s < options.ranks * options.foreign_slots; ++s) {
        slots_[layer].push_back(backend->MakeMlp(options.width, options.hidden, FormatOf(dtype)));
      }
    }
  }

  const MlpWeights& Home(int32_t layer, int32_t expert) const {
    return experts_[static_cast<size_t>(layer)][static_cast<size_t>(expert)];
  }
  const MlpWeights& Slot(int32_t layer, int32_t slot) const {
    return slots_[static_cast<size_t>(layer)][static_cast<size_t>(slot)];
  }
  int64_t expert_bytes() const {
    const MlpWeights& expert = experts_[0][0];
    return static_cast<int64_t>(expert.gate_up.storage.bytes() + expert.down.storage.bytes());
  }

 private:
  std::vector<std::vector<MlpWeights>> experts_;  // [layers][experts]
  std::vector<std::vector<MlpWeights>> slots_;    // [layers][ranks * foreign_slots]
};

struct Rows {
  Buffer in, out;  // [rows, hidden]
  DType dtype = DType::kF32;
};

// One planner over the steps of one workload.
class Side {
 public:
  Side(const BenchReroutingOptions& options, const PlanCosts& costs, BalanceMode mode)
      : options_(options),
        homes_(std::make_shared<const ExpertPlacement>(
            ExpertPlacement::Even(options.layers, options.experts, options.ranks))),
        planner_(homes_, PlannerOptions{.mode = mode,
                                        .costs = costs,
                                        .foreign_slots_per_rank =
                                            mode == BalanceMode::kAuto ? options.foreign_slots : 0,
                                        .llep = {}}),
        rank_s_(static_cast<size_t>(options.ranks)) {}

  // Seconds of the expert layers of one step; counts: [layers][experts].
  absl::StatusOr<double> Step(const std::vector<std::vector<int32_t>>& counts, const Layers& layers,
                              const Rows& rows, ComputeBackend* backend, MoveLink* link) {
    double seconds = 0;
    for (int32_t layer = 0; layer < options_.layers; ++layer) {
      const double start = OwnSeconds();
      planner_.Plan(counts[static_cast<size_t>(layer)], 1, layer, &plan_);
      seconds += OwnSeconds() - start;
      std::ranges::fill(rank_s_, 0.0);
      if (absl::Status status = Move(layer, layers, link); !status.ok()) return status;
      for (int32_t rank = 0; rank < options_.ranks; ++rank) {
        Compute(layer, rank, layers, rows, backend);
      }
      seconds += std::ranges::max(rank_s_);
      Note();
    }
    step_ms_.push_back(seconds * 1e3);
    return seconds;
  }

  const std::vector<double>& step_ms() const { return step_ms_; }
  const std::vector<double>& moves_us() const { return moves_us_; }
  double tau_ps() const { return tau_ps_; }
  double max_mean() const { return max_mean_ / static_cast<double>(plans_); }
  bool idle() const { return idle_; }
  int64_t most_copies() const { return most_copies_; }

 private:
  absl::Status Move(int32_t layer, const Layers& layers, MoveLink* link) {
    for (const WeightMove& move : plan_.moves) {
      const int32_t slot = move.to_rank * options_.foreign_slots + move.slot;
      const double start = CpuSeconds(CLOCK_PROCESS_CPUTIME_ID);
      const auto time = link->Move(layers.Home(layer, move.expert), layers.Slot(layer, slot));
      if (!time.ok()) return time.status();
      // Both ends' work, counted at both: more than either has.
      const double seconds = CpuSeconds(CLOCK_PROCESS_CPUTIME_ID) - start;
      rank_s_[static_cast<size_t>(move.from_rank)] += seconds;
      rank_s_[static_cast<size_t>(move.to_rank)] += seconds;
      moves_us_.push_back(seconds * 1e6);
    }
    return absl::OkStatus();
  }

  void Compute(int32_t layer, int32_t rank, const Layers& layers, const Rows& rows,
               ComputeBackend* backend) {
    groups_.clear();
    int64_t end = 0;
    for (int32_t e = 0; e < options_.experts; ++e) {
      for (const DispatchShare share : plan_.Of(0, e)) {
        if (share.rank != rank) continue;
        groups_.push_back({&Weights(layer, rank, e, layers), end, end + share.copies});
        end += share.copies;
      }
    }
    if (groups_.empty()) return;
    const double start = OwnSeconds();
    backend->GroupedMlp(rows.in.View(rows.dtype, {end, options_.hidden}), groups_,
                        rows.out.View(rows.dtype, {end, options_.hidden}));
    backend->Synchronize();
    rank_s_[static_cast<size_t>(rank)] += OwnSeconds() - start;
  }

  const MlpWeights& Weights(int32_t layer, int32_t rank, int32_t expert,
                            const Layers& layers) const {
    if (homes_->Hosts(layer, expert)[0] == rank) return layers.Home(layer, expert);
    const std::span<const int32_t> slots = planner_.ForeignExperts(layer, rank);
    const auto slot = static_cast<int32_t>(std::ranges::find(slots, expert) - slots.begin());
    SY_CHECK_LT(static_cast<size_t>(slot), slots.size());
    return layers.Slot(layer, rank * options_.foreign_slots + slot);
  }

  void Note() {
    tau_ps_ += static_cast<double>(plan_.tau_ps);
    max_mean_ += static_cast<double>(plan_.max_rank_copies) * options_.ranks /
                 static_cast<double>(std::max<int64_t>(1, plan_.total_copies));
    most_copies_ = std::max(most_copies_, plan_.max_rank_copies);
    idle_ = idle_ && plan_.regime == PlanRegime::kPlain;
    ++plans_;
  }

  const BenchReroutingOptions& options_;
  const std::shared_ptr<const ExpertPlacement> homes_;
  DispatchPlanner planner_;
  DispatchPlan plan_;
  std::vector<double> rank_s_;  // of the layer at hand
  std::vector<MlpGroup> groups_;
  std::vector<double> step_ms_, moves_us_;
  double tau_ps_ = 0, max_mean_ = 0;
  int64_t plans_ = 0, most_copies_ = 0;
  bool idle_ = true;
};

struct Case {
  WorkloadSpec spec;
  std::string name;
};

std::vector<Case> Cases(const BenchReroutingOptions& options) {
  std::vector<Case> cases;
  for (int32_t tokens : options.tokens) {
    WorkloadSpec spec{.num_experts = options.experts,
                      .num_ranks = options.ranks,
                      .top_k = options.top_k,
                      .tokens = tokens,
                      .seed = options.seed};
    for (double zipf : {0.0, 0.3, 0.6, 1.0, 1.2}) {
      spec.zipf = zipf;
      cases.push_back({spec, spec.Name()});
    }
    spec.skew = WorkloadSkew::kHotRank;
    cases.push_back({spec, spec.Name()});
  }
  return cases;
}

}  // namespace

absl::StatusOr<BenchReroutingReport> BenchRerouting(const BenchReroutingOptions& options) {
  if (absl::Status status = CheckOptions(options); !status.ok()) return status;
  ThreadPool pool(1);
  std::string error;
  const std::unique_ptr<ComputeBackend> backend = MakeCpuBackend(&pool, options.isa, &error);
  if (backend == nullptr) return absl::InvalidArgumentError(error);
  const auto link = MoveLink::Create("127.0.0.1");
  if (!link.ok()) return link.status();
  const DType dtype = options.dtype == "float32" ? DType::kF32 : DType::kBF16;
  BenchReroutingReport report{.options = options, .costs = {}, .rows = {}};
  report.costs = MeasurePlanCosts(
      {.hidden = options.hidden, .width = options.width, .dtype = dtype, .format = FormatOf(dtype)},
      backend.get(), link->get());
  const Layers layers(options, dtype, backend.get());
  const auto most_rows = int64_t{std::ranges::max(options.tokens)} * options.top_k;
  Rows rows{.in = Buffer(static_cast<size_t>(most_rows * options.hidden) * DTypeSize(dtype)),
            .out = {},
            .dtype = dtype};
  rows.out = Buffer(rows.in.bytes());
  std::mt19937_64 rng(options.seed + 1);
  FillRandom(rows.in.View(dtype, {most_rows, options.hidden}), rng);

  const std::vector<Case> cases = Cases(options);
  int64_t done = 0;
  for (const Case& c : cases) {
    std::vector<Workload> workloads;  // the layers differ
    for (int32_t layer = 0; layer < options.layers; ++layer) {
      WorkloadSpec spec = c.spec;
      spec.seed = options.seed + static_cast<uint64_t>(layer) * 1000;
      workloads.emplace_back(spec);
    }
    Side plain(options, report.costs, BalanceMode::kNone);
    Side rerouted(options, report.costs, BalanceMode::kAuto);
    std::vector<double> speedups;
    std::vector<std::vector<int32_t>> counts(workloads.size());
    for (int32_t step = 0; step < options.steps; ++step, ++done) {
      if (options.progress) {
        options.progress(done, static_cast<int64_t>(cases.size()) * options.steps);
      }
      for (size_t layer = 0; layer < workloads.size(); ++layer) {
        const std::span<const int32_t> next = workloads[layer].Next();
        counts[layer].assign(next.begin(), next.end());
      }
      std::array<Side*, 2> order = {&plain, &rerouted};
      if (step % 2 == 1) std::swap(order[0], order[1]);
      for (Side* side : order) {
        const auto seconds = side->Step(counts, layers, rows, backend.get(), link->get());
        if (!seconds.ok()) return seconds.status();
      }
      speedups.push_back(plain.step_ms().back() / rerouted.step_ms().back());
    }
    const int64_t row_bytes = 2 * options.hidden * static_cast<int64_t>(DTypeSize(dtype));
    const int64_t home_bytes = layers.expert_bytes() * options.layers *
                               ((options.experts + options.ranks - 1) / options.ranks);
    report.rows.push_back(
        {.workload = c.name,
         .tokens = c.spec.tokens,
         .plain_max_mean = plain.max_mean(),
         .auto_max_mean = rerouted.max_mean(),
         .plain_ms = Quantile(plain.step_ms(), 0.5),
         .auto_ms = Quantile(rerouted.step_ms(), 0.5),
         .speedup = Quantile(speedups, 0.5),
         .speedup_p25 = Quantile(speedups, 0.25),
         .speedup_p75 = Quantile(speedups, 0.75),
         .modelled_speedup = plain.tau_ps() / rerouted.tau_ps(),
         .moves = static_cast<int64_t>(rerouted.moves_us().size()),
         .move_us = Quantile(rerouted.moves_us(), 0.5),
         .idle = rerouted.idle(),
         .plain_bytes = home_bytes + plain.most_copies() * row_bytes,
         .auto_bytes = home_bytes + rerouted.most_copies() * row_bytes +
                       layers.expert_bytes() * options.layers * options.foreign_slots});
  }
  if (options.progress) options.progress(done, done);
  return report;
}

std::string BenchReroutingReport::Text() const {
  std::string text = absl::StrFormat(
      "%d layers, hidden %d, %d experts of width %d, top-%d, %d expert ranks, %d foreign slots, %s "
      "%s\nmeasured costs: %.1f us to read an expert, %.3f us per copy, %.1f us to move an expert\n"
      "ms: processor time of each rank's share, measured one after the other, put together as if "
      "in "
      "parallel; modelled: the cost model alone\n"
      "%-34s %9s %9s %9s %9s %8s %13s %9s %6s %8s %9s %9s\n",
      options.layers, options.hidden, options.experts, options.width, options.top_k, options.ranks,
      options.foreign_slots, options.dtype, options.isa,
      static_cast<double>(costs.expert_read_ps) * 1e-6, static_cast<double>(costs.token_ps) * 1e-6,
      static_cast<double>(costs.expert_move_ps) * 1e-6, "workload", "max/mean", "auto's",
      "plain ms", "auto ms", "speed-up", "p25-p75", "modelled", "moves", "move us", "plain MiB",
      "auto MiB");
  constexpr double kMiB = 1 << 20;
  for (const BenchReroutingRow& row : rows) {
    absl::StrAppend(
        &text,
        absl::StrFormat(
            "%-34s %9.2f %9.2f %9.3f %9.3f %7.2fx %6.2f-%6.2f %8.2fx %6d %8.1f %9.1f "
            "%9.1f%s\n",
            row.workload, row.plain_max_mean, row.auto_max_mean, row.plain_ms, row.auto_ms,
            row.speedup, row.speedup_p25, row.speedup_p75, row.modelled_speedup, row.moves,
            row.move_us, static_cast<double>(row.plain_bytes) / kMiB,
            static_cast<double>(row.auto_bytes) / kMiB, row.idle ? "  auto does nothing" : ""));
  }
  return text;
}

std::string BenchReroutingReport::Json() const {
  nlohmann::ordered_json out;
  out["layers"] = options.layers;
  out["hidden"] = options.hidden;
  out["experts"] = options.experts;
  out["width"] = options.width;
  out["top_k"] = options.top_k;
  out["ranks"] = options.ranks;
  out["foreign_slots"] = options.foreign_slots;
  out["dtype"] = options.dtype;
  out["isa"] = options.isa;
  out["expert_read_ps"] = costs.expert_read_ps;
  out["token_ps"] = costs.token_ps;
  out["expert_move_ps"] = costs.expert_move_ps;
  out["rows"] = nlohmann::ordered_json::array();
  for (const BenchReroutingRow& row : rows) {
    out["rows"].push_back({{"workload", row.workload},
                           {"tokens", row.tokens},
                           {"plain_max_mean", row.plain_max_mean},
                           {"auto_max_mean", row.auto_max_mean},
                           {"plain_ms", row.plain_ms},
                           {"auto_ms", row.auto_ms},
                           {"speedup", row.speedup},
                           {"speedup_p25", row.speedup_p25},
                           {"speedup_p75", row.speedup_p75},
                           {"modelled_speedup", row.modelled_speedup},
                           {"moves", row.moves},
                           {"move_us", row.move_us},
                           {"idle", row.idle},
                           {"plain_bytes", row.plain_bytes},
                           {"auto_bytes", row.auto_bytes}});
  }
  return out.dump(1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace switchyard
