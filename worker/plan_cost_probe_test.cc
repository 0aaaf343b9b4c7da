#include "worker/plan_cost_probe.h"

#include <gtest/gtest.h>

#include <cstring>

#include "comm/test_problems.h"
#include "kernels/thread_pool.h"

namespace switchyard {
namespace {

class PlanCostProbeTest : public ::testing::Test {
 protected:
  PlanCostProbeTest() : pool_(1) {
    std::string error;
    backend_ = MakeCpuBackend(&pool_, "portable", &error);
    SY_CHECK(backend_ != nullptr);
  }

  ThreadPool pool_;
  std::unique_ptr<ComputeBackend> backend_;
};

TEST_F(PlanCostProbeTest, AMoveBringsTheBytes) {
  std::mt19937 rng = SeededRng();
  const auto link = MoveLink::Create("127.0.0.1");
  ASSERT_TRUE(link.ok()) << link.status();
  const MlpWeights from = backend_->MakeMlp(24, 40, FormatOf(DType::kF32));
  const MlpWeights to = backend_->MakeMlp(24, 40, FormatOf(DType::kF32));
  for (int i = 0; i < 3; ++i) {
    for (const Buffer* buffer : {&from.gate_up.storage, &from.down.storage}) {
      for (size_t b = 0; b < buffer->bytes(); ++b) {
        buffer->data()[b] = static_cast<std::byte>(rng());
      }
    }
    const auto time = (*link)->Move(from, to);
    ASSERT_TRUE(time.ok()) << time.status();
    EXPECT_GT(time->count(), 0);
    for (const auto& [a, b] : {std::pair(&from.gate_up.storage, &to.gate_up.storage),
                               std::pair(&from.down.storage, &to.down.storage)}) {
      EXPECT_EQ(std::memcmp(a->data(), b->data(), a->bytes()), 0);
    }
  }
}

TEST_F(PlanCostProbeTest, AMoveOverTheNetworkCostsMoreThanACopy) {
  const PlanCostProbe probe{.hidden = 64, .width = 32, .dtype = DType::kF32};
  const auto link = MoveLink::Create("127.0.0.1");
  ASSERT_TRUE(link.ok()) << link.status();
  const PlanCosts copied = MeasurePlanCosts(probe, backend_.get(), nullptr);
  const PlanCosts moved = MeasurePlanCosts(probe, backend_.get(), link->get());
  EXPECT_TRUE(CheckPlanCosts(copied).ok());
  EXPECT_TRUE(CheckPlanCosts(moved).ok());
  // System calls and another thread against 24 KiB within the caches: a factor of 5 and more.
  EXPECT_GT(moved.expert_move_ps, copied.expert_move_ps);
}

TEST_F(PlanCostProbeTest, AnAddressOfNobodyIsRefused) {
  EXPECT_FALSE(MoveLink::Create("192.0.2.1").ok());
}

}  // namespace
}  // namespace switchyard
