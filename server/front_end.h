// FrontEnd: what every protocol shares: the engine once it is loaded, keys, health, metrics, the
// task pool, and the one way from a GenerationRequest to a running Generation. Owned by the Server;
// all methods may be called from any thread. It must outlive the scheduler, whose sinks reach the
// task pool.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/mutex.h"
#include "scheduler/cluster_snapshot.h"
#include "server/engine.h"
#include "server/generation.h"
#include "server/metrics.h"
#include "server/task_pool.h"

namespace switchyard {

struct FrontEndOptions {
  std::vector<std::string> api_keys;  // none: open to all
  int num_text_threads = 2;           // that parse, render and tokenize
  int num_output_threads = 2;  // that detokenize and write: a huge prompt holds up nobody's stream
  std::chrono::milliseconds stall_timeout{60'000};  // work without a step for so long: unhealthy
  std::optional<uint64_t> seed;  // for requests without one; unset: from the system
};

class FrontEnd {
 public:
  explicit FrontEnd(FrontEndOptions options);

  void SetLoading(int percent) { loading_percent_.store(percent); }
  // Instead of a percentage: what the engine waits for, asked whenever somebody wants to know.
  void SetWaitsFor(std::function<std::string()> waits_for);
  // The workers, for /admin/cluster and the metrics; before SetEngine, once.
  void SetCluster(std::function<ClusterSnapshot()> cluster);
  void SetEngine(Engine engine);  // once
  void SetDraining() { draining_.store(true); }

  // Null before the model is loaded.
  std::shared_ptr<const Engine> engine() const;
  // The engine if new work is welcome, else kUnavailable (counted as a rejection).
  absl::StatusOr<std::shared_ptr<const Engine>> EngineForWork();
  // OK when tokens can be generated; else kUnavailable and why ("loading 43 %").
  absl::Status Health() const;
  absl::Status Loading() const;                    // kUnavailable: "loading 43 %"
  std::optional<ClusterSnapshot> cluster() const;  // unset before SetCluster
  // `authorization`: the header or metadata as sent. Compares in constant time.
  absl::Status Authorize(std::string_view authorization) const;

  // Prepares, submits and starts. On an error nothing was accepted. Heavy: on pool() only.
  absl::StatusOr<std::shared_ptr<Generation>> Generate(
      const GenerationRequest& request, std::unique_ptr<GenerationConsumer> consumer);
  // Ends whatever still runs with an error for its client.
  void FailAll(const absl::Status& status);

  // Joins the pools: text may still be worked on for clients that have gone, and the engine is
  // about to go too.
  void StopPools();

  Metrics& metrics() { return metrics_; }
  TaskPool& pool() { return text_pool_; }  // for work before a request is accepted
  std::string SerializeMetrics();
  uint64_t DrawSeed();

 private:
  void Remember(const std::shared_ptr<Generation>& generation);

  const FrontEndOptions options_;
  std::atomic<int> loading_percent_{0};
  std::atomic<bool> draining_{false};
  std::atomic<uint64_t> num_seeds_{0};
  const uint64_t seed_base_;
  Metrics metrics_;

  mutable Mutex mu_;
  std::shared_ptr<const Engine> engine_ SY_GUARDED_BY(mu_);
  std::function<std::string()> waits_for_ SY_GUARDED_BY(mu_);
  std::function<ClusterSnapshot()> cluster_ SY_GUARDED_BY(mu_);
  std::vector<std::weak_ptr<Generation>> generations_ SY_GUARDED_BY(mu_);  // some have ended
  size_t prune_at_ SY_GUARDED_BY(mu_) = 64;

  TaskPool output_pool_;
  TaskPool text_pool_;  // last: its tasks use the rest
};

}  // namespace switchyard
