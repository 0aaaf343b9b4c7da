// Hash64: a 64-bit hash of bytes and numbers that is the same on every machine and run. Not
// cryptographic: it finds mistakes, not attackers. A value; used by one thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>

namespace switchyard {

class Hash64 {
 public:
  void Number(uint64_t value) {  // the finaliser of splitmix64 over a running state
    uint64_t z = state_ + 0x9e3779b97f4a7c15u + value;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    state_ = z ^ (z >> 31);
  }
  // Eight bytes a step, little-endian; the length counts.
  void Bytes(std::span<const std::byte> bytes) {
    size_t at = 0;
    for (; at + 8 <= bytes.size(); at += 8) {
      uint64_t word;
      std::memcpy(&word, bytes.data() + at, 8);
      state_ = (state_ ^ word) * 0x9fb21c651e98df25u;
      state_ ^= state_ >> 29;
    }
    uint64_t tail = 0;
    if (at < bytes.size()) std::memcpy(&tail, bytes.data() + at, bytes.size() - at);
    Number(tail);
    Number(bytes.size());
  }
  void Text(std::string_view text) { Bytes(std::as_bytes(std::span(text))); }
  uint64_t value() const { return state_; }

 private:
  uint64_t state_ = 0;
};

}  // namespace switchyard
