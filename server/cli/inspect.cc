#include "worker/inspect.h"

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>

#include "server/cli/command.h"
#include "server/cli/local_engine.h"
#include "server/cli/log.h"

namespace switchyard {
namespace {

struct InspectFlags {
  InspectOptions options;
  bool json = false;
};

int RunInspectCommand(const InspectFlags& flags) {
  ConfigureLog("text");
  const auto report = Inspect(flags.options);
  if (!report.ok()) return Fail(report.status());
  std::printf("%s\n", flags.json ? report->json.c_str() : report->text.c_str());
  return report->supported ? 0 : kFailed;
}

}  // namespace

Command AddInspect(CLI::App* parent) {
  CLI::App* app = parent->add_subcommand("inspect", "show what a checkpoint is and needs");
  auto flags = std::make_shared<InspectFlags>();
  app->footer(
      "Shows what a checkpoint is and needs: architecture, parameters (total and active per "
      "token), "
      "memory\nper role, KV bytes per token, and what is not supported. Exits 1 if it cannot be "
      "served.\n\nExample: switchyard inspect models/demo");
  app->add_option("DIR", flags->options.model_dir, "checkpoint folder")->required();
  app->add_option("--dtype", flags->options.dtype, "type the memory figures are for")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "float32", "bfloat16"}));
  AddWeightFormatFlags(app, &flags->options.formats);
  app->add_flag("--json", flags->json, "print JSON alone on stdout");
  return {app, [flags] { return RunInspectCommand(*flags); }};
}

}  // namespace switchyard
