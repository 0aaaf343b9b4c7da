#include "comm/data_plane.h"

#include <arpa/inet.h>
#include <linux/filter.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <deque>
#include <thread>

#include "absl/strings/str_cat.h"
#include "comm/communicator_conformance.h"
#include "comm/data_plane_test_ranks.h"
#include "comm/wire.h"

namespace switchyard {
namespace {

using testing::HasSubstr;

INSTANTIATE_TEST_SUITE_P(
    Network, CommunicatorConformance,
    testing::Values(CommunicatorMaker{"eager", [](int32_t size) { return MakeNetworkRanks(size); }},
                    CommunicatorMaker{"requested",
                                      [](int32_t size) { return MakeNetworkRanks(size, 1000); }}),
    [](const auto& info) { return info.param.name; });

// A peer that says what the test wants, byte for byte.
class RawPeer {
 public:
  explicit RawPeer(const std::string& address) : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in to{};
    to.sin_family = AF_INET;
    const size_t colon = address.rfind(':');
    to.sin_port = htons(static_cast<uint16_t>(std::stoi(address.substr(colon + 1))));
    SY_CHECK_EQ(inet_pton(AF_INET, address.substr(0, colon).c_str(), &to.sin_addr), 1);
    connected_ = connect(fd_, reinterpret_cast<sockaddr*>(&to), sizeof(to)) == 0;
  }
  RawPeer(const RawPeer&) = delete;
  RawPeer& operator=(const RawPeer&) = delete;
  ~RawPeer() { close(fd_); }
  bool connected() const { return connected_; }

  void Send(const void* data, size_t size) { (void)!send(fd_, data, size, MSG_NOSIGNAL); }
  void Send(WireHeader header, std::string_view payload) {
    header.payload = payload.size();
    Send(&header, sizeof(header));
    Send(payload.data(), payload.size());
  }
  // What the plane answers; false when it closes the connection.
  bool Receive(WireHeader* header) {
    return recv(fd_, header, sizeof(*header), MSG_WAITALL) == sizeof(*header);
  }
  void AwaitClose() {
    char byte;
    while (recv(fd_, &byte, 1, 0) > 0) {
    }
  }
  // From now on nothing that the plane sends arrives, and nothing is acknowledged.
  void CutCable() {
    sock_filter drop_all = {BPF_RET | BPF_K, 0, 0, 0};
    const sock_fprog program{1, &drop_all};
    SY_CHECK_EQ(setsockopt(fd_, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof(program)), 0);
  }

 private:
  const int fd_;
  bool connected_ = false;
};

// A peer that accepts connections and says nothing.
class SilentPeer {
 public:
  SilentPeer() : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in own{};
    own.sin_family = AF_INET;
    own.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof(own);
    SY_CHECK_EQ(bind(fd_, reinterpret_cast<sockaddr*>(&own), length), 0);
    SY_CHECK_EQ(listen(fd_, 1024), 0);
    SY_CHECK_EQ(getsockname(fd_, reinterpret_cast<sockaddr*>(&own), &length), 0);
    address_ = absl::StrCat("127.0.0.1:", ntohs(own.sin_port));
  }
  SilentPeer(const SilentPeer&) = delete;
  SilentPeer& operator=(const SilentPeer&) = delete;
  ~SilentPeer() { close(fd_); }
  const std::string& address() const { return address_; }

 private:
  const int fd_;
  std::string address_;
};

constexpr std::string_view kSecret = "the secret";

GroupSpec Spec(uint64_t epoch, int32_t rank, const std::vector<std::string>& addresses) {
  GroupSpec spec{.epoch = epoch, .rank = rank, .members = {}, .secret = std::string(kSecret)};
  for (const std::string& address : addresses) spec.members.push_back({address});
  return spec;
}

WireHeader Hello(uint64_t epoch, int32_t from, int32_t to, uint64_t size) {
  WireHeader hello;
  hello.type = WireType::kHello;
  hello.epoch = epoch;
  hello.from = from;
  hello.to = to;
  hello.size = size;
  return hello;
}

// Rank 1 lives; rank 0, on whose connection the two speak, is what the test says.
class OneRank : public testing::Test {
 protected:
  // Lingers briefly: nobody answers.
  void Join(const DataPlaneOptions& options = {.linger = std::chrono::milliseconds(1)}) {
    plane_ = MakePlane(options);
    auto comm = plane_->Join(Spec(5, 1, {silent_.address(), plane_->address()}), Later());
    ASSERT_TRUE(comm.ok()) << comm.status();
    comm_ = *std::move(comm);
  }
  absl::Status Receive(std::span<std::byte> buffer) {
    RecvOp recv{0, Tag(1), buffer};
    absl::Status status = comm_->Start({}, {&recv, 1});
    return status.ok() ? comm_->Wait(Later()) : status;
  }
  // A kData header of a message of rank 0 that Receive() waits for.
  static WireHeader Data(uint64_t size) {
    WireHeader data = Hello(5, 0, 1, size);
    data.type = WireType::kData;
    data.kind = MessageKind::kDispatch;
    data.message = 1;
    data.step = 1;
    return data;
  }
  std::unique_ptr<RawPeer> Member() {
    auto peer = std::make_unique<RawPeer>(plane_->address());
    peer->Send(Hello(5, 0, 1, 2), kSecret);
    WireHeader answer;
    EXPECT_TRUE(peer->Receive(&answer));
    EXPECT_EQ(answer.type, WireType::kWelcome);
    return peer;
  }

  SilentPeer silent_;
  std::unique_ptr<DataPlane> plane_;
  std::unique_ptr<Communicator> comm_;
};

TEST_F(OneRank, AMemberIsWelcomedAndHeard) {
  Join();
  RawPeer peer(plane_->address());
  peer.Send(Hello(5, 0, 1, 2), kSecret);
  WireHeader answer;
  ASSERT_TRUE(peer.Receive(&answer));
  EXPECT_EQ(answer.type, WireType::kWelcome);
  peer.Send(Data(5), "bytes");
  std::vector<std::byte> buffer(8);
  EXPECT_TRUE(Receive(buffer).ok());
  EXPECT_EQ(std::memcmp(buffer.data(), "bytes", 5), 0);
  EXPECT_EQ(plane_->refused_messages(), 0u);
}

TEST_F(OneRank, AWrongSecretOrAWrongHelloIsRefusedAndCounted) {
  Join();
  uint64_t refused = 0;
  const auto expect_refused = [&](const WireHeader& hello, std::string_view secret) {
    RawPeer peer(plane_->address());
    peer.Send(hello, secret);
    WireHeader answer;
    EXPECT_FALSE(peer.Receive(&answer));
    EXPECT_EQ(plane_->refused_messages(), ++refused);
  };
  expect_refused(Hello(5, 0, 1, 2), "the wrong secret");
  expect_refused(Hello(5, 0, 1, 2), "");
  expect_refused(Hello(5, 0, 1, 2), "the secreT");
  expect_refused(Hello(5, 0, 1, 2), std::string(300, 'x'));
  expect_refused(Hello(5, 0, 0, 2), kSecret);  // to another rank
  expect_refused(Hello(5, 0, 1, 3), kSecret);  // of another group
  expect_refused(Hello(5, 1, 1, 2), kSecret);  // from myself
  expect_refused(Hello(5, -1, 1, 2), kSecret);
  expect_refused(Hello(5, 2, 1, 2), kSecret);
  expect_refused(Data(5), "bytes");  // before the hello
  WireHeader other = Hello(5, 0, 1, 2);
  other.version = 99;
  expect_refused(other, kSecret);
  {
    const auto member = Member();
    expect_refused(Hello(5, 0, 1, 2), kSecret);  // a second one
  }
}

TEST_F(OneRank, GarbageIsRefusedWhateverItIs) {
  Join();
  std::mt19937 rng = SeededRng();
  constexpr uint64_t kPeers = 300;
  for (uint64_t i = 0; i < kPeers; ++i) {
    RawPeer peer(plane_->address());
    std::vector<unsigned char> bytes(sizeof(WireHeader) + static_cast<size_t>(Below(rng, 3000)));
    for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(rng());
    peer.Send(bytes.data(), bytes.size());
    peer.AwaitClose();
  }
  EXPECT_EQ(plane_->refused_messages(), kPeers);
}

TEST_F(OneRank, WhoSaysNoHelloInTimeIsCutOff) {
  Join({.hello_timeout = std::chrono::milliseconds(30), .linger = std::chrono::milliseconds(1)});
  RawPeer silent(plane_->address()), slow(plane_->address());
  const WireHeader hello = Hello(5, 0, 1, 2);
  slow.Send(&hello, sizeof(hello) - 1);
  silent.AwaitClose();
  slow.AwaitClose();
  EXPECT_EQ(plane_->refused_messages(), 2u);
}

TEST_F(OneRank, MessagesOfOlderEpochsAreDiscardedAndCounted) {
  Join({.linger = std::chrono::milliseconds(300)});
  RawPeer peer(plane_->address());
  peer.Send(Hello(4, 0, 1, 2), kSecret);
  WireHeader answer;
  ASSERT_TRUE(peer.Receive(&answer));
  EXPECT_EQ(answer.type, WireType::kBye);
  EXPECT_EQ(plane_->discarded_messages(), 1u);
  // One that was a member, and is late.
  const auto member = Member();
  comm_.reset();
  auto next = plane_->Join(Spec(6, 1, {silent_.address(), plane_->address()}), Later());
  ASSERT_TRUE(next.ok()) << next.status();
  WireHeader late = Data(100000);
  member->Send(late, std::string(100000, 'x'));
  const auto deadline = Later();
  while (plane_->discarded_messages() < 2 && std::chrono::steady_clock::now() < deadline)
    std::this_thread::yield();
  EXPECT_EQ(plane_->discarded_messages(), 2u);
  EXPECT_EQ(plane_->refused_messages(), 0u);
}

// Hellos of an epoch to come cannot be checked yet; those of an old one get an answer. Neither may
// keep members out, or pile up.
TEST_F(OneRank, WhoeverFillsThePortIsTheFirstToGo) {
  constexpr size_t kVisitors = 300, kKept = 256;
  for (const uint64_t epoch : {UINT64_MAX, uint64_t{4}}) {
    Join({.linger = std::chrono::minutes(5)});
    std::deque<RawPeer> visitors;
    for (size_t i = 0; i < kVisitors; ++i) {
      ASSERT_TRUE(visitors.emplace_back(plane_->address()).connected());
      visitors.back().Send(Hello(epoch, 0, 1, 2), "not the secret");
    }
    const auto member = Member();
    for (size_t i = 0; i < kVisitors + 1 - kKept; ++i) visitors[i].AwaitClose();
    member->Send(Data(5), "bytes");
    std::vector<std::byte> buffer(8);
    EXPECT_TRUE(Receive(buffer).ok());
    visitors.clear();
    comm_.reset();
  }
}

TEST_F(OneRank, APlaneThatGoesTakesNobodyNew) {
  Join({.linger = std::chrono::milliseconds(200)});
  RawPeer lingers(plane_->address());
  lingers.Send(Hello(4, 0, 1, 2), kSecret);
  WireHeader answer;
  ASSERT_TRUE(lingers.Receive(&answer));
  comm_.reset();
  const std::string address = plane_->address();
  RankThreads threads;
  threads.Run([&] {  // until it is refused: a plane that took them all would never go
    std::deque<RawPeer> visitors;
    while (visitors.emplace_back(address).connected())
      visitors.back().Send(Hello(4, 0, 1, 2), kSecret);
  });
  threads.Run([&] { plane_.reset(); });
}

// Only the network between two ranks is cut: both systems live, and nothing says so.
TEST(DataPlane, APeerThatIsCutOffSilentlyIsLostInSeconds) {
  const auto lose = [](bool bytes_under_way) {
    const SilentPeer silent;
    const auto plane = MakePlane({.linger = std::chrono::milliseconds(1)});
    auto comm = plane->Join(Spec(5, 1, {silent.address(), plane->address()}), Later());
    ASSERT_TRUE(comm.ok()) << comm.status();
    RawPeer peer(plane->address());
    peer.Send(Hello(5, 0, 1, 2), kSecret);
    WireHeader answer;
    ASSERT_TRUE(peer.Receive(&answer));
    if (bytes_under_way) peer.CutCable();
    std::vector<std::byte> buffer(8);
    RecvOp recv{0, Tag(1), buffer};
    ASSERT_TRUE((*comm)->Start({}, {&recv, 1}).ok());
    if (!bytes_under_way) {
      ASSERT_TRUE(peer.Receive(&answer));
      EXPECT_EQ(answer.type, WireType::kReady);
      peer.CutCable();
    }
    const absl::Status status = (*comm)->Wait(In(std::chrono::seconds(20)));
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("rank 0"));
  };
  RankThreads threads;
  threads.Run([&] { lose(false); });
  threads.Run([&] { lose(true); });
}

TEST_F(OneRank, AMalformedMessageIsAnErrorThatNamesItsRank) {
  const auto expect_error = [&](std::vector<std::pair<WireHeader, std::string>> messages) {
    Join({.eager_bytes = 1000, .linger = std::chrono::milliseconds(1)});
    const auto peer = Member();
    for (const auto& [header, payload] : messages) peer->Send(header, payload);
    std::vector<std::byte> buffer(2000, std::byte{0xee});
    const absl::Status status = Receive(std::span(buffer).first(1500));
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("rank 0"));
    EXPECT_EQ(buffer[1500], std::byte{0xee});
    peer->AwaitClose();
    EXPECT_EQ(plane_->refused_messages(), 1u);
    comm_.reset();
  };
  const std::string ten(10, 'x');
  const auto data = [&](const std::function<void(WireHeader*)>& change, uint64_t size = 10) {
    WireHeader header = Data(size);
    change(&header);
    return header;
  };
  const auto same = [](WireHeader*) {};
  expect_error({{data([](WireHeader* h) { h->magic = 1; }), ten}});
  expect_error({{data([](WireHeader* h) { h->epoch = 6; }), ten}});
  expect_error({{data([](WireHeader* h) { h->type = WireType::kHello; }), ten}});
  expect_error({{data([](WireHeader* h) { h->type = WireType::kWelcome; }), ""}});
  expect_error({{data([](WireHeader* h) { h->type = WireType{77}; }), ""}});
  expect_error({{data([](WireHeader* h) { h->kind = MessageKind{77}; }), ten}});
  expect_error({{data([](WireHeader* h) { h->offset = 5; }), ten}});
  expect_error({{data([](WireHeader* h) { h->offset = UINT64_MAX; }), ten}});
  expect_error({{data(same, 9), ten}});
  expect_error({{data(same, 11), ten}});
  expect_error({{data([](WireHeader* h) { h->message = 0; }), ten}});
  const auto later = [&](uint64_t step, uint64_t message, uint64_t size) {  // not received
    return std::pair(data(
                         [&](WireHeader* h) {
                           h->step = step;
                           h->message = message;
                         },
                         size),
                     std::string(size, 'x'));
  };
  expect_error({later(2, 1, 1001)});                   // more than the bound
  expect_error({later(2, 1, 600), later(3, 2, 600)});  // the same
  expect_error({later(2, 1, 10), later(2, 2, 10)});    // one tag
  expect_error({later(2, 2, 10), later(3, 1, 10)});    // order
  expect_error({later(2, 1, 10), later(2, 1, 10)});    // after its end
  expect_error({later(2, 1, 0), later(2, 1, 0)});
  expect_error({{data([](WireHeader* h) { h->type = WireType::kReady; }), ten}});
  expect_error({{data([](WireHeader* h) { h->type = WireType::kTooLarge; }), ""}});
  std::vector<std::pair<WireHeader, std::string>> many;
  for (uint64_t i = 1; i <= Communicator::kMaxPendingSends + 1; ++i)
    many.push_back(later(1 + i, i, 1));
  expect_error(many);
  many.clear();
  for (uint64_t i = 0; i <= 4096; ++i) {
    many.push_back({data([&](WireHeader* h) {
                      h->type = WireType::kReady;
                      h->step = i;
                    }),
                    ""});
  }
  expect_error(many);
}

// Whatever a member sends, this rank gets its bytes or an error, and lives.
TEST_F(OneRank, RandomMessagesOfAMemberHarmNobodyElse) {
  std::mt19937 rng = SeededRng();
  for (int trial = 0; trial < 200; ++trial) {
    Join({.eager_bytes = 2000, .linger = std::chrono::milliseconds(1)});
    const auto peer = Member();
    for (int i = 0; i < 6; ++i) {
      WireHeader header = Data(static_cast<uint64_t>(Below(rng, 3000)));
      header.type = Below(rng, 3) > 0 ? WireType::kData : static_cast<WireType>(Below(rng, 6));
      header.message = static_cast<uint64_t>(i + Below(rng, 2));
      header.step = static_cast<uint64_t>(Below(rng, 3));
      if (Below(rng, 3) == 0) header.offset = static_cast<uint64_t>(Below(rng, 3000));
      if (Below(rng, 10) == 0) header.size = rng();
      const bool fits = Below(rng, 4) != 0 && header.type == WireType::kData;
      const uint64_t size = fits ? header.size - std::min(header.size, header.offset)
                                 : static_cast<uint64_t>(Below(rng, 100));
      peer->Send(header, std::string(std::min(size, uint64_t{4000}), 'x'));
    }
    std::vector<std::byte> buffer(1500);
    RecvOp recv{0, Tag(1), buffer};
    ASSERT_TRUE(comm_->Start({}, {&recv, 1}).ok() || !comm_->Start({}, {}).ok());
    (void)comm_->Wait(In(std::chrono::milliseconds(2)));
    comm_.reset();
  }
}

TEST(DataPlane, AHelloMayComeBeforeItsEpoch) {
  const auto a = MakePlane(), b = MakePlane();
  const std::vector<std::string> addresses = {a->address(), b->address()};
  for (uint64_t epoch = 1; epoch < 20; ++epoch) {
    auto first = a->Join(Spec(epoch, 0, addresses), Later());
    ASSERT_TRUE(first.ok()) << first.status();
    const std::vector<std::byte> sent = Pattern(0, 1, epoch, 5000);
    std::vector<std::byte> buffer(5000);
    const SendOp send{1, Tag(1), sent};
    ASSERT_TRUE((*first)->Start({&send, 1}, {}).ok());
    EXPECT_EQ((*first)->Wait(In(std::chrono::milliseconds(0))).code(),
              absl::StatusCode::kDeadlineExceeded);
    first->reset();
    // The hello of the next epoch is there, or under way, when the other rank joins.
    ++epoch;
    first = a->Join(Spec(epoch, 0, addresses), Later());
    ASSERT_TRUE((*first)->Start({&send, 1}, {}).ok());
    RankThreads threads;
    threads.Run([&] { EXPECT_TRUE((*first)->Wait(Later()).ok()); });
    auto second = b->Join(Spec(epoch, 1, addresses), Later());
    ASSERT_TRUE(second.ok()) << second.status();
    RecvOp recv{0, Tag(1), buffer};
    ASSERT_TRUE((*second)->Start({}, {&recv, 1}).ok());
    const absl::Status status = (*second)->Wait(Later());
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_EQ(buffer, sent);
  }
  EXPECT_EQ(a->refused_messages() + b->refused_messages(), 0u);
}

// More than the sockets hold, for a receiver that waited a moment ago and now computes.
TEST(DataPlane, AMessageArrivesWhileItsReceiverComputes) {
  const auto ranks = MakeNetworkRanks(2);
  const std::vector<std::byte> sent = Pattern(0, 1, 1, 48 << 20);
  std::vector<std::byte> buffer(sent.size());
  std::atomic<bool> is_sent{false};
  const SendOp hello{0, Tag(1), {}};
  RecvOp recv{0, Tag(2), buffer};
  RankThreads threads;
  threads.Run([&] {
    RecvOp recv{1, Tag(1), {}};
    const SendOp send{1, Tag(2), sent};
    ASSERT_TRUE(ranks[0]->Start({}, {&recv, 1}).ok() && ranks[0]->Wait(Later()).ok());
    ASSERT_TRUE(ranks[0]->Start({&send, 1}, {}).ok());
    EXPECT_TRUE(ranks[0]->Wait(Later()).ok());
    is_sent = true;
  });
  ASSERT_TRUE(ranks[1]->Start({&hello, 1}, {}).ok() && ranks[1]->Wait(Later()).ok());
  ASSERT_TRUE(ranks[1]->Start({}, {&recv, 1}).ok());
  const auto late = In(std::chrono::seconds(20));
  while (!is_sent && std::chrono::steady_clock::now() < late)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_TRUE(is_sent);
  EXPECT_TRUE(ranks[1]->Wait(Later()).ok());
  EXPECT_EQ(buffer, sent);
}

TEST(DataPlane, ARankWithAnotherSecretIsLostToTheOthers) {
  const auto a = MakePlane(), b = MakePlane();
  GroupSpec spec = Spec(1, 0, {a->address(), b->address()});
  auto first = a->Join(spec, Later());
  spec.rank = 1;
  spec.secret = "another secret";
  auto second = b->Join(spec, Later());
  ASSERT_TRUE(first.ok() && second.ok());
  for (const auto& [comm, peer] : {std::pair(first->get(), 1), std::pair(second->get(), 0)}) {
    RecvOp recv{peer, Tag(1), {}};
    absl::Status status = comm->Start({}, {&recv, 1});
    if (status.ok()) status = comm->Wait(Later());
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  }
  EXPECT_GE(a->refused_messages() + b->refused_messages(), 1u);
}

TEST(DataPlane, RefusesWrongSpecs) {
  const auto plane = MakePlane();
  const auto code = [&](const GroupSpec& spec) {
    return plane->Join(spec, Later()).status().code();
  };
  EXPECT_EQ(code(Spec(3, 0, {})), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Spec(3, 1, {plane->address()})), absl::StatusCode::kInvalidArgument);
  GroupSpec spec = Spec(3, 0, {plane->address()});
  spec.secret.clear();
  EXPECT_EQ(code(spec), absl::StatusCode::kInvalidArgument);
  spec.secret = kSecret;
  {
    const auto comm = plane->Join(spec, Later());
    ASSERT_TRUE(comm.ok());
    spec.epoch = 4;
    EXPECT_EQ(code(spec), absl::StatusCode::kFailedPrecondition) << "one lives";
  }
  spec.epoch = 3;
  EXPECT_EQ(code(spec), absl::StatusCode::kFailedPrecondition) << "an epoch is joined once";
  spec.epoch = 4;
  EXPECT_EQ(plane->Join(spec, std::chrono::steady_clock::now()).status().code(),
            absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(DataPlane::Create({.host = "192.0.2.1"}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(DataPlane::Create({.host = "nonsense"}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(DataPlane, AnAddressThatIsNoneOrNobodysIsALostPeer) {
  const auto plane = MakePlane();
  std::string gone;
  {
    const auto other = MakePlane();
    gone = other->address();
  }
  uint64_t epoch = 0;
  for (const std::string& address :
       {std::string("nonsense"), std::string("127.0.0.1:99999"), gone}) {
    auto comm = plane->Join(Spec(++epoch, 0, {plane->address(), address}), Later());
    ASSERT_TRUE(comm.ok()) << comm.status();
    RecvOp recv{1, Tag(1), {}};
    absl::Status status = (*comm)->Start({}, {&recv, 1});
    if (status.ok()) status = (*comm)->Wait(Later());
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("rank 1"));
  }
}

}  // namespace
}  // namespace switchyard
