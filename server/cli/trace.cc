#include <CLI/CLI.hpp>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>

#include "absl/strings/str_format.h"
#include "comm/routing_trace.h"
#include "server/cli/command.h"
#include "server/cli/local_server.h"
#include "server/cli/log.h"
#include "server/json_writer.h"
#include "server/progress_bar.h"
#include "server/prompt_run.h"

namespace switchyard {
namespace {

struct TraceFlags {
  LocalEngineFlags engine;
  FrontEndFlags front_end;
  std::string prompts;
  int32_t max_tokens = 64;
  bool ids_only = false;
};

// Ends the recording and says what is in the file.
int Finish(const std::string& path, LocalEngine& engine) {
  RoutingRecorder& recorder = *engine.cell->recorder();
  const absl::Status status = recorder.Close();
  const RoutingRecorder::Totals totals = recorder.totals();
  std::printf("%s: %lld rows of %lld steps, %lld bytes, %lld rows dropped\n", path.c_str(),
              static_cast<long long>(totals.rows), static_cast<long long>(totals.steps),
              static_cast<long long>(totals.bytes), static_cast<long long>(totals.dropped_rows));
  return status.ok() ? 0 : Fail(status);
}

int RecordPrompts(TraceFlags flags) {
  ConfigureLog(flags.front_end.log_format);
  const auto requests = ReadPrompts(flags.prompts, flags.max_tokens);
  if (!requests.ok()) return Fail(requests.status());
  SchedulerOptions& scheduler = flags.engine.scheduler;  // what waits is in memory already
  scheduler.max_queued_requests = scheduler.max_num_seqs;
  scheduler.max_queued_tokens = INT64_MAX;
  const bool quiet = flags.front_end.log_format == "json";
  absl::StatusOr<std::unique_ptr<LocalEngine>> loaded;
  {
    ProgressBar bar("loading", 100, quiet);
    loaded = LoadLocalEngine(
        flags.engine, {.served_model_name = "", .chat_template = flags.front_end.chat_template},
        [&](int percent) { bar.Update(percent); });
  }
  if (!loaded.ok()) return Fail(loaded.status());
  (*loaded)->scheduler->Start();
  absl::StatusOr<PromptRunReport> report;
  {
    ProgressBar bar("recording", static_cast<int64_t>(requests->size()), quiet);
    report = RunPrompts(*requests, (*loaded)->engine, scheduler.max_num_seqs,
                        [&](int64_t done) { bar.Update(done); });
  }
  const int code = Finish(flags.engine.cell.recorder.path, **loaded);
  return report.ok() ? code : Fail(report.status());
}

int RunTrace(TraceFlags flags) {
  RoutingRecorderOptions& recorder = flags.engine.cell.recorder;
  if (recorder.path.empty() || flags.engine.cell.model_dir.empty()) {
    return Fail(absl::InvalidArgumentError("trace needs --model DIR and --out FILE, or info FILE"));
  }
  recorder.has_weights = !flags.ids_only;
  recorder.wait_when_full = !flags.prompts.empty();
  if (!flags.prompts.empty()) return RecordPrompts(flags);
  return ServeInProcess(flags.engine, flags.front_end,
                        [&recorder](LocalEngine& engine) { return Finish(recorder.path, engine); });
}

struct InfoFlags {
  std::string path;
  bool json = false;
};

std::string InfoJson(const RoutingTrace& trace, const std::vector<RoutingLayerLoad>& loads) {
  JsonWriter json;
  json.BeginObject();
  json.Member("sequences", static_cast<int64_t>(trace.SequenceBegins().size() - 1));
  json.Member("rows", static_cast<int64_t>(trace.rows.size()));
  json.Member("replaced_rows", trace.num_replaced);
  json.Member("unread_bytes", trace.num_unread_bytes);
  json.Member("num_experts", trace.shape.num_experts).Member("top_k", trace.shape.top_k);
  json.Key("has_weights").Bool(trace.shape.has_weights);
  json.Key("layers").BeginArray();
  for (const RoutingLayerLoad& load : loads) {
    json.BeginObject().Member("copies", load.copies);
    json.Member("distinct_experts", load.distinct_experts);
    json.Key("max_mean").Double(load.max_mean).EndObject();
  }
  json.EndArray().EndObject();
  return json.Take();
}

std::string InfoText(const RoutingTrace& trace, const std::vector<RoutingLayerLoad>& loads) {
  std::string text = absl::StrFormat(
      "%d rows of %d sequences (%d rows came again; the last one counts)\n"
      "%d MoE layers, top %d of %d experts, %s\n%6s %12s %9s %9s",
      trace.rows.size(), trace.SequenceBegins().size() - 1, trace.num_replaced,
      trace.shape.num_layers, trace.shape.top_k, trace.shape.num_experts,
      trace.shape.has_weights ? "ids and weights" : "ids", "layer", "copies", "distinct",
      "max/mean");
  for (size_t layer = 0; layer < loads.size(); ++layer) {
    absl::StrAppendFormat(&text, "\n%6d %12d %9d %9.3f", layer, loads[layer].copies,
                          loads[layer].distinct_experts, loads[layer].max_mean);
  }
  return text;
}

int RunInfo(const InfoFlags& flags) {
  const auto trace = ReadRoutingTrace(flags.path);
  if (!trace.ok()) return Fail(trace.status());
  if (trace->num_unread_bytes > 0) {
    std::fprintf(stderr, "switchyard: %s was cut off: its last %lld bytes are no whole block\n",
                 flags.path.c_str(), static_cast<long long>(trace->num_unread_bytes));
  }
  const std::vector<RoutingLayerLoad> loads = RoutingLayerLoads(*trace);
  std::printf("%s\n", (flags.json ? InfoJson(*trace, loads) : InfoText(*trace, loads)).c_str());
  return 0;
}

}  // namespace

Command AddTrace(CLI::App* parent) {
  CLI::App* app = parent->add_subcommand("trace", "record which experts the router chooses");
  app->footer(
      "Serves as `switchyard serve` does and records, for every position of every request, the "
      "experts that the\nrouter chose in every MoE layer and their weights, until SIGTERM; or, "
      "with "
      "--prompts, answers the prompts\nof a file and ends. When the disk is too slow for the "
      "traffic, steps are dropped and counted (with --prompts:\nthe model waits). Positions that "
      "come from the prefix cache are not computed and not recorded.\n\n"
      "Examples: switchyard trace --model models/demo --out demo.trace --port 8000\n"
      "          switchyard trace --model models/demo --out demo.trace --prompts "
      "models/demo/eval.jsonl\n"
      "          switchyard trace info demo.trace\n"
      "          switchyard bench planner --trace demo.trace");
  auto flags = std::make_shared<TraceFlags>();
  auto info_flags = std::make_shared<InfoFlags>();
  app->add_option("--out", flags->engine.cell.recorder.path, "file to write; replaced");
  app->add_option("--prompts", flags->prompts,
                  "file with a JSON object per line: \"messages\" or \"prompt\"; answered "
                  "greedily, nothing is served")
      ->check(CLI::ExistingFile);
  app->add_option("--max-tokens", flags->max_tokens, "of a reply to --prompts")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app->add_flag("--ids-only", flags->ids_only, "leave out the weights");
  AddLocalEngineFlags(app, &flags->engine);
  app->get_option("--model")->required(false);  // `info` needs none
  AddFrontEndFlags(app, &flags->front_end);
  CLI::App* info = app->add_subcommand("info", "what is in a trace");
  info->footer(
      "Copies, distinct experts and max/mean (the busiest expert's copies over the mean) of every "
      "MoE layer.\n\nExample: switchyard trace info demo.trace --json");
  info->add_option("FILE", info_flags->path, "trace")->required();
  info->add_flag("--json", info_flags->json, "print JSON alone on stdout");
  return {app, [=] { return info->parsed() ? RunInfo(*info_flags) : RunTrace(*flags); }};
}

}  // namespace switchyard
