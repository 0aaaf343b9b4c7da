// The header of every message between data planes: fixed, 72 bytes, little-endian. Written by
// NetworkGroup and the data plane; what came from a peer is checked with IsWellFormed before a
// field is used.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "comm/communicator.h"

namespace switchyard {

static_assert(std::endian::native == std::endian::little);

enum class WireType : uint8_t {
  kHello,     // payload: the secret; size: number of ranks; the first message, nothing before it
  kReady,     // a receive of at most `size` bytes is posted
  kData,      // payload: bytes [offset, …) of a message of `size` bytes
  kTooLarge,  // a receive of `offset` bytes does not hold the message of `size`
  kBye,       // the rank has left the epoch; the last message. Also an answer to a hello
  kWelcome,   // answer to a hello: messages may follow
};

struct WireHeader {
  static constexpr uint32_t kMagic = 0x50445953;  // "SYDP"
  static constexpr uint8_t kVersion = 1;
  static constexpr size_t kMaxPayload = 256 << 10;

  uint32_t magic = kMagic;
  uint8_t version = kVersion;
  WireType type = WireType::kHello;
  MessageKind kind = MessageKind::kCounts;
  uint8_t part = 0;
  uint64_t epoch = 0;
  int32_t from = 0;
  int32_t to = 0;
  uint64_t message = 0;  // kData: counts the messages of a connection from 1
  uint64_t step = 0;
  int32_t layer = 0;
  int32_t micro_batch = 0;
  uint64_t size = 0;
  uint64_t offset = 0;
  uint64_t payload = 0;  // bytes that follow the header

  MessageTag tag() const { return {step, layer, micro_batch, kind, part}; }
  bool IsWellFormed() const {
    return magic == kMagic && version == kVersion && type <= WireType::kWelcome &&
           kind <= MessageKind::kWeights && payload <= kMaxPayload;
  }
};
static_assert(sizeof(WireHeader) == 72 && std::is_trivially_copyable_v<WireHeader>);

}  // namespace switchyard
