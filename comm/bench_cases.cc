#include "comm/bench_cases.h"

#include <algorithm>
#include <span>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "comm/demo_trace.h"

namespace switchyard {
namespace {

constexpr double kSkews[] = {0.0, 0.3, 0.6, 1.0, 1.2};

// The file's name without folders and extension, as far as it needs no escaping.
std::string TraceName(const std::string& path, const std::vector<NamedTrace>& others) {
  std::string name = path.substr(path.find_last_of('/') + 1);
  name = name.substr(0, name.find_last_of('.'));
  for (char& c : name) {
    if (!absl::ascii_isalnum(static_cast<unsigned char>(c)) && c != '-' && c != '.') c = '_';
  }
  if (name.empty()) name = "trace";
  std::string unique = name;
  const auto taken = [&](const NamedTrace& other) { return other.name == unique; };
  for (int i = 2; std::ranges::any_of(others, taken); ++i) unique = absl::StrCat(name, "_", i);
  return unique;
}

absl::Status CheckReplay(const ReplayOptions& options, int32_t num_experts) {
  const int32_t most_tokens = std::max(options.decode_tokens, options.prefill_tokens);
  const int32_t most_ranks = std::min(num_experts, 256);
  if (options.num_ranks >= 1 && options.num_ranks <= most_ranks && options.num_sources >= 1 &&
      options.num_sources <= 256 && options.decode_tokens >= 1 && options.prefill_tokens >= 1 &&
      most_tokens <= kMaxRoutingStepRows) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("recorded routing of ", num_experts, " experts is replayed on 1 to ", most_ranks,
                   " ranks from 1 to 256 sources in steps of 1 to ", kMaxRoutingStepRows,
                   " tokens, not on ", options.num_ranks, " from ", options.num_sources, " of ",
                   options.decode_tokens, " and ", options.prefill_tokens));
}

// Calls `tick` before every step.
template <typename AnyWorkload>
Steps TakeSteps(AnyWorkload workload, int32_t num_steps, const std::function<void()>& tick) {
  Steps steps;
  for (int32_t s = 0; s < num_steps; ++s) {
    tick();
    const std::span<const int32_t> counts = workload.Next();
    steps.emplace_back(counts.begin(), counts.end());
  }
  return steps;
}

}  // namespace

std::vector<BenchCase> SyntheticCases(uint64_t seed) {
  std::vector<BenchCase> cases;
  for (double zipf : kSkews) {  // prefill
    cases.push_back({{.tokens = 8192, .zipf = zipf}, 0, zipf});
  }
  // Decode: most experts have few tokens.
  cases.push_back({{.num_experts = 256, .num_ranks = 16, .tokens = 64, .zipf = 0.6}, 4});
  cases.push_back({{.num_experts = 256, .num_ranks = 16, .tokens = 128, .zipf = 1.0}, 4});
  cases.push_back({{.num_experts = 128, .num_ranks = 8, .tokens = 31, .zipf = 0.3}, 4});
  // Prefill of a wide layer.
  cases.push_back({{.num_experts = 256, .num_ranks = 16, .tokens = 8192, .zipf = 1.2}, 0});
  // Many tokens over replicas.
  cases.push_back(
      {{.num_experts = 256, .num_ranks = 16, .num_sources = 4, .tokens = 4096, .zipf = 0.6}, 4});
  cases.push_back({{.tokens = 1021, .zipf = 0.6, .ragged = true}, 2});
  // Hot ranks and experts, requests with a taste, change.
  cases.push_back({{.tokens = 4096, .skew = WorkloadSkew::kHotRank}, 0});
  cases.push_back({{.tokens = 4096, .skew = WorkloadSkew::kHotStripe}, 0});
  cases.push_back({{.tokens = 4093, .zipf = 0.6, .tokens_per_request = 256}, 0});
  cases.push_back({{.num_sources = 3,
                    .tokens = 4096,
                    .zipf = 0.6,
                    .change = WorkloadChange::kDrift,
                    .ragged = true},
                   0});
  cases.push_back({{.tokens = 4096, .zipf = 1.0, .change = WorkloadChange::kShift}, 0});
  cases.push_back({{.tokens = 512, .zipf = 1.0, .change = WorkloadChange::kBurst}, 2});
  cases.push_back({{.num_sources = 2, .tokens = 64, .zipf = 1.0, .prefill_tokens = 4096}, 2});
  for (size_t i = 0; i < cases.size(); ++i) {
    // The plotted ones differ in skew alone.
    cases[i].spec.seed = cases[i].skew >= 0 ? seed : seed + i;
  }
  return cases;
}

absl::StatusOr<std::vector<NamedTrace>> ReadTraces(const std::vector<std::string>& paths) {
  std::vector<NamedTrace> traces;
  traces.push_back({"demo", ReadDemoTrace()});
  for (const std::string& path : paths) {
    auto trace = ReadRoutingTrace(path);
    if (!trace.ok()) return trace.status();
    if (trace->rows.empty()) return absl::InvalidArgumentError(absl::StrCat(path, " has no rows"));
    traces.push_back({TraceName(path, traces), *std::move(trace)});
  }
  return traces;
}

absl::Status AddRecordedCases(const NamedTrace& named, const ReplayOptions& options,
                              std::vector<BenchCase>* cases) {
  const RoutingTraceShape& shape = named.trace.shape;
  if (absl::Status status = CheckReplay(options, shape.num_experts); !status.ok()) return status;
  for (int32_t layer : LayersToReplay(named.trace)) {
    for (ReplayOrder order : {ReplayOrder::kDecode, ReplayOrder::kPrefill}) {
      const bool decode = order == ReplayOrder::kDecode;
      RecordedWorkload::Spec recorded{
          .trace = &named.trace,
          .layer = layer,
          .order = order,
          .num_sources = options.num_sources,
          .tokens = decode ? options.decode_tokens : options.prefill_tokens};
      const int32_t tokens = RecordedWorkload(recorded).tokens();
      BenchCase c{.spec = {.num_experts = shape.num_experts,
                           .num_ranks = options.num_ranks,
                           .top_k = shape.top_k,
                           .num_sources = options.num_sources,
                           .tokens = tokens},
                  .replica_slots = decode ? (shape.num_experts / options.num_ranks + 3) / 4 : 0,
                  .name = absl::StrCat(named.name, "-layer", layer, decode ? "-decode" : "-prefill",
                                       " N=", shape.num_experts, " P=", options.num_ranks,
                                       " tokens=", tokens),
                  .recorded = recorded};
      cases->push_back(std::move(c));
    }
  }
  return absl::OkStatus();
}

Steps StepsOf(const BenchCase& c, int32_t num_steps, const std::function<void()>& tick) {
  if (c.recorded) return TakeSteps(RecordedWorkload(*c.recorded), num_steps, tick);
  return TakeSteps(Workload(c.spec), num_steps, tick);
}

}  // namespace switchyard
