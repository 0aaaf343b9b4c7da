// For tests: a blocking client socket that sends exactly what it is told, for requests that no
// well-behaved client makes.
#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>
#include <string>

namespace switchyard {

class RawSocket {
 public:
  // `receive_buffer`: the kernel's, in bytes; 0: its default. Reads give up after 30 s.
  explicit RawSocket(uint16_t port, int receive_buffer = 0) : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    if (receive_buffer > 0)
      setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof(receive_buffer));
    const timeval limit{.tv_sec = 30, .tv_usec = 0};
    setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
  }
  ~RawSocket() { Close(); }
  RawSocket(const RawSocket&) = delete;
  RawSocket& operator=(const RawSocket&) = delete;

  void Send(const std::string& bytes) {
    EXPECT_EQ(send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL), ssize_t(bytes.size()));
  }
  // The next bytes; "" at the end, after a reset or a timeout.
  std::string Receive() {
    char buffer[4096];
    const ssize_t num_read = recv(fd_, buffer, sizeof(buffer), 0);
    ended_in_order_ = num_read == 0;
    return num_read > 0 ? std::string(buffer, static_cast<size_t>(num_read)) : std::string();
  }
  // Until `text` was seen or the end.
  std::string ReceiveUntil(const std::string& text) {
    std::string received;
    while (received.find(text) == std::string::npos) {
      const std::string more = Receive();
      if (more.empty()) break;
      received += more;
    }
    return received;
  }
  std::string ReceiveAll() {
    std::string received;
    for (std::string more = Receive(); !more.empty(); more = Receive()) received += more;
    return received;
  }
  // The last Receive saw the peer's orderly end, not a reset.
  bool ended_in_order() const { return ended_in_order_; }
  void Close() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }

 private:
  int fd_;
  bool ended_in_order_ = false;
};

}  // namespace switchyard
