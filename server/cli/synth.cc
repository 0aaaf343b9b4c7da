#include "worker/synth.h"

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>

#include "server/cli/command.h"
#include "server/cli/log.h"
#include "server/progress_bar.h"

namespace switchyard {
namespace {

int RunSynthCommand(SynthOptions options) {
  ConfigureLog("text");
  std::unique_ptr<ProgressBar> bar;
  options.progress = [&](int64_t done, int64_t total) {
    if (bar == nullptr) bar = std::make_unique<ProgressBar>("writing", total, /*quiet=*/false);
    bar->Update(done);
  };
  const absl::Status status = Synthesize(options);
  return status.ok() ? 0 : Fail(status);
}

}  // namespace

Command AddSynth(CLI::App* parent) {
  CLI::App* app = parent->add_subcommand("synth", "write a checkpoint with random weights");
  auto options = std::make_shared<SynthOptions>();
  app->footer(
      "Writes a checkpoint with random weights for any supported config.json, with a byte-level "
      "tokenizer, so\nthat a model's shape can be served and measured without its weights.\n\n"
      "Example: switchyard synth --config config.json --out /tmp/olmoe --dtype bfloat16");
  app->add_option("--config", options->config_path, "a config.json")->required();
  app->add_option("--out", options->out_dir, "folder to write; config.json comes last")->required();
  app->add_option("--seed", options->seed, "the same seed gives the same bytes")
      ->capture_default_str();
  app->add_option("--dtype", options->dtype, "auto (as the config says), float32 or bfloat16")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "float32", "bfloat16"}));
  app->add_option("--threads", options->threads, "0: all cores")->capture_default_str();
  return {app, [options] { return RunSynthCommand(*options); }};
}

}  // namespace switchyard
