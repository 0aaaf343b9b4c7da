#include <CLI/CLI.hpp>
#include <cstdio>
#include <fstream>
#include <memory>
#include <string>

#include "comm/bench_planner.h"
#include "kernels/bench_kernels.h"
#include "server/cli/command.h"
#include "server/cli/local_engine.h"
#include "server/cli/log.h"
#include "server/progress_bar.h"
#include "worker/bench_offline.h"
#include "worker/bench_rerouting.h"

namespace switchyard {
namespace {

struct BenchFlags {
  BenchOfflineOptions offline;
  bool json = false;
};

int RunBenchOffline(BenchFlags flags) {
  ConfigureLog("text");
  std::unique_ptr<ProgressBar> bar;
  flags.offline.cell.progress = [&](int64_t done, int64_t total) {
    if (bar == nullptr) bar = std::make_unique<ProgressBar>("loading", total, /*quiet=*/false);
    bar->Update(done);
    if (done == total) bar.reset();
  };
  flags.offline.log = [](const std::string& line) { std::fprintf(stderr, "%s\n", line.c_str()); };
  const auto report = BenchOffline(flags.offline);
  if (!report.ok()) return Fail(report.status());
  std::printf("%s\n", flags.json ? report->Json().c_str() : report->Text().c_str());
  return 0;
}

struct BenchPlannerFlags {
  BenchPlannerOptions options;
  std::string plot;
  bool json = false;
};

int RunBenchPlanner(BenchPlannerFlags flags) {
  ConfigureLog("text");
  absl::StatusOr<BenchPlannerReport> report;
  {
    ProgressBar bar("planning", 100, /*quiet=*/false);
    flags.options.progress = [&](int64_t done, int64_t total) { bar.Update(done * 100 / total); };
    report = BenchPlanner(flags.options);
  }
  if (!report.ok()) return Fail(report.status());
  if (!flags.plot.empty()) {
    std::ofstream file(flags.plot, std::ios::binary);
    file << report->Svg();
    if (!file.flush()) return Fail(absl::UnavailableError("cannot write " + flags.plot));
  }
  std::printf("%s\n", flags.json ? report->Json().c_str() : report->Text().c_str());
  return 0;
}

struct BenchKernelsFlags {
  BenchKernelsOptions options;
  bool json = false;
};

int RunBenchKernels(BenchKernelsFlags flags) {
  ConfigureLog("text");
  BenchKernelsReport report;
  std::string error;
  bool ok = false;
  {
    ProgressBar bar("measuring", 100, /*quiet=*/false);
    flags.options.progress = [&](int64_t done, int64_t total) { bar.Update(done * 100 / total); };
    ok = BenchKernels(flags.options, &report, &error);
  }
  if (!ok) return Fail(absl::InvalidArgumentError(error));
  std::printf("%s\n", flags.json ? report.Json().c_str() : report.Text().c_str());
  return 0;
}

void AddKernelsFlags(CLI::App* kernels, BenchKernelsFlags* flags) {
  kernels->footer(
      "Matrix products and one MoE layer of OLMoE-1B-7B's shape in bfloat16, int8 and int4, beside "
      "the CPU's ceilings\nand oneDNN, interleaved.\n\nExample: switchyard bench kernels --json");
  BenchKernelsOptions& options = flags->options;
  kernels->add_option("--seconds", options.seconds, "of measuring")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 3600.0));
  kernels->add_option("--threads", options.threads, "0: all cores")
      ->capture_default_str()
      ->check(CLI::Range(0, 1024));
  kernels->add_option("--isa", options.isa, "auto, avx512, avx2 or portable")
      ->capture_default_str();
  kernels->add_flag("--json", flags->json, "print JSON alone on stdout");
}

void AddPlannerFlags(CLI::App* planner, BenchPlannerFlags* flags) {
  planner->footer(
      "Synthetic and recorded routing through every --balance mode: what the plans would cost (a "
      "model, not a "
      "measurement), how\nfar from their lower bound they are, and how long planning takes. tau "
      "includes transfers.\n\nExample: switchyard bench planner --json --plot planner.svg");
  BenchPlannerOptions& options = flags->options;
  planner->add_option("--steps", options.steps, "of every workload")->capture_default_str();
  planner
      ->add_option("--t-mem", options.t_mem_tokens,
                   "copies whose computing takes as long as reading an expert's weights")
      ->capture_default_str()
      ->check(CLI::Range(0, 1000000));
  planner
      ->add_option("--t-link", options.t_link_tokens,
                   "copies whose computing takes as long as moving an expert (0: unknown)")
      ->capture_default_str()
      ->check(CLI::Range(0, 1000000));
  planner->add_option("--token-ps", options.token_ps, "picoseconds to compute one copy")
      ->capture_default_str();
  planner
      ->add_option("--foreign-slots", options.foreign_slots,
                   "experts per layer and rank that may be moved in")
      ->capture_default_str();
  planner->add_option("--seed", options.seed, "of the workloads")->capture_default_str();
  planner->add_option("--trace", options.traces,
                      "file of `switchyard trace` to replay too; may be given several times");
  ReplayOptions& replay = options.replay;
  planner->add_option("--ranks", replay.num_ranks, "expert ranks on which --trace is replayed")
      ->capture_default_str();
  planner->add_option("--sources", replay.num_sources, "attention workers of --trace's sequences")
      ->capture_default_str();
  planner
      ->add_option("--decode-tokens", replay.decode_tokens,
                   "of --trace per step, one of each sequence")
      ->capture_default_str();
  planner
      ->add_option("--prefill-tokens", replay.prefill_tokens,
                   "of --trace per step, sequence after sequence")
      ->capture_default_str();
  planner->add_option("--plot", flags->plot, "file for a plot of cost against skew (SVG)");
  planner->add_flag("--json", flags->json, "print JSON alone on stdout");
}

struct BenchReroutingFlags {
  BenchReroutingOptions options;
  bool json = false;
};

int RunBenchRerouting(BenchReroutingFlags flags) {
  ConfigureLog("text");
  absl::StatusOr<BenchReroutingReport> report;
  {
    ProgressBar bar("rerouting", 100, /*quiet=*/false);
    flags.options.progress = [&](int64_t done, int64_t total) { bar.Update(done * 100 / total); };
    report = BenchRerouting(flags.options);
  }
  if (!report.ok()) return Fail(report.status());
  std::printf("%s\n", flags.json ? report->Json().c_str() : report->Text().c_str());
  return 0;
}

void AddReroutingFlags(CLI::App* app, BenchReroutingFlags* flags) {
  app->footer(
      "Skewed synthetic routing through plain expert parallelism and through --balance auto, "
      "interleaved. Each rank's\nshare is computed by one thread, one rank after the other, and "
      "moved experts are sent over the loopback network:\na layer takes planning + the longest "
      "rank, "
      "as if every rank had a core. `modelled` is the cost model's figure.\n\nExample: switchyard "
      "bench rerouting --tokens 16,512 --json");
  BenchReroutingOptions& options = flags->options;
  app->add_option("--hidden", options.hidden, "size of a row")->capture_default_str();
  app->add_option("--width", options.width, "of an expert")->capture_default_str();
  app->add_option("--layers", options.layers, "MoE layers")->capture_default_str();
  app->add_option("--experts", options.experts, "per layer")->capture_default_str();
  app->add_option("--top-k", options.top_k, "experts of a token")->capture_default_str();
  app->add_option("--ranks", options.ranks, "expert workers")->capture_default_str();
  app->add_option("--foreign-slots", options.foreign_slots,
                  "experts per layer and rank that may be moved in")
      ->capture_default_str();
  app->add_option("--tokens", options.tokens, "of a step, e.g. 16,512")
      ->delimiter(',')
      ->capture_default_str();
  app->add_option("--steps", options.steps, "of every workload and planner")->capture_default_str();
  app->add_option("--dtype", options.dtype, "bfloat16 or float32")->capture_default_str();
  app->add_option("--isa", options.isa, "auto, avx512, avx2 or portable")->capture_default_str();
  app->add_option("--seed", options.seed, "of weights and workloads")->capture_default_str();
  app->add_flag("--json", flags->json, "print JSON alone on stdout");
}

}  // namespace

Command AddBench(CLI::App* parent) {
  CLI::App* app = parent->add_subcommand("bench", "measure speed");
  auto flags = std::make_shared<BenchFlags>();
  app->require_subcommand(1);
  CLI::App* offline = app->add_subcommand("offline", "prefill and decode speed without a server");
  offline->footer(
      "Random, distinct tokens per sequence. 'MB a step' are the weights and keys and values that "
      "a "
      "decode step reads,\neach once; 'of bandwidth' is the share of a read probe's rate, sampled "
      "between the runs, at which it does so.\n\nExample: switchyard bench offline --model "
      "models/demo "
      "--prompt-tokens 128 --output-tokens 64 --batch 1,4,16");
  BenchOfflineOptions& options = flags->offline;
  offline->add_option("--model", options.cell.model_dir, "checkpoint folder")->required();
  offline->add_option("--prompt-tokens", options.prompt_tokens, "per sequence")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  offline->add_option("--output-tokens", options.output_tokens, "per sequence")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  offline->add_option("--batch", options.batches, "sequences at once, e.g. 1,4,16")
      ->delimiter(',')
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  offline->add_option("--repetitions", options.repetitions, "of every batch; medians are printed")
      ->capture_default_str()
      ->check(CLI::Range(1, 1000));
  offline->add_option("--attention-workers", options.cell.attention_workers, "")
      ->capture_default_str();
  offline->add_option("--expert-workers", options.cell.expert_workers, "")->capture_default_str();
  offline->add_option("--threads", options.cell.threads, "0: all cores")->capture_default_str();
  offline->add_option("--dtype", options.cell.dtype, "auto, float32 or bfloat16")
      ->capture_default_str();
  offline->add_option("--isa", options.cell.isa, "auto, avx512, avx2 or portable")
      ->capture_default_str();
  AddWeightFormatFlags(offline, &options.cell.formats);
  offline
      ->add_option("--busy-threads", options.busy_threads,
                   "run everything again beside so many threads that only compute, and print what "
                   "is left of the speed")
      ->capture_default_str()
      ->check(CLI::Range(0, 1024));
  offline->add_option("--seed", options.seed, "of the random tokens")->capture_default_str();
  offline->add_flag("--json", flags->json, "print JSON alone on stdout");
  auto planner_flags = std::make_shared<BenchPlannerFlags>();
  CLI::App* planner = app->add_subcommand("planner", "compare the dispatch planners");
  AddPlannerFlags(planner, planner_flags.get());
  auto rerouting_flags = std::make_shared<BenchReroutingFlags>();
  CLI::App* rerouting =
      app->add_subcommand("rerouting", "what rerouting work between expert workers gains");
  AddReroutingFlags(rerouting, rerouting_flags.get());
  auto kernels_flags = std::make_shared<BenchKernelsFlags>();
  CLI::App* kernels = app->add_subcommand("kernels", "matrix products beside oneDNN and the CPU");
  AddKernelsFlags(kernels, kernels_flags.get());
  return {app, [=] {
            if (kernels->parsed()) return RunBenchKernels(*kernels_flags);
            if (rerouting->parsed()) return RunBenchRerouting(*rerouting_flags);
            return planner->parsed() ? RunBenchPlanner(*planner_flags) : RunBenchOffline(*flags);
          }};
}

}  // namespace switchyard
