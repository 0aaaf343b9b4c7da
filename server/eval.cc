#include "server/eval.h"

#include <algorithm>
#include <atomic>
#include <fstream>
#include <memory>
#include <thread>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "kernels/mutex.h"
#include "nlohmann/json.hpp"
#include "server/http_client.h"
#include "server/json_writer.h"
#include "server/progress_bar.h"

namespace switchyard {
namespace {

using Json = nlohmann::ordered_json;

struct Item {
  std::string domain;
  std::string answer;
  std::string body;  // of the request
};

absl::StatusOr<std::vector<Item>> ReadItems(const EvalOptions& options) {
  std::ifstream file(options.items);
  if (!file) return absl::NotFoundError(absl::StrCat("cannot read '", options.items, "'"));
  std::vector<Item> items;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    if (absl::StripAsciiWhitespace(line).empty()) continue;
    const Json parsed = Json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!parsed.is_object() || !parsed.contains("messages") || !parsed["messages"].is_array() ||
        !parsed.contains("answer") || !parsed["answer"].is_string()) {
      return absl::InvalidArgumentError(
          absl::StrCat(options.items, ":", number,
                       ": not an object with messages (a list) and answer (a string)"));
    }
    Json body = {
        {"messages", parsed["messages"]}, {"temperature", 0}, {"max_tokens", options.max_tokens}};
    if (!options.model.empty()) body["model"] = options.model;
    const auto domain = parsed.find("domain");
    items.push_back(
        {domain != parsed.end() && domain->is_string() ? domain->get<std::string>() : "all",
         parsed["answer"].get<std::string>(),
         body.dump(-1, ' ', false, Json::error_handler_t::replace)});
  }
  if (items.empty())
    return absl::InvalidArgumentError(absl::StrCat("'", options.items, "' has no items"));
  return items;
}

absl::StatusOr<std::string> Ask(HttpClient& client, const EvalOptions& options, const Item& item) {
  std::vector<std::pair<std::string, std::string>> headers = {{"Content-Type", "application/json"}};
  if (!options.api_key.empty())
    headers.emplace_back("Authorization", absl::StrCat("Bearer ", options.api_key));
  const auto reply = client.Send("POST", "/v1/chat/completions", headers, item.body,
                                 std::chrono::seconds(options.timeout_seconds));
  if (!reply.ok()) return reply.status();
  const Json parsed = Json::parse(reply->body, nullptr, /*allow_exceptions=*/false);
  if (reply->status != 200) {
    return absl::UnavailableError(
        absl::StrCat(options.url, " answered ", reply->status, ": ", reply->body.substr(0, 300)));
  }
  // Through a pointer: a shape of another kind gives null, not an exception.
  static const Json::json_pointer kContent("/choices/0/message/content");
  if (!parsed.is_object() || !parsed.contains(kContent) || !parsed[kContent].is_string()) {
    return absl::InternalError(
        absl::StrCat(options.url, " answered without a message: ", reply->body.substr(0, 300)));
  }
  return parsed[kContent].get<std::string>();
}

bool SameAnswer(const std::string& reply, const std::string& answer) {
  return absl::StripAsciiWhitespace(reply) == absl::StripAsciiWhitespace(answer);
}

// What the threads of a run share.
struct Run {
  const EvalOptions& options;
  const std::vector<Item>& items;
  std::atomic<size_t> next{0};
  Mutex mu;
  ProgressBar progress SY_GUARDED_BY(mu);
  EvalResult result SY_GUARDED_BY(mu);
  absl::Status failure SY_GUARDED_BY(mu);

  void Work(HttpClient& client) {
    for (size_t i = next.fetch_add(1); i < items.size(); i = next.fetch_add(1)) {
      const auto reply = Ask(client, options, items[i]);
      MutexLock lock(mu);
      if (!reply.ok()) {
        failure.Update(reply.status());
        next.store(items.size());  // nobody begins another
        return;
      }
      const bool correct = SameAnswer(*reply, items[i].answer);
      for (EvalScore* score : {&result.overall, &result.domains[items[i].domain]}) {
        ++score->total;
        score->correct += correct;
      }
      progress.Update(
          result.overall.total,
          absl::StrFormat("%d of %d right", result.overall.correct, result.overall.total));
    }
  }
};

void WriteScore(const EvalScore& score, JsonWriter& json) {
  json.BeginObject().Key("accuracy").Double(score.accuracy());
  json.Member("correct", score.correct).Member("total", score.total).EndObject();
}

}  // namespace

absl::StatusOr<EvalResult> RunEval(const EvalOptions& given) {
  EvalOptions options = given;
  options.url = std::string(absl::StripSuffix(absl::StripSuffix(given.url, "/"), "/v1"));
  const auto items = ReadItems(options);
  if (!items.ok()) return items.status();
  std::vector<std::unique_ptr<HttpClient>> clients;
  const size_t num_threads =
      std::min<size_t>(static_cast<size_t>(std::max(options.concurrency, 1)), items->size());
  for (size_t i = 0; i < num_threads; ++i) {
    auto client = HttpClient::Create(options.url);
    if (!client.ok()) return client.status();
    clients.push_back(*std::move(client));
  }
  Run run{.options = options,
          .items = *items,
          .mu = {},
          .progress = ProgressBar("eval", static_cast<int64_t>(items->size()), /*quiet=*/false),
          .result = {},
          .failure = {}};
  std::vector<std::thread> threads;
  for (const auto& client : clients) threads.emplace_back([&run, &client] { run.Work(*client); });
  for (std::thread& thread : threads) thread.join();
  MutexLock lock(run.mu);
  if (!run.failure.ok()) return run.failure;
  return run.result;
}

std::string FormatEval(const EvalResult& result, bool json) {
  if (json) {
    JsonWriter out;
    out.BeginObject().Key("overall");
    WriteScore(result.overall, out);
    out.Key("domains").BeginObject();
    for (const auto& [domain, score] : result.domains) {
      out.Key(domain);
      WriteScore(score, out);
    }
    out.EndObject().EndObject();
    return out.Take();
  }
  std::string text;
  for (const auto& [domain, score] : result.domains) {
    absl::StrAppendFormat(&text, "%-20s %5d / %-5d %6.1f %%\n", domain, score.correct, score.total,
                          100 * score.accuracy());
  }
  absl::StrAppendFormat(&text, "%-20s %5d / %-5d %6.1f %%", "overall", result.overall.correct,
                        result.overall.total, 100 * result.overall.accuracy());
  return text;
}

}  // namespace switchyard
