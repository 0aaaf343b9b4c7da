// RemoteCell: a cell of worker processes, in this process, under a scripted scheduler and over the
// real data plane; and the reference that its answers are compared with. For tests only, used on
// the test's thread.
#pragma once

#include <functional>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "worker/fake_scheduler.h"
#include "worker/local_cell.h"
#include "worker/test_cases.h"
#include "worker/test_driver.h"
#include "worker/worker_process.h"

namespace switchyard {
namespace remote {

inline constexpr v1::WorkerRole kAttention = v1::WORKER_ROLE_ATTENTION;
inline constexpr v1::WorkerRole kExpert = v1::WORKER_ROLE_EXPERT;

inline std::string Fixture(const std::string& name) {
  return absl::StrCat(SWITCHYARD_SOURCE_DIR, "/tests/fixtures/", name);
}

inline WorkerProcessOptions Options(const FakeScheduler& scheduler,
                                    std::vector<v1::WorkerRole> roles,
                                    const std::string& fixture = "qwen3_moe") {
  WorkerProcessOptions options;
  options.roles = std::move(roles);
  options.model.model_dir = Fixture(fixture);
  options.control.scheduler = scheduler.address();
  options.threads = 1;
  options.kv_cache_memory = 8 << 20;
  options.name = "test";
  options.on_registered = [](const RegisteredRole&) {};
  return options;
}

inline std::unique_ptr<WorkerProcess> Start(const WorkerProcessOptions& options) {
  absl::StatusOr<std::unique_ptr<WorkerProcess>> process = WorkerProcess::Create(options);
  EXPECT_TRUE(process.ok()) << process.status();
  return process.ok() ? *std::move(process) : nullptr;
}

}  // namespace remote

// A cell of worker processes under the scripted scheduler. Workers are named by their order.
class RemoteCell {
 public:
  // `prepare`, if any, is called before the first worker comes.
  RemoteCell(const std::string& fixture, int num_attention, int num_experts,
             const std::function<void(FakeScheduler*)>& prepare = nullptr)
      : fixture_(fixture), num_attention_(num_attention) {
    if (prepare) prepare(&scheduler_);
    for (int i = 0; i < num_attention + num_experts; ++i)
      Add(i < num_attention ? remote::kAttention : remote::kExpert);
  }

  // Starts one more worker; returns its index.
  size_t Add(v1::WorkerRole role) {
    processes_.push_back(remote::Start(remote::Options(scheduler_, {role}, fixture_)));
    Welcome(processes_.size() - 1);
    return processes_.size() - 1;
  }
  // The worker's next registration.
  void Welcome(size_t index) {
    v1::Register registration;
    const uint64_t id = scheduler_.NextWorker(&registration);
    if (members_.size() <= index) {
      members_.resize(index + 1);
      registrations_.resize(index + 1);
    }
    members_[index] = {id, registration.data_address()};
    registrations_[index] = registration;
  }
  void Kill(size_t index) { processes_[index] = nullptr; }

  // Loads and installs the next epoch with these expert workers and a placement over them.
  // `balance`: as --balance.
  void Form(const std::vector<size_t>& experts, const ExpertPlacement& placement,
            const std::string& balance = "auto") {
    for (size_t r = 0; r < experts.size(); ++r) {
      scheduler_.Assign(members_[experts[r]].worker, ++assignment_, placement,
                        static_cast<int32_t>(r));
    }
    for (size_t expert : experts)
      scheduler_.Expect(members_[expert].worker, FakeScheduler::Case::kLoaded);
    current_ = {};
    for (int a = 0; a < num_attention_; ++a) current_.push_back(members_[static_cast<size_t>(a)]);
    for (size_t expert : experts) current_.push_back(members_[expert]);
    scheduler_.Install(++epoch_, current_, num_attention_, placement, balance);
    for (const FakeScheduler::Member& member : current_) {
      EXPECT_EQ(
          scheduler_.Expect(member.worker, FakeScheduler::Case::kInstalled).installed().epoch(),
          epoch_);
    }
    told_step_ = 0;
  }
  // Ends the epoch at those of its workers that live.
  void Stop(const std::set<uint64_t>& dead = {}) {
    for (const FakeScheduler::Member& member : current_) {
      if (!dead.count(member.worker)) scheduler_.Abort(member.worker, epoch_);
    }
    for (const FakeScheduler::Member& member : current_) {
      if (dead.count(member.worker)) continue;
      EXPECT_EQ(scheduler_.Expect(member.worker, FakeScheduler::Case::kQuiesced).quiesced().epoch(),
                epoch_);
    }
  }

  TestTarget Target() {
    const absl::StatusOr<ModelFacts> facts =
        ReadModelFacts({.model_dir = remote::Fixture(fixture_)});
    EXPECT_TRUE(facts.ok());
    ModelInfo model = facts->info;
    model.num_kv_blocks = registrations_[0].num_kv_blocks();
    return {.model = model,
            .num_attention_workers = num_attention_,
            .execute = [this](int worker, StepPlan plan) { Execute(worker, plan); }};
  }

  FakeScheduler& scheduler() { return scheduler_; }
  uint64_t id(size_t index) const { return members_[index].worker; }
  const v1::Register& registration(size_t index) const { return registrations_[index]; }
  uint64_t epoch() const { return epoch_; }

 private:
  void Execute(int worker, const StepPlan& plan) {
    if (plan.header.step != told_step_) {
      told_step_ = plan.header.step;
      const StepPlan header = {.header = plan.header, .work = {}, .ended = {}};
      for (size_t r = static_cast<size_t>(num_attention_); r < current_.size(); ++r)
        scheduler_.SendStep(current_[r].worker, header);
    }
    scheduler_.SendStep(current_[static_cast<size_t>(worker)].worker, plan);
  }

  const std::string fixture_;
  const int num_attention_;
  FakeScheduler scheduler_;
  std::vector<std::unique_ptr<WorkerProcess>> processes_;
  std::vector<FakeScheduler::Member> members_;  // as last registered
  std::vector<v1::Register> registrations_;
  std::vector<FakeScheduler::Member> current_;  // of the epoch
  uint64_t epoch_ = 0;
  uint64_t assignment_ = 0;
  uint64_t told_step_ = 0;
};

// The reference: each case alone in one process with one worker of each role.
inline std::vector<TestOutput> Reference(const std::string& fixture, std::mt19937& random,
                                         std::vector<Case>* cases) {
  CellOptions options;
  options.model_dir = remote::Fixture(fixture);
  options.threads = 1;
  options.expert_workers = 1;
  options.kv_cache_memory = 8 << 20;
  options.max_num_batched_tokens = 256;
  const std::unique_ptr<LocalCell> cell = MakeCell(options);
  if (cell == nullptr) return {};
  *cases = RandomCases(6, cell->model_info(), random);
  TestDriver alone(cell.get());
  return RunAlone(alone, *cases);
}

}  // namespace switchyard
