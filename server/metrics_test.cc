// No dead series: traffic of every kind moves every family.
#include <gtest/gtest.h>

#include <set>
#include <sstream>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "server/fake_engine.h"
#include "server/raw_socket.h"

namespace switchyard {
namespace {

// Adds the families of a scrape to `all`, and those that are not zero to `moved`.
void Read(const std::string& text, std::set<std::string>* all, std::set<std::string>* moved) {
  std::string family;
  for (const absl::string_view line : absl::StrSplit(text, '\n', absl::SkipEmpty())) {
    if (absl::StartsWith(line, "# TYPE ")) {
      const std::vector<std::string> words = absl::StrSplit(line, ' ');
      family = words[2];
      all->insert(family);
      EXPECT_TRUE(absl::StartsWith(family, "switchyard_")) << line;
      EXPECT_EQ(words[3] == "counter", absl::EndsWith(family, "_total")) << line;
    } else if (!absl::StartsWith(line, "#")) {
      double value = 0;
      EXPECT_TRUE(absl::SimpleAtod(line.substr(line.rfind(' ') + 1), &value)) << line;
      EXPECT_EQ(value, value) << "NaN: " << line;
      if (value != 0) moved->insert(family);
    }
  }
}

TEST(MetricsTest, EveryFamilyMoves) {
  TestServerOptions options;
  options.num_kv_blocks = 16;  // of 16 tokens: two long requests do not fit together
  options.max_model_len = 200;
  options.scheduler = {.max_num_seqs = 2, .max_queued_requests = 2};
  TestServer server(options);
  // Workers of other processes, one of which died; that they move for real is test_cluster.py's.
  server.server().SetCluster([] {
    ClusterSnapshot cluster;
    cluster.networked = true;
    cluster.epoch = 3;
    cluster.joins = 4;
    cluster.failures = cluster.failovers = cluster.drains = cluster.refusals = 1;
    for (const char* name :
         {"data_wait_seconds", "dispatch_bytes", "combine_bytes", "plans", "plan_seconds",
          "weight_transfers", "weight_transfer_bytes", "foreign_copies"}) {
      cluster.counters[name] = 2;
    }
    cluster.balancedness = 0.75;
    cluster.plan_gap = 0.125;
    for (const char* role : {"attention", "expert"}) {
      ClusterSnapshot::Worker& worker = cluster.workers.emplace_back();
      worker.role = role;
      worker.rank = 0;
      worker.heartbeat_age_s = 0.125;
    }
    return cluster;
  });
  std::set<std::string> all;
  std::set<std::string> moved;
  const auto scrape = [&] { Read(server.Send("GET", "/metrics").body, &all, &moved); };

  const std::string prompt(40, 'a');
  const std::string body = R"({"prompt":")" + prompt + R"(","max_tokens":40,"ignore_eos":true})";
  EXPECT_EQ(server.Post("/v1/completions", body).status, 200);
  EXPECT_EQ(server.Post("/v1/completions", body).status, 200);  // from the prefix cache

  // One that runs, two that wait and will preempt it, one too many.
  const auto request = [](const std::string& text) {
    const std::string json = R"({"prompt":")" + text + R"(","max_tokens":140,"ignore_eos":true})";
    return "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: " +
           std::to_string(json.size()) + "\r\n\r\n" + json;
  };
  server.worker().Pause();
  std::vector<std::unique_ptr<RawSocket>> clients;
  for (const char* text : {"first of many", "second", "third"}) {
    clients.push_back(std::make_unique<RawSocket>(server.server().http_port()));
    clients.back()->Send(request(text));
    const int expected = static_cast<int>(clients.size());
    ASSERT_TRUE(TestServer::WaitFor([&] {
      const SchedulerStats stats = server.scheduler().Stats();
      return stats.running + stats.waiting == expected;
    }));
  }
  scrape();
  EXPECT_EQ(server.Post("/v1/completions", body).status, 429);
  server.worker().Resume();
  for (const auto& client : clients)
    EXPECT_TRUE(absl::StrContains(client->ReceiveUntil("\"usage\""), "200 OK"));
  ASSERT_TRUE(server.WaitIdle());
  scrape();
  std::string dead;
  for (const std::string& family : all) {
    if (!moved.contains(family)) dead += family + " ";
  }
  EXPECT_EQ(dead, "");
  EXPECT_GE(all.size(), 20u);
}

TEST(MetricsTest, CountsWhatWasKept) {
  TestServer server;
  const HttpReply reply = server.Post(
      "/v1/completions", R"({"prompt":"The quick brown fox","stop":"brown","max_tokens":100})");
  EXPECT_EQ(reply.status, 200);
  const auto value = [&](const std::string& name) {
    const std::string text = server.Send("GET", "/metrics").body;
    const size_t at = text.find("\n" + name + " ");
    return at == std::string::npos ? -1 : std::stoi(text.substr(at + name.size() + 2));
  };
  const size_t at = reply.body.find("\"completion_tokens\":");
  ASSERT_NE(at, std::string::npos);
  EXPECT_EQ(value("switchyard_generation_tokens_total"), std::stoi(reply.body.substr(at + 20)));
  EXPECT_EQ(value("switchyard_requests_total{finish_reason=\"stop\"}"), 1);
  EXPECT_TRUE(server.WaitIdle());
}

}  // namespace
}  // namespace switchyard
