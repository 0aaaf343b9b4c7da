// Membership against fake workers on a virtual clock: scripted cases, and random joins, deaths,
// drains, failures and slow acknowledgements.
#include "scheduler/membership.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <iostream>
#include <random>

namespace switchyard {
namespace {

using std::chrono::milliseconds;
using TimePoint = Membership::TimePoint;

constexpr int32_t kLayers = 3;

struct FakeWorker {
  WorkerFacts facts;
  ExpertSets held;         // loaded
  uint64_t newest = 0;     // assignment
  uint64_t installed = 0;  // epoch whose communicator lives here
  bool hung = false;       // sends no heartbeats
  bool wrong = false;      // its weights of the MoE layer 1 are not the others'
};

// The world around a Membership: workers that answer after a random while, and a scheduler that
// pauses when told to. Checks every action.
class World {
 public:
  World(MembershipOptions options, uint64_t seed)
      : random(seed), options_(Complete(std::move(options))), membership(options_) {}

  WorkerId Join(WorkerRole role, int32_t home_slots = 0) {
    WorkerFacts facts;
    facts.role = role;
    facts.num_kv_blocks = 100;
    facts.home_slots = home_slots;
    const WorkerId id = membership.Join(facts, now);
    workers[id].facts = facts;
    workers[id].held.resize(kLayers);
    Take();
    return id;
  }
  void Kill(WorkerId id) {
    workers.erase(id);
    membership.Lost(id, "killed", now);
    Take();
  }
  void Drain(WorkerId id) {
    membership.Drain(id, now);
    Take();
  }
  // With random loads, as if the traffic had changed.
  void Rebalance() {
    std::vector<int64_t> loads(static_cast<size_t>(kLayers * options_.num_experts));
    for (int64_t& load : loads) load = static_cast<int64_t>(random() % 1000 * (random() % 10));
    Rebalance(loads);
  }
  void Rebalance(const std::vector<int64_t>& loads) {
    membership.Rebalance(loads, now);
    Take();
  }
  void Fail(WorkerId id, int32_t suspect) {
    membership.Failed(id, membership.epoch(), "broken pipe", suspect, now);
    Take();
  }

  // Lets `span` pass: acknowledgements are answered when they are due, heartbeats go on.
  void Pass(milliseconds span) {
    const TimePoint end = now + span;
    while (now < end) {
      now += milliseconds(10);
      for (auto& [id, worker] : workers) {
        if (!worker.hung) membership.Heartbeat(id, 0, false, 0, now);
      }
      auto due = std::stable_partition(pending.begin(), pending.end(),
                                       [this](const Pending& p) { return p.due > now; });
      std::vector<Pending> ready(due, pending.end());
      pending.erase(due, pending.end());
      for (Pending& p : ready) {
        p.run();
        Take();
      }
      membership.Tick(now);
      Take();
    }
  }
  bool Running() const { return membership.phase() == CellPhase::kRunning; }
  int32_t NumMembers() const {
    const auto views = membership.Workers();
    return static_cast<int32_t>(
        std::count_if(views.begin(), views.end(), [](const auto& v) { return v.rank >= 0; }));
  }

  std::mt19937_64 random;
  TimePoint now = TimePoint() + std::chrono::hours(1);
  milliseconds max_delay{30};
  milliseconds load_time{100};

 private:
  const MembershipOptions options_;

 public:
  Membership membership;
  std::map<WorkerId, FakeWorker> workers;
  std::vector<WorkerEvent> events;  // all that the scheduler was told
  uint64_t viewed = 0;              // epoch that the scheduler may plan for; 0: none
  std::vector<AssignAction> assigns;
  int goodbyes = 0;
  int fences = 0;
  int fenced_for_good = 0;
  std::string last_fence;  // why

 private:
  struct Pending {
    TimePoint due;
    std::function<void()> run;
  };

  static MembershipOptions Complete(MembershipOptions options) {
    options.num_moe_layers = kLayers;
    options.draw_secret = [] { return std::string("secret"); };
    return options;
  }
  void Later(milliseconds base, std::function<void()> run) {
    const auto delay = base + milliseconds(random() % static_cast<uint64_t>(max_delay.count()));
    pending.push_back({now + delay, std::move(run)});
  }

  void Take() {
    for (MembershipAction& action : membership.TakeActions())
      std::visit([this](auto& a) { On(a); }, action);
  }
  void On(AssignAction& action) {
    assigns.push_back(action);
    if (workers.count(action.worker) == 0) return;
    const int32_t slots = workers[action.worker].facts.home_slots;
    for (const std::set<int32_t>& layer : action.experts) {
      if (slots > 0) {
        ASSERT_LE(static_cast<int32_t>(layer.size()), slots);
      }
    }
    workers[action.worker].newest = action.assignment;
    Later(load_time, [this, action] {
      const auto at = workers.find(action.worker);
      if (at == workers.end() || at->second.newest != action.assignment) return;
      at->second.held = action.experts;
      membership.Loaded(action.worker, action.assignment, Sums(action.experts, at->second.wrong),
                        now);
    });
  }
  static std::vector<Membership::ExpertSum> Sums(const ExpertSets& experts, bool wrong) {
    std::vector<Membership::ExpertSum> sums;
    for (int32_t l = 0; l < kLayers; ++l) {
      for (int32_t e : experts[static_cast<size_t>(l)]) {
        const auto right = static_cast<uint64_t>(0xa00 + l * 16 + e);
        sums.push_back({l, e, wrong && l == 1 ? right + 0x1000 : right});
      }
    }
    return sums;
  }
  void On(InstallAction& action) {
    const auto at = workers.find(action.worker);
    if (at == workers.end()) return;
    const EpochSpec& spec = *action.spec;
    ASSERT_EQ(at->second.installed, 0u) << "the epoch before is still installed";
    ASSERT_EQ(spec.members[static_cast<size_t>(action.rank)], action.worker);
    if (action.rank >= spec.num_attention) {
      for (int32_t l = 0; l < kLayers; ++l) {
        for (int32_t e : spec.placement->ExpertsOf(l, action.rank - spec.num_attention)) {
          ASSERT_EQ(at->second.held[static_cast<size_t>(l)].count(e), 1u)
              << "worker " << action.worker << " does not hold expert " << e;
        }
      }
    }
    ASSERT_TRUE(spec.placement->Validate().ok());
    at->second.installed = spec.epoch;
    Later(milliseconds(0), [this, id = action.worker, epoch = spec.epoch] {
      const auto w = workers.find(id);
      if (w != workers.end() && w->second.installed == epoch) membership.Installed(id, epoch, now);
    });
  }
  void On(AbortAction& action) {
    Later(milliseconds(0), [this, action] {
      const auto at = workers.find(action.worker);
      if (at == workers.end()) return;
      at->second.installed = 0;
      membership.Quiesced(action.worker, action.epoch, now);
    });
  }
  void On(GoodbyeAction& action) {
    ASSERT_EQ(workers.at(action.worker).installed, 0u);
    workers.erase(action.worker);
    ++goodbyes;
  }
  void On(FenceAction& action) {
    workers.erase(action.worker);
    fenced_for_good += action.returns == FenceReturn::kNever ? 1 : 0;
    last_fence = action.reason;
    ++fences;
  }
  void On(WorkerEvent& event) {
    if (const auto* view = std::get_if<EpochView>(&event)) {
      ASSERT_GT(view->epoch, last_viewed_);
      last_viewed_ = viewed = view->epoch;
      ASSERT_FALSE(view->attention.empty());
      for (WorkerId id : membership.spec()->members) {
        const auto at = workers.find(id);  // may have died just now
        if (at != workers.end()) {
          ASSERT_EQ(at->second.installed, view->epoch);
        }
      }
    } else if (const auto* pause = std::get_if<EpochPause>(&event)) {
      ASSERT_EQ(pause->epoch, viewed);
      Later(milliseconds(0), [this, epoch = pause->epoch] {
        if (viewed != epoch) return;  // it ended meanwhile
        viewed = 0;
        membership.Paused(epoch, now);
      });
    } else if (const auto* end = std::get_if<EpochEnd>(&event)) {
      ASSERT_EQ(end->epoch, last_viewed_);
      viewed = 0;
    }
    events.push_back(event);
  }

  std::vector<Pending> pending;
  uint64_t last_viewed_ = 0;
};

template <typename T>
int Count(const World& world) {
  return static_cast<int>(
      std::count_if(world.events.begin(), world.events.end(),
                    [](const WorkerEvent& e) { return std::holds_alternative<T>(e); }));
}

TEST(PlanHomes, SpreadsEvenlyAndKeepsWhatItCan) {
  const std::vector<HomeSlots> two = {{1, 10}, {2, 10}};
  const auto first = PlanHomes({}, two, 2, 7);
  ASSERT_TRUE(first.has_value());
  for (size_t l = 0; l < 2; ++l) {
    EXPECT_EQ(first->at(1)[l].size() + first->at(2)[l].size(), 7u);
    EXPECT_LE(std::max(first->at(1)[l].size(), first->at(2)[l].size()), 4u);
  }
  // The remainders are spread.
  EXPECT_NE(first->at(1)[0].size(), first->at(1)[1].size());
  // A third one takes over two experts per layer and nobody else gains any.
  const auto joined = PlanHomes(*first, {{1, 10}, {2, 10}, {3, 10}}, 2, 7);
  ASSERT_TRUE(joined.has_value());
  for (size_t l = 0; l < 2; ++l) {
    EXPECT_EQ(joined->at(3)[l].size(), 2u);
    for (WorkerId w : {1, 2}) {
      EXPECT_TRUE(std::includes(first->at(w)[l].begin(), first->at(w)[l].end(),
                                joined->at(w)[l].begin(), joined->at(w)[l].end()));
    }
  }
  // One is lost: the others keep what they have.
  const auto left = PlanHomes(*joined, {{1, 10}, {2, 10}}, 2, 7);
  ASSERT_TRUE(left.has_value());
  for (size_t l = 0; l < 2; ++l) {
    for (WorkerId w : {1, 2}) {
      EXPECT_TRUE(std::includes(left->at(w)[l].begin(), left->at(w)[l].end(),
                                joined->at(w)[l].begin(), joined->at(w)[l].end()));
    }
  }
  EXPECT_FALSE(PlanHomes({}, {{1, 3}, {2, 3}}, 1, 7).has_value());
  EXPECT_FALSE(PlanHomes({}, {}, 1, 7).has_value());
  EXPECT_EQ(PlanHomes(*first, two, 2, 7), first);
}

TEST(Membership, FormsWhenEveryExpertHasAHomeAndOneAttentionWorkerIsUp) {
  World world({.num_experts = 8, .min_expert_workers = 2}, 1);
  EXPECT_EQ(world.membership.WaitsFor(), "waiting for an attention worker");
  world.Join(WorkerRole::kAttention);
  world.Join(WorkerRole::kExpert);
  world.Pass(milliseconds(1000));
  EXPECT_FALSE(world.Running());
  EXPECT_EQ(world.membership.WaitsFor(), "waiting for expert workers: 1 of 2 are there");
  world.Join(WorkerRole::kExpert);
  world.Pass(milliseconds(300));
  EXPECT_TRUE(world.Running());
  EXPECT_EQ(world.NumMembers(), 3);
  EXPECT_EQ(Count<EpochView>(world), 1);
  EXPECT_EQ(Count<Unavailable>(world), 0) << "nobody was ever served, so nothing is lost";
}

TEST(Membership, AWorkerJoinsAtABoundaryAndLeavesWithoutAnAbort) {
  World world({.num_experts = 8}, 2);
  world.Join(WorkerRole::kAttention);
  const WorkerId first = world.Join(WorkerRole::kExpert);
  world.Pass(milliseconds(500));
  ASSERT_TRUE(world.Running());
  world.Join(WorkerRole::kExpert);
  world.Join(WorkerRole::kAttention);
  world.Pass(milliseconds(500));
  EXPECT_EQ(world.NumMembers(), 4);
  world.Drain(first);
  world.Pass(milliseconds(500));
  EXPECT_EQ(world.goodbyes, 1);
  EXPECT_EQ(world.NumMembers(), 3);
  EXPECT_TRUE(world.Running());
  EXPECT_EQ(Count<EpochEnd>(world), 0);
  EXPECT_EQ(world.membership.counters().failovers, 0u);
  EXPECT_EQ(world.membership.counters().drains, 1u);
}

TEST(Membership, TheLastAttentionWorkerStaysUntilAnotherIsThere) {
  World world({.num_experts = 4}, 3);
  const WorkerId only = world.Join(WorkerRole::kAttention);
  world.Join(WorkerRole::kExpert);
  world.Pass(milliseconds(500));
  world.Drain(only);
  world.Pass(milliseconds(500));
  EXPECT_EQ(world.goodbyes, 0);
  EXPECT_TRUE(world.Running());
  world.Join(WorkerRole::kAttention);
  world.Pass(milliseconds(500));
  EXPECT_EQ(world.goodbyes, 1);
  EXPECT_TRUE(world.Running());
}

TEST(Membership, SurvivorsTakeOverWhatALostExpertWorkerHeld) {
  World world({.num_experts = 9, .min_expert_workers = 3, .survive_expert_failures = 1}, 4);
  world.Join(WorkerRole::kAttention);
  std::vector<WorkerId> experts;
  for (int i = 0; i < 3; ++i) experts.push_back(world.Join(WorkerRole::kExpert));
  world.Pass(milliseconds(500));
  ASSERT_TRUE(world.Running());
  world.Kill(experts[1]);
  world.Pass(milliseconds(500));
  EXPECT_EQ(Count<EpochEnd>(world), 1);
  EXPECT_TRUE(world.Running());
  EXPECT_EQ(world.NumMembers(), 3);
  // The next one is more than the slots survive: requests wait, then end, then work again.
  world.Kill(experts[0]);
  world.Pass(milliseconds(59'000));
  EXPECT_FALSE(world.Running());
  EXPECT_EQ(Count<Unavailable>(world), 0);
  world.Pass(milliseconds(2'000));
  EXPECT_EQ(Count<Unavailable>(world), 1);
  EXPECT_EQ(world.membership.WaitsFor(),
            "waiting for expert workers: 1 hold 5 of 9 experts per layer");
  world.Join(WorkerRole::kExpert);
  world.Pass(milliseconds(500));
  EXPECT_TRUE(world.Running());
}

TEST(Membership, OnlyTheSequencesOfALostAttentionWorkerAreBlamed) {
  World world({.num_experts = 4}, 5);
  const WorkerId lost = world.Join(WorkerRole::kAttention);
  world.Join(WorkerRole::kAttention);
  const WorkerId expert = world.Join(WorkerRole::kExpert);
  world.Pass(milliseconds(500));
  // Its peer notices first and blames its rank.
  world.Fail(expert, 0);
  world.Kill(lost);
  world.Pass(milliseconds(500));
  ASSERT_EQ(Count<EpochEnd>(world), 1);
  for (const WorkerEvent& event : world.events) {
    if (const auto* end = std::get_if<EpochEnd>(&event)) {
      EXPECT_EQ(end->lost_attention, std::vector<uint64_t>{lost});
      EXPECT_FALSE(end->expert_lost);
    }
  }
  EXPECT_TRUE(world.Running());
  EXPECT_EQ(world.NumMembers(), 2);
}

TEST(Membership, SilenceIsDeathButAPauseOfThisProcessIsNot) {
  World world({.num_experts = 4}, 6);
  world.Join(WorkerRole::kAttention);
  const WorkerId silent = world.Join(WorkerRole::kExpert);
  world.Join(WorkerRole::kExpert);
  world.Pass(milliseconds(500));
  world.now += std::chrono::seconds(20);  // nobody ticked: the server was stopped
  world.Pass(milliseconds(500));
  EXPECT_EQ(world.fences, 0);
  world.workers[silent].hung = true;
  world.Pass(milliseconds(2200));
  EXPECT_EQ(world.fences, 1);
  world.Pass(milliseconds(500));
  EXPECT_TRUE(world.Running());
  EXPECT_EQ(world.NumMembers(), 2);
}

TEST(Membership, BusyWithoutProgressIsDeath) {
  World world({.num_experts = 4}, 7);
  world.Join(WorkerRole::kAttention);
  const WorkerId stuck = world.Join(WorkerRole::kExpert);
  world.Pass(milliseconds(500));
  for (int i = 0; i < 70; ++i) {
    world.membership.Heartbeat(stuck, 7, true, 0, world.now);
    world.workers[stuck].hung = true;  // its heartbeats come from here
    world.now += milliseconds(500);
    world.membership.Heartbeat(stuck, 7, true, 0, world.now);
    for (auto& [id, worker] : world.workers) {
      if (id != stuck) world.membership.Heartbeat(id, 0, false, 0, world.now);
    }
    world.membership.Tick(world.now);
    world.now += milliseconds(500);
    world.membership.Tick(world.now);
  }
  EXPECT_EQ(world.membership.counters().failures, 1u);
}

TEST(Membership, APeerThatNobodyReachesIsFenced) {
  World world({.num_experts = 4}, 8);
  const WorkerId attention = world.Join(WorkerRole::kAttention);
  world.Join(WorkerRole::kExpert);
  world.Join(WorkerRole::kExpert);
  world.Pass(milliseconds(500));
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(world.Running());
    world.Fail(attention, 2);
    world.Pass(milliseconds(500));
  }
  EXPECT_EQ(world.fences, 1);
  EXPECT_TRUE(world.Running());
  EXPECT_EQ(world.NumMembers(), 2);
  for (const WorkerEvent& event : world.events) {
    if (const auto* end = std::get_if<EpochEnd>(&event)) {
      EXPECT_FALSE(end->expert_lost) << "nobody died: no sequence is to blame";
      EXPECT_TRUE(end->lost_attention.empty());
    }
  }
}

TEST(Membership, WhoCannotInstallIsFenced) {
  World world({.num_experts = 4}, 10);
  world.max_delay = milliseconds(1);
  world.Join(WorkerRole::kAttention);
  const WorkerId bad = world.Join(WorkerRole::kExpert);
  world.Join(WorkerRole::kExpert);
  for (int i = 0; i < 1000 && world.fences == 0; ++i) {
    if (world.membership.phase() == CellPhase::kInstalling) world.Fail(bad, -1);
    world.Pass(milliseconds(10));
  }
  EXPECT_EQ(world.fences, 1);
  world.Pass(milliseconds(500));
  EXPECT_TRUE(world.Running());
}

TEST(Membership, WhoDrainsWhileNothingRunsMayGoAtOnce) {
  World world({.num_experts = 4, .min_expert_workers = 2}, 11);
  const WorkerId attention = world.Join(WorkerRole::kAttention);
  const WorkerId expert = world.Join(WorkerRole::kExpert);
  world.Drain(expert);
  EXPECT_EQ(world.goodbyes, 1);
  world.Drain(attention);
  EXPECT_EQ(world.goodbyes, 2);
  // And beside a running cell, while it loads.
  world.Join(WorkerRole::kAttention);
  for (int i = 0; i < 2; ++i) world.Join(WorkerRole::kExpert);
  world.Pass(milliseconds(500));
  ASSERT_TRUE(world.Running());
  world.Drain(world.Join(WorkerRole::kExpert));
  EXPECT_EQ(world.goodbyes, 3);
  EXPECT_TRUE(world.Running());
}

TEST(Membership, ReplicasMakeRoomWhenTheirHolderIsNeeded) {
  // Slots for one failure: 8 / (3 - 1) + 1. Replicas fill them all, then a worker dies.
  World world(
      {.num_experts = 8, .min_expert_workers = 3, .survive_expert_failures = 1, .replica_slots = 1},
      12);
  world.Join(WorkerRole::kAttention);
  std::vector<WorkerId> experts;
  for (int i = 0; i < 3; ++i) experts.push_back(world.Join(WorkerRole::kExpert));
  world.Pass(milliseconds(500));
  ASSERT_TRUE(world.Running());
  for (int round = 0; round < 10; ++round) {
    world.Rebalance();
    world.Pass(milliseconds(500));
  }
  world.Kill(experts[1]);
  world.Pass(milliseconds(1000));
  EXPECT_TRUE(world.Running());
}

TEST(Membership, OnlyWhatNobodyWaitsForMayBeHeldBack) {
  World world({.num_experts = 8, .replica_slots = 1}, 13);
  const auto urgent = [&](size_t from) {  // of the assignments since then: none, all or some
    int count = 0;
    for (size_t i = from; i < world.assigns.size(); ++i) count += world.assigns[i].urgent ? 1 : 0;
    if (from == world.assigns.size()) return "none was made";
    if (count == 0) return "no";
    return count == static_cast<int>(world.assigns.size() - from) ? "all" : "some";
  };
  world.Join(WorkerRole::kAttention);
  world.Join(WorkerRole::kExpert);
  world.Pass(milliseconds(500));
  EXPECT_STREQ(urgent(0), "all") << "the first placement";
  size_t seen = world.assigns.size();
  const WorkerId second = world.Join(WorkerRole::kExpert);
  world.Pass(milliseconds(500));
  EXPECT_STREQ(urgent(seen), "no") << "a worker joins";
  seen = world.assigns.size();
  world.Rebalance();
  EXPECT_STREQ(urgent(seen), "no") << "the placement follows the load";
  world.Pass(milliseconds(500));
  seen = world.assigns.size();
  world.Drain(second);
  EXPECT_STREQ(urgent(seen), "all") << "a worker leaves";
  world.Pass(milliseconds(500));
  const WorkerId third = world.Join(WorkerRole::kExpert);
  world.Pass(milliseconds(500));
  ASSERT_EQ(world.NumMembers(), 3);
  seen = world.assigns.size();
  world.Kill(third);
  world.Pass(milliseconds(500));
  EXPECT_STREQ(urgent(seen), "all") << "a worker is lost";
  EXPECT_TRUE(world.Running());
}

TEST(Membership, WhatIsHeldBackIsAskedForAgainWhenTheCellNeedsIt) {
  World world({.num_experts = 4}, 14);
  world.Join(WorkerRole::kAttention);
  const WorkerId first = world.Join(WorkerRole::kExpert);
  world.Pass(milliseconds(500));
  ASSERT_TRUE(world.Running());
  world.load_time = std::chrono::hours(1);  // held back
  const WorkerId second = world.Join(WorkerRole::kExpert);
  world.Pass(milliseconds(500));
  ASSERT_FALSE(world.assigns.back().urgent);
  world.load_time = milliseconds(100);
  world.Kill(first);  // now `second` alone can serve, and has nothing yet
  world.Pass(milliseconds(500));
  EXPECT_EQ(world.assigns.back().worker, second);
  EXPECT_TRUE(world.assigns.back().urgent);
  EXPECT_TRUE(world.Running());
}

TEST(Membership, WhoHoldsOtherWeightsIsSentAwayBeforeItServes) {
  World world({.num_experts = 2}, 15);
  world.Join(WorkerRole::kAttention);
  const WorkerId first = world.Join(WorkerRole::kExpert);
  world.Pass(milliseconds(500));
  ASSERT_TRUE(world.Running());
  const uint64_t epoch = world.membership.epoch();
  const WorkerId wrong = world.Join(WorkerRole::kExpert);
  world.workers[wrong].wrong = true;
  world.Pass(milliseconds(500));
  EXPECT_EQ(world.fenced_for_good, 1);
  EXPECT_TRUE(world.last_fence ==
                  "worker 3 () holds other weights: its checksum of expert 0 of MoE "
                  "layer 1 is 0000000000001a10, that of worker 2 0000000000000a10" ||
              world.last_fence ==
                  "worker 3 () holds other weights: its checksum of expert 1 of MoE "
                  "layer 1 is 0000000000001a11, that of worker 2 0000000000000a11")
      << world.last_fence;
  EXPECT_EQ(world.membership.epoch(), epoch) << "it never served";
  EXPECT_EQ(Count<EpochEnd>(world), 0);
  // What the first one told counts when it is gone, too.
  world.Kill(first);
  const WorkerId again = world.Join(WorkerRole::kExpert);
  world.workers[again].wrong = true;
  world.Pass(milliseconds(500));
  EXPECT_EQ(world.fenced_for_good, 2);
  EXPECT_FALSE(world.Running());
  world.Join(WorkerRole::kExpert);
  world.Pass(milliseconds(500));
  EXPECT_TRUE(world.Running());
}

TEST(Membership, AMemberThatReloadsOtherWeightsIsLost) {
  World world({.num_experts = 4}, 16);
  world.Join(WorkerRole::kAttention);
  const WorkerId first = world.Join(WorkerRole::kExpert);
  const WorkerId second = world.Join(WorkerRole::kExpert);
  world.Pass(milliseconds(1000));
  ASSERT_EQ(world.NumMembers(), 3);
  world.workers[second].wrong = true;  // from now on
  world.Kill(first);
  world.Pass(milliseconds(500));
  EXPECT_EQ(world.fenced_for_good, 1);
  EXPECT_EQ(world.membership.counters().failures, 2u);
  EXPECT_FALSE(world.Running());
  world.membership.Loaded(second, 1, {}, world.now);  // late: nobody knows it any more
  world.Join(WorkerRole::kExpert);
  world.Pass(milliseconds(500));
  EXPECT_TRUE(world.Running());
}

TEST(Membership, HotExpertsGetReplicasAtAStepBoundary) {
  World world({.num_experts = 8, .replica_slots = 1}, 9);
  world.Join(WorkerRole::kAttention);
  world.Join(WorkerRole::kExpert);
  world.Pass(milliseconds(500));
  world.Join(WorkerRole::kExpert);
  world.Pass(milliseconds(500));
  ASSERT_EQ(world.NumMembers(), 3);
  std::vector<int64_t> loads(kLayers * 8, 1);
  for (size_t l = 0; l < kLayers; ++l) loads[l * 8 + 3] = 100;
  world.Rebalance(loads);
  EXPECT_TRUE(world.Running()) << "it goes on while the replica is loaded";
  world.Pass(milliseconds(500));
  ASSERT_TRUE(world.Running());
  for (int32_t l = 0; l < kLayers; ++l)
    EXPECT_EQ(world.membership.spec()->placement->Hosts(l, 3).size(), 2u);
  EXPECT_EQ(world.membership.counters().rebalances, 1u);
  EXPECT_EQ(Count<EpochEnd>(world), 0);
  const uint64_t epoch = world.membership.epoch();
  world.Rebalance(loads);
  world.Pass(milliseconds(500));
  EXPECT_EQ(world.membership.epoch(), epoch) << "nothing is left to gain";
}

TEST(Membership, RandomChurnAlwaysEndsInARunningCell) {
  int64_t actions = 0;
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    World world({.num_experts = 12,
                 .min_expert_workers = 2,
                 .survive_expert_failures = 1,
                 .replica_slots = 2},
                seed);
    world.max_delay = milliseconds(1 + world.random() % 200);
    world.load_time = milliseconds(world.random() % 400);
    for (int i = 0; i < 120 && !testing::Test::HasFatalFailure(); ++i, ++actions) {
      std::vector<WorkerId> ids;
      for (const auto& [id, worker] : world.workers) ids.push_back(id);
      const WorkerId any = ids.empty() ? 0 : ids[world.random() % ids.size()];
      switch (world.random() % 9) {
        case 0:
        case 1:
          if (ids.size() < 9) world.Join(WorkerRole::kExpert);
          break;
        case 2:
          if (ids.size() < 9) world.Join(WorkerRole::kAttention);
          break;
        case 3:
          if (any != 0) world.Kill(any);
          break;
        case 4:
          if (any != 0 && ids.size() > 3) world.Drain(any);
          break;
        case 5:
          if (any != 0) world.workers[any].hung = world.random() % 4 == 0;
          break;
        case 6:
          if (any != 0) world.Fail(any, static_cast<int32_t>(world.random() % 5) - 1);
          break;
        case 7:
          world.Rebalance();
          break;
        default:
          break;
      }
      world.Pass(milliseconds(10 * (world.random() % 40)));
    }
    // Calm: new workers come, the old ones answer; everybody who wants to serve ends up serving.
    for (auto& [id, worker] : world.workers) worker.hung = false;
    world.Join(WorkerRole::kAttention);
    for (int i = 0; i < 3; ++i) world.Join(WorkerRole::kExpert);
    world.Pass(milliseconds(20'000));
    ASSERT_TRUE(world.Running()) << CellPhaseName(world.membership.phase());
    ASSERT_EQ(world.viewed, world.membership.epoch());
    for (const auto& view : world.membership.Workers())
      EXPECT_EQ(view.state, WorkerState::kServing) << "worker " << view.id;
  }
  std::cout << actions << " random events over 60 seeds\n";
}

}  // namespace
}  // namespace switchyard
