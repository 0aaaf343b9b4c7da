#include "worker/role_session.h"

#include <algorithm>
#include <charconv>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/step_wire.h"
#include "spdlog/spdlog.h"

namespace switchyard {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kFirstBackoff{100};
constexpr std::chrono::milliseconds kLastBackoff{2000};
constexpr std::chrono::seconds kWelcomeTimeout{10};
constexpr std::chrono::seconds kJoinTimeout{10};
constexpr std::chrono::seconds kReceiveSlice{60};  // then it is asked again
constexpr std::chrono::milliseconds kStatsInterval{1000};
constexpr std::chrono::milliseconds kMinHeartbeat{10};
constexpr std::chrono::milliseconds kMaxHeartbeat{10'000};

// The peer that a communicator's error blames ("rank 3 is lost"), or -1.
int32_t SuspectRank(const absl::Status& status) {
  const std::string_view text(status.message().data(), status.message().size());
  const size_t end = text.find(" is lost");
  if (!absl::IsUnavailable(status) || end == std::string_view::npos) return -1;
  const size_t begin = text.find_last_not_of("0123456789", end - 1) + 1;
  constexpr std::string_view kBefore = "rank ";
  if (begin < kBefore.size() || text.substr(begin - kBefore.size(), kBefore.size()) != kBefore)
    return -1;
  int32_t rank = -1;
  const auto [at, error] = std::from_chars(text.data() + begin, text.data() + end, rank);
  return error == std::errc() && at == text.data() + end ? rank : -1;
}

// Refusals that another attempt would not change.
bool IsFinal(const absl::Status& status) {
  return absl::IsFailedPrecondition(status) || absl::IsUnauthenticated(status) ||
         absl::IsPermissionDenied(status) || absl::IsInvalidArgument(status) ||
         absl::IsUnimplemented(status);
}

void SendEpochFailed(ControlStream* stream, uint64_t epoch, const absl::Status& error) {
  v1::WorkerMessage message;
  v1::EpochFailed* failed = message.mutable_epoch_failed();
  failed->set_epoch(epoch);
  failed->set_error(std::string(error.message()));
  failed->set_suspect_rank(SuspectRank(error));
  stream->Send(std::move(message));
}

}  // namespace

const char* RoleName(v1::WorkerRole role) {
  return role == v1::WORKER_ROLE_ATTENTION ? "attention" : "expert";
}

RoleSession::RoleSession(RoleSessionOptions options, std::unique_ptr<RoleHost> host)
    : options_(std::move(options)), host_(std::move(host)) {
  heartbeats_ = std::thread([this] { SendHeartbeats(); });
  thread_ = std::thread([this] { Run(); });
}

RoleSession::~RoleSession() {
  Stop();
  thread_.join();
  heartbeats_.join();
}

void RoleSession::Drain() {
  MutexLock lock(mu_);
  if (std::exchange(draining_, true)) return;
  changed_.NotifyAll();
  if (registered_) {
    v1::WorkerMessage message;
    message.mutable_drain();
    stream_->Send(std::move(message));
  } else if (stream_ != nullptr) {
    stream_->Cancel();
  }
}

void RoleSession::Stop() {
  MutexLock lock(mu_);
  stopping_ = true;
  changed_.NotifyAll();
  if (stream_ != nullptr) stream_->Cancel();
}

std::optional<absl::Status> RoleSession::result() const {
  MutexLock lock(mu_);
  return result_;
}

void RoleSession::Run() {
  absl::Status end = Serve();
  {
    MutexLock lock(mu_);
    stopping_ = true;  // the heartbeats end too
    result_ = absl::IsCancelled(end) ? absl::OkStatus() : std::move(end);
    changed_.NotifyAll();
  }
  options_.on_end();
}

absl::Status RoleSession::Serve() {
  std::chrono::milliseconds backoff = kFirstBackoff;
  for (;;) {
    const Clock::time_point began = Clock::now();
    if (absl::Status end = ServeOnce(); !end.ok()) return end;
    {
      MutexLock lock(mu_);
      if (draining_ || stopping_) return absl::CancelledError("asked to end");
    }
    if (Clock::now() - began > kLastBackoff) backoff = kFirstBackoff;  // that one had worked
    if (!Sleep(backoff)) return absl::CancelledError("asked to end");
    backoff = std::min(backoff * 2, kLastBackoff);
  }
}

bool RoleSession::Sleep(std::chrono::milliseconds time) {
  const Clock::time_point deadline = Clock::now() + time;
  MutexLock lock(mu_);
  while (!draining_ && !stopping_) {
    if (!changed_.WaitUntil(mu_, deadline)) break;
  }
  return !draining_ && !stopping_;
}

absl::Status RoleSession::ServeOnce() {
  // A place of its own for every stream: epochs of another scheduler begin anew, and peers of the
  // old one cannot reach this one.
  absl::StatusOr<std::unique_ptr<DataPlane>> data_plane =
      DataPlane::Create({.host = options_.data_host});
  if (absl::IsUnavailable(data_plane.status())) return NoteBreak(data_plane.status(), "no network");
  if (!data_plane.ok()) return data_plane.status();
  data_plane_ = *std::move(data_plane);
  absl::StatusOr<std::unique_ptr<ControlStream>> opened = ControlStream::Open(options_.control);
  if (!opened.ok()) return opened.status();
  const std::shared_ptr<ControlStream> stream = *std::move(opened);
  {
    MutexLock lock(mu_);
    if (draining_ || stopping_) return absl::CancelledError("asked to end");
    stream_ = stream;
  }
  absl::Status end = Register(stream.get());
  const bool registered = end.ok();
  if (registered) {
    last_break_ = absl::OkStatus();
    end = Follow(stream.get());
  }
  {
    MutexLock lock(mu_);
    stream_ = nullptr;
    registered_ = false;
  }
  stream->Cancel();
  host_->CancelAssignment();
  EndEpoch(absl::CancelledError("the control stream has ended"));
  data_plane_.reset();
  last_epoch_ = 0;
  if (!absl::IsUnavailable(end)) return end;
  return NoteBreak(
      end, registered ? "the control stream broke, its sequences are dropped" : "no scheduler yet");
}

// Logs it, unless that is no news; OK.
absl::Status RoleSession::NoteBreak(const absl::Status& why, const char* what) {
  bool asked_to_end = false;
  {
    MutexLock lock(mu_);
    asked_to_end = draining_ || stopping_;
  }
  if (!asked_to_end && why != last_break_) {
    spdlog::warn("{} worker: {}: {}", RoleName(host_->role()), what, std::string(why.message()));
    last_break_ = why;
  }
  return absl::OkStatus();
}

// OK: registered. kUnavailable: try again later.
absl::Status RoleSession::Register(ControlStream* stream) {
  v1::WorkerMessage message;
  v1::Register* registration = message.mutable_register_();
  *registration = options_.registration;
  registration->set_protocol_version(kProtocolVersion);
  registration->set_role(host_->role());
  registration->set_data_address(data_plane_->address());
  registration->set_data_transport(data_plane_->transport());
  host_->Describe(registration);
  stream->Send(std::move(message));

  const std::optional<v1::SchedulerMessage> answer =
      stream->Receive(Clock::now() + kWelcomeTimeout);
  if (!answer) {
    if (!stream->ended()) return absl::UnavailableError("no answer to the registration");
    const absl::Status status = stream->status();
    if (!IsFinal(status)) return absl::UnavailableError(status.message());
    return absl::Status(status.code(),
                        absl::StrCat("the scheduler at ", options_.control.scheduler,
                                     " refused this worker: ", std::string(status.message())));
  }
  if (!answer->has_welcome()) return absl::UnavailableError("the first message was no welcome");
  const v1::Welcome& welcome = answer->welcome();
  if (welcome.scheduler_incarnation() < scheduler_incarnation_) {
    return absl::UnavailableError(absl::StrCat("scheduler incarnation ",
                                               welcome.scheduler_incarnation(), " is older than ",
                                               scheduler_incarnation_));
  }
  if (welcome.max_num_batched_tokens() < 1 || welcome.max_num_batched_tokens() > kMaxBatchedTokens)
    return absl::UnavailableError(
        absl::StrCat("max_num_batched_tokens ", welcome.max_num_batched_tokens()));
  scheduler_incarnation_ = welcome.scheduler_incarnation();
  if (welcome.foreign_slots() < 0 || welcome.foreign_slots() > kMaxForeignSlots)
    return absl::UnavailableError(absl::StrCat("foreign_slots ", welcome.foreign_slots()));
  foreign_slots_ = welcome.foreign_slots();
  if (absl::Status status =
          host_->Prepare(welcome.max_num_batched_tokens(), welcome.foreign_slots());
      !status.ok()) {
    return status;
  }
  options_.on_registered(
      {.role = host_->role(), .worker = welcome.worker(), .data_address = data_plane_->address()});
  MutexLock lock(mu_);
  registered_ = true;
  heartbeat_ =
      std::clamp(std::chrono::milliseconds(welcome.heartbeat_ms()), kMinHeartbeat, kMaxHeartbeat);
  changed_.NotifyAll();
  return absl::OkStatus();
}

absl::Status RoleSession::Follow(ControlStream* stream) {
  for (;;) {
    const std::optional<v1::SchedulerMessage> message =
        stream->Receive(Clock::now() + kReceiveSlice);
    if (message) {
      if (absl::Status status = OnMessage(stream, *message); !status.ok()) return status;
    } else if (stream->ended()) {
      const absl::Status status = stream->status();
      if (!absl::IsFailedPrecondition(status)) return absl::UnavailableError(status.message());
      return absl::FailedPreconditionError(
          absl::StrCat("the scheduler at ", options_.control.scheduler,
                       " sent this worker away: ", std::string(status.message())));
    }
  }
}

absl::Status RoleSession::OnMessage(ControlStream* stream, const v1::SchedulerMessage& message) {
  switch (message.message_case()) {
    case v1::SchedulerMessage::kAssign: {
      std::shared_ptr<ControlStream> alive;
      {
        MutexLock lock(mu_);
        alive = stream_;
      }
      return host_->Assign(message.assign(), [alive](const v1::Loaded& loaded) {
        v1::WorkerMessage out;
        *out.mutable_loaded() = loaded;
        alive->Send(std::move(out));
      });
    }
    case v1::SchedulerMessage::kInstall:
      return OnInstall(stream, message.install());
    case v1::SchedulerMessage::kStep:
      OnStep(stream, message.step());
      return absl::OkStatus();
    case v1::SchedulerMessage::kAbort: {
      const uint64_t epoch = message.abort().epoch();
      if (epoch == epoch_) EndEpoch(absl::AbortedError(absl::StrCat("epoch ", epoch, " ended")));
      last_epoch_ = std::max(last_epoch_, epoch);
      v1::WorkerMessage quiesced;
      quiesced.mutable_quiesced()->set_epoch(epoch);
      stream->Send(std::move(quiesced));
      return absl::OkStatus();
    }
    case v1::SchedulerMessage::kGoodbye:
      return absl::CancelledError("the scheduler said goodbye");
    default:
      return absl::OkStatus();  // of a newer scheduler, or a second welcome
  }
}

absl::Status RoleSession::OnInstall(ControlStream* stream, const v1::Install& install) {
  const uint64_t epoch = install.epoch();
  if (epoch <= last_epoch_) return absl::OkStatus();  // already over
  last_epoch_ = epoch;
  EndEpoch(absl::AbortedError(absl::StrCat("epoch ", epoch, " begins")));
  const absl::StatusOr<RankEpoch> parsed =
      ParseInstall(install, options_.model, host_->role(), foreign_slots_);
  absl::Status status = parsed.status();
  if (status.ok()) {
    absl::StatusOr<std::unique_ptr<Communicator>> joined =
        data_plane_->Join(parsed->group, Clock::now() + kJoinTimeout);
    status = joined.status();
    if (status.ok()) {
      communicator_ =
          std::make_unique<WaitingCommunicator>(*std::move(joined), options_.pool, &figures_);
      status = host_->Begin(*parsed, communicator_.get(),
                            {.on_result =
                                 [stream](StepResult result) {
                                   v1::WorkerMessage message;
                                   ToWire(result, message.mutable_step_done()->mutable_result());
                                   stream->Send(std::move(message));
                                 },
                             .on_failure =
                                 [this, stream, epoch](const absl::Status& error) {
                                   if (!ending_.load()) SendEpochFailed(stream, epoch, error);
                                 }});
    }
  }
  if (absl::IsResourceExhausted(status)) return status;
  if (!status.ok()) {
    communicator_.reset();
    spdlog::error("{} worker: epoch {} cannot be installed: {}", RoleName(host_->role()), epoch,
                  std::string(status.message()));
    SendEpochFailed(stream, epoch, status);
    return absl::OkStatus();
  }
  epoch_ = epoch;
  spdlog::info("{} worker: epoch {}: rank {} of {} attention and {} expert workers",
               RoleName(host_->role()), epoch, parsed->group.rank, parsed->ranks.num_attention,
               parsed->ranks.num_experts);
  v1::WorkerMessage installed;
  installed.mutable_installed()->set_epoch(epoch);
  stream->Send(std::move(installed));
  return absl::OkStatus();
}

void RoleSession::OnStep(ControlStream* stream, const v1::Step& step) {
  if (epoch_ == 0 || step.plan().header().epoch() != epoch_) return;
  if (host_->counters().steps.load() >= RoleHost::kMaxSteps) {
    SendEpochFailed(stream, epoch_,
                    absl::ResourceExhaustedError(absl::StrCat("step ", step.plan().header().step(),
                                                              " came while ", RoleHost::kMaxSteps,
                                                              " others were under way")));
    return;
  }
  host_->Execute(FromWire(step.plan()));
}

void RoleSession::EndEpoch(const absl::Status& reason) {
  ending_.store(true);
  if (communicator_ != nullptr) communicator_->Abort(reason);
  host_->End();
  communicator_.reset();
  ending_.store(false);
  epoch_ = 0;
}

// ---- heartbeats ----

void RoleSession::SendHeartbeats() {
  std::vector<uint64_t> told(host_->counters().expert_copies.size());
  uint64_t told_rows = 0;
  Clock::time_point stats_due;
  for (;;) {
    std::shared_ptr<ControlStream> stream;
    {
      MutexLock lock(mu_);
      while (!registered_ && !stopping_) changed_.Wait(mu_);
      if (stopping_) return;
      stream = stream_;
    }
    stream->Send(MakeHeartbeat());
    const Clock::time_point now = Clock::now();
    if (now >= stats_due) {
      stats_due = now + kStatsInterval;
      if (std::optional<v1::WorkerMessage> stats = MakeMoeStats(&told, &told_rows))
        stream->Send(*std::move(stats));
    }
    MutexLock lock(mu_);
    const Clock::time_point next = now + heartbeat_;
    while (!stopping_ && stream_ == stream) {
      if (!changed_.WaitUntil(mu_, next)) break;
    }
  }
}

v1::WorkerMessage RoleSession::MakeHeartbeat() const {
  const WorkerCounters& counters = host_->counters();
  v1::WorkerMessage message;
  v1::Heartbeat* heartbeat = message.mutable_heartbeat();
  heartbeat->set_progress(counters.progress.load() + host_->loaded());
  heartbeat->set_busy(host_->loading() || (counters.steps.load() > 0 && !figures_.waiting.load()));
  heartbeat->set_rows(counters.rows.load());
  return message;
}

void RoleSession::AddCounters(v1::MoeStats* stats) const {
  const auto add = [stats](const char* name, uint64_t total, double unit = 1) {
    v1::Counter* counter = stats->add_counters();
    counter->set_name(name);
    counter->set_value(static_cast<double>(total) * unit);
  };
  const auto sent = [this](MessageKind kind) {
    return figures_.sent_bytes[static_cast<size_t>(kind)].load();
  };
  constexpr double kNs = 1e-9;
  constexpr double kPpm = 1e-6;
  add("data_wait_seconds", figures_.wait_ns.load(), kNs);
  if (host_->role() == v1::WORKER_ROLE_ATTENTION) {
    add("dispatch_bytes", sent(MessageKind::kDispatch));
    return;
  }
  const WorkerCounters& counters = host_->counters();
  add("combine_bytes", sent(MessageKind::kCombine));
  add("plans", counters.plans.load());
  add("plan_seconds", counters.plan_ns.load(), kNs);
  add("balancedness_sum", counters.balancedness_ppm.load(), kPpm);  // over plans
  add("plan_gap_sum", counters.plan_gap_ppm.load(), kPpm);          // over plans
  add("weight_transfers", counters.weights_received.load());
  add("weight_transfer_bytes", counters.weight_bytes_received.load());
  add("foreign_copies", counters.foreign_copies.load());
}

std::optional<v1::WorkerMessage> RoleSession::MakeMoeStats(std::vector<uint64_t>* told,
                                                           uint64_t* told_rows) const {
  const std::vector<std::atomic<uint64_t>>& copies = host_->counters().expert_copies;
  v1::WorkerMessage message;
  v1::MoeStats* stats = message.mutable_moe_stats();
  bool traffic = false;
  for (size_t i = 0; i < copies.size(); ++i) {
    const uint64_t now = copies[i].load(std::memory_order_relaxed);
    traffic = traffic || now != (*told)[i];
    stats->add_expert_copies(now - (*told)[i]);
    (*told)[i] = now;
  }
  const uint64_t rows = host_->counters().rows.load();
  traffic = traffic || rows != *told_rows;
  *told_rows = rows;
  if (!traffic) return std::nullopt;
  AddCounters(stats);
  return message;
}

}  // namespace switchyard
