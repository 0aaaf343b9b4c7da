#include "scheduler/membership.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "comm/placement_planner.h"
#include "kernels/check.h"
#include "spdlog/spdlog.h"

namespace switchyard {

const char* CellPhaseName(CellPhase phase) {
  switch (phase) {
    case CellPhase::kForming:
      return "forming";
    case CellPhase::kInstalling:
      return "installing";
    case CellPhase::kRunning:
      return "running";
    case CellPhase::kPausing:
      return "pausing";
    case CellPhase::kStopping:
      return "stopping";
  }
  return "";
}

const char* WorkerStateName(WorkerState state) {
  switch (state) {
    case WorkerState::kLoading:
      return "loading";
    case WorkerState::kReady:
      return "ready";
    case WorkerState::kServing:
      return "serving";
    case WorkerState::kDraining:
      return "draining";
  }
  return "";
}

Membership::Membership(const MembershipOptions& options)
    : options_(options),
      known_sums_(static_cast<size_t>(options.num_moe_layers) *
                  static_cast<size_t>(options.num_experts)) {
  SY_CHECK(options_.draw_secret != nullptr);
}

// ---- inputs ----

WorkerId Membership::Join(const WorkerFacts& facts, TimePoint now) {
  const WorkerId id = next_worker_++;
  Worker& worker = workers_[id];
  worker.facts = facts;
  worker.last_heartbeat = worker.last_progress = now;
  ++counters_.joins;
  spdlog::info("worker {} joined: {} {}, pid {}, {}", id,
               facts.role == WorkerRole::kAttention ? "attention" : "expert", facts.name, facts.pid,
               facts.peer);
  dirty_ = true;
  Advance(now);
  return id;
}

void Membership::Heartbeat(WorkerId id, uint64_t progress, bool busy, uint64_t rows,
                           TimePoint now) {
  const auto found = workers_.find(id);
  if (found == workers_.end()) return;
  Worker& worker = found->second;
  worker.last_heartbeat = now;
  if (!busy || progress != worker.progress) worker.last_progress = now;
  worker.progress = progress;
  worker.rows = rows;
}

void Membership::Lost(WorkerId id, const std::string& reason, TimePoint now) {
  const auto found = workers_.find(id);
  if (found == workers_.end()) return;
  const WorkerRole role = found->second.facts.role;
  spdlog::warn("worker {} ({}) is lost: {}", id, found->second.facts.name, reason);
  const bool member = IsMember(id);
  workers_.erase(found);
  awaited_.erase(id);
  ++counters_.failures;
  dirty_ = true;
  if (member) {
    // What peers said of others in this epoch was likely this death.
    for (auto& [other, worker] : workers_) worker.suspected = 0;
    if (phase_ == CellPhase::kRunning || phase_ == CellPhase::kPausing) {
      EndEpoch(now);
    } else if (phase_ == CellPhase::kInstalling) {
      Stop(now);
    }
    if (end_) {
      if (role == WorkerRole::kAttention) end_->lost_attention.push_back(id);
      if (role == WorkerRole::kExpert) end_->expert_lost = true;
    }
  }
  Advance(now);
}

void Membership::Drain(WorkerId id, TimePoint now) {
  const auto found = workers_.find(id);
  if (found == workers_.end() || found->second.draining) return;
  spdlog::info("worker {} ({}) drains", id, found->second.facts.name);
  found->second.draining = true;
  dirty_ = true;
  Advance(now);
}

std::string Membership::CompareSums(WorkerId id, std::span<const ExpertSum> sums) {
  const std::string who = absl::StrCat("worker ", id, " (", workers_.at(id).facts.name, ")");
  const auto known = [this](const ExpertSum& sum) -> KnownSum& {
    return known_sums_[static_cast<size_t>(sum.layer) * static_cast<size_t>(options_.num_experts) +
                       static_cast<size_t>(sum.expert)];
  };
  for (const ExpertSum& sum : sums) {
    const std::string what = absl::StrCat("expert ", sum.expert, " of MoE layer ", sum.layer);
    if (sum.layer < 0 || sum.layer >= options_.num_moe_layers || sum.expert < 0 ||
        sum.expert >= options_.num_experts) {
      return absl::StrCat(who, " has loaded ", what, ", which the model does not have");
    }
    if (known(sum).worker != 0 && known(sum).checksum != sum.checksum) {
      return absl::StrCat(who, " holds other weights: its checksum of ", what, " is ",
                          absl::Hex(sum.checksum, absl::kZeroPad16), ", that of worker ",
                          known(sum).worker, " ", absl::Hex(known(sum).checksum, absl::kZeroPad16));
    }
  }
  for (const ExpertSum& sum : sums) {
    if (known(sum).worker == 0) known(sum) = {id, sum.checksum};
  }
  return "";
}

void Membership::Loaded(WorkerId id, uint64_t assignment, std::span<const ExpertSum> sums,
                        TimePoint now) {
  const auto found = workers_.find(id);
  if (found == workers_.end()) return;
  if (const std::string wrong = CompareSums(id, sums); !wrong.empty()) {
    actions_.push_back(FenceAction{id, wrong, FenceReturn::kNever});
    Lost(id, wrong, now);
    return;
  }
  if (found->second.assignment != assignment) return;
  found->second.loaded = true;
  Advance(now);
}

void Membership::Installed(WorkerId id, uint64_t epoch, TimePoint now) {
  if (phase_ != CellPhase::kInstalling || epoch != spec_->epoch) return;
  awaited_.erase(id);
  Advance(now);
}

void Membership::Quiesced(WorkerId id, uint64_t epoch, TimePoint now) {
  if (phase_ != CellPhase::kStopping || epoch != spec_->epoch) return;
  awaited_.erase(id);
  Advance(now);
}

void Membership::Failed(WorkerId id, uint64_t epoch, const std::string& error, int32_t suspect,
                        TimePoint now) {
  if (!IsMember(id) || workers_.count(id) == 0 || epoch != spec_->epoch) return;
  if (phase_ == CellPhase::kForming || phase_ == CellPhase::kStopping) return;
  spdlog::warn("worker {} reports that epoch {} failed: {}", id, epoch, error);
  // Who could not even install it has itself to blame.
  WorkerId blamed = phase_ == CellPhase::kInstalling ? id : 0;
  if (suspect >= 0 && suspect < static_cast<int32_t>(spec_->members.size()))
    blamed = spec_->members[static_cast<size_t>(suspect)];
  if (phase_ == CellPhase::kInstalling) {
    Stop(now);
  } else {
    EndEpoch(now);
  }
  Suspect(blamed, error, now);
  Advance(now);
}

void Membership::Suspect(WorkerId id, const std::string& error, TimePoint now) {
  const auto found = workers_.find(id);
  if (found == workers_.end() || ++found->second.suspected < kMaxSuspicions) return;
  const std::string reason =
      absl::StrCat("blamed for ", kMaxSuspicions, " epochs in a row; the last error: ", error);
  actions_.push_back(FenceAction{id, reason, FenceReturn::kLater});
  // A link failed, not the worker: no sequence is to blame.
  const std::optional<EpochEnd> end = end_;
  Lost(id, reason, now);
  if (end_) end_ = end;
}

void Membership::Paused(uint64_t epoch, TimePoint now) {
  if (phase_ != CellPhase::kPausing || epoch != spec_->epoch) return;
  Stop(now);
  down_since_ = now;
  switching_ = true;
  Advance(now);
}

void Membership::Tick(TimePoint now) {
  const bool slept = last_tick_ != TimePoint() && now - last_tick_ > kMaxTickGap;
  last_tick_ = now;
  std::vector<std::pair<WorkerId, std::string>> dead;
  for (auto& [id, worker] : workers_) {
    if (slept) worker.last_heartbeat = worker.last_progress = now;
    if (now - worker.last_heartbeat > options_.heartbeat_timeout) {
      dead.emplace_back(
          id, absl::StrCat("no heartbeat for ", options_.heartbeat_timeout.count(), " ms"));
    } else if (now - worker.last_progress > options_.stall_timeout) {
      dead.emplace_back(
          id, absl::StrCat("busy without progress for ", options_.stall_timeout.count(), " ms"));
    }
  }
  if (phase_ == CellPhase::kStopping || phase_ == CellPhase::kInstalling) {
    if (slept) phase_since_ = now;
    for (WorkerId id : awaited_) {
      if (now - phase_since_ > options_.stall_timeout) {
        dead.emplace_back(id, absl::StrCat("no answer while ", CellPhaseName(phase_), " for ",
                                           options_.stall_timeout.count(), " ms"));
      }
    }
  }
  for (const auto& [id, reason] : dead) {
    if (workers_.count(id) == 0) continue;
    actions_.push_back(FenceAction{id, reason, FenceReturn::kAtOnce});
    Lost(id, reason, now);
  }
  if (phase_ == CellPhase::kRunning && now - running_since_ > kForgetSuspicions) {
    for (auto& [id, worker] : workers_) worker.suspected = 0;
  }
  if (phase_ == CellPhase::kForming && ever_ran_ && !told_unavailable_ &&
      now - down_since_ > options_.no_home_timeout && (!target_ || Attention().empty())) {
    told_unavailable_ = true;
    spdlog::error("no cell for {} ms: {}", options_.no_home_timeout.count(), WaitsFor());
    actions_.push_back(WorkerEvent(Unavailable{absl::UnavailableError(WaitsFor())}));
  }
}

// ---- transitions ----

void Membership::Advance(TimePoint now) {
  while (AdvanceOnce(now)) {
  }
}

bool Membership::AdvanceOnce(TimePoint now) {
  switch (phase_) {
    case CellPhase::kForming:
      ReleaseDrained();
      PlanTarget();
      if (!target_ || !TargetLoaded() || Attention().empty()) return false;
      Install(now);
      return true;
    case CellPhase::kInstalling: {
      if (!awaited_.empty()) return false;
      phase_ = CellPhase::kRunning;
      ever_ran_ = true;
      told_unavailable_ = false;
      running_since_ = now;
      dirty_ = true;  // those who were left out may join now
      EpochView view{.epoch = spec_->epoch, .attention = {}};
      for (int32_t a = 0; a < spec_->num_attention; ++a) {
        const WorkerId id = spec_->members[static_cast<size_t>(a)];
        view.attention.push_back(
            {.worker = id, .num_kv_blocks = workers_.at(id).facts.num_kv_blocks});
      }
      spdlog::info("epoch {} runs: {} attention and {} expert workers", spec_->epoch,
                   spec_->num_attention,
                   static_cast<int32_t>(spec_->members.size()) - spec_->num_attention);
      actions_.push_back(WorkerEvent(std::move(view)));
      return true;
    }
    case CellPhase::kRunning:
      ReleaseDrained();
      PlanTarget();
      if (!ChangeWanted()) return false;
      phase_ = CellPhase::kPausing;
      actions_.push_back(WorkerEvent(EpochPause{spec_->epoch}));
      return false;
    case CellPhase::kPausing:
      return false;
    case CellPhase::kStopping:
      if (!awaited_.empty()) return false;
      phase_ = CellPhase::kForming;
      if (!switching_) dirty_ = true;  // else target_ is what was prepared
      if (end_) actions_.push_back(WorkerEvent(*std::exchange(end_, std::nullopt)));
      return true;
  }
  return false;
}

void Membership::EndEpoch(TimePoint now) {
  ++counters_.failovers;
  end_ = EpochEnd{.epoch = spec_->epoch, .lost_attention = {}, .expert_lost = false};
  down_since_ = now;
  Stop(now);
}

void Membership::Stop(TimePoint now) {
  awaited_.clear();
  for (WorkerId id : spec_->members) {
    if (workers_.count(id) == 0) continue;
    awaited_.insert(id);
    actions_.push_back(AbortAction{id, spec_->epoch});
  }
  phase_ = CellPhase::kStopping;
  switching_ = false;
  phase_since_ = now;
}

// Decides what the next epoch shall be and tells the expert workers what to load for it.
void Membership::PlanTarget() {
  if (!std::exchange(dirty_, false)) return;
  target_.reset();
  const HomePlacement homes = Homes();
  std::vector<HomeSlots> all;
  std::vector<HomeSlots> holding;  // experts: recovery does not wait for those that begin to load
  for (const auto& [id, worker] : workers_) {
    if (worker.facts.role != WorkerRole::kExpert || worker.draining) continue;
    const HomeSlots slots{id, SlotsOf(worker)};
    all.push_back(slots);
    if (homes.count(id) > 0 || worker.loaded) holding.push_back(slots);
  }
  if (!ever_ran_ && static_cast<int32_t>(all.size()) < options_.min_expert_workers) return;
  if (phase_ != CellPhase::kRunning && !holding.empty()) {
    target_ = PlanHomes(homes, holding, options_.num_moe_layers, options_.num_experts);
  }
  if (!target_) target_ = PlanHomes(homes, all, options_.num_moe_layers, options_.num_experts);
  if (target_) AssignTarget(homes);
}

bool Membership::SomebodyWaits() const {
  return phase_ != CellPhase::kRunning ||
         std::any_of(workers_.begin(), workers_.end(), [](const auto& entry) {
           return entry.second.draining && entry.second.facts.role == WorkerRole::kExpert;
         });
}

void Membership::AssignTarget(const HomePlacement& homes) {
  const bool urgent = SomebodyWaits();
  for (const auto& [id, experts] : *target_) {
    ExpertSets hold = experts;  // and what it serves until the switch
    if (const auto held = homes.find(id); held != homes.end()) {
      for (size_t l = 0; l < hold.size(); ++l)
        hold[l].insert(held->second[l].begin(), held->second[l].end());
    }
    Worker& worker = workers_.at(id);
    const bool in_time = worker.loaded || worker.urgent || !urgent;
    if (worker.assigned == hold && in_time) continue;
    worker.assigned = hold;
    worker.assignment = next_assignment_++;
    worker.urgent = urgent;
    worker.loaded = false;
    actions_.push_back(AssignAction{id, worker.assignment, std::move(hold), urgent});
  }
}

void Membership::Rebalance(std::span<const int64_t> loads, TimePoint now) {
  if (phase_ != CellPhase::kRunning || options_.num_moe_layers == 0) return;
  const HomePlacement homes = Homes();
  if (!target_ || *target_ != homes) return;
  const int32_t num_ranks = spec_->placement->num_ranks();
  int32_t slots = (options_.num_experts + num_ranks - 1) / num_ranks + options_.replica_slots;
  for (const auto& [id, experts] : homes) slots = std::min(slots, SlotsOf(workers_.at(id)));
  absl::StatusOr<ExpertPlacement> planned = PlanPlacement({.num_layers = options_.num_moe_layers,
                                                           .num_experts = options_.num_experts,
                                                           .num_ranks = num_ranks,
                                                           .home_slots_per_rank = slots,
                                                           .loads = loads,
                                                           .current = spec_->placement.get()});
  if (!planned.ok()) return;  // too few slots: a worker with little memory came
  HomePlacement target;
  for (int32_t rank = 0; rank < num_ranks; ++rank) {
    ExpertSets& sets = target[spec_->members[static_cast<size_t>(spec_->num_attention + rank)]];
    for (int32_t l = 0; l < options_.num_moe_layers; ++l) {
      const std::vector<int32_t> experts = planned->ExpertsOf(l, rank);
      sets.emplace_back(experts.begin(), experts.end());
    }
  }
  if (target == homes) return;
  ++counters_.rebalances;
  spdlog::info("placement: {} experts move to even out the load",
               ExpertLoads(spec_->placement.get(), {}, *planned).size());
  target_ = std::move(target);
  AssignTarget(homes);
  Advance(now);
}

bool Membership::TargetLoaded() const {
  return std::all_of(target_->begin(), target_->end(),
                     [this](const auto& entry) { return workers_.at(entry.first).loaded; });
}

bool Membership::ChangeWanted() const {
  if (!target_ || !TargetLoaded()) return false;
  const std::vector<WorkerId> attention = Attention();
  if (attention.empty()) return false;
  const auto begin = spec_->members.begin();
  return !std::equal(attention.begin(), attention.end(), begin, begin + spec_->num_attention) ||
         *target_ != Homes();
}

void Membership::Install(TimePoint now) {
  auto spec = std::make_shared<EpochSpec>();
  spec->epoch = next_epoch_++;
  spec->members = Attention();
  spec->num_attention = static_cast<int32_t>(spec->members.size());
  std::vector<std::vector<std::vector<int32_t>>> hosts(
      static_cast<size_t>(options_.num_moe_layers),
      std::vector<std::vector<int32_t>>(static_cast<size_t>(options_.num_experts)));
  int32_t rank = 0;
  for (const auto& [id, experts] : *target_) {
    spec->members.push_back(id);
    for (size_t l = 0; l < experts.size(); ++l) {
      for (int32_t e : experts[l]) hosts[l][static_cast<size_t>(e)].push_back(rank);
    }
    workers_.at(id).assigned = experts;  // it drops the rest
    ++rank;
  }
  absl::StatusOr<ExpertPlacement> placement = ExpertPlacement::Create(rank, std::move(hosts));
  SY_CHECK(placement.ok());
  spec->placement = std::make_shared<ExpertPlacement>(*std::move(placement));
  spec->secret = options_.draw_secret();
  for (WorkerId id : spec->members)
    spec->data_addresses.push_back(workers_.at(id).facts.data_address);
  spec_ = std::move(spec);
  awaited_ = {spec_->members.begin(), spec_->members.end()};
  phase_ = CellPhase::kInstalling;
  phase_since_ = now;
  for (size_t r = 0; r < spec_->members.size(); ++r)
    actions_.push_back(InstallAction{spec_->members[r], static_cast<int32_t>(r), spec_});
}

// Those who want to leave and are in no epoch any more.
void Membership::ReleaseDrained() {
  for (auto at = workers_.begin(); at != workers_.end();) {
    const bool needed = phase_ == CellPhase::kForming ? false : IsMember(at->first);
    if (!at->second.draining || needed) {
      ++at;
      continue;
    }
    spdlog::info("worker {} ({}) has left", at->first, at->second.facts.name);
    actions_.push_back(GoodbyeAction{at->first});
    ++counters_.drains;
    at = workers_.erase(at);
  }
}

// ---- facts ----

int32_t Membership::SlotsOf(const Worker& worker) const {
  if (worker.facts.home_slots > 0) return worker.facts.home_slots;
  const int32_t workers =
      std::max(1, options_.min_expert_workers - options_.survive_expert_failures);
  return std::min(options_.num_experts,
                  (options_.num_experts + workers - 1) / workers + options_.replica_slots);
}

std::vector<WorkerId> Membership::Attention() const {
  std::vector<WorkerId> ids;
  for (const auto& [id, worker] : workers_) {
    if (worker.facts.role == WorkerRole::kAttention && !worker.draining) ids.push_back(id);
  }
  return ids;
}

bool Membership::IsMember(WorkerId id) const {
  return spec_ != nullptr &&
         std::find(spec_->members.begin(), spec_->members.end(), id) != spec_->members.end();
}

HomePlacement Membership::Homes() const {
  HomePlacement homes;
  if (spec_ == nullptr) return homes;
  const size_t first = static_cast<size_t>(spec_->num_attention);
  for (size_t r = first; r < spec_->members.size(); ++r) {
    const WorkerId id = spec_->members[r];
    if (workers_.count(id) == 0) continue;
    ExpertSets& sets = homes[id];
    for (int32_t l = 0; l < options_.num_moe_layers; ++l) {
      const std::vector<int32_t> experts =
          spec_->placement->ExpertsOf(l, static_cast<int32_t>(r - first));
      sets.emplace_back(experts.begin(), experts.end());
    }
  }
  return homes;
}

std::vector<Membership::WorkerView> Membership::Workers() const {
  std::vector<WorkerView> views;
  const bool has_epoch = spec_ != nullptr && phase_ != CellPhase::kForming;
  for (const auto& [id, worker] : workers_) {
    WorkerView& view = views.emplace_back();
    view.id = id;
    view.facts = worker.facts;
    view.last_heartbeat = worker.last_heartbeat;
    view.rows = worker.rows;
    if (has_epoch && IsMember(id)) {
      const auto at = std::find(spec_->members.begin(), spec_->members.end(), id);
      view.rank = static_cast<int32_t>(at - spec_->members.begin());
      if (view.rank >= spec_->num_attention) {
        for (int32_t l = 0; l < options_.num_moe_layers; ++l) {
          view.num_experts += static_cast<int32_t>(
              spec_->placement->ExpertsOf(l, view.rank - spec_->num_attention).size());
        }
      }
    }
    if (worker.draining) {
      view.state = WorkerState::kDraining;
    } else if (view.rank >= 0) {
      view.state = WorkerState::kServing;
    } else {
      const bool ready = worker.facts.role == WorkerRole::kAttention || worker.loaded;
      view.state = ready ? WorkerState::kReady : WorkerState::kLoading;
    }
  }
  return views;
}

std::string Membership::WaitsFor() const {
  if (phase_ == CellPhase::kRunning || phase_ == CellPhase::kPausing) return "";
  int32_t attention = 0;
  int32_t experts = 0;
  int64_t slots = 0;
  for (const auto& [id, worker] : workers_) {
    if (worker.draining) continue;
    if (worker.facts.role == WorkerRole::kAttention) {
      ++attention;
    } else {
      ++experts;
      slots += SlotsOf(worker);
    }
  }
  if (attention == 0) return "waiting for an attention worker";
  const int32_t wanted = ever_ran_ ? 1 : options_.min_expert_workers;
  if (experts < wanted)
    return absl::StrCat("waiting for expert workers: ", experts, " of ", wanted, " are there");
  if (slots < options_.num_experts) {
    return absl::StrCat("waiting for expert workers: ", experts, " hold ", slots, " of ",
                        options_.num_experts, " experts per layer");
  }
  return phase_ == CellPhase::kForming ? "experts are being loaded" : "the workers are changing";
}

}  // namespace switchyard
