#include "server/generate.h"

#include <CLI/CLI.hpp>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <memory>
#include <string>

#include "server/cli/command.h"
#include "server/cli/local_engine.h"
#include "server/cli/log.h"
#include "server/progress_bar.h"

namespace switchyard {
namespace {

struct GenerateFlags {
  LocalEngineFlags engine;
  std::string chat_template;
  std::string log_format = "text";
  GenerationRequest request;
  std::string prompt;
  bool chat = false;
  uint64_t seed = 0;
};

int RunGenerateCommand(const GenerateFlags& flags) {
  ConfigureLog(flags.log_format);
  absl::StatusOr<std::unique_ptr<LocalEngine>> loaded;
  {
    ProgressBar bar("loading", 100, /*quiet=*/false);
    loaded = LoadLocalEngine(flags.engine,
                             {.served_model_name = "", .chat_template = flags.chat_template},
                             [&](int percent) { bar.Update(percent); });
  }
  if (!loaded.ok()) return Fail(loaded.status());
  GenerationRequest request = flags.request;
  request.chat = flags.chat;
  if (flags.chat) {
    request.conversation.now_unix_seconds = std::time(nullptr);
    request.conversation.messages = {{{"role", "user"}, {"content", flags.prompt}}};
  } else {
    request.prompts = {PromptInput{.text = flags.prompt, .ids = {}}};
  }
  (*loaded)->scheduler->Start();
  const auto report = RunGenerate(request, (*loaded)->engine, flags.seed, stdout);
  if (!report.ok()) return Fail(report.status());
  std::printf("\n");
  std::fprintf(stderr, "%s\n", FormatReport(*report).c_str());
  return 0;
}

}  // namespace

Command AddGenerate(CLI::App* parent) {
  CLI::App* app = parent->add_subcommand("generate", "answer one prompt in this process");
  app->footer(
      "Answers one prompt in this process: the text goes to stdout as it comes, tokens per second "
      "to stderr.\n\nExample: switchyard generate --model models/demo --chat --prompt \"Is 7 odd "
      "or "
      "even?\" --temperature 0");
  auto flags = std::make_shared<GenerateFlags>();
  AddLocalEngineFlags(app, &flags->engine);
  AddChatTemplateFlag(app, &flags->chat_template);
  AddLogFormatFlag(app, &flags->log_format);
  GenerationRequest& request = flags->request;
  request.max_tokens = 128;
  app->add_option("--prompt", flags->prompt, "the text to continue, or with --chat the question")
      ->required();
  app->add_flag("--chat", flags->chat, "send the prompt as a user's message through the template");
  app->add_option("--max-tokens", request.max_tokens, "tokens to generate at most (128)");
  app->add_option("--temperature", request.temperature, "0: greedy (default: as the model says)");
  app->add_option("--top-p", request.top_p, "nucleus sampling");
  app->add_option("--top-k", request.top_k, "sample from the k best");
  app->add_option("--min-p", request.min_p, "least share of the best token's probability");
  app->add_option("--repetition-penalty", request.repetition_penalty, "1: none");
  app->add_option("--stop", request.stop, "end before this text; may be given several times");
  app->add_flag("--ignore-eos", request.ignore_eos, "go on after an end-of-text token");
  app->add_option("--seed", flags->seed, "of the random numbers")->capture_default_str();
  return {app, [flags] { return RunGenerateCommand(*flags); }};
}

}  // namespace switchyard
