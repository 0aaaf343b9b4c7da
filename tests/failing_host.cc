#include "tests/failing_host.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <map>
#include <utility>

#include "comm/exchange_layout.h"
#include "comm/hash64.h"

namespace switchyard {
namespace {

// The phases around one group of messages; empty: none there.
struct GroupPhases {
  const char* before = "";   // Start
  const char* started = "";  // Start has returned
  const char* done = "";     // Wait has returned
};

GroupPhases PhasesOf(MessageKind kind, bool sends) {
  switch (kind) {
    case MessageKind::kCounts:
      return {.before = "counts", .done = "counted"};
    case MessageKind::kDispatch:  // an attention worker sends it, an expert worker receives it
      return sends ? GroupPhases{"planned", "dispatched", "combined"}
                   : GroupPhases{.done = "received"};
    case MessageKind::kCombine:
      return {.before = "computed", .done = "answered"};
    case MessageKind::kWeights:
      return {.started = "moving", .done = "moved"};
  }
  return {};
}

class FailingCommunicator final : public Communicator {
 public:
  // Aborts when the dispatch of step `poisoned` has been sent.
  FailingCommunicator(Communicator* inner, FailPoints* points,
                      const std::atomic<uint64_t>* poisoned)
      : inner_(inner), points_(points), poisoned_(poisoned) {}

  int32_t rank() const override { return inner_->rank(); }
  int32_t size() const override { return inner_->size(); }

  absl::Status Start(int32_t index, std::span<const SendOp> sends,
                     std::span<RecvOp> recvs) override {
    Group& group = groups_[static_cast<size_t>(index)];
    group = {.tag = sends.empty() ? recvs[0].tag : sends[0].tag, .phases = {}, .recvs = recvs};
    group.phases = PhasesOf(group.tag.kind, !sends.empty());
    Pass(group.phases.before, group.tag);
    if (absl::Status status = inner_->Start(index, sends, recvs); !status.ok()) return status;
    Pass(group.phases.started, group.tag);
    // An expert worker that sends its results and asks for the next layer's rows: what it waits for
    // are those.
    if (group.tag.kind == MessageKind::kCombine && !recvs.empty()) {
      Pass(group.phases.done, group.tag);
      group.tag = recvs[0].tag;
      group.phases = PhasesOf(group.tag.kind, /*sends=*/false);
    }
    if (group.tag.kind == MessageKind::kDispatch && group.tag.step == poisoned_->load())
      FailPoints::Abort("a row of that token");
    return absl::OkStatus();
  }
  absl::Status Wait(int32_t index, std::chrono::steady_clock::time_point deadline) override {
    if (absl::Status status = inner_->Wait(index, deadline); !status.ok()) return status;
    const Group& group = groups_[static_cast<size_t>(index)];
    if (group.tag.kind == MessageKind::kDispatch && group.tag.layer == 0) CheckRows(group.recvs);
    Pass(group.phases.done, group.tag);
    return absl::OkStatus();
  }
  void Abort(const absl::Status& reason) override { inner_->Abort(reason); }

 private:
  struct Group {  // what is under way in it
    MessageTag tag;
    GroupPhases phases;
    std::span<RecvOp> recvs;
  };

  void Pass(const char* phase, const MessageTag& tag) { points_->Pass(phase, tag.step, tag.layer); }

  // Of the dispatch messages that an expert worker has received.
  void CheckRows(std::span<const RecvOp> recvs) {
    for (const RecvOp& recv : recvs) {
      if (recv.tag.kind != MessageKind::kDispatch) continue;
      ExchangeHeader header;
      std::memcpy(&header, recv.buffer.data(), sizeof(header));
      const size_t row_bytes = static_cast<size_t>(header.row_bytes);
      const std::span<const std::byte> rows =
          recv.buffer.subspan(static_cast<size_t>(HeaderRows(header.row_bytes)) * row_bytes);
      for (int32_t r = 0; r < header.num_rows; ++r) {
        Hash64 hash;
        hash.Bytes(rows.subspan(static_cast<size_t>(r) * row_bytes, row_bytes));
        points_->CheckRow(hash.value());
      }
    }
  }

  Communicator* const inner_;
  FailPoints* const points_;
  const std::atomic<uint64_t>* const poisoned_;
  std::array<Group, kNumGroups> groups_;
};

class FailingHost final : public RoleHost {
 public:
  FailingHost(std::unique_ptr<RoleHost> inner, FailPoints* points)
      : inner_(std::move(inner)), points_(points) {}

  v1::WorkerRole role() const override { return inner_->role(); }
  void Describe(v1::Register* registration) const override { inner_->Describe(registration); }
  absl::Status Prepare(int32_t max_rows, int32_t foreign_slots) override {
    return inner_->Prepare(max_rows, foreign_slots);
  }
  absl::Status Assign(const v1::Assign& assign, LoadedCallback done) override {
    points_->Poll(step_);
    absl::Status status = inner_->Assign(
        assign, [points = points_, done = std::move(done)](const v1::Loaded& loaded) {
          points->Pass("loaded");
          done(loaded);
        });
    points_->Pass("load");
    return status;
  }
  void CancelAssignment() override { inner_->CancelAssignment(); }

  absl::Status Begin(const RankEpoch& epoch, Communicator* communicator,
                     Callbacks callbacks) override {
    points_->Poll(step_);
    points_->Pass("install");
    communicator_ = std::make_unique<FailingCommunicator>(communicator, points_, &poisoned_);
    callbacks.on_result = [points = points_,
                           send = std::move(callbacks.on_result)](StepResult result) {
      const uint64_t step = result.step;
      points->Pass("result", step);
      send(std::move(result));
      points->Pass("reported", step);
    };
    running_ = true;
    return inner_->Begin(epoch, communicator_.get(), std::move(callbacks));
  }
  void Execute(StepPlan plan) override {
    step_ = plan.header.step;
    points_->Poll(step_);
    points_->Pass("step", step_);
    if (points_->token()) LookForToken(plan);
    inner_->Execute(std::move(plan));
  }
  void End() override {
    inner_->End();
    communicator_.reset();
    if (!std::exchange(running_, false)) return;
    points_->Poll(step_);
    points_->Pass("quiesced");
  }

  const WorkerCounters& counters() const override { return inner_->counters(); }
  bool loading() const override { return inner_->loading(); }
  uint64_t loaded() const override { return inner_->loaded(); }

 private:
  // Whether this step computes the row of the token that this worker cannot bear.
  void LookForToken(const StepPlan& plan) {
    for (const SequenceEnd& end : plan.ended) position_.erase(end.sequence);
    for (const SequenceWork& work : plan.work) {
      if (work.begin != nullptr) {
        const auto first = work.begin->tokens.begin();
        const auto last = first + work.begin->prompt_length;
        const auto found = std::find(first, last, *points_->token());
        if (found == last) continue;
        position_[work.sequence] = static_cast<int32_t>(found - first);
      }
      const auto known = position_.find(work.sequence);
      if (known != position_.end() && work.start <= known->second &&
          known->second < work.start + work.count) {
        poisoned_.store(plan.header.step);
      }
    }
  }

  const std::unique_ptr<RoleHost> inner_;
  FailPoints* const points_;
  std::atomic<uint64_t> poisoned_{0};  // the step with the token's row
  // The session's thread only.
  uint64_t step_ = 0;
  bool running_ = false;
  std::map<SequenceId, int32_t> position_;  // of the token, in sequences that have it
  std::unique_ptr<Communicator> communicator_;
};

}  // namespace

std::unique_ptr<RoleHost> MakeFailingHost(std::unique_ptr<RoleHost> inner, FailPoints* points) {
  return std::make_unique<FailingHost>(std::move(inner), points);
}

}  // namespace switchyard
