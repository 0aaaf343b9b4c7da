#include "scheduler/cluster.h"

#include <grpcpp/grpcpp.h>
#include <sys/random.h>

#include <algorithm>
#include <deque>
#include <map>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/mutex.h"
#include "proto/step_wire.h"
#include "scheduler/cell_costs.h"
#include "scheduler/cluster_credentials.h"
#include "scheduler/cluster_messages.h"
#include "scheduler/control_session.h"
#include "scheduler/register_check.h"
#include "scheduler/worker_reports.h"
#include "spdlog/spdlog.h"

namespace switchyard {
namespace {

using Clock = std::chrono::steady_clock;
using SessionPtr = std::shared_ptr<ControlSession>;

constexpr auto kTick = std::chrono::milliseconds(100);
constexpr int kMissedHeartbeats = 8;
constexpr int kMaxMessageBytes = 256 << 20;  // a result with all logprobs of a long prompt
constexpr size_t kMaxQuarantine = 1024;
constexpr auto kQuarantine = std::chrono::seconds(20);

std::string RandomBytes(size_t count) {
  std::string bytes(count, '\0');
  SY_CHECK_EQ(getrandom(bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
  return bytes;
}

MembershipOptions ToMembershipOptions(const ClusterOptions& options) {
  return {.num_moe_layers = options.model.num_moe_layers,
          .num_experts = options.model.num_experts,
          .min_expert_workers = options.min_expert_workers,
          .survive_expert_failures = options.survive_expert_failures,
          .replica_slots = options.replica_slots,
          .heartbeat_timeout = kMissedHeartbeats * options.heartbeat,
          .stall_timeout = options.stall_timeout,
          .no_home_timeout = options.no_home_timeout,
          .draw_secret = [] { return RandomBytes(32); }};
}

// The members of the newest epoch, for Execute. Immutable.
struct Route {
  uint64_t epoch = 0;
  std::vector<SessionPtr> members;  // by rank; null: gone
  int32_t num_attention = 0;
};

}  // namespace

struct Cluster::State final : public v1::Control::CallbackService {
  explicit State(const ClusterOptions& options)
      : options(options),
        incarnation(static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch() /
                                          std::chrono::nanoseconds(1))),
        membership(ToMembershipOptions(options)),
        reports(static_cast<size_t>(options.model.num_moe_layers) *
                static_cast<size_t>(options.model.num_experts)) {}

  grpc::ServerBidiReactor<v1::WorkerMessage, v1::SchedulerMessage>* Session(
      grpc::CallbackServerContext* context) override;

  // ---- gRPC threads ----
  void OnMessage(const SessionPtr& session, v1::WorkerMessage message);
  void OnResult(const SessionPtr& session, const v1::StepResult& wire);
  void Post(std::function<void()> task);

  // ---- the cluster's thread ----
  void Run();
  void Begin(const SessionPtr& session);
  void HangUpOnTheSilent(Clock::time_point now);  // who has not registered in time
  void Handle(const SessionPtr& session, const v1::WorkerMessage& message);
  void Register(const SessionPtr& session, const v1::Register& facts);
  void OnLoaded(WorkerId worker, const v1::Loaded& loaded, Clock::time_point now);
  void End(const SessionPtr& session);
  void Forget(WorkerId worker);
  bool CarryOut();  // false: there was nothing to do
  void Do(AssignAction& action);
  void Do(InstallAction& action);
  void Do(AbortAction& action);
  void Do(GoodbyeAction& action);
  void Do(FenceAction& action);
  void Do(WorkerEvent& event);
  void SendTo(WorkerId worker, v1::SchedulerMessage message);
  void RebalanceIfDue(Clock::time_point now);
  void Publish();

  // Constant after Create.
  const ClusterOptions options;
  const uint64_t incarnation;
  uint16_t port = 0;
  std::unique_ptr<grpc::Server> server;
  std::thread thread;

  std::atomic<uint64_t> progress{0};

  // The cluster's thread only.
  Membership membership;
  std::map<SessionPtr, Clock::time_point> unregistered;  // until when they may stay so
  std::map<WorkerId, SessionPtr> sessions;               // registered
  std::map<ControlSession*, WorkerId> ids;
  std::map<WorkerId, uint64_t> incarnations;
  std::map<uint64_t, Clock::time_point> quarantine;  // by incarnation, until when
  std::map<WorkerId, std::string> numerics;          // of those registered
  std::map<WorkerId, v1::PlanCosts> costs;           // as expert workers measured them
  std::map<WorkerId, uint64_t> worker_progress;
  std::shared_ptr<Route> next_route;  // while Install messages go out
  v1::PlanCosts next_costs;           // of that epoch
  WorkerReports reports;
  Clock::time_point next_rebalance;
  uint64_t refusals = 0;

  mutable Mutex mu;
  CondVar changed;
  std::deque<std::function<void()>> tasks SY_GUARDED_BY(mu);  // at most a few per session
  bool stopping SY_GUARDED_BY(mu) = false;
  std::function<void(WorkerEvent)> on_event SY_GUARDED_BY(mu);
  std::vector<WorkerEvent> early_events SY_GUARDED_BY(mu);  // before on_event was set
  std::function<void()> on_ready SY_GUARDED_BY(mu);
  bool was_ready SY_GUARDED_BY(mu) = false;
  std::shared_ptr<const Route> route SY_GUARDED_BY(mu);
  uint64_t last_step SY_GUARDED_BY(mu) = 0;  // whose header the expert workers have
  ClusterSnapshot snapshot SY_GUARDED_BY(mu);
};

// ---- gRPC threads ----

grpc::ServerBidiReactor<v1::WorkerMessage, v1::SchedulerMessage>* Cluster::State::Session(
    grpc::CallbackServerContext* context) {
  const absl::Status allowed = CheckClusterToken(*context, options.token);
  if (!allowed.ok()) {
    spdlog::warn("a worker at {} was refused: {}", context->peer(), std::string(allowed.message()));
    Post([this] { ++refusals; });
    return ControlSession::Refuse(
        context, grpc::Status(grpc::StatusCode::UNAUTHENTICATED, std::string(allowed.message())));
  }
  const SessionPtr session = ControlSession::Accept(
      context, {.on_message = [this](const SessionPtr& s,
                                     v1::WorkerMessage m) { OnMessage(s, std::move(m)); },
                .on_end = [this](const SessionPtr& s) { Post([this, s] { End(s); }); }});
  Post([this, session] { Begin(session); });
  session->Next();
  return session.get();
}

void Cluster::State::OnMessage(const SessionPtr& session, v1::WorkerMessage message) {
  if (message.has_step_done()) {  // the scheduler waits for it
    OnResult(session, message.step_done().result());
    session->Next();
    return;
  }
  Post([this, session, message = std::move(message)] {
    Handle(session, message);
    session->Next();
  });
}

void Cluster::State::OnResult(const SessionPtr& session, const v1::StepResult& wire) {
  std::function<void(WorkerEvent)> sink;
  int32_t rank = 0;
  {
    MutexLock lock(mu);
    if (route == nullptr || wire.epoch() != route->epoch) return;
    while (rank < route->num_attention && route->members[static_cast<size_t>(rank)] != session)
      ++rank;
    if (rank == route->num_attention) return;  // not a member
    sink = on_event;
  }
  if (sink == nullptr) return;
  StepResult result = FromWire(wire);
  result.worker = rank;
  result.fatal = false;  // one worker cannot speak for the cell
  progress.fetch_add(1);
  sink(std::move(result));
}

void Cluster::State::Post(std::function<void()> task) {
  MutexLock lock(mu);
  if (stopping) return;
  tasks.push_back(std::move(task));
  changed.NotifyOne();
}

// ---- the cluster's thread ----

void Cluster::State::Run() {
  Clock::time_point next_tick = Clock::now();
  for (;;) {
    std::deque<std::function<void()>> taken;
    {
      MutexLock lock(mu);
      while (tasks.empty() && !stopping) {
        if (!changed.WaitUntil(mu, next_tick)) break;
      }
      if (stopping) return;
      taken.swap(tasks);
    }
    bool changes = false;
    for (const std::function<void()>& task : taken) {
      task();
      changes = CarryOut() || changes;
    }
    if (Clock::now() >= next_tick) {
      membership.Tick(Clock::now());
      RebalanceIfDue(Clock::now());
      HangUpOnTheSilent(Clock::now());
      CarryOut();
      changes = true;
      next_tick = Clock::now() + kTick;
    }
    if (changes) Publish();
  }
}

void Cluster::State::Begin(const SessionPtr& session) {
  if (unregistered.size() < static_cast<size_t>(options.max_unregistered)) {
    unregistered[session] = Clock::now() + options.register_timeout;
    return;
  }
  ++refusals;
  session->Close(grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED,
                              absl::StrCat(options.max_unregistered,
                                           " other connections have not registered yet")),
                 /*abandon=*/false);
}

void Cluster::State::HangUpOnTheSilent(Clock::time_point now) {
  for (auto at = unregistered.begin(); at != unregistered.end();) {
    if (now < at->second) {
      ++at;
      continue;
    }
    const std::string reason =
        absl::StrCat("no registration within ", options.register_timeout.count(), " ms");
    spdlog::warn("a connection from {} is closed: {}", at->first->peer(), reason);
    at->first->Close(grpc::Status(grpc::StatusCode::DEADLINE_EXCEEDED, reason), /*abandon=*/false);
    at = unregistered.erase(at);
  }
}

void Cluster::State::Handle(const SessionPtr& session, const v1::WorkerMessage& message) {
  if (message.has_register_()) {
    Register(session, message.register_());
    return;
  }
  const auto found = ids.find(session.get());
  if (found == ids.end()) return;  // refused, or declared dead
  const WorkerId id = found->second;
  const Clock::time_point now = Clock::now();
  switch (message.message_case()) {
    case v1::WorkerMessage::kHeartbeat: {
      const v1::Heartbeat& beat = message.heartbeat();
      if (std::exchange(worker_progress[id], beat.progress()) != beat.progress())
        progress.fetch_add(1);
      membership.Heartbeat(id, beat.progress(), beat.busy(), beat.rows(), now);
      break;
    }
    case v1::WorkerMessage::kLoaded:
      OnLoaded(id, message.loaded(), now);
      break;
    case v1::WorkerMessage::kInstalled:
      membership.Installed(id, message.installed().epoch(), now);
      break;
    case v1::WorkerMessage::kQuiesced:
      membership.Quiesced(id, message.quiesced().epoch(), now);
      break;
    case v1::WorkerMessage::kEpochFailed:
      membership.Failed(id, message.epoch_failed().epoch(), message.epoch_failed().error(),
                        message.epoch_failed().suspect_rank(), now);
      break;
    case v1::WorkerMessage::kDrain:
      membership.Drain(id, now);
      break;
    case v1::WorkerMessage::kMoeStats:
      reports.Count(id, message.moe_stats());
      break;
    default:
      break;  // of a newer worker: the protocol version would differ if it mattered
  }
}

void Cluster::State::Register(const SessionPtr& session, const v1::Register& facts) {
  std::string refusal = RegisterRefusal(facts, options.model, options.model_hash, numerics);
  if (ids.count(session.get()) > 0) {
    refusal = "the worker has registered already";
  } else if (unregistered.erase(session) == 0) {
    return;  // it was hung up on meanwhile
  }
  const auto fenced = quarantine.find(facts.incarnation());
  if (refusal.empty() && fenced != quarantine.end() && Clock::now() < fenced->second) {
    // It tries again: this is no refusal for good.
    session->Close(grpc::Status(grpc::StatusCode::UNAVAILABLE,
                                "its peers could not reach it; it may register again in a while"),
                   /*abandon=*/false);
    return;
  }
  if (!refusal.empty()) {
    ++refusals;
    spdlog::warn("worker {} at {} was refused: {}", facts.name(), session->peer(), refusal);
    session->Close(grpc::Status(grpc::StatusCode::FAILED_PRECONDITION, refusal),
                   /*abandon=*/false);
    return;
  }
  const bool attention = facts.role() == v1::WORKER_ROLE_ATTENTION;
  const WorkerId id =
      membership.Join({.role = attention ? WorkerRole::kAttention : WorkerRole::kExpert,
                       .name = facts.name(),
                       .pid = facts.pid(),
                       .peer = session->peer(),
                       .data_address = facts.data_address(),
                       .data_transport = facts.data_transport(),
                       .device = facts.device(),
                       .threads = facts.threads(),
                       .memory_bytes = facts.memory_bytes(),
                       .num_kv_blocks = facts.num_kv_blocks(),
                       .home_slots = facts.home_slots()},
                      Clock::now());
  sessions[id] = session;
  incarnations[id] = facts.incarnation();
  ids[session.get()] = id;
  numerics[id] = facts.numerics_id();
  if (!attention) costs[id] = facts.costs();
  v1::SchedulerMessage message;
  v1::Welcome* welcome = message.mutable_welcome();
  welcome->set_worker(id);
  welcome->set_scheduler_incarnation(incarnation);
  welcome->set_heartbeat_ms(static_cast<int32_t>(options.heartbeat.count()));
  welcome->set_max_num_batched_tokens(options.max_num_batched_tokens);
  welcome->set_foreign_slots(options.foreign_slots);
  session->Send(std::move(message));  // before what Join decided: CarryOut comes later
}

void Cluster::State::OnLoaded(WorkerId worker, const v1::Loaded& loaded, Clock::time_point now) {
  std::vector<Membership::ExpertSum> sums;
  for (const v1::ExpertSum& sum : loaded.sums())
    sums.push_back({sum.layer(), sum.expert(), sum.checksum()});
  membership.Loaded(worker, loaded.assignment(), sums, now);
}

void Cluster::State::End(const SessionPtr& session) {
  unregistered.erase(session);
  const auto found = ids.find(session.get());
  if (found == ids.end()) return;
  const WorkerId id = found->second;
  Forget(id);
  membership.Lost(id, "its control connection broke", Clock::now());
}

void Cluster::State::RebalanceIfDue(Clock::time_point now) {
  if (options.placement_interval.count() == 0 || now < next_rebalance) return;
  const bool first = next_rebalance == Clock::time_point();
  next_rebalance = now + options.placement_interval;
  if (first) return;
  membership.Rebalance(reports.loads(), now);
  reports.Age();
}

void Cluster::State::Forget(WorkerId worker) {
  const auto found = sessions.find(worker);
  if (found != sessions.end()) ids.erase(found->second.get());
  sessions.erase(worker);
  numerics.erase(worker);
  costs.erase(worker);
  incarnations.erase(worker);
  worker_progress.erase(worker);
  reports.Forget(worker);
}

bool Cluster::State::CarryOut() {
  std::vector<MembershipAction> actions = membership.TakeActions();
  for (MembershipAction& action : actions) std::visit([this](auto& a) { Do(a); }, action);
  return !actions.empty();
}

void Cluster::State::SendTo(WorkerId worker, v1::SchedulerMessage message) {
  const auto found = sessions.find(worker);
  if (found != sessions.end()) found->second->Send(std::move(message));
}

void Cluster::State::Do(AssignAction& action) {
  SendTo(action.worker, AssignMessage(action, options.load_bytes_per_step));
}

void Cluster::State::Do(InstallAction& action) {
  const EpochSpec& spec = *action.spec;
  if (next_route == nullptr || next_route->epoch != spec.epoch) {
    next_route = std::make_shared<Route>();
    next_route->epoch = spec.epoch;
    next_route->num_attention = spec.num_attention;
    std::vector<v1::PlanCosts> measured;
    for (WorkerId member : spec.members) {
      const auto found = sessions.find(member);
      next_route->members.push_back(found == sessions.end() ? nullptr : found->second);
      if (const auto known = costs.find(member); known != costs.end())
        measured.push_back(known->second);
    }
    next_costs = CombineCosts(measured);
  }
  SendTo(action.worker, InstallMessage(action, options.balance, next_costs));
}

void Cluster::State::Do(AbortAction& action) {
  v1::SchedulerMessage message;
  message.mutable_abort()->set_epoch(action.epoch);
  SendTo(action.worker, std::move(message));
}

void Cluster::State::Do(GoodbyeAction& action) {
  const auto found = sessions.find(action.worker);
  if (found == sessions.end()) return;
  v1::SchedulerMessage message;
  message.mutable_goodbye();
  found->second->Send(std::move(message));
  found->second->Close(grpc::Status::OK, /*abandon=*/false);
  Forget(action.worker);
}

void Cluster::State::Do(FenceAction& action) {
  const auto found = sessions.find(action.worker);
  if (found == sessions.end()) return;
  if (action.returns == FenceReturn::kNever) {  // it is told why, as at a refused registration
    ++refusals;
    found->second->Close(grpc::Status(grpc::StatusCode::FAILED_PRECONDITION, action.reason),
                         /*abandon=*/false);
    Forget(action.worker);
    return;
  }
  if (action.returns == FenceReturn::kLater) {
    if (quarantine.size() >= kMaxQuarantine) quarantine.clear();
    quarantine[incarnations[action.worker]] = Clock::now() + kQuarantine;
  }
  found->second->Close(grpc::Status(grpc::StatusCode::ABORTED, action.reason), /*abandon=*/true);
  Forget(action.worker);
}

void Cluster::State::Do(WorkerEvent& event) {
  const bool view = std::holds_alternative<EpochView>(event);
  std::function<void(WorkerEvent)> sink;
  std::function<void()> ready;
  {
    MutexLock lock(mu);
    if (view) {
      route = next_route;
      last_step = 0;
      if (!std::exchange(was_ready, true)) ready = on_ready;
    }
    if (on_event == nullptr) early_events.push_back(event);  // SetEventCallback delivers them
    sink = on_event;
  }
  if (ready != nullptr) ready();
  if (sink != nullptr) sink(std::move(event));
}

void Cluster::State::Publish() {
  const Clock::time_point now = Clock::now();
  const Membership::Counters& totals = membership.counters();
  ClusterSnapshot next;
  next.networked = true;
  next.epoch = membership.epoch();
  next.phase = CellPhaseName(membership.phase());
  next.waits_for = membership.WaitsFor();
  next.joins = totals.joins;
  next.failures = totals.failures;
  next.drains = totals.drains;
  next.failovers = totals.failovers;
  next.rebalances = totals.rebalances;
  next.refusals = refusals;
  for (const Membership::WorkerView& view : membership.Workers()) {
    next.workers.push_back(
        {.id = view.id,
         .role = view.facts.role == WorkerRole::kAttention ? "attention" : "expert",
         .name = view.facts.name,
         .pid = view.facts.pid,
         .address = view.facts.peer,
         .transport = view.facts.data_transport,
         .device = view.facts.device,
         .threads = view.facts.threads,
         .memory_bytes = view.facts.memory_bytes,
         .state = WorkerStateName(view.state),
         .rank = view.rank,
         .num_experts = view.num_experts,
         .num_kv_blocks = view.facts.num_kv_blocks,
         .rows = view.rows,
         .heartbeat_age_s = std::chrono::duration<double>(now - view.last_heartbeat).count()});
  }
  reports.Fill(now, &next);
  MutexLock lock(mu);
  snapshot = std::move(next);
}

// ---- the public side ----

Cluster::Cluster(std::unique_ptr<State> state) : state_(std::move(state)) {}

absl::StatusOr<std::unique_ptr<Cluster>> Cluster::Create(const ClusterOptions& options) {
  const auto credentials = MakeServerCredentials(
      {options.host, options.token, options.certificate, options.private_key, options.ca});
  if (!credentials.ok()) return credentials.status();
  auto state = std::make_unique<State>(options);
  grpc::ServerBuilder builder;
  const std::string address = absl::StrCat(options.host, ":", options.control_port);
  int bound = 0;
  builder.AddListeningPort(address, *credentials, &bound);
  builder.RegisterService(state.get());
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 2000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 2000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 500);
  state->server = builder.BuildAndStart();
  if (state->server == nullptr || bound == 0)
    return absl::UnavailableError(absl::StrCat("cannot listen on ", address, " for workers"));
  state->port = static_cast<uint16_t>(bound);
  state->Publish();
  state->thread = std::thread([s = state.get()] { s->Run(); });
  return std::unique_ptr<Cluster>(new Cluster(std::move(state)));
}

Cluster::~Cluster() {
  {
    MutexLock lock(state_->mu);
    state_->stopping = true;
    state_->tasks.clear();
    state_->on_event = nullptr;
    state_->changed.NotifyAll();
  }
  state_->thread.join();
  // A worker takes a broken connection for the server's end and waits for the next one.
  state_->server->Shutdown(std::chrono::system_clock::now());
  state_->server->Wait();
}

uint16_t Cluster::control_port() const { return state_->port; }

ClusterSnapshot Cluster::Snapshot() const {
  MutexLock lock(state_->mu);
  return state_->snapshot;
}

void Cluster::SetReadyCallback(std::function<void()> on_ready) {
  MutexLock lock(state_->mu);
  if (state_->was_ready && on_ready != nullptr) on_ready();
  state_->on_ready = std::move(on_ready);
}

uint64_t Cluster::progress() const { return state_->progress.load(); }

void Cluster::SetEventCallback(std::function<void(WorkerEvent)> on_event) {
  MutexLock lock(state_->mu);  // so that no later event overtakes the early ones
  for (WorkerEvent& event : std::exchange(state_->early_events, {})) on_event(std::move(event));
  state_->on_event = std::move(on_event);
}

void Cluster::Execute(int32_t attention_rank, StepPlan plan) {
  std::shared_ptr<const Route> route;
  bool first = false;
  {
    MutexLock lock(state_->mu);
    route = state_->route;
    // The epoch may have ended since the plan was made: the scheduler is about to hear of it.
    if (route == nullptr || plan.header.epoch != route->epoch) return;
    first = std::exchange(state_->last_step, plan.header.step) != plan.header.step;
  }
  if (first) {
    v1::SchedulerMessage message;
    ToWire(plan.header, message.mutable_step()->mutable_plan()->mutable_header());
    for (size_t r = static_cast<size_t>(route->num_attention); r < route->members.size(); ++r) {
      if (route->members[r] != nullptr) route->members[r]->Send(message);
    }
  }
  SY_CHECK(attention_rank >= 0 && attention_rank < route->num_attention);
  const SessionPtr& session = route->members[static_cast<size_t>(attention_rank)];
  if (session == nullptr) return;
  v1::SchedulerMessage message;
  ToWire(plan, message.mutable_step()->mutable_plan());
  session->Send(std::move(message));
}

void Cluster::Paused(uint64_t epoch) {
  state_->Post([state = state_.get(), epoch] { state->membership.Paused(epoch, Clock::now()); });
}

}  // namespace switchyard
