// The golden files of the fixtures (tests/fixtures/README.md) and of the demo model. Tests only.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace switchyard {

// What transformers computed for one prompt, teacher-forced over prompt + greedy[0 … decode_steps -
// 1].
struct GoldenCase {
  std::string name;
  std::vector<int32_t> prompt;
  std::vector<int32_t> greedy;  // [decode_steps + 1]
  int32_t first_row = 0;
  int32_t num_rows = 0;
  std::vector<float>
      logits;  // [num_rows, vocab_size]: row r holds the logits after position first_row + r

  std::span<const float> Row(int32_t position, int32_t vocab_size) const {
    return std::span(logits).subspan(
        static_cast<size_t>(position - first_row) * static_cast<size_t>(vocab_size),
        static_cast<size_t>(vocab_size));
  }
};

struct Golden {
  int32_t vocab_size = 0;
  int32_t decode_steps = 0;
  std::vector<GoldenCase> cases;
};

// Reads golden.json and golden.f32 of a fixture's folder. CHECKs that they are whole.
Golden ReadGolden(const std::string& dir);

}  // namespace switchyard
