// HttpClient: a blocking HTTP/1.1 client for one connection: the evaluation's, and the tests'. Used
// by one thread at a time. Every wait has a limit. No Boost type appears here.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"

namespace switchyard {

struct HttpReply {
  int status = 0;
  std::vector<std::pair<std::string, std::string>> headers;
  std::string body;

  // "" when missing; names in any case.
  std::string Header(const std::string& name) const;
};

class HttpClient {
 public:
  // `url`: http://HOST[:PORT][/PATH]; the path is put in front of every target. Connects when first
  // needed.
  static absl::StatusOr<std::unique_ptr<HttpClient>> Create(const std::string& url);
  ~HttpClient();

  // Sends one request and reads the whole reply. Keeps the connection if it can. kUnavailable,
  // naming the address, when the server cannot be reached or breaks off; kDeadlineExceeded after
  // `timeout`.
  absl::StatusOr<HttpReply> Send(const std::string& method, const std::string& target,
                                 const std::vector<std::pair<std::string, std::string>>& headers,
                                 const std::string& body, std::chrono::milliseconds timeout);

 private:
  struct State;
  explicit HttpClient(std::unique_ptr<State> state);
  const std::unique_ptr<State> state_;
};

}  // namespace switchyard
