#include "scheduler/scheduler.h"

#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/mutex.h"
#include "scheduler/scheduler_core.h"

namespace switchyard {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kHeartbeat = std::chrono::milliseconds(250);

struct Command {
  enum class Kind { kSubmit, kCancel, kCancelChoice } kind;
  RequestId id = 0;
  int32_t choice = 0;
  Request request;
};

// What other threads leave for the scheduler's thread. Taken whole, in order. Results and
// submissions are bounded by what is in flight and by the queue's limits, cancels by the requests
// that live, the other events by the workers that come and go.
struct Messages {
  std::vector<Command> commands;
  std::vector<WorkerEvent> events;
  std::vector<std::function<void()>> drained;  // to call when nothing is left
  bool stop = false;
};

// Outlives the scheduler in the client's callback, so that late results are harmless.
struct Inbox {
  Mutex mu;
  CondVar changed;
  Messages messages SY_GUARDED_BY(mu);
  RequestId next_id SY_GUARDED_BY(mu) = 1;
  int32_t queued_requests SY_GUARDED_BY(mu) = 0;
  int64_t queued_tokens SY_GUARDED_BY(mu) = 0;
  bool draining SY_GUARDED_BY(mu) = false;
  absl::Status refusal SY_GUARDED_BY(mu);  // not OK: the workers failed or are away for too long

  bool empty() const SY_REQUIRES(mu) {
    return messages.commands.empty() && messages.events.empty() && messages.drained.empty() &&
           !messages.stop;
  }

  Messages Take(Clock::time_point deadline) SY_EXCLUDES(mu) {
    MutexLock lock(mu);
    while (empty()) {
      if (!changed.WaitUntil(mu, deadline)) break;
    }
    const bool stop = messages.stop;  // stays
    Messages taken = std::exchange(messages, {});
    messages.stop = stop;
    return taken;
  }
};

}  // namespace

struct Scheduler::State {
  State(const SchedulerOptions& options, const ModelInfo& model, WorkerClient* client)
      : options(options), client(client), core(options, model) {
    Publish();  // health may ask before Start
  }

  void Run();
  bool Handle(Messages messages);
  void On(const StepResult& result);
  void On(const EpochView& view) { core.Install(view); }
  void On(const EpochPause& pause) { core.Pause(pause); }
  void On(const EpochEnd& end) { core.EndEpoch(end); }
  void On(const Unavailable& event) { core.BecomeUnavailable(event.status); }
  absl::Status Refusal() const;
  void Execute(SchedulerCore::Step step);
  void Publish();
  void Finish();

  // Constant after Start.
  const SchedulerOptions options;
  WorkerClient* const client;
  const std::shared_ptr<Inbox> inbox = std::make_shared<Inbox>();
  std::function<void(const StepObservation&)> observer;
  std::thread thread;

  // Scheduler thread only (Validate of the core: any).
  SchedulerCore core;
  std::vector<std::function<void()>> drained;
  Clock::time_point last_progress = Clock::now();
  uint64_t seen_progress = 0;  // of the client
  bool was_idle = true;

  mutable Mutex stats_mu;
  SchedulerStats stats SY_GUARDED_BY(stats_mu);
};

void Scheduler::State::Run() {
  for (;;) {
    const bool stop = Handle(inbox->Take(Clock::now() + kHeartbeat));
    if (stop) break;
    if (const auto epoch = core.TakePaused()) client->Paused(*epoch);
    while (core.CanPlan()) {
      core.Admit();
      auto step = core.Plan(Clock::now());
      if (!step) break;
      Execute(*std::move(step));
    }
    Publish();
  }
  Finish();
}

// True when the loop is to end.
bool Scheduler::State::Handle(Messages messages) {
  for (Command& command : messages.commands) {
    switch (command.kind) {
      case Command::Kind::kSubmit:
        core.Submit(command.id, std::move(command.request));
        break;
      case Command::Kind::kCancel:
        core.Cancel(command.id);
        break;
      case Command::Kind::kCancelChoice:
        core.CancelChoice(command.id, command.choice);
        break;
    }
  }
  for (const WorkerEvent& event : messages.events) {
    std::visit([&](const auto& e) { On(e); }, event);
  }
  if (const absl::Status refusal = Refusal(); !refusal.ok()) core.EndAll(refusal);  // came since
  for (auto& done : messages.drained) drained.push_back(std::move(done));
  return messages.stop;
}

void Scheduler::State::On(const StepResult& result) {
  const Clock::time_point now = Clock::now();
  last_progress = now;
  const auto observation = core.Apply(result, now);
  if (observation && observer) observer(*observation);
}

// Why nothing is accepted; OK: it is.
absl::Status Scheduler::State::Refusal() const {
  return core.failed() ? absl::UnavailableError("the workers failed") : core.unavailable();
}

void Scheduler::State::Execute(SchedulerCore::Step step) {
  last_progress = Clock::now();
  for (auto& [rank, plan] : step.plans) client->Execute(rank, std::move(plan));
}

// Lets the world see what the loop did: the queue's room, the snapshot, the events.
void Scheduler::State::Publish() {
  const bool idle = core.idle();
  if (idle && !was_idle) core.CheckIntegrity();
  was_idle = idle;
  const uint64_t done = client->progress();
  if (!core.step_in_flight() || done != seen_progress) last_progress = Clock::now();
  seen_progress = done;
  {
    const SchedulerCore::LeftQueue left = core.TakeLeftQueue();
    MutexLock lock(inbox->mu);
    inbox->queued_requests -= left.requests;
    inbox->queued_tokens -= left.tokens;
    inbox->refusal = Refusal();
  }
  {
    SchedulerStats snapshot = core.Stats();
    snapshot.last_progress = last_progress;
    MutexLock lock(stats_mu);
    stats = snapshot;
  }
  for (SchedulerCore::Delivery& delivery : core.TakeDeliveries()) {
    delivery.request->sink(std::move(delivery.events));
  }
  if (idle) {
    for (const auto& done : std::exchange(drained, {})) done();
  }
}

// The scheduler goes: what is left ends with an error.
void Scheduler::State::Finish() {
  Handle(inbox->Take(Clock::now()));
  core.EndAll(absl::UnavailableError("the server is shutting down"));
  Publish();
}

Scheduler::Scheduler(const SchedulerOptions& options, const ModelInfo& model, WorkerClient* client)
    : state_(std::make_unique<State>(options, model, client)) {
  client->SetEventCallback([inbox = state_->inbox](WorkerEvent event) {
    MutexLock lock(inbox->mu);
    inbox->messages.events.push_back(std::move(event));
    inbox->changed.NotifyOne();
  });
}

Scheduler::~Scheduler() {
  {
    MutexLock lock(state_->inbox->mu);
    state_->inbox->draining = true;
    state_->inbox->messages.stop = true;
    state_->inbox->changed.NotifyOne();
  }
  if (state_->thread.joinable()) {
    state_->thread.join();
  } else {
    state_->Finish();
  }
}

void Scheduler::Start() {
  SY_CHECK(!state_->thread.joinable());
  state_->thread = std::thread([state = state_.get()] { state->Run(); });
}

absl::StatusOr<RequestId> Scheduler::Submit(Request request) {
  SY_CHECK(request.sink != nullptr);
  if (absl::Status status = state_->core.Validate(request); !status.ok()) return status;
  const SchedulerOptions& options = state_->options;
  // Each choice holds the prompt's tokens (and their logprobs) while it waits.
  const int64_t num_tokens =
      static_cast<int64_t>(request.prompt.size()) * static_cast<int64_t>(request.choices.size());
  Inbox& inbox = *state_->inbox;
  MutexLock lock(inbox.mu);
  if (!inbox.refusal.ok()) return inbox.refusal;
  if (inbox.draining) return absl::UnavailableError("the server is draining");
  if (inbox.queued_requests >= options.max_queued_requests) {
    return absl::ResourceExhaustedError(absl::StrCat("the queue is full: ", inbox.queued_requests,
                                                     " requests wait, the limit is ",
                                                     options.max_queued_requests));
  }
  // A request beyond the limit may wait when nothing else does.
  if (inbox.queued_requests > 0 && inbox.queued_tokens + num_tokens > options.max_queued_tokens) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the queue is full: ", inbox.queued_tokens, " prompt tokens wait, with ",
                     num_tokens, " more the limit of ", options.max_queued_tokens, " is exceeded"));
  }
  ++inbox.queued_requests;
  inbox.queued_tokens += num_tokens;
  const RequestId id = inbox.next_id++;
  inbox.messages.commands.push_back({Command::Kind::kSubmit, id, 0, std::move(request)});
  inbox.changed.NotifyOne();
  return id;
}

void Scheduler::Cancel(RequestId id) {
  MutexLock lock(state_->inbox->mu);
  state_->inbox->messages.commands.push_back({Command::Kind::kCancel, id, 0, {}});
  state_->inbox->changed.NotifyOne();
}

void Scheduler::CancelChoice(RequestId id, int32_t choice) {
  MutexLock lock(state_->inbox->mu);
  state_->inbox->messages.commands.push_back({Command::Kind::kCancelChoice, id, choice, {}});
  state_->inbox->changed.NotifyOne();
}

void Scheduler::Drain(std::function<void()> done) {
  MutexLock lock(state_->inbox->mu);
  state_->inbox->draining = true;
  state_->inbox->messages.drained.push_back(std::move(done));
  state_->inbox->changed.NotifyOne();
}

SchedulerStats Scheduler::Stats() const {
  MutexLock lock(state_->stats_mu);
  return state_->stats;
}

void Scheduler::SetStepObserver(std::function<void(const StepObservation&)> observer) {
  SY_CHECK(!state_->thread.joinable());
  state_->observer = std::move(observer);
}

}  // namespace switchyard
