#include "tests/golden.h"

#include <fstream>
#include <nlohmann/json.hpp>

#include "kernels/check.h"

namespace switchyard {

Golden ReadGolden(const std::string& dir) {
  std::ifstream text(dir + "/golden.json");
  SY_CHECK(text.good());
  const auto json = nlohmann::json::parse(text);
  SY_CHECK_EQ(json.at("format").get<int>(), 1);
  std::ifstream floats(dir + "/golden.f32", std::ios::binary);
  SY_CHECK(floats.good());

  Golden golden;
  golden.vocab_size = json.at("vocab_size");
  golden.decode_steps = json.at("decode_steps");
  for (const auto& from : json.at("cases")) {
    GoldenCase& to = golden.cases.emplace_back();
    to.name = from.at("name");
    to.prompt = from.at("prompt").get<std::vector<int32_t>>();
    to.greedy = from.at("greedy").get<std::vector<int32_t>>();
    to.first_row = from.at("first_row");
    to.num_rows = from.at("rows");
    SY_CHECK_EQ(to.greedy.size(), static_cast<size_t>(golden.decode_steps) + 1);
    SY_CHECK_EQ(to.first_row + to.num_rows,
                static_cast<int32_t>(to.prompt.size()) + golden.decode_steps);
    to.logits.resize(static_cast<size_t>(to.num_rows) * static_cast<size_t>(golden.vocab_size));
    floats.seekg(from.at("offset").get<int64_t>() * 4);
    floats.read(reinterpret_cast<char*>(to.logits.data()),
                static_cast<std::streamsize>(to.logits.size() * 4));
    SY_CHECK(floats.good());
  }
  return golden;
}

}  // namespace switchyard
