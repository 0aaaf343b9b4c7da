// main(): the composition root, the one file that may include every room. A subcommand is a
// function of the room that does the work; here flags become its options and the rooms are bound
// together.
#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "scheduler/scheduler.h"
#include "scheduler/worker_client.h"
#include "server/engine.h"
#include "server/eval.h"
#include "server/generate.h"
#include "server/json_writer.h"
#include "server/progress_bar.h"
#include "server/sampling_defaults.h"
#include "server/server.h"
#include "server/shutdown_signals.h"
#include "server/text/chat_template.h"
#include "server/text/tokenizer.h"
#include "worker/bench_offline.h"
#include "worker/inspect.h"
#include "worker/local_cell.h"
#include "worker/synth.h"

namespace switchyard {
namespace {

// Exit codes: 0 done, 1 failed, 2 wrong usage.
constexpr int kFailed = 1;
constexpr int kUsage = 2;

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "switchyard: %s\n", std::string(status.message()).c_str());
  return status.code() == absl::StatusCode::kInvalidArgument ? kUsage : kFailed;
}

// %* in a pattern: the message as a JSON string.
class JsonMessage final : public spdlog::custom_flag_formatter {
 public:
  void format(const spdlog::details::log_msg& message, const std::tm&,
              spdlog::memory_buf_t& out) override {
    std::string text;
    AppendJsonString({message.payload.data(), message.payload.size()}, text);
    out.append(text.data(), text.data() + text.size());
  }
  std::unique_ptr<custom_flag_formatter> clone() const override {
    return std::make_unique<JsonMessage>();
  }
};

// Logs go to stderr: stdout is for results, the ready line and JSON.
void ConfigureLog(const std::string& format) {
  spdlog::set_default_logger(
      std::make_shared<spdlog::logger>("", std::make_shared<spdlog::sinks::stderr_sink_mt>()));
  auto formatter = std::make_unique<spdlog::pattern_formatter>();
  formatter->add_flag<JsonMessage>('*').set_pattern(
      format == "json" ? R"({"time":"%Y-%m-%dT%H:%M:%S.%e%z","level":"%l","message":%*})"
                       : "%Y-%m-%d %H:%M:%S.%e %L %v");
  spdlog::set_formatter(std::move(formatter));
}

// ---- the engine in this process ----

struct EngineFlags {
  CellOptions cell;
  SchedulerOptions scheduler;
  std::string served_model_name;
  std::string chat_template;
  std::string device = "auto";
  std::string log_format = "text";
};

// The scheduler's view of the workers in this process.
class CellClient final : public WorkerClient {
 public:
  explicit CellClient(LocalCell* cell) : cell_(cell) {}
  int32_t num_attention_workers() const override { return cell_->num_attention_workers(); }
  uint64_t progress() const override { return cell_->progress(); }
  void Execute(int32_t worker, StepPlan plan) override { cell_->Execute(worker, std::move(plan)); }
  void SetResultCallback(std::function<void(StepResult)> on_result) override {
    cell_->SetResultCallback(std::move(on_result));
  }

 private:
  LocalCell* const cell_;
};

// Everything behind an Engine. The scheduler goes first, then the workers.
struct LoadedEngine {
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<ChatTemplate> chat_template;  // null: the checkpoint has none
  std::unique_ptr<LocalCell> cell;
  std::unique_ptr<CellClient> client;
  std::unique_ptr<Scheduler> scheduler;  // not started
  Engine engine;
};

// Loads text parts and weights; `percent` is called with 0 … 100 while the weights load.
absl::StatusOr<std::unique_ptr<LoadedEngine>> LoadEngine(EngineFlags flags,
                                                         const std::function<void(int)>& percent) {
  auto loaded = std::make_unique<LoadedEngine>();
  const std::filesystem::path dir = flags.cell.model_dir;
  if (!std::filesystem::is_directory(dir)) {
    return absl::NotFoundError(
        absl::StrCat("--model ", dir.string(), " is not a folder with a checkpoint"));
  }
  auto tokenizer = Tokenizer::Load(dir);
  if (!tokenizer.ok()) return tokenizer.status();
  loaded->tokenizer = *std::move(tokenizer);
  auto chat = ChatTemplate::Load(dir, flags.chat_template, *loaded->tokenizer);
  if (chat.ok()) {
    loaded->chat_template = *std::move(chat);
  } else if (absl::IsNotFound(chat.status()) && flags.chat_template.empty()) {
    spdlog::warn("{}: chat completions will be refused", std::string(chat.status().message()));
  } else {
    return chat.status();
  }
  const auto defaults = LoadSamplingDefaults(dir);
  if (!defaults.ok()) return defaults.status();

  flags.cell.max_num_seqs = flags.scheduler.max_num_seqs;
  flags.cell.max_num_batched_tokens = flags.scheduler.max_num_batched_tokens;
  flags.cell.progress = [&percent](int64_t done, int64_t total) {
    percent(total > 0 ? static_cast<int>(done * 100 / total) : 100);
  };
  auto cell = LocalCell::Create(flags.cell);
  if (!cell.ok()) return cell.status();
  loaded->cell = *std::move(cell);
  loaded->client = std::make_unique<CellClient>(loaded->cell.get());

  Engine& engine = loaded->engine;
  engine.model = loaded->cell->model_info();
  if (!flags.served_model_name.empty()) engine.model.name = flags.served_model_name;
  engine.tokenizer = loaded->tokenizer.get();
  if (const ChatTemplate* chat_template = loaded->chat_template.get()) {
    engine.render_chat = [chat_template](const ChatPrompt& prompt) {
      return chat_template->Render(prompt);
    };
  }
  engine.defaults = *defaults;
  engine.num_attention_workers = flags.cell.attention_workers;
  engine.num_expert_workers = flags.cell.expert_workers;
  loaded->scheduler =
      std::make_unique<Scheduler>(flags.scheduler, engine.model, loaded->client.get());
  engine.scheduler = loaded->scheduler.get();
  spdlog::info("{}: {}, {}, {} attention and {} expert workers, {} KV blocks of {} tokens each",
               engine.model.name, engine.model.architecture, engine.model.numerics_id,
               engine.num_attention_workers, engine.num_expert_workers, engine.model.num_kv_blocks,
               engine.model.block_size);
  return loaded;
}

void AddEngineFlags(CLI::App* app, EngineFlags* flags) {
  CellOptions& cell = flags->cell;
  SchedulerOptions& scheduler = flags->scheduler;
  app->add_option("--model", cell.model_dir,
                  "checkpoint folder: config.json, *.safetensors, tokenizer.json")
      ->required();
  app->add_option("--attention-workers", cell.attention_workers,
                  "attention workers; each serves a share of the sequences")
      ->capture_default_str()
      ->check(CLI::Range(1, 64));
  app->add_option("--expert-workers", cell.expert_workers,
                  "expert workers; each holds a share of the experts")
      ->capture_default_str()
      ->check(CLI::Range(1, 256));
  app->add_option("--threads", cell.threads, "compute threads in total (0: all cores)")
      ->capture_default_str()
      ->check(CLI::Range(0, 1024));
  app->add_option("--device", flags->device, "auto or cpu (this build computes on the CPU)")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "cpu"}));
  app->add_option("--isa", cell.isa,
                  "instruction path: auto, avx512, avx2 or portable; equal bits hold within one")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "avx512", "avx2", "portable"}));
  app->add_option("--dtype", cell.dtype, "auto (as stored), float32 or bfloat16")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "float32", "bfloat16"}));
  app->add_option("--max-model-len", cell.max_model_len,
                  "prompt + output tokens of a sequence (0: as the model says)")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  app->add_option("--kv-cache-memory", cell.kv_cache_memory,
                  "KV cache of all attention workers, e.g. 2GiB (0: what the sequences can use, at "
                  "most half of the free memory)")
      ->capture_default_str()
      ->transform(CLI::AsSizeValue(false));
  app->add_option("--max-num-seqs", scheduler.max_num_seqs, "sequences in one step")
      ->capture_default_str()
      ->check(CLI::Range(1, 65536));
  app->add_option("--max-num-batched-tokens", scheduler.max_num_batched_tokens,
                  "tokens in one step; longer prompts are computed in chunks")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  app->add_option("--chat-template", flags->chat_template,
                  "Jinja file to use instead of the checkpoint's template")
      ->check(CLI::ExistingFile);
  app->add_option("--log-format", flags->log_format, "text or json, on stderr")
      ->capture_default_str()
      ->check(CLI::IsMember({"text", "json"}));
}

// ---- serve ----

struct ServeFlags {
  EngineFlags engine;
  ServerOptions server;
  int shutdown_timeout_s = 30;
};

int RunServe(const ServeFlags& flags) {
  ConfigureLog(flags.engine.log_format);
  ShutdownSignals shutdown;  // before any other thread
  ServerOptions options = flags.server;
  options.shutdown_timeout = std::chrono::seconds(flags.shutdown_timeout_s);
  Server server(options);
  if (absl::Status status = server.Start(); !status.ok()) return Fail(status);

  absl::StatusOr<std::unique_ptr<LoadedEngine>> loaded;
  {
    ProgressBar bar("loading", 100, /*quiet=*/flags.engine.log_format == "json");
    loaded = LoadEngine(flags.engine, [&](int percent) {
      if (shutdown.requested()) std::_Exit(0);  // nothing was accepted yet
      server.SetLoading(percent);
      bar.Update(percent);
    });
  }
  if (!loaded.ok()) return Fail(loaded.status());
  Scheduler& scheduler = *(*loaded)->scheduler;
  scheduler.SetStepObserver(server.step_observer());
  scheduler.Start();
  server.SetEngine((*loaded)->engine);
  std::printf("switchyard ready http=%s:%d grpc=%s:%d model=%s\n", options.http.host.c_str(),
              server.http_port(), options.http.host.c_str(), server.grpc_port(),
              (*loaded)->engine.model.name.c_str());
  std::fflush(stdout);

  shutdown.Wait();
  spdlog::info("shutting down: running requests may finish within {} s", flags.shutdown_timeout_s);
  server.Shutdown();
  spdlog::info("bye");
  return 0;
}

void AddServe(CLI::App* app, ServeFlags* flags) {
  app->footer(
      "Serves the OpenAI API over HTTP (/v1/chat/completions, /v1/completions, /v1/models, "
      "/tokenize,\n/detokenize, /health, /metrics) and switchyard.v1.Inference over gRPC. When it "
      "can answer it\nprints one line on stdout: switchyard ready http=HOST:PORT grpc=HOST:PORT "
      "model=NAME.\n\nExample: switchyard serve --model models/demo --port 8000 --expert-workers "
      "4");
  AddEngineFlags(app, &flags->engine);
  app->add_option("--host", flags->server.http.host, "address to listen on")->capture_default_str();
  app->add_option("--port", flags->server.http.port, "HTTP port (0: any free one)")
      ->capture_default_str();
  app->add_option("--grpc-port", flags->server.grpc_port, "gRPC port (0: any free one)")
      ->capture_default_str();
  app->add_option("--served-model-name", flags->engine.served_model_name,
                  "the model's name in the API (default: the folder's name)");
  app->add_option("--max-queued-requests", flags->engine.scheduler.max_queued_requests,
                  "waiting requests; more are answered 429")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  app->add_option("--api-key", flags->server.front_end.api_keys,
                  "key that requests must carry; may be given several times")
      ->envname("SWITCHYARD_API_KEY");
  app->add_option("--seed", flags->server.front_end.seed,
                  "base for the seeds of requests that bring none (default: random)");
  app->add_option("--shutdown-timeout", flags->shutdown_timeout_s,
                  "seconds that running requests get after SIGTERM")
      ->capture_default_str()
      ->check(CLI::Range(0, 86400));
}

// ---- generate ----

struct GenerateFlags {
  EngineFlags engine;
  GenerationRequest request;
  std::string prompt;
  bool chat = false;
  uint64_t seed = 0;
};

int RunGenerateCommand(const GenerateFlags& flags) {
  ConfigureLog(flags.engine.log_format);
  absl::StatusOr<std::unique_ptr<LoadedEngine>> loaded;
  {
    ProgressBar bar("loading", 100, /*quiet=*/false);
    loaded = LoadEngine(flags.engine, [&](int percent) { bar.Update(percent); });
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

void AddGenerate(CLI::App* app, GenerateFlags* flags) {
  app->footer(
      "Answers one prompt in this process: the text goes to stdout as it comes, tokens per second "
      "to stderr.\n\nExample: switchyard generate --model models/demo --chat --prompt \"Is 7 odd "
      "or "
      "even?\" --temperature 0");
  AddEngineFlags(app, &flags->engine);
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
}

// ---- eval, inspect, synth, bench ----

int RunEvalCommand(const EvalOptions& options) {
  const auto result = RunEval(options);
  if (!result.ok()) return Fail(result.status());
  std::printf("%s\n", FormatEval(*result, options.json).c_str());
  return 0;
}

void AddEval(CLI::App* app, EvalOptions* options) {
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
}

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

void AddInspect(CLI::App* app, InspectFlags* flags) {
  app->footer(
      "Shows what a checkpoint is and needs: architecture, parameters (total and active per "
      "token), "
      "memory\nper role, KV bytes per token, and what is not supported. Exits 1 if it cannot be "
      "served.\n\nExample: switchyard inspect models/demo");
  app->add_option("DIR", flags->options.model_dir, "checkpoint folder")->required();
  app->add_option("--dtype", flags->options.dtype, "type the memory figures are for")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "float32", "bfloat16"}));
  app->add_flag("--json", flags->json, "print JSON alone on stdout");
}

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

void AddSynth(CLI::App* app, SynthOptions* options) {
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
}

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

void AddBench(CLI::App* app, BenchFlags* flags) {
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
}

int Main(int argc, char** argv) {
  CLI::App app("Switchyard: a server for mixture-of-experts language models.");
  app.set_version_flag("--version", "switchyard " SWITCHYARD_VERSION);
  app.require_subcommand(1);
  app.footer("`switchyard COMMAND --help` explains a command and shows an example.");

  ServeFlags serve_flags;
  GenerateFlags generate_flags;
  EvalOptions eval_options;
  InspectFlags inspect_flags;
  SynthOptions synth_options;
  BenchFlags bench_flags;
  CLI::App* serve = app.add_subcommand("serve", "serve a model over HTTP and gRPC");
  CLI::App* generate = app.add_subcommand("generate", "answer one prompt in this process");
  CLI::App* eval = app.add_subcommand("eval", "score a running server on questions with answers");
  CLI::App* inspect = app.add_subcommand("inspect", "show what a checkpoint is and needs");
  CLI::App* synth = app.add_subcommand("synth", "write a checkpoint with random weights");
  CLI::App* bench = app.add_subcommand("bench", "measure speed");
  AddServe(serve, &serve_flags);
  AddGenerate(generate, &generate_flags);
  AddEval(eval, &eval_options);
  AddInspect(inspect, &inspect_flags);
  AddSynth(synth, &synth_options);
  AddBench(bench, &bench_flags);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kUsage;
  }
  if (serve->parsed()) return RunServe(serve_flags);
  if (generate->parsed()) return RunGenerateCommand(generate_flags);
  if (eval->parsed()) return RunEvalCommand(eval_options);
  if (inspect->parsed()) return RunInspectCommand(inspect_flags);
  if (synth->parsed()) return RunSynthCommand(synth_options);
  return RunBenchOffline(bench_flags);
}

}  // namespace
}  // namespace switchyard

int main(int argc, char** argv) { return switchyard::Main(argc, argv); }
