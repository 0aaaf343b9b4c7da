// For tests: the seed of a random one.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

namespace switchyard {

// A new one each time, printed so that a failure can be repeated with SWITCHYARD_TEST_SEED.
inline uint32_t TestSeed() {
  const char* set = std::getenv("SWITCHYARD_TEST_SEED");
  const auto seed = set != nullptr ? static_cast<uint32_t>(std::strtoul(set, nullptr, 10))
                                   : uint32_t{std::random_device{}()};
  std::printf("SWITCHYARD_TEST_SEED=%u\n", seed);
  std::fflush(stdout);
  return seed;
}

}  // namespace switchyard
