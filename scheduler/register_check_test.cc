#include "scheduler/register_check.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "proto/step_wire.h"

namespace switchyard {
namespace {

using testing::HasSubstr;

class RegisterCheckTest : public testing::Test {
 protected:
  RegisterCheckTest() {
    model_.name = "model";
    model_.max_model_len = 100;
    model_.block_size = 16;
    facts_.set_protocol_version(kProtocolVersion);
    facts_.set_version(SWITCHYARD_VERSION);
    facts_.set_role(v1::WORKER_ROLE_ATTENTION);
    facts_.set_model_hash(7);
    facts_.set_data_address("127.0.0.1:1");
    facts_.set_num_kv_blocks(7);  // 112 positions
    facts_.set_max_model_len(100);
    facts_.set_numerics_id("cpu avx2");
  }
  std::string Refusal() const { return RegisterRefusal(facts_, model_, 7, numerics_); }

  ModelInfo model_;
  v1::Register facts_;
  std::map<WorkerId, std::string> numerics_ = {{4, "cpu avx2"}};
};

TEST_F(RegisterCheckTest, WhoFitsIsWelcome) {
  EXPECT_EQ(Refusal(), "");
  facts_.set_role(v1::WORKER_ROLE_EXPERT);
  facts_.set_num_kv_blocks(0);
  facts_.set_max_model_len(0);
  EXPECT_EQ(Refusal(), "") << "an expert worker has no KV cache";
}

TEST_F(RegisterCheckTest, ARefusalNamesBothValues) {
  const auto expect = [&](auto change, const char* one, const char* other) {
    const v1::Register good = facts_;
    change();
    EXPECT_THAT(Refusal(), testing::AllOf(HasSubstr(one), HasSubstr(other)));
    facts_ = good;
  };
  const std::string protocol = absl::StrCat(kProtocolVersion);
  expect([&] { facts_.set_protocol_version(99); }, "99", protocol.c_str());
  expect([&] { facts_.set_version("0.0"); }, "0.0", SWITCHYARD_VERSION);
  expect([&] { facts_.set_role(v1::WORKER_ROLE_UNSPECIFIED); }, "no role", "0");
  expect([&] { facts_.set_model_hash(8); }, "0000000000000008", "0000000000000007");
  expect([&] { facts_.set_data_address(""); }, "no data address", "");
  expect([&] { facts_.set_num_kv_blocks(0); }, "0 KV blocks", "1");
  expect([&] { facts_.set_num_kv_blocks(6); }, "96 positions", "100");
  expect([&] { facts_.set_max_model_len(99); }, "99 positions", "100");
  expect([&] { facts_.set_numerics_id("cpu avx512"); }, "cpu avx512", "worker 4");
}

}  // namespace
}  // namespace switchyard
