// All-to-all of two ranks in two processes of this host: the data plane beside plain sockets, in
// the same run, interleaved. Both sides send and receive one message per exchange and sleep while
// they wait. Usage: exchange_bench [--pairs N] [--milliseconds M] [--json]
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "comm/data_plane.h"
#include "comm/test_messages.h"
#include "kernels/check.h"
#include "kernels/measure.h"

namespace switchyard {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kSizes[] = {1 << 10, 16 << 10, 128 << 10, 1 << 20};

struct Options {
  int pairs = 9;          // of runs, one of each kind
  int milliseconds = 50;  // per run
  bool json = false;
};

void ReadAll(int fd, void* to, size_t size) {
  SY_CHECK_EQ(recv(fd, to, size, MSG_WAITALL), static_cast<ssize_t>(size));
}

// One rank of both kinds of exchange. `control` joins the two processes.
class Rank {
 public:
  Rank(int32_t rank, int control) : rank_(rank), control_(control) {
    auto plane = DataPlane::Create({});
    SY_CHECK(plane.ok());
    plane_ = *std::move(plane);
    char own[64] = {}, other[64] = {};
    std::strncpy(own, plane_->address().c_str(), sizeof(own) - 1);
    SY_CHECK_EQ(write(control_, own, sizeof(own)), static_cast<ssize_t>(sizeof(own)));
    ReadAll(control_, other, sizeof(other));
    GroupSpec spec{.epoch = 1, .rank = rank, .members = {{own}, {other}}, .secret = "bench"};
    if (rank == 1) std::swap(spec.members[0], spec.members[1]);
    auto comm = plane_->Join(spec, Later());
    SY_CHECK(comm.ok());
    comm_ = *std::move(comm);
    ConnectPlain();
    sent_ = Pattern(rank, 1 - rank, 1, kSizes[std::size(kSizes) - 1]);
    received_.resize(sent_.size());
  }

  void Plain(size_t size) {
    size_t sent = 0, got = 0;
    while (sent < size || got < size) {
      bool moved = false;
      if (sent < size) {
        const ssize_t n = send(plain_, sent_.data() + sent, size - sent, MSG_DONTWAIT);
        if (n > 0) sent += static_cast<size_t>(n);
        moved = n > 0;
      }
      if (got < size) {
        const ssize_t n = recv(plain_, received_.data() + got, size - got, MSG_DONTWAIT);
        if (n > 0) got += static_cast<size_t>(n);
        moved = moved || n > 0;
      }
      if (moved) continue;
      pollfd entry{.fd = plain_, .events = 0, .revents = 0};
      if (sent < size) entry.events |= POLLOUT;
      if (got < size) entry.events |= POLLIN;
      (void)poll(&entry, 1, -1);
    }
  }

  void Network(size_t size) {
    const SendOp send{1 - rank_, Tag(++step_), std::span(sent_).first(size)};
    RecvOp recv{1 - rank_, Tag(step_), std::span(received_).first(size)};
    SY_CHECK(comm_->Start({&send, 1}, {&recv, 1}).ok());
    SY_CHECK(comm_->Wait(Later()).ok());
    SY_CHECK_EQ(recv.received, size);
  }

  // Microseconds per exchange; rank 0 decides how many there are.
  double Run(bool plain, size_t size, int milliseconds) {
    uint64_t count = 8;
    double microseconds = 0;
    for (int round = 0; round < 2; ++round) {  // the first one warms up and measures the count
      if (rank_ == 0) SY_CHECK_EQ(write(control_, &count, sizeof(count)), 8);
      if (rank_ == 1) ReadAll(control_, &count, sizeof(count));
      const auto begin = Clock::now();
      const double cpu = CpuSeconds(CLOCK_PROCESS_CPUTIME_ID);
      for (uint64_t i = 0; i < count; ++i) plain ? Plain(size) : Network(size);
      microseconds = std::chrono::duration<double, std::micro>(Clock::now() - begin).count() /
                     static_cast<double>(count);
      cpu_microseconds_ =
          1e6 * (CpuSeconds(CLOCK_PROCESS_CPUTIME_ID) - cpu) / static_cast<double>(count);
      count = std::max<uint64_t>(8, static_cast<uint64_t>(1000.0 * milliseconds / microseconds));
    }
    return microseconds;
  }
  double cpu_microseconds() const { return cpu_microseconds_; }  // of this rank, per exchange

 private:
  void ConnectPlain() {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (rank_ == 0) {
      const int listener = socket(AF_INET, SOCK_STREAM, 0);
      socklen_t length = sizeof(address);
      SY_CHECK_EQ(bind(listener, reinterpret_cast<sockaddr*>(&address), length), 0);
      SY_CHECK_EQ(listen(listener, 1), 0);
      SY_CHECK_EQ(getsockname(listener, reinterpret_cast<sockaddr*>(&address), &length), 0);
      SY_CHECK_EQ(write(control_, &address.sin_port, 2), 2);
      plain_ = accept(listener, nullptr, nullptr);
      close(listener);
    } else {
      ReadAll(control_, &address.sin_port, 2);
      plain_ = socket(AF_INET, SOCK_STREAM, 0);
      SY_CHECK_EQ(connect(plain_, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    }
    const int on = 1;
    SY_CHECK_EQ(setsockopt(plain_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)), 0);
  }

  const int32_t rank_;
  const int control_;
  std::unique_ptr<DataPlane> plane_;
  std::unique_ptr<Communicator> comm_;
  int plain_ = -1;
  uint64_t step_ = 0;
  double cpu_microseconds_ = 0;
  std::vector<std::byte> sent_, received_;
};

void RunAll(int32_t rank, int control, const Options& options) {
  Rank self(rank, control);
  const bool prints = rank == 0;
  if (prints && !options.json)
    std::printf("%10s %12s %12s %8s   %s\n", "bytes", "sockets us", "ours us", "ratio", "CPU us");
  if (prints && options.json) std::printf("{\"rows\":[");
  for (const size_t size : kSizes) {
    std::vector<double> plain, ours, ratios, plain_cpu, ours_cpu;
    for (int pair = 0; pair < options.pairs; ++pair) {
      plain.push_back(self.Run(/*plain=*/true, size, options.milliseconds));
      plain_cpu.push_back(self.cpu_microseconds());
      ours.push_back(self.Run(/*plain=*/false, size, options.milliseconds));
      ours_cpu.push_back(self.cpu_microseconds());
      ratios.push_back(ours.back() / plain.back());
    }
    if (!prints) continue;
    if (options.json) {
      std::printf("%s{\"bytes\":%zu,\"sockets_us\":%.2f,\"ours_us\":%.2f,\"ratio\":%.3f}",
                  size == kSizes[0] ? "" : ",", size, Median(plain), Median(ours), Median(ratios));
    } else {
      std::printf("%10zu %12.1f %12.1f %8.2f   %.1f %.1f\n", size, Median(plain), Median(ours),
                  Median(ratios), Median(plain_cpu), Median(ours_cpu));
    }
  }
  if (prints && options.json) std::printf("]}\n");
}

}  // namespace
}  // namespace switchyard

int main(int argc, char** argv) {
  switchyard::Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view flag = argv[i];
    if (flag == "--json") {
      options.json = true;
    } else if (flag == "--pairs" && i + 1 < argc) {
      options.pairs = std::max(1, std::atoi(argv[++i]));
    } else if (flag == "--milliseconds" && i + 1 < argc) {
      options.milliseconds = std::max(1, std::atoi(argv[++i]));
    } else {
      std::fprintf(stderr, "usage: exchange_bench [--pairs N] [--milliseconds M] [--json]\n");
      return 2;
    }
  }
  int control[2];
  SY_CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, control), 0);
  const pid_t child = fork();
  switchyard::RunAll(child == 0 ? 1 : 0, control[child == 0 ? 1 : 0], options);
  if (child != 0) waitpid(child, nullptr, 0);
  return 0;
}
