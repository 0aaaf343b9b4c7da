#include "worker/bench_offline.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <random>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/bandwidth_probe.h"
#include "kernels/measure.h"
#include "nlohmann/json.hpp"
#include "worker/batch_run.h"

namespace switchyard {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kProbeBytes = size_t{512} << 20;  // far beyond any cache of these machines
constexpr int kWarmUpTokens = 16;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

absl::Status CheckOptions(const BenchOfflineOptions& options) {
  constexpr int kMaxTokens = 1 << 24;
  if (options.prompt_tokens < 1 || options.prompt_tokens > kMaxTokens ||
      options.output_tokens < 1 || options.output_tokens > kMaxTokens || options.batches.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("prompt tokens ", options.prompt_tokens, " and output tokens ",
                     options.output_tokens, " must be from 1 to ", kMaxTokens, ", batch sizes (",
                     options.batches.size(), " given) at least one"));
  }
  if (options.repetitions < 1 || options.repetitions > 1000) {
    return absl::InvalidArgumentError(
        absl::StrCat("repetitions ", options.repetitions, " is not from 1 to 1000"));
  }
  if (options.busy_threads < 0 || options.busy_threads > 1024) {
    return absl::InvalidArgumentError(
        absl::StrCat("busy threads ", options.busy_threads, " is not from 0 to 1024"));
  }
  for (int batch : options.batches) {
    if (batch < 1 || batch > 1 << 16) {
      return absl::InvalidArgumentError(
          absl::StrCat("batch ", batch, " is not from 1 to ", 1 << 16));
    }
  }
  return absl::OkStatus();
}

// Every sequence of the largest batch must fit into the KV cache at once.
absl::Status CheckKv(const ModelInfo& model, int attention_workers, int batch, int length) {
  const int64_t per_worker = (batch + attention_workers - 1) / attention_workers;
  const int64_t blocks = per_worker * ((length + model.block_size - 1) / model.block_size);
  if (blocks <= model.num_kv_blocks) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat(
      "batch ", batch, " of ", length, " tokens needs ", blocks,
      " KV blocks per attention worker = ", blocks * model.block_size * model.kv_bytes_per_token,
      " bytes, but there are ", model.num_kv_blocks, " blocks"));
}

void Log(const BenchOfflineOptions& options, const std::string& line) {
  if (options.log) options.log(line);
}

// Threads that compute for nobody, as another program on the machine might.
class BusyThreads {
 public:
  explicit BusyThreads(int count) {
    for (int i = 0; i < count; ++i) {
      threads_.emplace_back([this] {
        while (!stop_.load(std::memory_order_relaxed)) {
        }
      });
    }
  }
  ~BusyThreads() {
    stop_.store(true);
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};

// What the repetitions of one batch took.
struct Samples {
  std::vector<double> prefill_seconds;
  std::vector<double> prefill_flops_per_second;
  std::vector<double> step_seconds;
  std::vector<double> probe_gb_per_second;
  double decode_bytes = 0;
};

absl::Status Repeat(const BenchOfflineOptions& options, int batch, std::mt19937_64& random,
                    BatchRun* run, Samples* samples) {
  run->Start(batch, options.prompt_tokens, random);
  const Clock::time_point start = Clock::now();
  absl::Status status = run->Prefill();
  samples->prefill_seconds.push_back(SecondsSince(start));
  samples->prefill_flops_per_second.push_back(run->flops() / samples->prefill_seconds.back());
  const int64_t bytes_before = run->bytes_read();
  if (status.ok()) status = run->Decode(options.output_tokens - 1, &samples->step_seconds);
  samples->decode_bytes += static_cast<double>(run->bytes_read() - bytes_before);
  return status;
}

// `busy`: of the runs beside busy threads; empty without any.
BenchOfflineRow MakeRow(const BenchOfflineOptions& options, int batch, const Samples& samples,
                        const Samples& busy) {
  BenchOfflineRow row{.batch = batch,
                      .prompt_tokens = options.prompt_tokens,
                      .output_tokens = options.output_tokens};
  row.prefill_tokens_per_second =
      static_cast<double>(batch) * options.prompt_tokens / Median(samples.prefill_seconds);
  row.prefill_gflops = Median(samples.prefill_flops_per_second) / 1e9;
  row.probe_gb_per_second = Median(samples.probe_gb_per_second);
  const auto ratio = [](const std::vector<double>& alone, const std::vector<double>& beside) {
    return beside.empty() ? 0.0 : Median(alone) / Median(beside);
  };
  row.busy_prefill_ratio = ratio(samples.prefill_seconds, busy.prefill_seconds);
  row.busy_decode_ratio = ratio(samples.step_seconds, busy.step_seconds);
  if (samples.step_seconds.empty()) return row;
  const double step_seconds = Median(samples.step_seconds);
  row.decode_tokens_per_second = batch / step_seconds;
  row.decode_bytes_per_step =
      samples.decode_bytes / static_cast<double>(samples.step_seconds.size());
  row.decode_share_of_bound =
      row.decode_bytes_per_step / step_seconds / 1e9 / row.probe_gb_per_second;
  return row;
}

}  // namespace

absl::StatusOr<BenchOfflineReport> BenchOffline(const BenchOfflineOptions& options) {
  if (absl::Status status = CheckOptions(options); !status.ok()) return status;
  const int length = options.prompt_tokens + options.output_tokens;
  const int largest = *std::max_element(options.batches.begin(), options.batches.end());
  CellOptions cell_options = options.cell;
  if (cell_options.max_model_len == 0) cell_options.max_model_len = length;
  cell_options.max_num_seqs = largest;
  absl::StatusOr<std::unique_ptr<LocalCell>> cell = LocalCell::Create(cell_options);
  if (!cell.ok()) return cell.status();
  BenchOfflineReport report{.model = (*cell)->model_info(), .rows = {}};
  if (length > report.model.max_model_len) {
    return absl::InvalidArgumentError(absl::StrCat("prompt and output of ", length,
                                                   " tokens exceed max_model_len ",
                                                   report.model.max_model_len));
  }
  const int workers = (*cell)->num_attention_workers();
  if (absl::Status status = CheckKv(report.model, workers, largest, length); !status.ok())
    return status;

  BandwidthProbe probe((*cell)->pool(), kProbeBytes);
  BatchRun run(cell->get(), cell_options.max_num_batched_tokens);
  std::mt19937_64 random(options.seed);
  // A short run first: pages are touched and threads are up before the clock starts.
  run.Start(1, std::min(kWarmUpTokens, options.prompt_tokens), random);
  if (absl::Status status = run.Prefill(); !status.ok()) return status;
  probe.Sample();
  for (int batch : options.batches) {
    Samples samples, busy;
    samples.probe_gb_per_second.push_back(probe.Sample());
    for (int r = 0; r < options.repetitions; ++r) {
      Log(options, absl::StrCat("batch ", batch, ", run ", r + 1, " of ", options.repetitions));
      std::mt19937_64 same_tokens = random;
      if (absl::Status status = Repeat(options, batch, random, &run, &samples); !status.ok())
        return status;
      samples.probe_gb_per_second.push_back(probe.Sample());
      if (options.busy_threads == 0) continue;
      const BusyThreads others(options.busy_threads);
      if (absl::Status status = Repeat(options, batch, same_tokens, &run, &busy); !status.ok())
        return status;
    }
    report.rows.push_back(MakeRow(options, batch, samples, busy));
  }
  return report;
}

std::string BenchOfflineReport::Text() const {
  std::string text =
      absl::StrFormat("%s %s %s\n%6s %7s %7s %14s %14s %13s %11s %13s %9s\n", model.name,
                      model.dtype, model.numerics_id, "batch", "prompt", "output", "prefill tok/s",
                      "prefill GFLOP", "decode tok/s", "MB a step", "of bandwidth", "GB/s");
  for (const BenchOfflineRow& row : rows) {
    absl::StrAppend(&text,
                    absl::StrFormat("%6d %7d %7d %14.2f %14.1f %13.2f %11.1f %11.0f %% %9.2f\n",
                                    row.batch, row.prompt_tokens, row.output_tokens,
                                    row.prefill_tokens_per_second, row.prefill_gflops,
                                    row.decode_tokens_per_second, row.decode_bytes_per_step / 1e6,
                                    100 * row.decode_share_of_bound, row.probe_gb_per_second));
    if (row.busy_prefill_ratio == 0) continue;
    absl::StrAppendFormat(&text,
                          "%6s beside busy threads: %.2f of the prefill, %.2f of the decode\n", "",
                          row.busy_prefill_ratio, row.busy_decode_ratio);
  }
  return text;
}

std::string BenchOfflineReport::Json() const {
  nlohmann::ordered_json out;
  out["model"] = model.name;
  out["dtype"] = model.dtype;
  out["numerics_id"] = model.numerics_id;
  out["rows"] = nlohmann::ordered_json::array();
  for (const BenchOfflineRow& row : rows) {
    out["rows"].push_back({{"batch", row.batch},
                           {"prompt_tokens", row.prompt_tokens},
                           {"output_tokens", row.output_tokens},
                           {"prefill_tokens_per_second", row.prefill_tokens_per_second},
                           {"decode_tokens_per_second", row.decode_tokens_per_second},
                           {"probe_gb_per_second", row.probe_gb_per_second},
                           {"decode_bytes_per_step", row.decode_bytes_per_step},
                           {"decode_share_of_bound", row.decode_share_of_bound},
                           {"prefill_gflops", row.prefill_gflops}});
    if (row.busy_prefill_ratio == 0) continue;
    out["rows"].back()["busy_prefill_ratio"] = row.busy_prefill_ratio;
    out["rows"].back()["busy_decode_ratio"] = row.busy_decode_ratio;
  }
  return out.dump(1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace switchyard
