// Membership: who belongs to the cell, in which epoch, and which experts they hold (DESIGN.md
// section 3, "Epochs, commit, abort"). A pure state machine without threads, clocks or transport:
// inputs are what workers and the scheduler report, outputs are actions to carry out. Owned by the
// Cluster, on its thread; tests drive it with a virtual clock.
//
//   forming ──▶ installing ──▶ running ──▶ pausing ──▶ stopping ──▶ forming …
//      ▲            │ death        │ death                 ▲
//      └────────────┴──────────────┴───────────────────────┘ (stopping: survivors quiesce)
//
//   forming     no epoch; experts are given homes and loaded until a cell can be formed
//   installing  Install was sent; waits until every member has acknowledged
//   running     the scheduler plans steps; joins and drains are prepared in the background
//   pausing     a prepared change waits for the step in flight to end
//   stopping    Abort was sent; waits until every surviving member has quiesced
//
// A death anywhere starts the way again with the next id; ids are never reused.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "comm/expert_placement.h"
#include "proto/epoch.h"
#include "scheduler/home_placement.h"

namespace switchyard {

enum class WorkerRole : uint8_t { kAttention, kExpert };

struct MembershipOptions {
  int32_t num_moe_layers = 0;
  int32_t num_experts = 0;
  int32_t min_expert_workers = 1;       // the first placement waits for so many
  int32_t survive_expert_failures = 0;  // home slots suffice when so many of those are lost
  int32_t replica_slots = 0;  // of them, per layer and worker, Rebalance may use for replicas
  std::chrono::milliseconds heartbeat_timeout{2000};   // silence for so long is death
  std::chrono::milliseconds stall_timeout{60'000};     // busy without progress for so long is death
  std::chrono::milliseconds no_home_timeout{60'000};   // without a cell for so long: requests end
  std::function<std::string()> draw_secret = nullptr;  // of an epoch; must be set
};

// What a worker says of itself when it registers. Constant for its life.
struct WorkerFacts {
  WorkerRole role = WorkerRole::kAttention;
  std::string name;
  int32_t pid = 0;
  std::string peer;            // where its control connection comes from
  std::string data_address;    // opaque, for the peers
  std::string data_transport;  // e.g. "tcp"
  std::string device;
  int32_t threads = 0;
  int64_t memory_bytes = 0;
  int32_t num_kv_blocks = 0;  // attention
  int32_t home_slots = 0;     // expert: experts per layer that its memory holds; 0: as many as told
};

// One epoch: immutable once made.
struct EpochSpec {
  uint64_t epoch = 0;
  std::vector<WorkerId> members;            // by rank: attention workers, then expert workers
  std::vector<std::string> data_addresses;  // by rank
  int32_t num_attention = 0;
  std::shared_ptr<const ExpertPlacement> placement;
  std::string secret;
};

struct AssignAction {
  WorkerId worker = 0;
  uint64_t assignment = 0;
  ExpertSets experts;
  // The cell waits for it, or somebody who leaves: loaded at once, whatever that costs the steps.
  bool urgent = false;
};
struct InstallAction {
  WorkerId worker = 0;
  int32_t rank = 0;
  std::shared_ptr<const EpochSpec> spec;
};
struct AbortAction {
  WorkerId worker = 0;
  uint64_t epoch = 0;
};
struct GoodbyeAction {  // it has left; close its session
  WorkerId worker = 0;
};
enum class FenceReturn : uint8_t {
  kAtOnce,  // it was declared dead: it may register anew
  kLater,   // it lives, but its peers cannot work with it
  kNever,   // what it holds is wrong
};
struct FenceAction {  // close its session
  WorkerId worker = 0;
  std::string reason;
  FenceReturn returns = FenceReturn::kAtOnce;
};
// A WorkerEvent goes to the scheduler.
using MembershipAction =
    std::variant<AssignAction, InstallAction, AbortAction, GoodbyeAction, FenceAction, WorkerEvent>;

enum class CellPhase : uint8_t { kForming, kInstalling, kRunning, kPausing, kStopping };
const char* CellPhaseName(CellPhase phase);

enum class WorkerState : uint8_t { kLoading, kReady, kServing, kDraining };
const char* WorkerStateName(WorkerState state);

class Membership {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;

  // A worker as others may see it.
  struct WorkerView {
    WorkerId id = 0;
    WorkerFacts facts;
    WorkerState state = WorkerState::kLoading;
    int32_t rank = -1;        // in the epoch; -1: not a member
    int32_t num_experts = 0;  // replicas that it holds in the epoch, over all layers
    TimePoint last_heartbeat;
    uint64_t rows = 0;
  };
  // What a worker made of an expert's weights (DESIGN.md section 3: "checksums equal").
  struct ExpertSum {
    int32_t layer = 0;
    int32_t expert = 0;
    uint64_t checksum = 0;
  };
  struct Counters {
    uint64_t joins = 0;
    uint64_t failures = 0;    // workers declared dead
    uint64_t drains = 0;      // workers that left
    uint64_t failovers = 0;   // epochs that ended by a death or an error
    uint64_t rebalances = 0;  // placements that Rebalance decided to change
  };

  explicit Membership(const MembershipOptions& options);

  // ---- inputs; unknown workers and other epochs are ignored ----
  WorkerId Join(const WorkerFacts& facts, TimePoint now);
  void Heartbeat(WorkerId worker, uint64_t progress, bool busy, uint64_t rows, TimePoint now);
  void Lost(WorkerId worker, const std::string& reason, TimePoint now);
  void Drain(WorkerId worker, TimePoint now);
  // It holds the assignment. Whose sums differ from the first that were told is sent away.
  void Loaded(WorkerId worker, uint64_t assignment, std::span<const ExpertSum> sums, TimePoint now);
  void Installed(WorkerId worker, uint64_t epoch, TimePoint now);
  void Quiesced(WorkerId worker, uint64_t epoch, TimePoint now);
  // A member's data plane failed. `suspect`: the rank it blames, -1 for none.
  void Failed(WorkerId worker, uint64_t epoch, const std::string& error, int32_t suspect,
              TimePoint now);
  void Paused(uint64_t epoch, TimePoint now);  // the scheduler has nothing in flight
  // The slow loop (comm/placement_planner.h): plans homes and replicas anew from what was activated
  // lately, loads them in the background and switches at a step boundary. loads: [num_moe_layers,
  // num_experts]. Does nothing while another change is on its way.
  void Rebalance(std::span<const int64_t> loads, TimePoint now);
  void Tick(TimePoint now);  // deadlines; call at least every kMaxTickGap / 2

  std::vector<MembershipAction> TakeActions() { return std::exchange(actions_, {}); }

  CellPhase phase() const { return phase_; }
  uint64_t epoch() const { return spec_ == nullptr ? 0 : spec_->epoch; }
  std::shared_ptr<const EpochSpec> spec() const { return spec_; }  // of the newest epoch, or null
  std::vector<WorkerView> Workers() const;
  const Counters& counters() const { return counters_; }
  // Why no cell runs; empty while one does.
  std::string WaitsFor() const;

 private:
  struct Worker {
    WorkerFacts facts;
    bool draining = false;
    TimePoint last_heartbeat;
    TimePoint last_progress;
    uint64_t progress = 0;
    uint64_t rows = 0;
    // Expert workers.
    ExpertSets assigned;      // what it was last told to hold
    uint64_t assignment = 0;  // of that
    bool urgent = false;      // as that said
    bool loaded = false;      // it holds that
    int32_t suspected = 0;    // epochs in a row that peers say failed because of it
  };

  // A gap between ticks beyond this means that this process slept, not that the workers are dead.
  static constexpr std::chrono::milliseconds kMaxTickGap{1000};
  static constexpr int32_t kMaxSuspicions = 3;
  static constexpr std::chrono::milliseconds kForgetSuspicions{10'000};  // of a running epoch

  // Empty, and the sums are remembered; or why they cannot be right.
  std::string CompareSums(WorkerId worker, std::span<const ExpertSum> sums);
  void Advance(TimePoint now);
  bool AdvanceOnce(TimePoint now);
  void EndEpoch(TimePoint now);  // something failed while it ran
  void Stop(TimePoint now);      // Abort to every member that lives
  void Suspect(WorkerId worker, const std::string& error, TimePoint now);
  void PlanTarget();
  void AssignTarget(const HomePlacement& homes);
  bool SomebodyWaits() const;  // for what is loaded
  bool TargetLoaded() const;
  bool ChangeWanted() const;
  void Install(TimePoint now);
  void ReleaseDrained();
  int32_t SlotsOf(const Worker& worker) const;
  std::vector<WorkerId> Attention() const;  // that shall serve
  bool IsMember(WorkerId worker) const;
  HomePlacement Homes() const;  // of the newest epoch's placement, live workers only

  const MembershipOptions options_;
  std::map<WorkerId, Worker> workers_;
  struct KnownSum {
    WorkerId worker = 0;  // who told it first; 0: nobody yet
    uint64_t checksum = 0;
  };
  std::vector<KnownSum> known_sums_;  // [num_moe_layers, num_experts], for the cell's life
  WorkerId next_worker_ = 1;
  CellPhase phase_ = CellPhase::kForming;
  std::shared_ptr<const EpochSpec> spec_;  // newest epoch, installed or not
  uint64_t next_epoch_ = 1;
  uint64_t next_assignment_ = 1;
  std::set<WorkerId> awaited_;           // acknowledgements that this phase waits for
  std::optional<HomePlacement> target_;  // what the next epoch shall be; nothing: impossible now
  bool dirty_ = false;                   // target_ must be planned again
  // While stopping after a failure: what the scheduler will be told once it is known who lives.
  std::optional<EpochEnd> end_;
  bool switching_ = false;  // stopping for target_, not because something failed
  bool ever_ran_ = false;
  TimePoint running_since_;  // of the epoch that runs
  TimePoint down_since_;     // while no cell runs
  TimePoint phase_since_;    // of stopping and installing
  bool told_unavailable_ = false;
  TimePoint last_tick_;
  Counters counters_;
  std::vector<MembershipAction> actions_;
};

}  // namespace switchyard
