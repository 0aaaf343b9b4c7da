// Philox4x32-10, the counter-based generator of Salmon et al. (SC 2011, "Parallel random numbers:
// as easy as 1, 2, 3"). A pure function: the same key and counter give the same number on any
// worker, at any time, in any batch.
#pragma once

#include <array>
#include <cstdint>

namespace switchyard {

inline std::array<uint32_t, 4> Philox4x32(std::array<uint32_t, 4> counter,
                                          std::array<uint32_t, 2> key) {
  constexpr uint64_t kMultiplier0 = 0xd2511f53, kMultiplier1 = 0xcd9e8d57;
  constexpr uint32_t kWeyl0 = 0x9e3779b9, kWeyl1 = 0xbb67ae85;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = kMultiplier0 * counter[0];
    const uint64_t p1 = kMultiplier1 * counter[2];
    counter = {static_cast<uint32_t>(p1 >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(p1),
               static_cast<uint32_t>(p0 >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(p0)};
    key = {key[0] + kWeyl0, key[1] + kWeyl1};
  }
  return counter;
}

// The random number of one draw, uniform in [0, 1) with 53 bits. Draw 0 picks the token.
struct DrawKey {
  uint64_t seed = 0;
  uint32_t choice = 0;
  int64_t position = 0;
  uint32_t draw = 0;
};
inline double Uniform(const DrawKey& k) {
  const uint64_t position = static_cast<uint64_t>(k.position);
  const std::array<uint32_t, 4> out = Philox4x32(
      {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), k.choice, k.draw},
      {static_cast<uint32_t>(k.seed), static_cast<uint32_t>(k.seed >> 32)});
  const uint64_t bits = static_cast<uint64_t>(out[0]) << 32 | out[1];
  return static_cast<double>(bits >> 11) * 0x1.0p-53;
}

}  // namespace switchyard
