#include "server/front_end.h"

#include <algorithm>
#include <random>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "server/api_error.h"

namespace switchyard {
namespace {

// SplitMix64 (Steele et al., 2014): a good value for every counter.
uint64_t Mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

uint64_t RandomSeed() {
  std::random_device device;
  return (uint64_t{device()} << 32) | device();
}

// Takes the same time wherever the texts differ; only the length of `given` shows.
bool EqualInConstantTime(std::string_view given, std::string_view key) {
  unsigned char difference = given.size() == key.size() ? 0 : 1;
  for (size_t i = 0; i < given.size(); ++i) {
    difference |= static_cast<unsigned char>(given[i] ^ (key.empty() ? 0 : key[i % key.size()]));
  }
  return difference == 0;
}

}  // namespace

FrontEnd::FrontEnd(FrontEndOptions options)
    : options_(std::move(options)),
      seed_base_(options_.seed ? *options_.seed : RandomSeed()),
      output_pool_(options_.num_output_threads),
      text_pool_(options_.num_text_threads) {}

void FrontEnd::SetEngine(Engine engine) {
  MutexLock lock(mu_);
  engine_ = std::make_shared<const Engine>(std::move(engine));
}

std::shared_ptr<const Engine> FrontEnd::engine() const {
  MutexLock lock(mu_);
  return engine_;
}

absl::StatusOr<std::shared_ptr<const Engine>> FrontEnd::EngineForWork() {
  if (draining_.load()) {
    metrics_.CountRejection(RejectionReason::kDraining);
    return absl::UnavailableError("the server is shutting down");
  }
  auto engine = this->engine();
  if (engine == nullptr) {
    metrics_.CountRejection(RejectionReason::kLoading);
    return Loading();
  }
  return engine;
}

void FrontEnd::StopPools() {
  text_pool_.Stop();
  output_pool_.Stop();
}

void FrontEnd::SetWaitsFor(std::function<std::string()> waits_for) {
  MutexLock lock(mu_);
  waits_for_ = std::move(waits_for);
}

void FrontEnd::SetCluster(std::function<ClusterSnapshot()> cluster) {
  MutexLock lock(mu_);
  cluster_ = std::move(cluster);
}

std::optional<ClusterSnapshot> FrontEnd::cluster() const {
  std::function<ClusterSnapshot()> cluster;
  {
    MutexLock lock(mu_);
    cluster = cluster_;
  }
  if (cluster == nullptr) return std::nullopt;
  return cluster();
}

absl::Status FrontEnd::Loading() const {
  std::function<std::string()> waits_for;
  {
    MutexLock lock(mu_);
    waits_for = waits_for_;
  }
  if (waits_for != nullptr) return absl::UnavailableError(waits_for());
  return absl::UnavailableError(absl::StrCat("loading ", loading_percent_.load(), " %"));
}

absl::Status FrontEnd::Health() const {
  const auto engine = this->engine();
  if (draining_.load()) return absl::UnavailableError("the server is shutting down");
  if (engine == nullptr) return Loading();
  const SchedulerStats stats = engine->scheduler->Stats();
  if (stats.failed) return absl::UnavailableError("the engine has failed");
  if (stats.unavailable) {
    const std::optional<ClusterSnapshot> cluster = this->cluster();
    return absl::UnavailableError(cluster ? cluster->waits_for : "no workers are left");
  }
  const auto still = std::chrono::steady_clock::now() - stats.last_progress;
  if (stats.running + stats.waiting > 0 && still > options_.stall_timeout) {
    return absl::UnavailableError(
        absl::StrCat("the engine is stalled: no step for ",
                     std::chrono::duration_cast<std::chrono::seconds>(still).count(), " s"));
  }
  return absl::OkStatus();
}

absl::Status FrontEnd::Authorize(std::string_view authorization) const {
  if (options_.api_keys.empty()) return absl::OkStatus();
  absl::string_view given(authorization.data(), authorization.size());
  bool known = false;
  if (absl::ConsumePrefix(&given, "Bearer ") || absl::ConsumePrefix(&given, "bearer ")) {
    for (const std::string& key : options_.api_keys)
      known |= EqualInConstantTime({given.data(), given.size()}, key);
  }
  if (known) return absl::OkStatus();
  return WithErrorCode(
      absl::UnauthenticatedError(authorization.empty()
                                     ? "an API key is required: Authorization: Bearer KEY"
                                     : "the API key is not valid"),
      "invalid_api_key");
}

absl::StatusOr<std::shared_ptr<Generation>> FrontEnd::Generate(
    const GenerationRequest& request, std::unique_ptr<GenerationConsumer> consumer) {
  auto engine = EngineForWork();
  if (!engine.ok()) return engine.status();
  auto prepared = Prepare(request, **engine, [this] { return DrawSeed(); });
  if (!prepared.ok()) return prepared.status();
  auto generation =
      Generation::Start({.engine = engine->get(), .pool = &output_pool_, .metrics = &metrics_},
                        request, *std::move(prepared), std::move(consumer));
  if (absl::IsResourceExhausted(generation.status()))
    metrics_.CountRejection(RejectionReason::kQueueFull);
  if (absl::IsUnavailable(generation.status())) {
    metrics_.CountRejection(draining_.load() ? RejectionReason::kDraining
                                             : RejectionReason::kFailed);
  }
  if (generation.ok()) Remember(*generation);
  return generation;
}

void FrontEnd::Remember(const std::shared_ptr<Generation>& generation) {
  MutexLock lock(mu_);
  generations_.push_back(generation);
  if (generations_.size() < prune_at_) return;
  generations_.erase(std::remove_if(generations_.begin(), generations_.end(),
                                    [](const auto& entry) { return entry.expired(); }),
                     generations_.end());
  prune_at_ = std::max<size_t>(64, 2 * generations_.size());
}

void FrontEnd::FailAll(const absl::Status& status) {
  std::vector<std::weak_ptr<Generation>> generations;
  {
    MutexLock lock(mu_);
    generations = generations_;
  }
  for (const auto& entry : generations) {
    if (const auto generation = entry.lock()) generation->Fail(status);
  }
}

std::string FrontEnd::SerializeMetrics() {
  const auto engine = this->engine();
  const std::optional<ClusterSnapshot> cluster = this->cluster();
  if (cluster) metrics_.SetCluster(*cluster);
  if (engine == nullptr) return metrics_.Serialize(nullptr);
  const SchedulerStats stats = engine->scheduler->Stats();
  return metrics_.Serialize(&stats);
}

uint64_t FrontEnd::DrawSeed() { return Mix(seed_base_ + num_seeds_.fetch_add(1)); }

}  // namespace switchyard
