// failing_worker: `switchyard worker` with fail points, for the tests. It takes the same flags; the
// environment says where it fails (fail_points.h).
#include <CLI/CLI.hpp>

#include "server/cli/command.h"
#include "tests/failing_host.h"

int main(int argc, char** argv) {
  CLI::App app("A worker that ends itself where a test says.");
  app.require_subcommand(1);
  switchyard::FailPoints points;
  const switchyard::Command worker =
      switchyard::AddWorker(&app, [&points](std::unique_ptr<switchyard::RoleHost> host) {
        return switchyard::MakeFailingHost(std::move(host), &points);
      });
  CLI11_PARSE(app, argc, argv);
  return worker.run();
}
