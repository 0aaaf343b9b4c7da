#include "server/cli/front_end_flags.h"

#include <CLI/CLI.hpp>
#include <chrono>
#include <map>
#include <string>

#include "server/cli/log.h"
#include "server/cli/model_text.h"

namespace switchyard {

ServerOptions FrontEndFlags::server_options() const {
  ServerOptions options = server;
  options.shutdown_timeout = std::chrono::seconds(shutdown_timeout_s);
  return options;
}

void AddFrontEndFlags(CLI::App* app, FrontEndFlags* flags) {
  ServerOptions& server = flags->server;
  app->add_option("--host", server.http.host, "address to listen on")->capture_default_str();
  app->add_option("--port", server.http.port, "HTTP port (0: any free one)")->capture_default_str();
  app->add_option("--grpc-port", server.grpc.port, "gRPC port (0: any free one)")
      ->capture_default_str();
  app->add_option("--served-model-name", flags->served_model_name,
                  "the model's name in the API (default: the folder's name)");
  AddChatTemplateFlag(app, &flags->chat_template);
  app->add_option("--max-queued-requests", flags->max_queued_requests,
                  "waiting requests; more are answered 429")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  app->add_option("--api-key", server.front_end.api_keys,
                  "key that requests must carry; may be given several times")
      ->envname("SWITCHYARD_API_KEY");
  app->add_option("--seed", server.front_end.seed,
                  "base for the seeds of requests that bring none (default: random)");
  app->add_option("--shutdown-timeout", flags->shutdown_timeout_s,
                  "seconds that running requests get after SIGTERM")
      ->capture_default_str()
      ->check(CLI::Range(0, 86400));
  AddLogFormatFlag(app, &flags->log_format);
}

void AddStepFlags(CLI::App* app, SchedulerOptions* scheduler) {
  app->add_option("--max-num-seqs", scheduler->max_num_seqs, "sequences in one step")
      ->capture_default_str()
      ->check(CLI::Range(1, 65536));
  app->add_option("--max-num-batched-tokens", scheduler->max_num_batched_tokens,
                  "tokens in one step; longer prompts are computed in chunks")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  app->add_option("--steps-in-flight", scheduler->max_steps_in_flight,
                  "2: the next step is planned and sent while one runs; 1: when it has ended")
      ->capture_default_str()
      ->check(CLI::Range(1, 2));
  static const std::map<std::string, MicroBatchMode> kMicroBatches = {
      {"auto", MicroBatchMode::kAuto}, {"1", MicroBatchMode::kOne}, {"2", MicroBatchMode::kTwo}};
  app->add_option(
         "--micro-batches", scheduler->micro_batches,
         "parts of a step of which one is computed while the other is at the experts: 1, 2, "
         "or auto (two where they were measured to be faster)")
      ->transform(CLI::CheckedTransformer(kMicroBatches).description("{auto,1,2}"))
      ->default_str("auto");
}

}  // namespace switchyard
