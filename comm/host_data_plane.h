// HostDataPlane: the DataPlane over TcpLink. The state of all its connections and of the group that
// lives, under one lock. Rooms use data_plane.h; this header is for its two source files:
// data_plane.cc has the calls of the rank and the own thread, data_plane_peers.cc what peers say.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "comm/data_plane.h"
#include "comm/network_group.h"
#include "comm/tcp_link.h"
#include "kernels/mutex.h"

namespace switchyard {

class HostDataPlane final : public DataPlane, public TcpLink::Sink, public NetworkGroup::Wire {
 public:
  using Clock = std::chrono::steady_clock;
  using ConnectionId = TcpLink::ConnectionId;

  explicit HostDataPlane(const DataPlaneOptions& options) : options_(options) {}

  absl::Status Open();  // once, before anything else
  ~HostDataPlane() override;

  const std::string& address() const override { return address_; }
  const char* transport() const override { return "tcp"; }
  uint64_t discarded_messages() const override {
    MutexLock lock(mu_);
    return discarded_;
  }
  uint64_t refused_messages() const override {
    MutexLock lock(mu_);
    return refused_;
  }

  absl::StatusOr<std::unique_ptr<Communicator>> Join(const GroupSpec& spec,
                                                     Clock::time_point deadline) override;

  // For the communicator.
  absl::Status Start(int32_t group, std::span<const SendOp> sends, std::span<RecvOp> recvs);
  absl::Status Wait(int32_t group, Clock::time_point deadline);
  void Abort(const absl::Status& reason);
  void Leave();

 private:
  enum class Role : uint8_t {
    kStranger,   // accepted, no hello yet
    kEarly,      // accepted, its hello is of an epoch to come
    kMember,     // accepted, of the live epoch
    kOwn,        // opened by this rank, of the live epoch
    kLingering,  // of an epoch that is over here; the other end closes
  };
  struct Connection {
    Role role = Role::kStranger;
    int32_t rank = -1;                                     // of the other end, once known
    WireHeader hello;                                      // kEarly
    std::string secret;                                    // kEarly
    Clock::time_point expires = Clock::time_point::max();  // then it is closed
  };

  void Run();
  void Park(uint64_t seen) SY_REQUIRES(mu_);
  void Drive(Clock::time_point until) SY_REQUIRES(mu_);
  void Expire() SY_REQUIRES(mu_);
  void SetExpiry(Connection& connection, Clock::time_point expires) SY_REQUIRES(mu_);
  void LeaveIfFailed() SY_REQUIRES(mu_);
  void CloseAndForget(ConnectionId id) SY_REQUIRES(mu_);
  void Refuse(ConnectionId id) SY_REQUIRES(mu_);
  void SendBye(ConnectionId id, uint64_t epoch, int32_t to) SY_REQUIRES(mu_);
  void Linger(ConnectionId id) SY_REQUIRES(mu_);
  ConnectionId Channel(int32_t peer) const SY_REQUIRES(mu_);
  bool IsChannel(const Connection& connection) const SY_REQUIRES(mu_);
  void OnBye(ConnectionId id) SY_REQUIRES(mu_);
  void Lose(int32_t rank, const std::string& why) SY_REQUIRES(mu_);
  void OnHello(ConnectionId id, const WireHeader& hello, std::string secret) SY_REQUIRES(mu_);
  void Welcome(ConnectionId id, const WireHeader& hello, const std::string& secret)
      SY_REQUIRES(mu_);
  void MakeRoom() SY_REQUIRES(mu_);
  void EndOther(ConnectionId id) SY_REQUIRES(mu_);

  // TcpLink::Sink and NetworkGroup::Wire. Called with the lock held, from the calls into them.
  void OnAccepted(ConnectionId id) SY_REQUIRES(mu_) override;
  std::byte* OnHeader(ConnectionId id, const WireHeader& header) SY_REQUIRES(mu_) override;
  void OnMessage(ConnectionId id, const WireHeader& header, std::span<const std::byte> payload)
      SY_REQUIRES(mu_) override;
  void OnMalformed(ConnectionId id) SY_REQUIRES(mu_) override;
  void OnBroken(ConnectionId id, const std::string& why) SY_REQUIRES(mu_) override;
  void OnSent(uint64_t cookie) SY_REQUIRES(mu_) override;
  void Send(int32_t peer, const WireHeader& header, std::span<const std::byte> payload)
      SY_REQUIRES(mu_) override;
  void DropIncoming(int32_t peer) SY_REQUIRES(mu_) override;
  void CutOff(int32_t peer) SY_REQUIRES(mu_) override;

  // Constant after Open().
  const DataPlaneOptions options_;
  std::string address_;
  std::thread thread_;

  mutable Mutex mu_;
  std::unique_ptr<TcpLink> link_ SY_PT_GUARDED_BY(mu_);  // but for what it says
  std::unordered_map<ConnectionId, Connection> connections_ SY_GUARDED_BY(mu_);
  Clock::time_point next_expiry_ SY_GUARDED_BY(mu_) = Clock::time_point::max();
  Clock::time_point next_accept_ SY_GUARDED_BY(mu_) = Clock::time_point::max();
  uint64_t discarded_ SY_GUARDED_BY(mu_) = 0;
  uint64_t refused_ SY_GUARDED_BY(mu_) = 0;
  bool stop_ SY_GUARDED_BY(mu_) = false;

  bool has_joined_ SY_GUARDED_BY(mu_) = false;
  GroupSpec spec_ SY_GUARDED_BY(mu_);  // of the newest epoch
  std::unique_ptr<NetworkGroup> group_ SY_GUARDED_BY(mu_);
  bool left_ SY_GUARDED_BY(mu_) = false;                   // peers were told
  std::vector<ConnectionId> own_ SY_GUARDED_BY(mu_);       // [size]; 0: none
  std::vector<ConnectionId> accepted_ SY_GUARDED_BY(mu_);  // [size]; 0: none

  // Who looks after the link: the rank's thread while it is in Wait, else the own thread. Between
  // the waits of a rank that waits often it is nobody, for some milliseconds.
  bool rank_drives_ SY_GUARDED_BY(mu_) = false;
  bool has_waited_ SY_GUARDED_BY(mu_) = false;  // in this epoch
  uint64_t num_waits_ SY_GUARDED_BY(mu_) = 0;
  bool owner_parked_ SY_GUARDED_BY(mu_) = false;  // wants to be told when the rank stops
  CondVar owner_free_;
};

}  // namespace switchyard
