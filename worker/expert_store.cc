#include "worker/expert_store.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "comm/hash64.h"
#include "spdlog/spdlog.h"

namespace switchyard {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kProgressInterval{5};  // of the log lines of a long load

uint64_t Checksum(const MlpWeights& weights, int32_t layer, int32_t expert) {
  Hash64 hash;
  hash.Number(static_cast<uint64_t>(layer));
  hash.Number(static_cast<uint64_t>(expert));
  for (const PackedMatrix* matrix : {&weights.gate_up, &weights.down})
    hash.Bytes({matrix->storage.data(), matrix->storage.bytes()});
  return hash.value();
}

}  // namespace

ExpertStore::ExpertStore(const OpenedModel* model, std::unique_ptr<ComputeBackend> backend,
                         std::shared_ptr<const WorkerCounters> counters)
    : model_(model),
      backend_(std::move(backend)),
      counters_(std::move(counters)),
      budget_(model->expert_bytes) {
  held_.resize(static_cast<size_t>(model->info.num_moe_layers));
  for (std::vector<Held>& layer : held_) layer.resize(static_cast<size_t>(model->info.num_experts));
  thread_ = std::thread([this] { Run(); });
}

ExpertStore::~ExpertStore() {
  {
    MutexLock lock(mu_);
    stopping_ = true;
    changed_.NotifyAll();
  }
  thread_.join();
}

void ExpertStore::Assign(ExpertLists experts, int64_t bytes_per_step, Done done) {
  MutexLock lock(mu_);
  assignment_ = {assignment_.number + 1, std::move(experts), std::move(done)};
  budget_.Begin(bytes_per_step);
  changed_.NotifyAll();
}

void ExpertStore::CountStep() {
  MutexLock lock(mu_);
  budget_.CountStep(Clock::now());
  if (held_back_) changed_.NotifyAll();
}

void ExpertStore::CancelAssignment() {
  MutexLock lock(mu_);
  assignment_.done = nullptr;
}

absl::StatusOr<std::shared_ptr<const ExpertWeights>> ExpertStore::Install(
    const ExpertPlacement& placement, int32_t rank) {
  auto weights = std::make_shared<ExpertWeights>();
  weights->dtype = model_->dtype;
  MutexLock lock(mu_);
  std::vector<std::vector<uint8_t>> keep(held_.size());
  for (size_t layer = 0; layer < held_.size(); ++layer) {
    auto& experts = weights->experts.emplace_back(held_[layer].size());
    keep[layer].resize(held_[layer].size());
    for (int32_t expert : placement.ExpertsOf(static_cast<int32_t>(layer), rank)) {
      const size_t e = static_cast<size_t>(expert);
      experts[e] = held_[layer][e].weights;
      keep[layer][e] = 1;
      if (experts[e] == nullptr) {
        return absl::FailedPreconditionError(
            absl::StrCat("expert ", expert, " of MoE layer ", layer, " is not loaded"));
      }
    }
    if (assignment_.done == nullptr) continue;  // what it asked for besides is dropped
    for (int32_t expert : assignment_.experts[layer]) keep[layer][static_cast<size_t>(expert)] = 1;
  }
  for (size_t layer = 0; layer < held_.size(); ++layer) {
    for (size_t e = 0; e < held_[layer].size(); ++e) {
      if (!keep[layer][e]) held_[layer][e] = {};
    }
  }
  return weights;
}

int64_t ExpertStore::CountWith(const ExpertLists& experts) const {
  MutexLock lock(mu_);
  int64_t count = 0;
  for (size_t layer = 0; layer < held_.size(); ++layer) {
    std::vector<uint8_t> counted(held_[layer].size());
    for (size_t e = 0; e < counted.size(); ++e)
      counted[e] = held_[layer][e].weights != nullptr ? 1 : 0;
    for (int32_t expert : experts[layer]) counted[static_cast<size_t>(expert)] = 1;
    count += std::count(counted.begin(), counted.end(), uint8_t{1});
  }
  return count;
}

bool ExpertStore::loading() const {
  MutexLock lock(mu_);
  return assignment_.done != nullptr && !held_back_;
}

const ExpertStore::Held& ExpertStore::At(int32_t layer, int32_t expert) const {
  return held_[static_cast<size_t>(layer)][static_cast<size_t>(expert)];
}

ExpertStore::Place ExpertStore::FirstMissing() const {
  for (size_t layer = 0; layer < assignment_.experts.size(); ++layer) {
    for (int32_t expert : assignment_.experts[layer]) {
      const int32_t l = static_cast<int32_t>(layer);
      if (At(l, expert).weights == nullptr) return {l, expert};
    }
  }
  return {};
}

std::vector<ExpertStore::Sum> ExpertStore::Sums() const {
  std::vector<Sum> sums;
  for (size_t layer = 0; layer < assignment_.experts.size(); ++layer) {
    const int32_t l = static_cast<int32_t>(layer);
    for (int32_t expert : assignment_.experts[layer])
      sums.push_back({l, expert, At(l, expert).checksum});
  }
  return sums;
}

bool ExpertStore::AwaitNext(Place* next) {
  while (!stopping_) {
    if (assignment_.done == nullptr) {
      changed_.Wait(mu_);
      continue;
    }
    *next = FirstMissing();
    if (next->expert < 0 || budget_.Take(counters_->steps.load() > 0, Clock::now())) return true;
    held_back_ = true;
    changed_.WaitUntil(mu_, budget_.idle_at());
    held_back_ = false;
  }
  return false;
}

ExpertStore::Held ExpertStore::Load(int32_t layer, int32_t expert) {
  Held held;
  held.weights = LoadExpert(*model_, layer, expert, backend_.get(), LoadProgress());
  held.checksum = Checksum(*held.weights, layer, expert);
  return held;
}

void ExpertStore::Run() {
  uint64_t number = 0;  // of the assignment being loaded
  uint64_t before = 0;  // experts loaded when it came
  Clock::time_point began, logged;
  for (;;) {
    Place next;
    std::vector<Sum> sums;
    Done done;
    {
      MutexLock lock(mu_);
      if (!AwaitNext(&next)) return;
      if (number != assignment_.number) {
        number = assignment_.number;
        before = loaded_.load();
        began = logged = Clock::now();
      }
      if (next.expert < 0) {
        sums = Sums();
        done = std::exchange(assignment_.done, nullptr);
      }
    }
    if (done) {
      spdlog::info("loaded {} experts of at most {} bytes in {:.2f} s", loaded_.load() - before,
                   model_->expert_bytes,
                   std::chrono::duration<double>(Clock::now() - began).count());
      done(sums);
      continue;
    }
    Held held = Load(next.layer, next.expert);
    loaded_.fetch_add(1);
    {
      MutexLock lock(mu_);
      held_[static_cast<size_t>(next.layer)][static_cast<size_t>(next.expert)] = std::move(held);
    }
    if (Clock::now() - logged >= kProgressInterval) {
      logged = Clock::now();
      spdlog::info("loading experts: {} so far, now MoE layer {} of {}", loaded_.load() - before,
                   next.layer, model_->info.num_moe_layers);
    }
  }
}

}  // namespace switchyard
