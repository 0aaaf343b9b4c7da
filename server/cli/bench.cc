#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <string>

#include "server/cli/command.h"
#include "server/cli/log.h"
#include "server/progress_bar.h"
#include "worker/bench_offline.h"

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

}  // namespace

Command AddBench(CLI::App* parent) {
  CLI::App* app = parent->add_subcommand("bench", "measure speed");
  auto flags = std::make_shared<BenchFlags>();
  app->require_subcommand(1);
  CLI::App* offline = app->add_subcommand("offline", "prefill and decode speed without a server");
  offline->footer(
      "Random, distinct tokens per sequence. The memory bandwidth of a probe in the same process "
      "stands\nbeside every figure.\n\nExample: switchyard bench offline --model models/demo "
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
  offline->add_option("--attention-workers", options.cell.attention_workers, "")
      ->capture_default_str();
  offline->add_option("--expert-workers", options.cell.expert_workers, "")->capture_default_str();
  offline->add_option("--threads", options.cell.threads, "0: all cores")->capture_default_str();
  offline->add_option("--dtype", options.cell.dtype, "auto, float32 or bfloat16")
      ->capture_default_str();
  offline->add_option("--isa", options.cell.isa, "auto, avx512, avx2 or portable")
      ->capture_default_str();
  offline->add_option("--seed", options.seed, "of the random tokens")->capture_default_str();
  offline->add_flag("--json", flags->json, "print JSON alone on stdout");
  return {app, [flags] { return RunBenchOffline(*flags); }};
}

}  // namespace switchyard
