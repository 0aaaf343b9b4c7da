// The same text, or an error in the same places, as Python's Jinja2 on testdata/templates.json
// (make_templates.py).
#include <gtest/gtest.h>

#include <fstream>

#include "nlohmann/json.hpp"
#include "server/text/jinja/template.h"

namespace switchyard::jinja {
namespace {

TEST(ChatTemplateGoldenTest, EqualsJinja2) {
  std::ifstream file(std::string(SWITCHYARD_SOURCE_DIR) + "/server/text/testdata/templates.json");
  ASSERT_TRUE(file);
  const auto golden = nlohmann::ordered_json::parse(file);
  const auto& cases = golden["cases"];
  EXPECT_GE(cases.size(), 150u);
  for (const auto& item : cases) {
    const auto source = golden["templates"][item["template"].get<size_t>()].get<std::string>();
    SCOPED_TRACE("template " + item["template"].dump() + ", context " + item["context"].dump() +
                 ":\n" + source);
    std::vector<std::pair<std::string, Value>> variables;
    for (const auto& [name, json] : golden["contexts"][item["context"].get<size_t>()].items()) {
      auto value = Value::FromJson(json);
      ASSERT_TRUE(value.ok());
      variables.emplace_back(name, *std::move(value));
    }
    std::string text;
    absl::Status status;
    auto parsed = Template::Parse(source);
    if (parsed.ok()) {
      auto rendered = (*parsed)->Render(std::move(variables),
                                        golden["now_unix_seconds"].get<int64_t>(), Limits());
      if (rendered.ok()) {
        text = rendered->text();
      } else {
        status = rendered.status();
      }
    } else {
      status = parsed.status();
    }
    if (item.contains("error")) {
      EXPECT_FALSE(status.ok()) << "rendered '" << text << "'";
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
      EXPECT_NE(status.message().find("line "), absl::string_view::npos) << status;
    } else {
      EXPECT_TRUE(status.ok()) << status;
      EXPECT_EQ(text, item["output"].get<std::string>());
    }
  }
}

}  // namespace
}  // namespace switchyard::jinja
