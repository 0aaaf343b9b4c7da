#include "server/http_connection.h"

#include <algorithm>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/experimental/awaitable_operators.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/read.hpp>
#include <boost/beast/http/string_body.hpp>
#include <ctime>
#include <random>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/api_error.h"

namespace switchyard {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
using asio::ip::tcp;
using boost::system::error_code;

namespace {

// Read ahead while a request is being answered: enough for pipelined requests, and to see the peer
// close.
constexpr size_t kMaxReadAheadBytes = 64 << 10;

auto Token(error_code& error) { return asio::redirect_error(asio::use_awaitable, error); }

std::string HttpDate() {
  const std::time_t now = std::time(nullptr);
  std::tm utc;
  gmtime_r(&now, &utc);
  char text[40];
  return {text, std::strftime(text, sizeof(text), "%a, %d %b %Y %H:%M:%S GMT", &utc)};
}

std::string Chunk(std::string_view bytes, bool chunked) {
  if (!chunked) return std::string(bytes);
  return absl::StrCat(absl::Hex(bytes.size()), "\r\n",
                      absl::string_view(bytes.data(), bytes.size()), "\r\n");
}

template <typename Name>  // http::field or the name itself
std::string Field(const http::fields& fields, Name name) {
  const auto value = fields[name];
  return {value.data(), value.size()};
}

// The id that an answer carries: the client's own if it is printable and short, else a new one.
std::string AnswerRequestId(std::string_view from_client) {
  const bool printable = std::all_of(from_client.begin(), from_client.end(),
                                     [](char c) { return c > ' ' && c <= '~'; });
  if (!from_client.empty() && from_client.size() <= 128 && printable)
    return std::string(from_client);
  thread_local std::mt19937_64 random{std::random_device{}()};
  return absl::StrCat("req-", absl::Hex(random(), absl::kZeroPad16));
}

// How an answer begins, beside the headers that its maker gave it.
struct Head {
  int status = 200;
  std::string_view content_type;  // empty: none
  std::string_view request_id;
  int64_t length = -1;  // < 0: a stream
  bool keep_alive = false;
  bool chunked = false;  // when a stream
};

bool HasBody(int status) { return status != 204; }

std::string FormatHead(const Head& head, const HttpHeaders& headers) {
  const auto reason =
      http::obsolete_reason(http::int_to_status(static_cast<unsigned>(head.status)));
  std::string text =
      absl::StrCat("HTTP/1.1 ", head.status, " ", absl::string_view(reason.data(), reason.size()),
                   "\r\nServer: switchyard/" SWITCHYARD_VERSION "\r\nDate: ", HttpDate(),
                   "\r\nConnection: ", head.keep_alive ? "keep-alive" : "close", "\r\n");
  const auto add = [&text](std::string_view name, std::string_view value) {
    absl::StrAppend(&text, absl::string_view(name.data(), name.size()), ": ",
                    absl::string_view(value.data(), value.size()), "\r\n");
  };
  add("X-Request-Id", head.request_id);
  if (!head.content_type.empty()) add("Content-Type", head.content_type);
  if (head.length >= 0 && HasBody(head.status)) add("Content-Length", std::to_string(head.length));
  if (head.length < 0 && head.chunked) add("Transfer-Encoding", "chunked");
  for (const auto& [name, value] : headers) add(name, value);
  return text + "\r\n";
}

}  // namespace

void ConnectionContext::BeginAnswer() {
  MutexLock lock(mu);
  ++num_answering;
}

void ConnectionContext::EndAnswer() {
  MutexLock lock(mu);
  if (--num_answering == 0) idle.NotifyAll();
}

// ---- HttpExchange

HttpExchange::HttpExchange(std::shared_ptr<State> state) : state_(std::move(state)) {}

HttpExchange::~HttpExchange() {
  bool streaming = false;
  {
    MutexLock lock(state_->mu);
    streaming = state_->phase == State::Phase::kStreaming;
    if (streaming) state_->phase = State::Phase::kBroken;
  }
  if (streaming) {
    state_->Break();  // a stream that was never ended must not look like a complete one
  } else {
    Respond({.status = 500,
             .content_type = "application/json",
             .headers = {},
             .body = ErrorBody(500, "the request was dropped")});
  }
}

void HttpExchange::Respond(HttpResponse response) {
  {
    MutexLock lock(state_->mu);
    if (state_->phase != State::Phase::kWaiting) return;
    state_->phase = State::Phase::kResponded;
    state_->response = std::move(response);
  }
  state_->Wake();
}

void HttpExchange::BeginStream(HttpHeaders headers) {
  {
    MutexLock lock(state_->mu);
    if (state_->phase != State::Phase::kWaiting) return;
    state_->phase = State::Phase::kStreaming;
    state_->stream_headers = std::move(headers);
  }
  state_->Wake();
}

void HttpExchange::Write(std::string bytes) {
  bool too_slow = false;
  {
    MutexLock lock(state_->mu);
    if (state_->phase != State::Phase::kStreaming) return;
    // The lag before this write: one large event (an echoed prompt) is no sign of a slow reader.
    too_slow = state_->pending.size() > state_->max_pending_bytes;
    if (too_slow) {
      state_->phase = State::Phase::kBroken;
    } else {
      state_->pending += bytes;
    }
  }
  if (too_slow) {
    state_->Break();
  } else {
    state_->Wake();
  }
}

void HttpExchange::EndStream() {
  {
    MutexLock lock(state_->mu);
    if (state_->phase != State::Phase::kStreaming) return;
    state_->phase = State::Phase::kEnded;
  }
  state_->Wake();
}

void HttpExchange::OnDisconnect(std::function<void()> callback) {
  {
    MutexLock lock(state_->mu);
    if (state_->phase != State::Phase::kGone) {
      state_->on_disconnect = std::move(callback);
      return;
    }
  }
  callback();
}

void HttpExchange::State::Wake() {
  asio::post(io->io, [peer = connection] {
    if (const auto strong = peer.lock()) strong->Notify();
  });
}

void HttpExchange::State::Break() {
  asio::post(io->io, [peer = connection] {
    if (const auto strong = peer.lock()) strong->Reset();
  });
}

void HttpExchange::State::Close(bool answered) {
  std::function<void()> callback;
  {
    MutexLock lock(mu);
    phase = Phase::kGone;
    pending.clear();
    callback.swap(on_disconnect);
  }
  if (!answered && callback) callback();
}

// ---- Connection

Connection::Connection(std::shared_ptr<IoThread> io, std::shared_ptr<ConnectionContext> context,
                       tcp::socket socket, std::atomic<int>* count)
    : io_(std::move(io)),
      context_(std::move(context)),
      count_(count),
      socket_(std::move(socket)),
      buffer_(context_->options.max_header_bytes + kMaxReadAheadBytes),
      wake_(io_->io),
      watchdog_(io_->io) {
  count_->fetch_add(1);
}

Connection::~Connection() { count_->fetch_sub(1); }

void Connection::Notify() {
  notified_ = true;
  wake_.cancel();
}

void Connection::Close() {
  peer_closed_ = true;
  error_code ignored;
  socket_.close(ignored);
  wake_.cancel();
  watchdog_.cancel();
}

void Connection::Reset() {
  error_code ignored;
  socket_.set_option(asio::socket_base::linger(true, 0), ignored);
  Close();
}

void Connection::SetDeadline(Clock::time_point deadline) {
  const bool earlier = deadline < deadline_;
  deadline_ = deadline;
  if (earlier) watchdog_.cancel();
}

asio::awaitable<void> Connection::Watchdog() {
  while (!done_) {
    watchdog_.expires_at(deadline_);
    error_code ignored;
    co_await watchdog_.async_wait(Token(ignored));
    if (!done_ && Clock::now() >= deadline_) {
      Reset();
      co_return;
    }
  }
}

asio::awaitable<void> Connection::Run() {
  io_->connections.insert(this);
  bool keep_alive = true;
  while (keep_alive && !peer_closed_) {
    Incoming incoming;
    if (!co_await ReadRequest(&incoming)) break;
    SetDeadline(Clock::time_point::max());
    notified_ = false;
    const auto state = std::make_shared<HttpExchange::State>(
        io_, weak_from_this(), context_->options.max_stream_buffer_bytes);
    context_->BeginAnswer();
    context_->handler(std::move(incoming.request), std::make_shared<HttpExchange>(state));
    const bool answered = co_await Answer(incoming, *state);
    state->Close(answered);
    context_->EndAnswer();
    keep_alive = answered && incoming.keep_alive;
  }
}

asio::awaitable<void> Connection::TurnAway() {
  io_->connections.insert(this);
  co_await Refuse(503, "", "too many connections");
}

void Connection::Finish() {
  done_ = true;
  io_->connections.erase(this);
  error_code ignored;
  if (socket_.is_open()) socket_.shutdown(tcp::socket::shutdown_both, ignored);
  Close();
}

asio::awaitable<bool> Connection::ReadRequest(Incoming* incoming) {
  const HttpServerOptions& options = context_->options;
  error_code error;
  if (buffer_.size() == 0) {
    SetDeadline(Clock::now() + options.idle_timeout);
    const size_t num_read = co_await socket_.async_read_some(buffer_.prepare(4096), Token(error));
    if (error) co_return false;
    buffer_.commit(num_read);
  }
  SetDeadline(Clock::now() + options.request_timeout);
  http::request_parser<http::string_body> parser;
  parser.header_limit(static_cast<uint32_t>(options.max_header_bytes));
  parser.body_limit(options.max_body_bytes);
  co_await http::async_read_header(socket_, buffer_, parser, Token(error));
  if (!error && absl::EqualsIgnoreCase(Field(parser.get(), http::field::expect), "100-continue")) {
    const std::string go_on = "HTTP/1.1 100 Continue\r\n\r\n";
    co_await asio::async_write(socket_, asio::buffer(go_on), Token(error));
  }
  if (!error) co_await http::async_read(socket_, buffer_, parser, Token(error));
  // Also of a request whose headers broke off.
  const std::string request_id = Field(parser.get(), "X-Request-Id");
  if (error == http::error::body_limit) {
    co_await Refuse(
        413, request_id,
        absl::StrCat("the request's body exceeds the limit of ", options.max_body_bytes, " bytes"));
    co_return false;
  }
  if (error == http::error::header_limit || error == http::error::buffer_overflow) {
    co_await Refuse(
        431, request_id,
        absl::StrCat("the request's headers exceed ", options.max_header_bytes, " bytes"));
    co_return false;
  }
  if (error.category() == http::make_error_code(http::error::bad_method).category() &&
      error != http::error::end_of_stream && error != http::error::partial_message) {
    co_await Refuse(400, request_id, absl::StrCat("malformed HTTP request: ", error.message()));
    co_return false;
  }
  if (error) co_return false;

  auto message = parser.release();
  HttpRequest& request = incoming->request;
  request.arrival = Clock::now();
  request.method = std::string(message.method_string().data(), message.method_string().size());
  const std::string target(message.target().data(), message.target().size());
  request.path = target.substr(0, target.find('?'));
  request.content_type = Field(message, http::field::content_type);
  request.authorization = Field(message, http::field::authorization);
  request.body = std::move(message.body());
  incoming->request_id = AnswerRequestId(request_id);
  incoming->chunked_ok = message.version() >= 11;
  incoming->keep_alive = message.keep_alive() && incoming->chunked_ok;
  incoming->head = request.method == "HEAD";
  co_return true;
}

asio::awaitable<void> Connection::Refuse(int status, std::string_view request_id,
                                         std::string_view message) {
  const std::string body = ErrorBody(status, message);
  HttpHeaders headers = {{"Access-Control-Allow-Origin", "*"}};
  if (status == 503) headers.emplace_back("Retry-After", "1");
  const std::string answer_id = AnswerRequestId(request_id);
  const std::string reply = FormatHead({.status = status,
                                        .content_type = "application/json",
                                        .request_id = answer_id,
                                        .length = static_cast<int64_t>(body.size())},
                                       headers) +
                            body;
  if (!co_await WriteAll(reply)) co_return;
  error_code error;
  socket_.shutdown(tcp::socket::shutdown_send, error);
  SetDeadline(Clock::now() + context_->options.linger_timeout);
  buffer_.clear();
  while (!error) co_await socket_.async_read_some(buffer_.prepare(16 << 10), Token(error));
}

asio::awaitable<bool> Connection::WriteAll(const std::string& bytes) {
  SetDeadline(Clock::now() + context_->options.write_timeout);
  error_code error;
  co_await asio::async_write(socket_, asio::buffer(bytes), Token(error));
  SetDeadline(Clock::time_point::max());
  co_return !error;
}

asio::awaitable<void> Connection::WaitForNotify(Clock::time_point until) {
  if (notified_) co_return;
  wake_.expires_at(until);
  error_code ignored;
  co_await wake_.async_wait(Token(ignored));
}

asio::awaitable<void> Connection::WaitForPeerClose() {
  while (buffer_.size() < kMaxReadAheadBytes) {
    error_code error;
    const size_t room = std::min<size_t>(4096, kMaxReadAheadBytes - buffer_.size());
    const size_t num_read = co_await socket_.async_read_some(buffer_.prepare(room), Token(error));
    if (error == asio::error::operation_aborted) co_return;
    if (error) {
      peer_closed_ = true;
      co_return;
    }
    buffer_.commit(num_read);
  }
  // Read ahead enough: the peer's close will be seen when we write.
  asio::steady_timer never(io_->io, Clock::time_point::max());
  error_code ignored;
  co_await never.async_wait(Token(ignored));
}

asio::awaitable<bool> Connection::WaitForExchange(Clock::time_point until) {
  using asio::experimental::awaitable_operators::operator||;
  co_await (WaitForNotify(until) || WaitForPeerClose());
  notified_ = false;
  co_return !peer_closed_;
}

asio::awaitable<bool> Connection::Answer(const Incoming& incoming, HttpExchange::State& state) {
  using Phase = HttpExchange::State::Phase;
  while (true) {
    Phase phase;
    HttpResponse response;
    {
      MutexLock lock(state.mu);
      phase = state.phase;
      if (phase == Phase::kResponded) response = std::move(state.response);
    }
    if (phase == Phase::kResponded) {
      std::string reply = FormatHead({.status = response.status,
                                      .content_type = response.content_type,
                                      .request_id = incoming.request_id,
                                      .length = static_cast<int64_t>(response.body.size()),
                                      .keep_alive = incoming.keep_alive},
                                     response.headers);
      if (!incoming.head && HasBody(response.status)) reply += response.body;
      co_return co_await WriteAll(reply);
    }
    if (phase != Phase::kWaiting) co_return co_await Stream(incoming, state);
    if (!co_await WaitForExchange(Clock::time_point::max())) co_return false;
  }
}

asio::awaitable<bool> Connection::Stream(const Incoming& incoming, HttpExchange::State& state) {
  using Phase = HttpExchange::State::Phase;
  const bool chunked = incoming.chunked_ok;
  bool head_sent = false;
  auto last_write = Clock::now();
  while (true) {
    std::string bytes;
    std::string pending;
    Phase phase;
    {
      MutexLock lock(state.mu);
      phase = state.phase;
      pending.swap(state.pending);
      if (!head_sent) {
        bytes = FormatHead({.content_type = "text/event-stream; charset=utf-8",
                            .request_id = incoming.request_id,
                            .keep_alive = incoming.keep_alive,
                            .chunked = chunked},
                           state.stream_headers);
      }
    }
    head_sent = true;
    if (phase == Phase::kBroken) co_return false;
    if (!pending.empty()) bytes += Chunk(pending, chunked);
    if (phase == Phase::kEnded && chunked) bytes += "0\r\n\r\n";
    const auto next_ping = last_write + context_->options.ping_interval;
    if (bytes.empty() && Clock::now() >= next_ping) bytes = Chunk(": ping\n\n", chunked);
    if (!bytes.empty()) {
      if (!co_await WriteAll(bytes)) co_return false;
      last_write = Clock::now();
    }
    if (phase == Phase::kEnded) co_return true;
    if (bytes.empty() && !co_await WaitForExchange(next_ping)) co_return false;
  }
}

}  // namespace switchyard
