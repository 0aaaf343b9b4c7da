#include "scheduler/block_hash.h"

#include <bit>
#include <cstring>
#include <random>
#include <vector>

namespace switchyard {
namespace {

static_assert(std::endian::native == std::endian::little, "block hashes read little-endian words");

struct SipState {
  uint64_t v0, v1, v2, v3;

  void Round() {
    v0 += v1, v1 = std::rotl(v1, 13), v1 ^= v0, v0 = std::rotl(v0, 32);
    v2 += v3, v3 = std::rotl(v3, 16), v3 ^= v2;
    v0 += v3, v3 = std::rotl(v3, 21), v3 ^= v0;
    v2 += v1, v1 = std::rotl(v1, 17), v1 ^= v2, v2 = std::rotl(v2, 32);
  }
  void Absorb(uint64_t word) {
    v3 ^= word;
    Round(), Round();
    v0 ^= word;
  }
  uint64_t Squeeze() {
    Round(), Round(), Round(), Round();
    return v0 ^ v1 ^ v2 ^ v3;
  }
};

void AppendBytes(std::vector<uint8_t>& out, const void* data, size_t size) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  out.insert(out.end(), bytes, bytes + size);
}

}  // namespace

BlockHash SipHash128(const BlockHashKey& key, std::span<const uint8_t> bytes) {
  SipState s{0x736f6d6570736575ull ^ key.k0, 0x646f72616e646f6dull ^ key.k1 ^ 0xee,
             0x6c7967656e657261ull ^ key.k0, 0x7465646279746573ull ^ key.k1};
  const size_t whole = bytes.size() / 8 * 8;
  for (size_t i = 0; i < whole; i += 8) {
    uint64_t word;
    std::memcpy(&word, bytes.data() + i, 8);
    s.Absorb(word);
  }
  uint64_t last = static_cast<uint64_t>(bytes.size()) << 56;
  for (size_t i = whole; i < bytes.size(); ++i) {
    last |= static_cast<uint64_t>(bytes[i]) << (8 * (i - whole));
  }
  s.Absorb(last);
  s.v2 ^= 0xee;
  const uint64_t low = s.Squeeze();
  s.v1 ^= 0xdd;
  return {low, s.Squeeze()};
}

BlockHasher::BlockHasher() {
  std::random_device device;
  const auto draw = [&] { return (static_cast<uint64_t>(device()) << 32) | device(); };
  key_ = {draw(), draw()};
}

BlockHash BlockHasher::Root(std::string_view cache_salt, uint32_t routing_profile) const {
  std::vector<uint8_t> bytes;
  AppendBytes(bytes, &routing_profile, sizeof(routing_profile));
  AppendBytes(bytes, cache_salt.data(), cache_salt.size());
  return SipHash128(key_, bytes);
}

BlockHash BlockHasher::Next(const BlockHash& previous, std::span<const int32_t> tokens) const {
  std::vector<uint8_t> bytes;
  bytes.reserve(sizeof(previous) + tokens.size_bytes());
  AppendBytes(bytes, &previous, sizeof(previous));
  AppendBytes(bytes, tokens.data(), tokens.size_bytes());
  return SipHash128(key_, bytes);
}

}  // namespace switchyard
