#include "server/http_client.h"

#include <boost/asio/connect.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <boost/beast/http/message.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/read.hpp>
#include <boost/beast/http/string_body.hpp>
#include <boost/beast/http/write.hpp>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace switchyard {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
using asio::ip::tcp;
using boost::system::error_code;

namespace {

constexpr uint64_t kMaxReplyBytes = 256 << 20;

}  // namespace

struct HttpClient::State {
  asio::io_context io;
  std::unique_ptr<beast::tcp_stream> stream;  // null: not connected
  beast::flat_buffer buffer;
  std::string host;
  std::string port = "80";
  std::string prefix;

  error_code Connect(std::chrono::milliseconds timeout);
  error_code Exchange(const http::request<http::string_body>& request,
                      http::response_parser<http::string_body>* parser,
                      std::chrono::milliseconds timeout);
  // Runs the operation that was started until it completed.
  void Run() {
    io.restart();
    io.run();
  }
};

error_code HttpClient::State::Connect(std::chrono::milliseconds timeout) {
  error_code error;
  tcp::resolver resolver(io);
  const auto endpoints = resolver.resolve(host, port, error);
  if (error) return error;
  stream = std::make_unique<beast::tcp_stream>(io);
  buffer.clear();
  stream->expires_after(timeout);
  stream->async_connect(endpoints,
                        [&error](error_code result, const tcp::endpoint&) { error = result; });
  Run();
  if (error) {
    stream = nullptr;
  } else {
    stream->socket().set_option(tcp::no_delay(true), error);
  }
  return error;
}

error_code HttpClient::State::Exchange(const http::request<http::string_body>& request,
                                       http::response_parser<http::string_body>* parser,
                                       std::chrono::milliseconds timeout) {
  error_code error;
  stream->expires_after(timeout);
  http::async_write(*stream, request, [&error](error_code result, size_t) { error = result; });
  Run();
  if (error) return error;
  http::async_read(*stream, buffer, *parser,
                   [&error](error_code result, size_t) { error = result; });
  Run();
  return error;
}

HttpClient::HttpClient(std::unique_ptr<State> state) : state_(std::move(state)) {}
HttpClient::~HttpClient() = default;

absl::StatusOr<std::unique_ptr<HttpClient>> HttpClient::Create(const std::string& url) {
  static constexpr char kScheme[] = "http://";
  if (!absl::StartsWith(url, kScheme)) {
    return absl::InvalidArgumentError(absl::StrCat("'", url, "' is not an http:// URL"));
  }
  auto state = std::make_unique<State>();
  std::string authority = url.substr(sizeof(kScheme) - 1);
  const size_t slash = authority.find('/');
  if (slash != std::string::npos) {
    state->prefix = authority.substr(slash);
    authority.resize(slash);
    while (!state->prefix.empty() && state->prefix.back() == '/') state->prefix.pop_back();
  }
  state->host = authority;
  const size_t colon = authority.rfind(':');
  if (colon != std::string::npos && authority.find(']', colon) == std::string::npos) {
    state->host = authority.substr(0, colon);
    state->port = authority.substr(colon + 1);
  }
  if (state->host.size() > 2 && state->host.front() == '[')
    state->host = state->host.substr(1, state->host.size() - 2);
  int number = 0;
  if (state->host.empty() || !absl::SimpleAtoi(state->port, &number) || number < 1 ||
      number > 65535) {
    return absl::InvalidArgumentError(absl::StrCat("'", url, "' names no host and port"));
  }
  return std::unique_ptr<HttpClient>(new HttpClient(std::move(state)));
}

absl::StatusOr<HttpReply> HttpClient::Send(
    const std::string& method, const std::string& target,
    const std::vector<std::pair<std::string, std::string>>& headers, const std::string& body,
    std::chrono::milliseconds timeout) {
  http::request<http::string_body> request;
  request.version(11);
  request.method_string(method);
  request.target(state_->prefix + target);
  request.set(http::field::host, absl::StrCat(state_->host, ":", state_->port));
  for (const auto& [name, value] : headers) request.set(name, value);
  request.body() = body;
  request.prepare_payload();

  const bool reused = state_->stream != nullptr;
  http::response_parser<http::string_body> parser;
  parser.body_limit(kMaxReplyBytes);
  parser.skip(method == "HEAD");
  error_code error;
  if (!reused) error = state_->Connect(timeout);
  if (!error) error = state_->Exchange(request, &parser, timeout);
  if (error && error != beast::error::timeout && reused && !parser.got_some()) {
    // The server closed the connection while it was idle.
    return (state_->stream = nullptr, Send(method, target, headers, body, timeout));
  }
  if (error) {
    state_->stream = nullptr;
    const std::string where = absl::StrCat(state_->host, ":", state_->port);
    if (error == beast::error::timeout) {
      return absl::DeadlineExceededError(
          absl::StrCat(where, " did not answer within ", timeout.count(), " ms"));
    }
    return absl::UnavailableError(absl::StrCat("cannot reach ", where, ": ", error.message()));
  }
  HttpReply reply;
  const auto message = parser.release();
  reply.status = static_cast<int>(message.result_int());
  for (const auto& field : message) {
    reply.headers.emplace_back(std::string(field.name_string().data(), field.name_string().size()),
                               std::string(field.value().data(), field.value().size()));
  }
  reply.body = message.body();
  if (!message.keep_alive()) state_->stream = nullptr;
  return reply;
}

std::string HttpReply::Header(const std::string& name) const {
  for (const auto& [key, value] : headers) {
    if (absl::EqualsIgnoreCase(key, name)) return value;
  }
  return "";
}

}  // namespace switchyard
