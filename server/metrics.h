// Metrics: everything under /metrics, prefix switchyard_. Owned by the server; all methods may be
// called from any thread. The families and their help texts are in metrics.cc; those that the
// scheduler counts are read from its snapshot when scraped. Token counters and histograms count
// what the server kept.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "scheduler/cluster_snapshot.h"
#include "scheduler/request.h"
#include "scheduler/scheduler.h"

namespace switchyard {

// Why a request was not admitted.
enum class RejectionReason { kQueueFull, kLoading, kDraining, kFailed };

// One choice that ended, in seconds. A time is unset when the phase was not reached.
struct ChoiceTimes {
  std::optional<double> queue;
  std::optional<double> prefill;
  std::optional<double> decode;
  double e2e = 0;
  int32_t generated = 0;  // tokens
  FinishReason reason = FinishReason::kStop;
};

class Metrics {
 public:
  Metrics();
  ~Metrics();

  void CountRejection(RejectionReason reason);
  void ObservePrompt(int32_t num_tokens);  // an admitted prompt
  void ObserveTimeToFirstToken(double seconds);
  void ObserveInterTokenLatency(double seconds);
  void CountGeneratedTokens(int32_t num_tokens);
  void ObserveChoice(const ChoiceTimes& times);
  void ObserveStep(const StepObservation& step);    // scheduler thread, after each step
  void SetCluster(const ClusterSnapshot& cluster);  // the workers, when scraped

  // The Prometheus text format. `scheduler`: null before the model is loaded.
  std::string Serialize(const SchedulerStats* scheduler);

 private:
  struct Families;
  const std::unique_ptr<Families> families_;
};

}  // namespace switchyard
