#include "server/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <algorithm>
#include <map>
#include <sstream>

#include "kernels/mutex.h"

namespace switchyard {
namespace {

using prometheus::BuildCounter;
using prometheus::BuildGauge;
using prometheus::BuildHistogram;
using prometheus::Counter;
using prometheus::Gauge;
using prometheus::Histogram;
using prometheus::Registry;
using Buckets = Histogram::BucketBoundaries;

// vLLM's buckets, so that existing dashboards fit.
const Buckets kFirstTokenSeconds = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1,
                                    0.25,  0.5,   0.75, 1,    2.5,  5,    7.5,  10,
                                    20,    40,    80,   160,  640,  2560};
const Buckets kInterTokenSeconds = {0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
                                    0.75, 1,     2.5,  5,     7.5, 10,   20,  40,  80};
const Buckets kRequestSeconds = {0.3, 0.5, 0.8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                                 30,  40,  50,  60, 120, 240, 480, 960, 1920, 7680};
const Buckets kIterationTokens = {1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384};
const Buckets kRequestTokens = {1,    2,    5,    10,    20,    50,    100,    200,    500,
                                1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000};
const Buckets kStepSeconds = {0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05,
                              0.1,    0.25,  0.5,    1,     2.5,  5,     10};

Counter& AddCounter(Registry& registry, const char* name, const char* help) {
  return BuildCounter().Name(name).Help(help).Register(registry).Add({});
}
Gauge& AddGauge(Registry& registry, const char* name, const char* help) {
  return BuildGauge().Name(name).Help(help).Register(registry).Add({});
}
Histogram& AddHistogram(Registry& registry, const char* name, const char* help,
                        const Buckets& buckets) {
  return BuildHistogram().Name(name).Help(help).Register(registry).Add({}, buckets);
}

// Brings a counter up to a total that another thread counts.
void RaiseTo(Counter& counter, double total) {
  const double missing = total - counter.Value();
  if (missing > 0) counter.Increment(missing);
}

// Totals that workers report (worker/role_session.cc) and the families that show them.
struct WorkerCounter {
  const char* name;
  const char* family;
  const char* help;
};
constexpr WorkerCounter kWorkerCounters[] = {
    {"data_wait_seconds", "switchyard_data_wait_seconds_total",
     "Time that workers waited for their peers' rows."},
    {"dispatch_bytes", "switchyard_dispatch_bytes_total",
     "Bytes of rows sent from attention to expert workers."},
    {"combine_bytes", "switchyard_combine_bytes_total",
     "Bytes of results sent from expert to attention workers."},
    {"plans", "switchyard_dispatch_plans_total",
     "Plans made by expert workers: one per layer, step and worker."},
    {"plan_seconds", "switchyard_dispatch_plan_seconds_total",
     "Time that expert workers spent planning."},
    {"weight_transfers", "switchyard_expert_weight_transfers_total",
     "Experts sent from one expert worker to another for a plan."},
    {"weight_transfer_bytes", "switchyard_expert_weight_transfer_bytes_total",
     "Bytes of those experts' weights."},
    {"foreign_copies", "switchyard_foreign_expert_copies_total",
     "Copies computed with weights that another worker sent."},
};

}  // namespace

struct Metrics::Families {
  Registry registry;
  Mutex scrape_mu;  // one scrape at a time: RaiseTo reads, then writes

  Gauge& running =
      AddGauge(registry, "switchyard_requests_running", "Sequences that are computed now.");
  Gauge& waiting = AddGauge(registry, "switchyard_requests_waiting",
                            "Sequences that wait for a place in the batch.");
  Gauge& kv_usage =
      AddGauge(registry, "switchyard_kv_cache_usage_ratio", "Share of KV blocks in use, 0 to 1.");
  prometheus::Family<Gauge>& workers = BuildGauge()
                                           .Name("switchyard_workers")
                                           .Help("Workers that are up, by role.")
                                           .Register(registry);
  Gauge& attention_workers = workers.Add({{"role", "attention"}});
  Gauge& expert_workers = workers.Add({{"role", "expert"}});
  Gauge& epoch = AddGauge(registry, "switchyard_expert_placement_epoch",
                          "Epoch of membership and expert placement; rises with every change.");
  Counter& iterations =
      AddCounter(registry, "switchyard_engine_iterations_total", "Steps of the scheduler.");
  Counter& prompt_tokens =
      AddCounter(registry, "switchyard_prompt_tokens_total", "Prompt tokens of admitted requests.");
  Counter& cached_tokens = AddCounter(registry, "switchyard_prompt_tokens_cached_total",
                                      "Prompt tokens served from the prefix cache.");
  Counter& generated = AddCounter(registry, "switchyard_generation_tokens_total",
                                  "Generated tokens that were kept.");
  Counter& preemptions = AddCounter(registry, "switchyard_preemptions_total",
                                    "Sequences that lost their KV blocks to others.");
  prometheus::Family<Counter>& steps = BuildCounter()
                                           .Name("switchyard_steps_total")
                                           .Help(
                                               "Steps (switchyard_engine_iterations_total) by the "
                                               "micro-batches that their rows travelled in.")
                                           .Register(registry);
  Counter& one_micro_batch = steps.Add({{"micro_batches", "1"}});
  Counter& two_micro_batches = steps.Add({{"micro_batches", "2"}});
  Counter& worker_seconds = AddCounter(registry, "switchyard_attention_step_seconds_total",
                                       "Time that attention workers spent in steps.");
  Counter& wait_seconds =
      AddCounter(registry, "switchyard_attention_wait_seconds_total",
                 "Part of it in which they waited for expert workers and each other.");
  prometheus::Family<Counter>& requests = BuildCounter()
                                              .Name("switchyard_requests_total")
                                              .Help("Choices that ended, by finish reason.")
                                              .Register(registry);
  Counter& finished_stop = requests.Add({{"finish_reason", "stop"}});
  Counter& finished_length = requests.Add({{"finish_reason", "length"}});
  Counter& finished_abort = requests.Add({{"finish_reason", "abort"}});
  Counter& finished_error = requests.Add({{"finish_reason", "error"}});
  prometheus::Family<Counter>& rejections =
      BuildCounter()
          .Name("switchyard_admission_rejections_total")
          .Help("Valid requests that were refused, by reason.")
          .Register(registry);
  Counter& rejected_queue_full = rejections.Add({{"reason", "queue_full"}});
  Counter& rejected_loading = rejections.Add({{"reason", "loading"}});
  Counter& rejected_draining = rejections.Add({{"reason", "draining"}});
  Counter& rejected_failed = rejections.Add({{"reason", "engine_failed"}});
  Histogram& first_token =
      AddHistogram(registry, "switchyard_time_to_first_token_seconds",
                   "From a request's arrival to its first token.", kFirstTokenSeconds);
  Histogram& inter_token = AddHistogram(registry, "switchyard_inter_token_latency_seconds",
                                        "Between two tokens of a choice.", kInterTokenSeconds);
  Histogram& e2e =
      AddHistogram(registry, "switchyard_e2e_request_latency_seconds",
                   "From a request's arrival to the end of a choice.", kRequestSeconds);
  Histogram& queue_time = AddHistogram(registry, "switchyard_request_queue_time_seconds",
                                       "From arrival to the first step.", kRequestSeconds);
  Histogram& prefill_time =
      AddHistogram(registry, "switchyard_request_prefill_time_seconds",
                   "From the first step to the end of prefill.", kRequestSeconds);
  Histogram& decode_time =
      AddHistogram(registry, "switchyard_request_decode_time_seconds",
                   "From the end of prefill to the end of a choice.", kRequestSeconds);
  Histogram& request_prompt = AddHistogram(registry, "switchyard_request_prompt_tokens",
                                           "Tokens per prompt.", kRequestTokens);
  Histogram& request_generation = AddHistogram(registry, "switchyard_request_generation_tokens",
                                               "Tokens generated per choice.", kRequestTokens);
  Histogram& iteration_tokens =
      AddHistogram(registry, "switchyard_iteration_tokens", "Rows per step.", kIterationTokens);
  Histogram& step_seconds =
      AddHistogram(registry, "switchyard_step_seconds", "Duration of a step.", kStepSeconds);

  // Only where workers are other processes: elsewhere these could never move.
  struct Cluster {
    explicit Cluster(Registry& registry)
        : joins(AddCounter(registry, "switchyard_worker_joins_total", "Workers that registered.")),
          failures(AddCounter(registry, "switchyard_worker_failures_total",
                              "Workers that were declared dead.")),
          drains(AddCounter(registry, "switchyard_worker_drains_total",
                            "Workers that left in order.")),
          failovers(AddCounter(registry, "switchyard_failovers_total",
                               "Epochs that ended by a death or an error; their work was planned "
                               "again.")),
          refusals(AddCounter(registry, "switchyard_worker_refusals_total",
                              "Registrations of workers that were refused.")),
          heartbeat_age(AddGauge(registry, "switchyard_worker_heartbeat_age_seconds",
                                 "Age of the oldest last heartbeat of all workers.")) {}
    Counter& joins;
    Counter& failures;
    Counter& drains;
    Counter& failovers;
    Counter& refusals;
    Gauge& heartbeat_age;
    std::map<std::string, Counter*> counters;  // of the workers, by their name, once reported
    Gauge* balancedness = nullptr;             // once there were plans
    Gauge* plan_gap = nullptr;
  };
  std::optional<Cluster> cluster;  // under scrape_mu
};

Metrics::Metrics() : families_(new Families) {}
Metrics::~Metrics() = default;

void Metrics::CountRejection(RejectionReason reason) {
  switch (reason) {
    case RejectionReason::kQueueFull:
      families_->rejected_queue_full.Increment();
      break;
    case RejectionReason::kLoading:
      families_->rejected_loading.Increment();
      break;
    case RejectionReason::kDraining:
      families_->rejected_draining.Increment();
      break;
    case RejectionReason::kFailed:
      families_->rejected_failed.Increment();
      break;
  }
}

void Metrics::ObservePrompt(int32_t num_tokens) {
  families_->prompt_tokens.Increment(num_tokens);
  families_->request_prompt.Observe(num_tokens);
}

void Metrics::ObserveTimeToFirstToken(double seconds) { families_->first_token.Observe(seconds); }
void Metrics::ObserveInterTokenLatency(double seconds) { families_->inter_token.Observe(seconds); }
void Metrics::CountGeneratedTokens(int32_t num_tokens) {
  families_->generated.Increment(num_tokens);
}

void Metrics::ObserveChoice(const ChoiceTimes& times) {
  Families& f = *families_;
  f.e2e.Observe(times.e2e);
  f.request_generation.Observe(times.generated);
  if (times.queue) f.queue_time.Observe(std::max(0.0, *times.queue));
  if (times.prefill) f.prefill_time.Observe(std::max(0.0, *times.prefill));
  if (times.decode) f.decode_time.Observe(std::max(0.0, *times.decode));
  switch (times.reason) {
    case FinishReason::kStop:
      f.finished_stop.Increment();
      break;
    case FinishReason::kLength:
      f.finished_length.Increment();
      break;
    case FinishReason::kCancelled:
      f.finished_abort.Increment();
      break;
    case FinishReason::kError:
    case FinishReason::kNone:
      f.finished_error.Increment();
      break;
  }
}

void Metrics::ObserveStep(const StepObservation& step) {
  families_->iteration_tokens.Observe(step.tokens);
  families_->step_seconds.Observe(step.seconds);
}

void Metrics::SetCluster(const ClusterSnapshot& snapshot) {
  Families& f = *families_;
  MutexLock lock(f.scrape_mu);
  int32_t attention = 0;
  int32_t experts = 0;
  double oldest = 0;
  for (const ClusterSnapshot::Worker& worker : snapshot.workers) {
    oldest = std::max(oldest, worker.heartbeat_age_s);
    if (worker.rank >= 0) ++(worker.role == "expert" ? experts : attention);
  }
  f.attention_workers.Set(attention);
  f.expert_workers.Set(experts);
  f.epoch.Set(static_cast<double>(snapshot.epoch));
  if (!snapshot.networked) return;
  if (!f.cluster) f.cluster.emplace(f.registry);
  RaiseTo(f.cluster->joins, static_cast<double>(snapshot.joins));
  RaiseTo(f.cluster->failures, static_cast<double>(snapshot.failures));
  RaiseTo(f.cluster->drains, static_cast<double>(snapshot.drains));
  RaiseTo(f.cluster->failovers, static_cast<double>(snapshot.failovers));
  RaiseTo(f.cluster->refusals, static_cast<double>(snapshot.refusals));
  f.cluster->heartbeat_age.Set(oldest);
  for (const WorkerCounter& known : kWorkerCounters) {
    const auto reported = snapshot.counters.find(known.name);
    if (reported == snapshot.counters.end() || reported->second == 0) continue;
    Counter*& counter = f.cluster->counters[known.name];
    if (counter == nullptr) counter = &AddCounter(f.registry, known.family, known.help);
    RaiseTo(*counter, reported->second);
  }
  if (snapshot.balancedness < 0) return;
  if (f.cluster->balancedness == nullptr) {
    f.cluster->balancedness = &AddGauge(
        f.registry, "switchyard_expert_balancedness",
        "Mean over expert ranks of the copies computed, over the fullest rank's; of recent plans.");
    f.cluster->plan_gap = &AddGauge(f.registry, "switchyard_dispatch_plan_gap_ratio",
                                    "Cost of recent plans over their lower bound, less one.");
  }
  f.cluster->balancedness->Set(snapshot.balancedness);
  f.cluster->plan_gap->Set(snapshot.plan_gap);
}

std::string Metrics::Serialize(const SchedulerStats* scheduler) {
  Families& f = *families_;
  MutexLock lock(f.scrape_mu);
  if (scheduler != nullptr) {
    f.running.Set(scheduler->running);
    f.waiting.Set(scheduler->waiting);
    f.kv_usage.Set(scheduler->kv_usage);
    RaiseTo(f.iterations, static_cast<double>(scheduler->steps));
    RaiseTo(f.cached_tokens, static_cast<double>(scheduler->cached_tokens));
    RaiseTo(f.preemptions, static_cast<double>(scheduler->preemptions));
    RaiseTo(f.one_micro_batch,
            static_cast<double>(scheduler->steps - scheduler->two_micro_batches));
    RaiseTo(f.two_micro_batches, static_cast<double>(scheduler->two_micro_batches));
    RaiseTo(f.worker_seconds, scheduler->worker_seconds);
    RaiseTo(f.wait_seconds, scheduler->wait_seconds);
  }
  std::ostringstream out;
  prometheus::TextSerializer().Serialize(out, f.registry.Collect());
  return out.str();
}

}  // namespace switchyard
