// Ranks that are processes: this binary runs itself again with `--rank`, talks to the children over
// pipes, and stops or kills them.
#include <dirent.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <malloc.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <iostream>
#include <map>
#include <sstream>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "comm/data_plane.h"
#include "comm/data_plane_test_ranks.h"
#include "comm/test_messages.h"
#include "comm/test_problems.h"
#include "kernels/measure.h"

namespace switchyard {
namespace {

using testing::AnyOf;
using testing::HasSubstr;
using testing::StartsWith;

constexpr std::chrono::seconds kBound(120);  // far more than anything may take

// ---- the rank -------------------------------------------------------------------------------

size_t NumOpenFiles() {
  DIR* dir = opendir("/proc/self/fd");
  size_t count = 0;
  while (readdir(dir) != nullptr) ++count;
  closedir(dir);
  return count;
}

int64_t HeapKib() {
  const struct mallinfo2 info = mallinfo2();
  return static_cast<int64_t>((info.uordblks + info.hblkhd) / 1024);
}

// All-to-all of random sizes with checked contents, until `num_rounds` or an error.
absl::Status Exchange(Communicator& comm, uint32_t seed, uint64_t num_rounds,
                      std::chrono::milliseconds patience) {
  const auto size_of = [&](int32_t from, int32_t to, uint64_t round) {
    std::mt19937 rng(seed + static_cast<uint32_t>(from * 131 + to * 17) +
                     static_cast<uint32_t>(round) * 7907u);
    rng.discard(3);
    return static_cast<size_t>(Below(rng, 4) == 0 ? Below(rng, 200000) : Below(rng, 3000));
  };
  for (uint64_t round = 0; round < num_rounds; ++round) {
    std::vector<std::vector<std::byte>> data, buffers;
    std::vector<SendOp> sends;
    std::vector<RecvOp> recvs;
    for (int32_t peer = 0; peer < comm.size(); ++peer) {
      data.push_back(Pattern(comm.rank(), peer, round, size_of(comm.rank(), peer, round)));
      sends.push_back({peer, Tag(round), data.back()});
      buffers.emplace_back(size_of(peer, comm.rank(), round));
      recvs.push_back({peer, Tag(round), buffers.back()});
    }
    absl::Status status = comm.Start(sends, recvs);
    if (status.ok()) status = comm.Wait(In(patience));
    if (!status.ok()) return status;
    for (const RecvOp& recv : recvs) {
      const std::vector<std::byte> want =
          Pattern(recv.peer, comm.rank(), round, recv.buffer.size());
      if (recv.received != want.size() || !std::ranges::equal(recv.buffer, want))
        return absl::InternalError(absl::StrCat("wrong bytes from rank ", recv.peer));
    }
    if (round % 4 == 0) std::cout << "round " << round << std::endl;
  }
  return absl::OkStatus();
}

// Commands come on stdin, answers go to stdout. `exchange` runs on a thread, so that `abort` can
// come meanwhile.
int RunRank() {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  const std::unique_ptr<DataPlane> plane = MakePlane();
  std::cout << "address " << plane->address() << std::endl;
  std::unique_ptr<Communicator> comm;
  std::thread worker;
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream in(line);
    std::string command;
    in >> command;
    if (command == "join") {
      GroupSpec spec;
      in >> spec.epoch >> spec.rank >> spec.secret;
      for (std::string address; in >> address;) spec.members.push_back({address});
      auto joined = plane->Join(spec, Later());
      SY_CHECK(joined.ok());
      comm = *std::move(joined);
      std::cout << "joined" << std::endl;
    } else if (command == "exchange") {
      uint32_t seed = 0;
      uint64_t rounds = 0;
      int64_t patience_ms = 0;
      in >> seed >> rounds >> patience_ms;
      worker = std::thread([&comm, seed, rounds, patience_ms] {
        const double before = CpuSeconds(CLOCK_PROCESS_CPUTIME_ID);
        const absl::Status status =
            Exchange(*comm, seed, rounds, std::chrono::milliseconds(patience_ms));
        const double seconds = CpuSeconds(CLOCK_PROCESS_CPUTIME_ID) - before;
        std::cout << absl::StrCat("done ", static_cast<int64_t>(seconds * 1e3), " ",
                                  status.ToString(), "\n")
                  << std::flush;
      });
    } else if (command == "abort") {
      comm->Abort(absl::AbortedError("the parent says so"));
    } else if (command == "leave") {
      worker.join();
      comm.reset();
      std::cout << "left" << std::endl;
    } else if (command == "stats") {
      std::cout << "stats " << NumOpenFiles() << " " << HeapKib() << " "
                << plane->discarded_messages() << " " << plane->refused_messages() << std::endl;
    }
  }
  return 0;
}

// ---- the parent -----------------------------------------------------------------------------

class Child {
 public:
  Child() {
    int in[2], out[2];
    SY_CHECK_EQ(pipe2(in, O_CLOEXEC), 0);
    SY_CHECK_EQ(pipe2(out, O_CLOEXEC), 0);
    pid_ = fork();
    if (pid_ == 0) {
      dup2(in[0], STDIN_FILENO);
      dup2(out[1], STDOUT_FILENO);
      execl("/proc/self/exe", "data_plane_process_test", "--rank", nullptr);
      _exit(127);
    }
    close(in[0]);
    close(out[1]);
    to_ = in[1];
    from_ = out[0];
    address_ = ReadLine("address ").substr(8);
  }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;
  ~Child() {
    Signal(SIGKILL);
    waitpid(pid_, nullptr, 0);
    close(to_);
    close(from_);
  }

  const std::string& address() const { return address_; }
  void Signal(int signal) { kill(pid_, signal); }
  void Say(const std::string& line) {
    const std::string bytes = line + "\n";
    SY_CHECK_EQ(write(to_, bytes.data(), bytes.size()), static_cast<ssize_t>(bytes.size()));
  }
  // The next line that begins with `prefix`; others are skipped. Empty at the end or when nothing
  // comes in time.
  std::string ReadLine(const std::string& prefix) {
    const auto deadline = std::chrono::steady_clock::now() + kBound;
    while (true) {
      for (size_t end; (end = read_.find('\n')) != std::string::npos;) {
        const std::string line = read_.substr(0, end);
        read_.erase(0, end + 1);
        if (absl::StartsWith(line, prefix)) return line;
      }
      pollfd entry{.fd = from_, .events = POLLIN, .revents = 0};
      const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
          deadline - std::chrono::steady_clock::now());
      if (left.count() <= 0 || poll(&entry, 1, static_cast<int>(left.count())) <= 0) return "";
      char bytes[4096];
      const ssize_t got = read(from_, bytes, sizeof(bytes));
      if (got <= 0) return "";
      read_.append(bytes, static_cast<size_t>(got));
    }
  }

 private:
  pid_t pid_ = -1;
  int to_ = -1, from_ = -1;
  std::string address_, read_;
};

// How an exchange ended: milliseconds of CPU time of the whole process, and the status.
struct Outcome {
  int64_t cpu_ms = -1;
  std::string status;
};

class Processes : public testing::Test {
 protected:
  void Make(int32_t size) {
    children_.clear();
    for (int32_t rank = 0; rank < size; ++rank) children_.push_back(std::make_unique<Child>());
  }
  Child& At(int32_t rank) { return *children_[static_cast<size_t>(rank)]; }
  void SayAll(const std::string& line) {
    for (auto& child : children_) child->Say(line);
  }
  void ReadAll(const std::string& prefix) {
    for (auto& child : children_) ASSERT_NE(child->ReadLine(prefix), "") << prefix;
  }
  void Join(uint64_t epoch) {
    std::vector<std::string> addresses;
    for (auto& child : children_) addresses.push_back(child->address());
    for (size_t rank = 0; rank < children_.size(); ++rank) {
      children_[rank]->Say(absl::StrCat("join ", epoch, " ", rank, " secret-of-", epoch, " ",
                                        absl::StrJoin(addresses, " ")));
    }
    ReadAll("joined");
  }
  Outcome Done(int32_t rank) {
    std::istringstream in(At(rank).ReadLine("done "));
    Outcome outcome;
    std::string word;
    in >> word >> outcome.cpu_ms;
    std::getline(in >> std::ws, outcome.status);
    return outcome;
  }

  std::vector<std::unique_ptr<Child>> children_;
};

TEST_F(Processes, RandomPayloadsArriveWhole) {
  for (const int32_t size : {2, 4}) {
    Make(size);
    Join(1);
    SayAll(absl::StrCat("exchange ", SeededRng()(), " 200 60000"));
    for (int32_t rank = 0; rank < size; ++rank) EXPECT_EQ(Done(rank).status, "OK");
  }
}

// A survivor may learn of it from another survivor, which has left with its error.
TEST_F(Processes, AKilledPeerEndsEverybodysWait) {
  std::mt19937 rng = SeededRng();
  for (int trial = 0; trial < 8; ++trial) {
    Make(3);
    Join(1);
    SayAll(absl::StrCat("exchange ", rng(), " 1000000000 600000"));
    const int32_t victim = Below(rng, 3);
    for (int i = Below(rng, 4); i >= 0; --i) ASSERT_NE(At(victim).ReadLine("round"), "");
    const auto moment =
        std::chrono::steady_clock::now() + std::chrono::microseconds(Below(rng, 500));
    while (std::chrono::steady_clock::now() < moment) {
    }
    At(victim).Signal(SIGKILL);
    bool is_named = false;
    for (int32_t rank = 0; rank < 3; ++rank) {
      if (rank == victim) continue;
      const std::string status = Done(rank).status;
      EXPECT_THAT(status, StartsWith("UNAVAILABLE: rank "));
      is_named = is_named || absl::StrContains(status, absl::StrCat("rank ", victim, " is lost"));
    }
    EXPECT_TRUE(is_named);
    // Who is left goes on without it.
    children_.erase(children_.begin() + victim);
    SayAll("leave");
    ReadAll("left");
    Join(2);
    SayAll("exchange 7 20 60000");
    for (int32_t rank = 0; rank < 2; ++rank) EXPECT_EQ(Done(rank).status, "OK");
  }
}

// Nobody knows that a stopped peer is stopped: only the deadline or an abort ends the wait, which
// costs nothing.
TEST_F(Processes, AStoppedPeerIsALatePeer) {
  Make(3);
  Join(1);
  SayAll("exchange 1 20 60000");
  for (int32_t rank = 0; rank < 3; ++rank) ASSERT_EQ(Done(rank).status, "OK");
  SayAll("leave");
  ReadAll("left");
  At(2).Signal(SIGSTOP);
  children_[0]->Say("");  // the pipes are fine
  std::vector<std::string> addresses;
  for (auto& child : children_) addresses.push_back(child->address());
  for (int32_t rank = 0; rank < 2; ++rank) {
    At(rank).Say(absl::StrCat("join 2 ", rank, " s ", absl::StrJoin(addresses, " ")));
    ASSERT_NE(At(rank).ReadLine("joined"), "");
    At(rank).Say("exchange 1 1 1500");
  }
  int num_late = 0;
  for (int32_t rank = 0; rank < 2; ++rank) {
    const Outcome outcome = Done(rank);
    if (absl::StartsWith(outcome.status, "DEADLINE_EXCEEDED")) {
      EXPECT_THAT(outcome.status, HasSubstr("rank 2"));
      EXPECT_THAT(outcome.status, testing::Not(HasSubstr("waited too long for rank 1")));
      EXPECT_LT(outcome.cpu_ms, 75) << "5 % of 1500 ms";
      ++num_late;
    } else {
      EXPECT_THAT(outcome.status, StartsWith("UNAVAILABLE: rank "));  // the other one has left
    }
  }
  EXPECT_GE(num_late, 1);
  for (int32_t rank = 0; rank < 2; ++rank) {
    At(rank).Say("leave");
    ASSERT_NE(At(rank).ReadLine("left"), "");
    At(rank).Say(absl::StrCat("join 3 ", rank, " s ", absl::StrJoin(addresses, " ")));
    ASSERT_NE(At(rank).ReadLine("joined"), "");
    At(rank).Say("exchange 1 1 600000");
  }
  for (int32_t rank = 0; rank < 2; ++rank) At(rank).Say("abort");
  for (int32_t rank = 0; rank < 2; ++rank) {
    EXPECT_THAT(Done(rank).status,
                AnyOf(HasSubstr("ABORTED: the parent says so"), StartsWith("UNAVAILABLE: rank ")));
  }
  // It wakes up and is in time for the next epoch.
  At(2).Signal(SIGCONT);
  for (int32_t rank = 0; rank < 2; ++rank) {
    At(rank).Say("leave");
    ASSERT_NE(At(rank).ReadLine("left"), "");
  }
  Join(4);
  SayAll("exchange 1 20 60000");
  for (int32_t rank = 0; rank < 3; ++rank) EXPECT_EQ(Done(rank).status, "OK");
}

TEST_F(Processes, JoiningAgainAndAgainLeaksNothing) {
  Make(3);
  std::map<int32_t, std::pair<int64_t, int64_t>> before;  // rank → open files, KiB
  for (uint64_t epoch = 1; epoch <= 60; ++epoch) {
    Join(epoch);
    SayAll(absl::StrCat("exchange ", epoch, " 20 60000"));
    for (int32_t rank = 0; rank < 3; ++rank) ASSERT_EQ(Done(rank).status, "OK") << epoch;
    SayAll("leave");
    ReadAll("left");
    if (epoch != 10 && epoch != 60) continue;
    for (int32_t rank = 0; rank < 3; ++rank) {
      // What lingers is closed soon.
      const auto deadline = std::chrono::steady_clock::now() + kBound;
      int64_t files = 0, kib = 0, discarded = 0, refused = 0;
      do {
        At(rank).Say("stats");
        std::istringstream in(At(rank).ReadLine("stats ").substr(6));
        in >> files >> kib >> discarded >> refused;
        if (epoch == 10 && files <= 12) break;
      } while ((epoch == 10 || files > before[rank].first) &&
               std::chrono::steady_clock::now() < deadline);
      EXPECT_EQ(refused, 0);
      if (epoch == 10) {
        before[rank] = {files, kib};
      } else {
        EXPECT_LE(files, before[rank].first);
        EXPECT_LT(kib, before[rank].second + 64);
      }
    }
  }
}

}  // namespace
}  // namespace switchyard

int main(int argc, char** argv) {
  if (argc > 1 && std::string_view(argv[1]) == "--rank") return switchyard::RunRank();
  signal(SIGPIPE, SIG_IGN);
  testing::InitGoogleMock(&argc, argv);
  return RUN_ALL_TESTS();
}
