#include "server/eval.h"

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>

#include "server/cli/command.h"

namespace switchyard {
namespace {

int RunEvalCommand(const EvalOptions& options) {
  const auto result = RunEval(options);
  if (!result.ok()) return Fail(result.status());
  std::printf("%s\n", FormatEval(*result, options.json).c_str());
  return 0;
}

}  // namespace

Command AddEval(CLI::App* parent) {
  CLI::App* app =
      parent->add_subcommand("eval", "score a running server on questions with answers");
  auto options = std::make_shared<EvalOptions>();
  app->footer(
      "Asks every line of a file ({\"domain\": …, \"messages\": […], \"answer\": …}) at "
      "temperature "
      "0 and counts\nthe replies that equal the answer.\n\nExample: switchyard eval --url "
      "http://127.0.0.1:8000 --items models/demo/eval.jsonl");
  app->add_option("--url", options->url, "an OpenAI-compatible server, without /v1")
      ->capture_default_str();
  app->add_option("--items", options->items, "file with one item per line")->required();
  app->add_option("--model", options->model, "model name to ask for (default: none)");
  app->add_option("--api-key", options->api_key, "key to send")->envname("SWITCHYARD_API_KEY");
  app->add_option("--concurrency", options->concurrency, "requests at once")
      ->capture_default_str()
      ->check(CLI::Range(1, 1024));
  app->add_option("--max-tokens", options->max_tokens, "of a reply")->capture_default_str();
  app->add_flag("--json", options->json, "print JSON alone on stdout");
  return {app, [options] { return RunEvalCommand(*options); }};
}

}  // namespace switchyard
