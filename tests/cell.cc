#include "tests/cell.h"

#include <cstring>
#include <utility>

#include "kernels/check.h"

namespace switchyard {
namespace {

constexpr std::chrono::minutes kLost(4);  // no test waits this long for a request that lives

template <typename T>
void Append(const T& value, std::string* out) {
  static_assert(std::is_arithmetic_v<T>);
  out->append(reinterpret_cast<const char*>(&value), sizeof(value));
}

void AppendLogprob(const TokenLogprob& logprob, std::string* out) {
  Append(logprob.token, out);
  Append(logprob.logprob, out);
  Append(logprob.top.size(), out);
  for (const auto& [token, value] : logprob.top) {
    Append(token, out);
    Append(value, out);
  }
}

}  // namespace

std::string ChoiceReply::Bits() const {
  std::string bits;
  Append(static_cast<int>(reason), &bits);
  Append(tokens.size(), &bits);
  for (int32_t token : tokens) Append(token, &bits);
  Append(logprobs.size(), &bits);
  for (const TokenLogprob& logprob : logprobs) AppendLogprob(logprob, &bits);
  Append(prompt_logprobs.size(), &bits);
  for (const TokenLogprob& logprob : prompt_logprobs) AppendLogprob(logprob, &bits);
  return bits;
}

bool Reply::Finished() const {
  for (const ChoiceReply& choice : choices_) {
    if (choice.reason == FinishReason::kNone) return false;
  }
  return true;
}

std::vector<ChoiceReply> Reply::Wait() {
  const auto deadline = std::chrono::steady_clock::now() + kLost;
  MutexLock lock(mu_);
  while (!Finished()) SY_CHECK(changed_.WaitUntil(mu_, deadline));
  return choices_;
}

void Reply::WaitForTokens(size_t choice, size_t n) {
  const auto deadline = std::chrono::steady_clock::now() + kLost;
  MutexLock lock(mu_);
  while (choices_[choice].tokens.size() < n && choices_[choice].reason == FinishReason::kNone) {
    SY_CHECK(changed_.WaitUntil(mu_, deadline));
  }
}

std::vector<ChoiceReply> Reply::Now() const {
  MutexLock lock(mu_);
  return choices_;
}

void Reply::Take(std::vector<ChoiceEvent> events) {
  MutexLock lock(mu_);
  for (ChoiceEvent& event : events) {
    ChoiceReply& choice = choices_[static_cast<size_t>(event.choice)];
    SY_CHECK(choice.reason == FinishReason::kNone);  // it ends once
    choice.tokens.insert(choice.tokens.end(), event.tokens.begin(), event.tokens.end());
    std::ranges::move(event.logprobs, std::back_inserter(choice.logprobs));
    std::ranges::move(event.prompt_logprobs, std::back_inserter(choice.prompt_logprobs));
    choice.cached_tokens = std::max(choice.cached_tokens, event.cached_tokens);
    if (event.finished) {
      choice.reason = event.reason;
      choice.error = event.error;
    }
  }
  changed_.NotifyAll();
}

class Cell::Client final : public WorkerClient {
 public:
  Client(std::unique_ptr<LocalCell> workers, std::function<void(StepPlan*)> tamper)
      : workers_(std::move(workers)), tamper_(std::move(tamper)) {}
  uint64_t progress() const override { return workers_->progress(); }
  void Execute(int32_t rank, StepPlan plan) override {
    if (tamper_) tamper_(&plan);
    workers_->Execute(rank, std::move(plan));
  }
  void Paused(uint64_t) override {}  // never asked to
  void SetEventCallback(std::function<void(WorkerEvent)> on_event) override {
    workers_->SetResultCallback([on_event](StepResult result) { on_event(std::move(result)); });
    EpochView view{.epoch = 1, .attention = {}};
    for (int rank = 0; rank < workers_->num_attention_workers(); ++rank) {
      view.attention.push_back(
          {.worker = static_cast<uint64_t>(rank) + 1, .num_kv_blocks = model().num_kv_blocks});
    }
    on_event(std::move(view));
  }
  const ModelInfo& model() const { return workers_->model_info(); }
  uint64_t weights_moved() const {
    uint64_t moved = 0;
    for (int e = 0; e < workers_->num_expert_workers(); ++e) {
      moved += workers_->expert_counters(e).weights_received.load();
    }
    return moved;
  }

 private:
  const std::unique_ptr<LocalCell> workers_;
  const std::function<void(StepPlan*)> tamper_;
};

Cell::Cell(const CellOptions& workers, SchedulerOptions scheduler,
           std::function<void(StepPlan*)> tamper) {
  auto cell = LocalCell::Create(workers);
  if (!cell.ok()) internal::CheckFailed(__FILE__, __LINE__, cell.status().ToString());
  client_ = std::make_unique<Client>(*std::move(cell), std::move(tamper));
  scheduler.max_num_batched_tokens = workers.max_num_batched_tokens;
  scheduler.max_num_seqs = workers.max_num_seqs;
  scheduler_ = std::make_unique<Scheduler>(scheduler, client_->model(), client_.get());
  scheduler_->Start();
}

Cell::~Cell() = default;

const ModelInfo& Cell::model() const { return client_->model(); }
uint64_t Cell::weights_moved() const { return client_->weights_moved(); }
SchedulerStats Cell::Stats() const { return scheduler_->Stats(); }

absl::StatusOr<Cell::Submitted> Cell::Submit(Request request) {
  auto reply = std::make_shared<Reply>(request.choices.size());
  request.arrival = std::chrono::steady_clock::now();
  request.sink = [reply](std::vector<ChoiceEvent> events) { reply->Take(std::move(events)); };
  const absl::StatusOr<RequestId> id = scheduler_->Submit(std::move(request));
  if (!id.ok()) return id.status();
  return Submitted{*id, std::move(reply)};
}

void Cell::Cancel(RequestId id) { scheduler_->Cancel(id); }
void Cell::CancelChoice(RequestId id, int32_t choice) { scheduler_->CancelChoice(id, choice); }

std::vector<ChoiceReply> Cell::Run(Request request) {
  auto submitted = Submit(std::move(request));
  if (!submitted.ok()) internal::CheckFailed(__FILE__, __LINE__, submitted.status().ToString());
  return submitted->reply->Wait();
}

void Cell::Drain() {
  Mutex mu;
  CondVar changed;
  bool drained = false;
  scheduler_->Drain([&] {
    MutexLock lock(mu);
    drained = true;
    changed.NotifyAll();
  });
  const auto deadline = std::chrono::steady_clock::now() + kLost;
  MutexLock lock(mu);
  while (!drained) SY_CHECK(changed.WaitUntil(mu, deadline));
}

std::string FixtureDir(const std::string& name) {
  return std::string(SWITCHYARD_SOURCE_DIR) + "/tests/fixtures/" + name;
}
std::string DemoDir() { return std::string(SWITCHYARD_SOURCE_DIR) + "/models/demo"; }

}  // namespace switchyard
