#include "comm/faulty_communicator.h"

#include "comm/communicator_conformance.h"
#include "comm/data_plane_test_ranks.h"

namespace switchyard {
namespace {

using testing::HasSubstr;

ThreadPool* Pool() {
  static ThreadPool pool(2);
  return &pool;
}

Communicators Wrap(Communicators inner, const FaultPlan& plan_of_rank_0) {
  Communicators wrapped;
  for (auto& communicator : inner) {
    const bool is_first = wrapped.empty();
    wrapped.push_back(std::make_unique<FaultyCommunicator>(
        std::move(communicator), is_first ? plan_of_rank_0 : FaultPlan{}));
  }
  return wrapped;
}

// Without faults it is a communicator like any other; a plan that changes nothing too.
const FaultPlan kHarmless{.on_send = [](const SendOp&) { return SendFault{}; }};

INSTANTIATE_TEST_SUITE_P(Faulty, CommunicatorConformance,
                         testing::Values(CommunicatorMaker{"in_process",
                                                           [](int32_t size) {
                                                             return Wrap(MakeInProcessCommunicators(
                                                                             size, Pool()),
                                                                         kHarmless);
                                                           }},
                                         CommunicatorMaker{"network",
                                                           [](int32_t size) {
                                                             return Wrap(MakeNetworkRanks(size),
                                                                         kHarmless);
                                                           }}),
                         [](const auto& info) { return info.param.name; });

class Faults : public testing::TestWithParam<CommunicatorMaker> {
 protected:
  // Rank 0, which has the faults, sends `size` bytes to rank 1; both wait.
  void SendFromFaulty(const FaultPlan& plan, size_t size,
                      std::chrono::milliseconds patience = std::chrono::minutes(2)) {
    comms_ = Wrap(GetParam().make(2), plan);
    sent_ = Pattern(0, 1, 1, size);
    buffer_.assign(size, std::byte{0});
    recv_ = {0, Tag(1), buffer_};
    RankThreads threads;
    threads.Run([&] {
      const SendOp send{1, Tag(1), sent_};
      sender_ = comms_[0]->Start({&send, 1}, {});
      if (sender_.ok()) sender_ = comms_[0]->Wait(Later());
    });
    threads.Run([&] {
      receiver_ = comms_[1]->Start({}, {&recv_, 1});
      if (receiver_.ok()) receiver_ = comms_[1]->Wait(In(patience));
    });
  }

  Communicators comms_;
  std::vector<std::byte> sent_, buffer_;
  RecvOp recv_;
  absl::Status sender_, receiver_;
};

TEST_P(Faults, ADroppedMessageEndsAtTheDeadlineWithItsSendersName) {
  SendFromFaulty({.on_send = [](const SendOp&) { return SendFault{.drop = true}; }}, 100,
                 std::chrono::milliseconds(50));
  EXPECT_TRUE(sender_.ok()) << sender_;
  EXPECT_EQ(receiver_.code(), absl::StatusCode::kDeadlineExceeded) << receiver_;
  EXPECT_THAT(std::string(receiver_.message()), HasSubstr("rank 0 (to send step 1"));
}

TEST_P(Faults, ATruncatedMessageIsShorter) {
  SendFromFaulty({.on_send = [](const SendOp&) { return SendFault{.truncate = 30}; }}, 100);
  ASSERT_TRUE(sender_.ok() && receiver_.ok()) << sender_ << receiver_;
  EXPECT_EQ(recv_.received, 70u);
  EXPECT_TRUE(std::equal(buffer_.begin(), buffer_.begin() + 70, sent_.begin()));
}

TEST_P(Faults, AKilledRankIsLostToItsPeer) {
  SendFromFaulty({.kill_at_start = 0}, 100);
  EXPECT_EQ(sender_.code(), absl::StatusCode::kAborted) << sender_;
  EXPECT_EQ(receiver_.code(), absl::StatusCode::kUnavailable) << receiver_;
  EXPECT_THAT(std::string(receiver_.message()), HasSubstr("rank 0"));
}

TEST_P(Faults, ASlowPeerIsOnlySlow) {
  SendFromFaulty(
      {.start_delay = std::chrono::milliseconds(20), .wait_delay = std::chrono::milliseconds(20)},
      300000);
  ASSERT_TRUE(sender_.ok() && receiver_.ok()) << sender_ << receiver_;
  EXPECT_EQ(buffer_, sent_);
}

INSTANTIATE_TEST_SUITE_P(
    Over, Faults,
    testing::Values(CommunicatorMaker{"in_process",
                                      [](int32_t n) {
                                        return MakeInProcessCommunicators(n, Pool());
                                      }},
                    CommunicatorMaker{"network", [](int32_t n) { return MakeNetworkRanks(n); }}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace switchyard
