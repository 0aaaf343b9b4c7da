// The conformance suite over NCCL: rank r is a thread that owns device r. A test that needs more
// ranks than the machine has devices cannot run; the program names it and fails.
#include "comm/nccl_communicator.h"

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <map>

#include "comm/communicator_conformance.h"
#include "kernels/check.h"

namespace switchyard {
namespace {

constexpr size_t kMaxMessageBytes = size_t{1} << 20;

Communicators MakeNcclCommunicators(int32_t size) {
  const auto id = NewNcclUniqueId();
  SY_CHECK(id.ok());
  const auto liveness = std::make_shared<RankLiveness>(size);
  Communicators communicators(static_cast<size_t>(size));
  {
    RankThreads threads;
    for (int32_t rank = 0; rank < size; ++rank) {
      threads.Run([&, rank] {
        auto made = MakeNcclCommunicator({.unique_id = *id,
                                          .rank = rank,
                                          .size = size,
                                          .device = rank,
                                          .max_message_bytes = kMaxMessageBytes,
                                          .liveness = liveness,
                                          .deadline = Later()});
        if (!made.ok()) std::fprintf(stderr, "%s\n", made.status().ToString().c_str());
        SY_CHECK(made.ok());
        communicators[static_cast<size_t>(rank)] = *std::move(made);
      });
    }
  }
  return communicators;
}

INSTANTIATE_TEST_SUITE_P(Nccl, CommunicatorConformance,
                         testing::Values(CommunicatorMaker{.name = "nccl",
                                                           .make = MakeNcclCommunicators,
                                                           .sender_hears_too_large = false}),
                         [](const auto& info) { return info.param.name; });

// The ranks that a test of the suite makes; the rest make up to 8.
int RanksOf(const std::string& test) {
  static const std::map<std::string, int> kRanks = {
      {"AGroupMayHoldMessagesToOneself", 1},
      {"WaitWithNothingUnderWayIsDone", 2},
      {"MovesMessagesOfAllSizes", 2},
      {"TagsMatchMessagesWhateverTheOrder", 2},
      {"AMessageLargerThanItsBufferIsAnErrorWithBothSizes", 2},
      {"WaitingDoesNotBurnACore", 2},
      {"AbortEndsAWaitAndIsFinal", 2},
      {"RefusesMisuse", 2},
      {"KnowsItsRankAndSize", 3},
      {"TheDeadlineNamesWhoIsLate", 3},
      {"RanksWithoutBusinessWithALostPeerGoOn", 3},
      {"ALostPeerEndsTheWaitsThatNeedIt", 4},
      {"AbortsAndDeathsAtAnyMomentEndEverything", 5},
  };
  const auto found = kRanks.find(test.substr(0, test.find('/')));
  return found == kRanks.end() ? 8 : found->second;
}

// Leaves out what `devices` cannot run and prints its names; returns how many.
int LeaveOut(int devices) {
  std::string names;
  int count = 0;
  const auto& unit = *testing::UnitTest::GetInstance();
  for (int s = 0; s < unit.total_test_suite_count(); ++s) {
    const auto& suite = *unit.GetTestSuite(s);
    for (int t = 0; t < suite.total_test_count(); ++t) {
      const std::string name = suite.GetTestInfo(t)->name();
      if (RanksOf(name) <= devices) continue;
      absl::StrAppend(&names, names.empty() ? "-" : ":", suite.name(), ".", name);
      std::fprintf(stderr, "did not run, needs %d devices: %s.%s\n", RanksOf(name), suite.name(),
                   name.c_str());
      ++count;
    }
  }
  if (count > 0) testing::GTEST_FLAG(filter) += names;
  return count;
}

}  // namespace
}  // namespace switchyard

int main(int argc, char** argv) {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", /*overwrite=*/1);  // before CUDA starts
  testing::InitGoogleMock(&argc, argv);
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess) devices = 0;
  std::fprintf(stderr, devices == 0 ? "no CUDA device was found\n" : "%d CUDA devices\n", devices);
  const int left_out = switchyard::LeaveOut(devices);
  const int failed = devices == 0 ? 1 : RUN_ALL_TESTS();
  return failed != 0 || left_out > 0 ? 1 : 0;
}
