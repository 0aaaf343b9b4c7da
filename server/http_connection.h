// Connection: one client's socket, as a coroutine on one I/O thread; and the state behind an
// HttpExchange. Internal to the HTTP server (http_server.cc, http_connection.cc): it exposes Boost
// types.
#pragma once

#include <atomic>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <thread>
#include <unordered_set>

#include "kernels/mutex.h"
#include "server/http_server.h"

namespace switchyard {

class Connection;

// One I/O thread with its own io_context. Kept alive by every exchange that may still post to it.
struct IoThread {
  boost::asio::io_context io{1};
  boost::asio::executor_work_guard<boost::asio::io_context::executor_type> work{io.get_executor()};
  std::thread thread;
  std::unordered_set<Connection*> connections;  // this thread only
};

// What all connections of a server share. Constant after the start, but for the counters.
struct ConnectionContext {
  HttpServerOptions options;
  HttpHandler handler;
  std::atomic<int> num_connections{0};
  std::atomic<int> num_refusals{0};   // connections that are being turned away
  std::atomic<bool> stopping{false};  // connections that begin now end at once

  Mutex mu;
  CondVar idle;
  int num_answering SY_GUARDED_BY(mu) = 0;  // requests handed to the handler and not yet answered

  void BeginAnswer() SY_EXCLUDES(mu);
  void EndAnswer() SY_EXCLUDES(mu);
};

struct HttpExchange::State {
  State(std::shared_ptr<IoThread> io_thread, std::weak_ptr<Connection> peer, size_t limit)
      : io(std::move(io_thread)), connection(std::move(peer)), max_pending_bytes(limit) {}

  enum class Phase { kWaiting, kResponded, kStreaming, kEnded, kBroken, kGone };

  // Schedules the connection to look at this state.
  void Wake() SY_EXCLUDES(mu);
  // Has the connection reset: the stream cannot be completed. REQUIRES: phase is kBroken.
  void Break() SY_EXCLUDES(mu);
  // The client has gone, or the answer was sent: later calls are ignored. Runs the callback if
  // there was no answer.
  void Close(bool answered) SY_EXCLUDES(mu);

  const std::shared_ptr<IoThread> io;
  const std::weak_ptr<Connection> connection;
  const size_t max_pending_bytes;
  Mutex mu;
  Phase phase SY_GUARDED_BY(mu) = Phase::kWaiting;
  HttpResponse response SY_GUARDED_BY(mu);
  HttpHeaders stream_headers SY_GUARDED_BY(mu);
  std::string pending SY_GUARDED_BY(mu);  // stream bytes not yet taken by the connection
  std::function<void()> on_disconnect SY_GUARDED_BY(mu);
};

class Connection : public std::enable_shared_from_this<Connection> {
 public:
  // `count`: the counter of `context` that it is part of while it lives.
  Connection(std::shared_ptr<IoThread> io, std::shared_ptr<ConnectionContext> context,
             boost::asio::ip::tcp::socket socket, std::atomic<int>* count);
  ~Connection();

  // The connection's whole life, or a refusal because there are too many; then Finish. And its
  // watchdog, which closes the socket when deadline_ passes.
  boost::asio::awaitable<void> Run();
  boost::asio::awaitable<void> TurnAway();
  boost::asio::awaitable<void> Watchdog();
  // The four below: on the connection's I/O thread.
  void Finish();  // Run has ended, however it did
  void Notify();  // the exchange changed
  void Close();
  void Reset();  // closes so that the peer sees an error, not an end

 private:
  using Clock = std::chrono::steady_clock;

  struct Incoming {
    HttpRequest request;
    std::string request_id;  // of the answer
    bool keep_alive = false;
    bool chunked_ok = true;  // HTTP/1.1
    bool head = false;
  };

  boost::asio::awaitable<bool> ReadRequest(Incoming* incoming);
  boost::asio::awaitable<bool> Answer(const Incoming& incoming, HttpExchange::State& state);
  boost::asio::awaitable<bool> Stream(const Incoming& incoming, HttpExchange::State& state);
  boost::asio::awaitable<bool> WriteAll(const std::string& bytes);
  // `request_id`: the client's, if it is known.
  boost::asio::awaitable<void> Refuse(int status, std::string_view request_id,
                                      std::string_view message);
  // Returns when Notify was called, `until` passed or the peer closed; false in the last case.
  boost::asio::awaitable<bool> WaitForExchange(Clock::time_point until);
  boost::asio::awaitable<void> WaitForNotify(Clock::time_point until);
  boost::asio::awaitable<void> WaitForPeerClose();
  void SetDeadline(Clock::time_point deadline);

  const std::shared_ptr<IoThread> io_;
  const std::shared_ptr<ConnectionContext> context_;
  std::atomic<int>* const count_;
  boost::asio::ip::tcp::socket socket_;
  boost::beast::flat_buffer buffer_;  // read but not parsed: pipelined requests
  boost::asio::steady_timer wake_;
  boost::asio::steady_timer watchdog_;
  Clock::time_point deadline_ = Clock::time_point::max();
  bool notified_ = false;
  bool peer_closed_ = false;
  bool done_ = false;
};

}  // namespace switchyard
