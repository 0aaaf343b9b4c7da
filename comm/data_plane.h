// DataPlane: one rank's place on the host network. It owns its listening endpoint and one thread,
// and makes the Communicator of one epoch after the other. A process may have several. Create,
// Join and destruction belong to the rank's owner thread; address(), transport() and the counters
// may be read by any thread. The communicator that it made must be destroyed before it.
//
// Any two members of a group connect to each other in the background, both ways. The first message
// on a connection is a hello that carries the epoch's secret; nothing else is read before it. A
// hello for an epoch that was not joined here yet is kept and answered by Join. Messages of an
// older epoch are discarded and counted; so is whatever does not follow the protocol, and who sent
// it is cut off. A peer whose system answers nothing for 3 s is lost; one whose process is stopped
// is not noticed: that is the control plane's matter.
//
// Memory: at most `eager_bytes` per peer for messages that came before their receive was posted;
// larger ones wait at their sender until it is.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/communicator.h"

namespace switchyard {

struct DataPlaneOptions {
  std::string host = "127.0.0.1";  // IPv4 address of a local interface: bound to, and published
  size_t eager_bytes = size_t{4} << 20;  // under way to one peer before it posted the receives
  std::chrono::milliseconds hello_timeout{10000};   // of a connection to say hello
  std::chrono::milliseconds early_timeout{120000};  // of a hello to wait for Join of its epoch
  std::chrono::milliseconds linger{1000};  // of peers to close their end of a communicator gone
};

struct GroupMember {
  std::string address;  // opaque: DataPlane::address() of that rank
};

struct GroupSpec {
  uint64_t epoch = 0;  // larger than that of every group joined before
  int32_t rank = 0;
  std::vector<GroupMember> members;  // [size], by rank; the own one too
  std::string secret;                // of the epoch, the same at all ranks; at most 256 bytes
};

class DataPlane {
 public:
  // kInvalidArgument: no such local address. kUnavailable: the network refused, in its words.
  static absl::StatusOr<std::unique_ptr<DataPlane>> Create(const DataPlaneOptions& options);
  virtual ~DataPlane() = default;

  virtual const std::string& address() const = 0;
  virtual const char* transport() const = 0;  // what moves the bytes, "tcp"

  // The communicator of one epoch; at most one lives. Does not wait for the peers: connecting goes
  // on in the background, and a peer that cannot be reached is lost once it has been tried.
  // kInvalidArgument: the spec. kFailedPrecondition: one lives, or the epoch is not newer.
  // kDeadlineExceeded: `deadline` passed.
  virtual absl::StatusOr<std::unique_ptr<Communicator>> Join(
      const GroupSpec& spec, std::chrono::steady_clock::time_point deadline) = 0;

  // Messages of older epochs.
  virtual uint64_t discarded_messages() const = 0;
  // Hellos with a wrong secret, malformed messages, connections without a hello in time.
  virtual uint64_t refused_messages() const = 0;
};

}  // namespace switchyard
