// The conformance suite of Communicator: what every implementation must do. A test binary includes
// this once and instantiates CommunicatorConformance with its own way to make a group. Linked by
// tests only.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <time.h>

#include <array>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "comm/communicator.h"
#include "comm/test_messages.h"
#include "comm/test_problems.h"
#include "kernels/measure.h"

namespace switchyard {

using Communicators = std::vector<std::unique_ptr<Communicator>>;

struct CommunicatorMaker {
  std::string name;
  std::function<Communicators(int32_t)> make;
  bool sender_hears_too_large = true;  // false: that its message is too large, only the receiver
};
inline void PrintTo(const CommunicatorMaker& maker, std::ostream* out) { *out << maker.name; }

class CommunicatorConformance : public testing::TestWithParam<CommunicatorMaker> {
 protected:
  void Make(int32_t size) { comms_ = GetParam().make(size); }
  Communicator& At(int32_t rank) { return *comms_[static_cast<size_t>(rank)]; }
  absl::Status Send(int32_t from, int32_t to, MessageTag tag, std::span<const std::byte> data) {
    const SendOp send{.peer = to, .tag = tag, .data = data};
    absl::Status status = At(from).Start({&send, 1}, {});
    return status.ok() ? At(from).Wait(Later()) : status;
  }
  absl::Status Receive(int32_t to, int32_t from, MessageTag tag, std::span<std::byte> buffer,
                       size_t* received, std::chrono::steady_clock::time_point deadline = Later()) {
    RecvOp recv{.peer = from, .tag = tag, .buffer = buffer};
    absl::Status status = At(to).Start({}, {&recv, 1});
    if (status.ok()) status = At(to).Wait(deadline);
    *received = recv.received;
    return status;
  }

  Communicators comms_;
};

TEST_P(CommunicatorConformance, KnowsItsRankAndSize) {
  Make(3);
  for (int32_t rank = 0; rank < 3; ++rank) {
    EXPECT_EQ(At(rank).rank(), rank);
    EXPECT_EQ(At(rank).size(), 3);
  }
}

TEST_P(CommunicatorConformance, WaitWithNothingUnderWayIsDone) {
  Make(2);
  EXPECT_TRUE(At(0).Wait(Later()).ok());
  EXPECT_TRUE(At(0).Start({}, {}).ok());
  EXPECT_TRUE(At(0).Wait(std::chrono::steady_clock::now()).ok());
}

TEST_P(CommunicatorConformance, MovesMessagesOfAllSizes) {
  Make(2);
  for (const size_t size : {size_t{0}, size_t{1}, size_t{63}, size_t{4096}, size_t{1000003}}) {
    const std::vector<std::byte> sent = Pattern(0, 1, size, size);
    std::vector<std::byte> buffer(size + 100, std::byte{0xee});
    size_t received = SIZE_MAX;
    {
      RankThreads threads;
      threads.Run([&] { EXPECT_TRUE(Send(0, 1, Tag(size), sent).ok()); });
      threads.Run([&] { EXPECT_TRUE(Receive(1, 0, Tag(size), buffer, &received).ok()); });
    }
    EXPECT_EQ(received, size);
    EXPECT_TRUE(std::equal(sent.begin(), sent.end(), buffer.begin()));
    EXPECT_TRUE(std::all_of(buffer.begin() + static_cast<ptrdiff_t>(size), buffer.end(),
                            [](std::byte b) { return b == std::byte{0xee}; }));
  }
}

TEST_P(CommunicatorConformance, TagsMatchMessagesWhateverTheOrder) {
  Make(2);
  const std::vector<std::byte> a = Pattern(0, 1, 1, 100), b = Pattern(0, 1, 2, 200),
                               c = Pattern(0, 1, 3, 300);
  RankThreads threads;
  threads.Run([&] {
    const SendOp sends[] = {{1, Tag(1, 0), a}, {1, Tag(1, 1), b}};
    const SendOp third{1, Tag(1, 1, MessageKind::kCombine), c};
    EXPECT_TRUE(At(0).Start(sends, {}).ok());
    EXPECT_TRUE(At(0).Start({&third, 1}, {}).ok());  // several groups of sends, one wait
    EXPECT_TRUE(At(0).Wait(Later()).ok());
  });
  threads.Run([&] {
    std::vector<std::byte> buffer(1000);
    size_t received = 0;
    EXPECT_TRUE(Receive(1, 0, Tag(1, 1, MessageKind::kCombine), buffer, &received).ok());
    EXPECT_TRUE(received == 300 && std::equal(c.begin(), c.end(), buffer.begin()));
    EXPECT_TRUE(Receive(1, 0, Tag(1, 1), buffer, &received).ok());
    EXPECT_TRUE(received == 200 && std::equal(b.begin(), b.end(), buffer.begin()));
    EXPECT_TRUE(Receive(1, 0, Tag(1, 0), buffer, &received).ok());
    EXPECT_TRUE(received == 100 && std::equal(a.begin(), a.end(), buffer.begin()));
  });
}

TEST_P(CommunicatorConformance, EveryFieldOfATagTellsMessagesApart) {
  Make(2);
  std::vector<MessageTag> tags(6, Tag(1, 1));
  tags[1].step = 2;
  tags[2].layer = 2;
  tags[3].micro_batch = 1;
  tags[4].kind = MessageKind::kWeights;
  tags[5].part = 200;
  std::vector<std::vector<std::byte>> sent, buffers;
  std::vector<SendOp> sends;
  std::vector<RecvOp> recvs;
  for (size_t i = 0; i < tags.size(); ++i) {
    sent.push_back(Pattern(0, 1, i, 100));
    sends.push_back({1, tags[i], sent.back()});
    buffers.emplace_back(100);
    recvs.push_back({0, tags[i], buffers.back()});
  }
  std::ranges::reverse(recvs);
  RankThreads threads;
  threads.Run([&] {
    EXPECT_TRUE(At(0).Start(sends, {}).ok());
    EXPECT_TRUE(At(0).Wait(Later()).ok());
  });
  threads.Run([&] {
    EXPECT_TRUE(At(1).Start({}, recvs).ok());
    EXPECT_TRUE(At(1).Wait(Later()).ok());
    EXPECT_EQ(buffers, sent);
  });
}

TEST_P(CommunicatorConformance, AGroupMayHoldMessagesToOneself) {
  Make(1);
  const std::vector<std::byte> sent = Pattern(0, 0, 1, 777);
  std::vector<std::byte> buffer(777);
  const SendOp sends[] = {{0, Tag(1), sent}, {0, Tag(2), {}}};
  RecvOp recvs[] = {{0, Tag(2), {}, 9}, {0, Tag(1), buffer, 9}};
  ASSERT_TRUE(At(0).Start(sends, recvs).ok());
  ASSERT_TRUE(At(0).Wait(Later()).ok());
  EXPECT_EQ(recvs[0].received, 0u);
  EXPECT_EQ(recvs[1].received, 777u);
  EXPECT_EQ(buffer, sent);
  // The send may also be started first, in a group of its own.
  std::ranges::fill(buffer, std::byte{0});
  const SendOp again{0, Tag(3), sent};
  RecvOp recv{0, Tag(3), buffer};
  ASSERT_TRUE(At(0).Start({&again, 1}, {}).ok());
  ASSERT_TRUE(At(0).Start({}, {&recv, 1}).ok());
  ASSERT_TRUE(At(0).Wait(Later()).ok());
  EXPECT_EQ(buffer, sent);
}

TEST_P(CommunicatorConformance, AMessageLargerThanItsBufferIsAnErrorWithBothSizes) {
  Make(2);
  const std::vector<std::byte> sent(501);
  std::vector<std::byte> buffer(1000, std::byte{0xee});
  const std::span<std::byte> small = std::span(buffer).first(500);
  size_t received = 0;
  absl::Status status, sender;
  {
    RankThreads threads;
    threads.Run([&] {
      sender = Send(0, 1, Tag(1), sent);
      At(1).Abort(absl::AbortedError("the sender has returned"));  // not the first error
    });
    threads.Run([&] { status = Receive(1, 0, Tag(1), small, &received); });
  }
  const auto expect_both_sizes = [](const absl::Status& error) {
    EXPECT_EQ(error.code(), absl::StatusCode::kOutOfRange) << error;
    EXPECT_THAT(std::string(error.message()),
                testing::AllOf(testing::HasSubstr("501"), testing::HasSubstr("500")));
  };
  expect_both_sizes(status);
  if (GetParam().sender_hears_too_large) expect_both_sizes(sender);
  EXPECT_TRUE(std::ranges::all_of(buffer, [](std::byte b) { return b == std::byte{0xee}; }));
  EXPECT_EQ(At(1).Wait(Later()), status) << "the error is final";
}

TEST_P(CommunicatorConformance, QuitLeavesNoBufferBehind) {
  Make(2);
  std::vector<std::byte> buffer(64, std::byte{0xee});
  RecvOp recv{.peer = 1, .tag = Tag(1), .buffer = buffer};
  ASSERT_TRUE(At(0).Start(1, {}, {&recv, 1}).ok());
  const absl::Status reason = absl::InternalError("a plan of its own was refused");
  At(0).Quit(reason);
  const std::vector<std::byte> sent(64);
  const SendOp send{.peer = 0, .tag = Tag(1), .data = sent};
  if (At(1).Start({&send, 1}, {}).ok()) (void)At(1).Wait(In(std::chrono::milliseconds(50)));
  EXPECT_TRUE(std::ranges::all_of(buffer, [](std::byte b) { return b == std::byte{0xee}; }));
  EXPECT_EQ(At(0).Start({}, {}), reason);
  EXPECT_EQ(At(0).Wait(1, Later()), reason);
}

TEST_P(CommunicatorConformance, TheDeadlineNamesWhoIsLate) {
  Make(3);
  std::vector<std::byte> buffer(8, std::byte{0xee});
  RecvOp recvs[] = {{1, Tag(5, 7), buffer}, {2, Tag(5, 7), {}}};
  const SendOp in_time{0, Tag(5, 7), {}};
  ASSERT_TRUE(At(2).Start({&in_time, 1}, {}).ok());
  ASSERT_TRUE(At(0).Start({}, recvs).ok());
  ASSERT_TRUE(At(2).Wait(Later()).ok());
  const absl::Status status = At(0).Wait(In(std::chrono::milliseconds(20)));
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_THAT(std::string(status.message()), testing::HasSubstr("rank 1 (to send step 5 layer 7"));
  EXPECT_THAT(std::string(status.message()), testing::Not(testing::HasSubstr("rank 2")));
  // Nobody may write into the buffer any more.
  const std::vector<std::byte> late(8);
  const SendOp send{0, Tag(5, 7), late};
  (void)At(1).Start({&send, 1}, {});
  (void)At(1).Wait(std::chrono::steady_clock::now());
  EXPECT_EQ(buffer[0], std::byte{0xee});
  EXPECT_EQ(At(0).Start({}, {}), status);
}

TEST_P(CommunicatorConformance, WaitingDoesNotBurnACore) {
  Make(2);
  std::vector<std::byte> buffer(8);
  size_t received = 0;
  const double before = CpuSeconds(CLOCK_THREAD_CPUTIME_ID);
  EXPECT_FALSE(Receive(0, 1, Tag(1), buffer, &received, In(std::chrono::milliseconds(300))).ok());
  EXPECT_LT(CpuSeconds(CLOCK_THREAD_CPUTIME_ID) - before, 0.06);
}

TEST_P(CommunicatorConformance, AbortEndsAWaitAndIsFinal) {
  Make(2);
  std::vector<std::byte> buffer(8);
  absl::Status status;
  {
    RankThreads threads;
    threads.Run([&] {
      RecvOp recv{1, Tag(1), buffer};
      status = At(0).Start({}, {&recv, 1});
      if (status.ok()) status = At(0).Wait(Later());
    });
    threads.Run([&] { At(0).Abort(absl::AbortedError("epoch 4 is over")); });
  }
  EXPECT_EQ(status, absl::AbortedError("epoch 4 is over"));
  At(0).Abort(absl::InternalError("too late"));
  EXPECT_EQ(At(0).Start({}, {}), status);
  EXPECT_EQ(At(0).Wait(Later()), status);
}

TEST_P(CommunicatorConformance, ALostPeerEndsTheWaitsThatNeedIt) {
  Make(4);
  std::vector<std::byte> buffer(8);
  const std::vector<std::byte> data = Pattern(0, 3, 1, 8);
  absl::Status receiver, sender, after;
  size_t received = 0;
  {
    RankThreads threads;
    threads.Run([&] {
      std::vector<std::byte> own(8);
      size_t own_received = 0;
      receiver = Receive(0, 2, Tag(1), own, &own_received);
    });
    threads.Run([&] { sender = Send(1, 2, Tag(1), data); });
    threads.Run([&] { comms_[2].reset(); });
    EXPECT_TRUE(At(3).Start({}, {}).ok());  // has no business with rank 2
  }
  for (const absl::Status& status : {receiver, sender}) {
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
    EXPECT_THAT(std::string(status.message()), testing::HasSubstr("rank 2"));
  }
  after = Receive(3, 2, Tag(2), buffer, &received);
  EXPECT_EQ(after.code(), absl::StatusCode::kUnavailable) << after;
  EXPECT_THAT(std::string(after.message()), testing::HasSubstr("rank 2"));
}

TEST_P(CommunicatorConformance, RanksWithoutBusinessWithALostPeerGoOn) {
  Make(3);
  comms_[2].reset();
  const std::vector<std::byte> sent = Pattern(0, 1, 1, 64);
  std::vector<std::byte> buffer(64);
  size_t received = 0;
  {
    RankThreads threads;
    threads.Run([&] { EXPECT_TRUE(Send(0, 1, Tag(1), sent).ok()); });
    threads.Run([&] { EXPECT_TRUE(Receive(1, 0, Tag(1), buffer, &received).ok()); });
  }
  EXPECT_EQ(buffer, sent);
}

TEST_P(CommunicatorConformance, RefusesMisuse) {
  std::vector<std::byte> buffer(8);
  const auto start = [&](std::vector<SendOp> sends, std::vector<RecvOp> recvs) {
    Make(2);
    return At(0).Start(sends, recvs);
  };
  EXPECT_THAT(std::string(start({{2, Tag(1), {}}}, {}).message()),
              testing::HasSubstr("rank 2 of 2"));
  EXPECT_THAT(std::string(start({}, {{-1, Tag(1), {}}}).message()),
              testing::HasSubstr("rank -1 of 2"));
  EXPECT_EQ(start({{1, Tag(1), {}}, {1, Tag(1), {}}}, {}).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(start({}, {{1, Tag(1), {}}, {1, Tag(1), {}}}).code(),
            absl::StatusCode::kInvalidArgument);

  Make(2);
  RecvOp first{1, Tag(1), buffer}, second{1, Tag(2), buffer};
  EXPECT_TRUE(At(0).Start({}, {&first, 1}).ok());
  EXPECT_EQ(At(0).Start({}, {&second, 1}).code(), absl::StatusCode::kFailedPrecondition);

  Make(2);
  EXPECT_TRUE(At(0).Start(0, {}, {&first, 1}).ok());
  EXPECT_EQ(At(0).Start(1, {}, {&first, 1}).code(), absl::StatusCode::kInvalidArgument)
      << "one message cannot be received twice";

  std::vector<SendOp> many;
  for (int i = 0; i <= Communicator::kMaxPendingSends; ++i) many.push_back({1, Tag(1, i), {}});
  EXPECT_EQ(start(many, {}).code(), absl::StatusCode::kResourceExhausted);
}

TEST_P(CommunicatorConformance, AGroupIsWaitedForWhileAnotherIsUnderWay) {
  Make(2);
  const std::vector<std::byte> early = Pattern(1, 0, 1, 5000), late = Pattern(1, 0, 2, 90000);
  std::vector<std::byte> first(90000), second(5000);
  RankThreads threads;
  threads.Run([&] {
    RecvOp of_first{1, Tag(2), first}, of_second{1, Tag(1), second};
    const SendOp go{1, Tag(3), {}};
    EXPECT_TRUE(At(0).Start(0, {}, {&of_first, 1}).ok());
    EXPECT_TRUE(At(0).Start(1, {}, {&of_second, 1}).ok());
    EXPECT_TRUE(At(0).Wait(1, Later()).ok());
    EXPECT_EQ(second, early);
    // Rank 1 sends what group 0 waits for only now; group 1 goes on meanwhile.
    EXPECT_TRUE(At(0).Start(1, {&go, 1}, {}).ok());
    EXPECT_TRUE(At(0).Wait(1, Later()).ok());
    EXPECT_TRUE(At(0).Wait(0, Later()).ok());
    EXPECT_EQ(of_first.received, late.size());
    EXPECT_EQ(first, late);
  });
  threads.Run([&] {
    size_t received = 0;
    EXPECT_TRUE(Send(1, 0, Tag(1), early).ok());
    EXPECT_TRUE(Receive(1, 0, Tag(3), {}, &received).ok());
    EXPECT_TRUE(Send(1, 0, Tag(2), late).ok());
  });
}

TEST_P(CommunicatorConformance, TheDeadlineOfAGroupNamesItsPeersAndEndsAllGroups) {
  Make(3);
  std::vector<std::byte> buffer(8, std::byte{0xee});
  RecvOp other{1, Tag(1), buffer}, recv{2, Tag(2), {}};
  ASSERT_TRUE(At(0).Start(0, {}, {&other, 1}).ok());
  ASSERT_TRUE(At(0).Start(1, {}, {&recv, 1}).ok());
  const absl::Status status = At(0).Wait(1, In(std::chrono::milliseconds(20)));
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_THAT(std::string(status.message()), testing::HasSubstr("rank 2 (to send step 2"));
  EXPECT_THAT(std::string(status.message()), testing::Not(testing::HasSubstr("rank 1")));
  const std::vector<std::byte> data(8);
  const SendOp send{0, Tag(1), data};
  (void)At(1).Start({&send, 1}, {});
  (void)At(1).Wait(std::chrono::steady_clock::now());
  EXPECT_EQ(At(0).Wait(0, Later()), status);
  EXPECT_EQ(buffer[0], std::byte{0xee});
}

TEST_P(CommunicatorConformance, APeerLostToOneGroupEndsTheWaitForAnother) {
  Make(3);
  std::vector<std::byte> buffer(8);
  absl::Status status;
  {
    RankThreads threads;
    threads.Run([&] {
      RecvOp lost{2, Tag(1), buffer}, lives{1, Tag(2), {}};
      status = At(0).Start(0, {}, {&lost, 1});
      if (status.ok()) status = At(0).Start(1, {}, {&lives, 1});
      if (status.ok()) status = At(0).Wait(1, Later());
    });
    threads.Run([&] { comms_[2].reset(); });
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_THAT(std::string(status.message()), testing::HasSubstr("rank 2"));
}

// Two groups between all ranks, started and waited for in any order at each rank. After a group's
// Wait its buffers are the caller's again, whatever the other one does.
TEST_P(CommunicatorConformance, TwoGroupsDoNotDisturbEachOther) {
  const uint32_t seed = SeededRng()();
  for (const int32_t size : {2, 4}) {
    Make(size);
    RankThreads threads;
    for (int32_t rank = 0; rank < size; ++rank) {
      threads.Run([&, rank] {
        struct Group {
          std::vector<std::vector<std::byte>> data, buffers;
          std::vector<SendOp> sends;
          std::vector<RecvOp> recvs;
        };
        std::mt19937 rng(seed ^ static_cast<uint32_t>(rank));
        for (uint64_t round = 0; round < 60; ++round) {
          std::array<Group, Communicator::kNumGroups> groups;
          const auto tag = [&](size_t g) { return Tag(round, static_cast<int32_t>(g)); };
          const auto bytes = [&](int32_t from, int32_t to, size_t g) {
            std::mt19937 of_message(seed + static_cast<uint32_t>(from * 131 + to * 17) +
                                    static_cast<uint32_t>(round * 2 + g) * 7907u);
            return static_cast<size_t>(Below(of_message, Below(of_message, 4) == 0 ? 90000 : 300));
          };
          const auto start = [&](size_t g) {
            Group& group = groups[g];
            for (int32_t peer = 0; peer < size; ++peer) {
              group.data.push_back(Pattern(rank, peer, round * 2 + g, bytes(rank, peer, g)));
              group.buffers.emplace_back(bytes(peer, rank, g));
            }
            for (int32_t peer = 0; peer < size; ++peer) {
              const auto p = static_cast<size_t>(peer);
              group.sends.push_back({peer, tag(g), group.data[p]});
              group.recvs.push_back({peer, tag(g), group.buffers[p]});
            }
            ASSERT_TRUE(At(rank).Start(static_cast<int32_t>(g), group.sends, group.recvs).ok());
          };
          const auto wait = [&](size_t g) {
            Group& group = groups[g];
            const absl::Status status = At(rank).Wait(static_cast<int32_t>(g), Later());
            ASSERT_TRUE(status.ok()) << status;
            for (int32_t peer = 0; peer < size; ++peer) {
              const auto p = static_cast<size_t>(peer);
              ASSERT_EQ(group.recvs[p].received, group.buffers[p].size());
              ASSERT_EQ(group.buffers[p],
                        Pattern(peer, rank, round * 2 + g, group.buffers[p].size()));
            }
            group = {};
          };
          const auto first = static_cast<size_t>(Below(rng, 2));
          start(first);
          start(1 - first);
          const auto awaited = static_cast<size_t>(Below(rng, 2));
          wait(awaited);
          wait(1 - awaited);
        }
      });
    }
  }
}

// Random groups between all ranks; sizes, splits into calls and orders differ, contents are
// checked.
TEST_P(CommunicatorConformance, RandomGroupsArriveWhole) {
  const uint32_t seed = SeededRng()();
  for (const int32_t size : {2, 3, 5, 8}) {
    Make(size);
    // What goes from a to b in round t, known to all: -1 for nothing, else a size.
    const auto message = [&](int32_t a, int32_t b, uint64_t round) {
      std::mt19937 rng(seed + static_cast<uint32_t>(a * 131 + b * 17) +
                       static_cast<uint32_t>(round) * 7907u);
      rng.discard(3);
      const int32_t kind = Below(rng, 8);
      return kind < 2 ? -1 : kind == 2 ? 0 : kind == 3 ? Below(rng, 60000) : Below(rng, 300);
    };
    RankThreads threads;
    for (int32_t rank = 0; rank < size; ++rank) {
      threads.Run([&, rank] {
        std::mt19937 rng(seed ^ static_cast<uint32_t>(rank));
        for (uint64_t round = 0; round < 100; ++round) {
          std::vector<std::vector<std::byte>> data, buffers;
          std::vector<SendOp> sends;
          std::vector<RecvOp> recvs;
          for (int32_t peer = 0; peer < size; ++peer) {
            if (const int32_t out = message(rank, peer, round); out >= 0) {
              data.push_back(Pattern(rank, peer, round, static_cast<size_t>(out)));
              sends.push_back({peer, Tag(round), data.back()});
            }
            if (const int32_t in = message(peer, rank, round); in >= 0) {
              buffers.emplace_back(static_cast<size_t>(in + Below(rng, 2)));
              recvs.push_back({peer, Tag(round), buffers.back()});
            }
          }
          std::ranges::shuffle(sends, rng);
          std::ranges::shuffle(recvs, rng);
          const auto early =
              static_cast<size_t>(Below(rng, static_cast<int32_t>(sends.size()) + 1));
          ASSERT_TRUE(At(rank).Start(std::span(sends).first(early), {}).ok());
          ASSERT_TRUE(At(rank).Start(std::span(sends).subspan(early), recvs).ok());
          const absl::Status status = At(rank).Wait(Later());
          ASSERT_TRUE(status.ok()) << status;
          for (const RecvOp& recv : recvs) {
            const int32_t in = message(recv.peer, rank, round);
            ASSERT_EQ(recv.received, static_cast<size_t>(in));
            const std::vector<std::byte> want = Pattern(recv.peer, rank, round, recv.received);
            ASSERT_TRUE(std::equal(want.begin(), want.end(), recv.buffer.begin()));
          }
        }
      });
    }
  }
}

// Whoever aborts or dies at any moment: every rank's thread ends, with an error or with whole
// messages.
TEST_P(CommunicatorConformance, AbortsAndDeathsAtAnyMomentEndEverything) {
  std::mt19937 rng = SeededRng();
  for (int trial = 0; trial < 60; ++trial) {
    const int32_t size = 2 + Below(rng, 4);
    const int32_t victim = Below(rng, size);
    const uint64_t rounds = 50;
    const auto death_round = static_cast<uint64_t>(Below(rng, static_cast<int32_t>(rounds)));
    const bool dies = Below(rng, 2) == 0;
    Make(size);
    RankThreads threads;
    for (int32_t rank = 0; rank < size; ++rank) {
      threads.Run([&, rank] {
        for (uint64_t round = 0; round < rounds; ++round) {
          std::vector<std::vector<std::byte>> data, buffers;
          std::vector<SendOp> sends;
          std::vector<RecvOp> recvs;
          for (int32_t peer = 0; peer < size; ++peer) {
            data.push_back(Pattern(rank, peer, round, 3000));
            buffers.emplace_back(3000);
            sends.push_back({peer, Tag(round), data.back()});
            recvs.push_back({peer, Tag(round), buffers.back()});
          }
          if (rank == victim && round == death_round) {
            if (dies) {
              comms_[static_cast<size_t>(rank)].reset();
              return;
            }
            for (int32_t other = 0; other < size; ++other)
              At(other).Abort(absl::AbortedError("stop"));
          }
          absl::Status status = At(rank).Start(sends, recvs);
          if (status.ok()) status = At(rank).Wait(Later());
          if (!status.ok()) {
            const auto code = status.code();
            EXPECT_TRUE(code == absl::StatusCode::kAborted ||
                        code == absl::StatusCode::kUnavailable)
                << status;
            if (dies) comms_[static_cast<size_t>(rank)].reset();
            return;
          }
          for (const RecvOp& recv : recvs) {
            const std::vector<std::byte> want = Pattern(recv.peer, rank, round, 3000);
            ASSERT_TRUE(std::equal(want.begin(), want.end(), recv.buffer.begin()));
          }
        }
      });
    }
  }
}

}  // namespace switchyard
