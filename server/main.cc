// main(): binds the subcommands of cli/.
#include <CLI/CLI.hpp>

#include "server/cli/command.h"
#include "server/cli/memory_policy.h"

namespace switchyard {
namespace {

int Main(int argc, char** argv) {
  CLI::App app("Switchyard: a server for mixture-of-experts language models.");
  app.set_version_flag("--version", "switchyard " SWITCHYARD_VERSION);
  app.require_subcommand(1);
  app.footer("`switchyard COMMAND --help` explains a command and shows an example.");
  const Command commands[] = {AddServe(&app),    AddServer(&app), AddWorker(&app),
                              AddGenerate(&app), AddEval(&app),   AddSynth(&app),
                              AddInspect(&app),  AddBench(&app),  AddTrace(&app)};
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kUsage;
  }
  InterleaveMemory();
  for (const Command& command : commands) {
    if (command.app->parsed()) return command.run();
  }
  return kUsage;  // not reached: one subcommand is required
}

}  // namespace
}  // namespace switchyard

int main(int argc, char** argv) { return switchyard::Main(argc, argv); }
