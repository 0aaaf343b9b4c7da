#include "server/http_server.h"

#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/use_awaitable.hpp>

#include "absl/strings/str_cat.h"
#include "server/http_connection.h"
#include "spdlog/spdlog.h"

namespace switchyard {

namespace asio = boost::asio;
using asio::ip::tcp;

struct HttpServer::State {
  std::shared_ptr<ConnectionContext> context;
  std::vector<std::shared_ptr<IoThread>> io_threads;
  std::unique_ptr<tcp::acceptor> acceptor;  // on the first I/O thread
  std::unique_ptr<asio::steady_timer> retry;
  bool stopped = false;

  asio::awaitable<void> Accept();
  void Adopt(const std::shared_ptr<IoThread>& io, tcp::socket socket);
};

namespace {

// Binds and listens on the first address of `host` that accepts it.
boost::system::error_code Listen(const HttpServerOptions& options, asio::io_context& io,
                                 tcp::acceptor& acceptor) {
  boost::system::error_code error;
  tcp::resolver resolver(io);
  const auto endpoints =
      resolver.resolve(options.host, std::to_string(options.port),
                       tcp::resolver::passive | tcp::resolver::numeric_service, error);
  if (error) return error;
  for (const auto& entry : endpoints) {
    const tcp::endpoint endpoint = entry.endpoint();
    boost::system::error_code ignored;
    acceptor.close(ignored);
    if (acceptor.open(endpoint.protocol(), error)) continue;
    if (acceptor.set_option(tcp::acceptor::reuse_address(true), error)) continue;
    if (acceptor.bind(endpoint, error)) continue;
    if (!acceptor.listen(asio::socket_base::max_listen_connections, error)) return error;
  }
  return error;
}

}  // namespace

HttpServer::HttpServer(const HttpServerOptions& options, HttpHandler handler) : state_(new State) {
  state_->context = std::make_shared<ConnectionContext>();
  state_->context->options = options;
  state_->context->handler = std::move(handler);
  for (int i = 0; i < options.num_io_threads; ++i)
    state_->io_threads.push_back(std::make_shared<IoThread>());
}

HttpServer::~HttpServer() { Stop(); }

absl::StatusOr<uint16_t> HttpServer::Start() {
  State& state = *state_;
  asio::io_context& io = state.io_threads.front()->io;
  state.acceptor = std::make_unique<tcp::acceptor>(io);
  state.retry = std::make_unique<asio::steady_timer>(io);
  const HttpServerOptions& options = state.context->options;
  if (const auto error = Listen(options, io, *state.acceptor)) {
    state.acceptor.reset();
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", options.host, ":", options.port, ": ", error.message()));
  }
  const uint16_t port = state.acceptor->local_endpoint().port();
  asio::co_spawn(io, state.Accept(), asio::detached);
  for (const auto& io_thread : state.io_threads) {
    io_thread->thread = std::thread([io_thread] { io_thread->io.run(); });
  }
  return port;
}

asio::awaitable<void> HttpServer::State::Accept() {
  size_t next = 0;
  while (acceptor->is_open()) {
    const std::shared_ptr<IoThread>& io = io_threads[next++ % io_threads.size()];
    boost::system::error_code error;
    tcp::socket socket =
        co_await acceptor->async_accept(io->io, asio::redirect_error(asio::use_awaitable, error));
    if (error == asio::error::operation_aborted) co_return;
    if (error) {
      // Out of file descriptors, for example: wait for some to come back.
      spdlog::warn("accept failed: {}", error.message());
      retry->expires_after(std::chrono::milliseconds(100));
      co_await retry->async_wait(asio::redirect_error(asio::use_awaitable, error));
      continue;
    }
    Adopt(io, std::move(socket));
  }
}

void HttpServer::State::Adopt(const std::shared_ptr<IoThread>& io, tcp::socket socket) {
  boost::system::error_code ignored;
  socket.set_option(tcp::no_delay(true), ignored);
  socket.set_option(asio::socket_base::send_buffer_size(context->options.send_buffer_bytes),
                    ignored);
  const bool full = context->num_connections.load() >= context->options.max_connections;
  if (full && context->num_refusals.load() >= context->options.max_refusals) return;
  const auto connection = std::make_shared<Connection>(
      io, context, std::move(socket), full ? &context->num_refusals : &context->num_connections);
  asio::post(io->io, [io, connection, full, stopping = &context->stopping] {
    if (stopping->load()) return;
    asio::co_spawn(io->io, full ? connection->TurnAway() : connection->Run(),
                   [connection](const std::exception_ptr& failure) {
                     if (failure)
                       spdlog::error("a connection failed and is closed");  // out of memory, say
                     connection->Finish();
                   });
    asio::co_spawn(io->io, connection->Watchdog(), [connection](const std::exception_ptr&) {});
  });
}

bool HttpServer::WaitIdle(std::chrono::steady_clock::time_point deadline) {
  ConnectionContext& context = *state_->context;
  MutexLock lock(context.mu);
  while (context.num_answering > 0) {
    if (!context.idle.WaitUntil(context.mu, deadline) &&
        std::chrono::steady_clock::now() >= deadline)
      return false;
  }
  return true;
}

void HttpServer::Stop() {
  State& state = *state_;
  if (state.stopped) return;
  state.stopped = true;
  state.context->stopping.store(true);
  for (const auto& io : state.io_threads) {
    // Never started: a task that holds its own thread alive would not run, and leak.
    if (!io->thread.joinable()) continue;
    asio::post(io->io, [&state, io] {
      boost::system::error_code ignored;
      if (io == state.io_threads.front() && state.acceptor) {
        state.acceptor->close(ignored);
        state.retry->cancel();
      }
      const auto connections = io->connections;  // Close removes none at once, but be safe
      for (Connection* connection : connections) connection->Close();
    });
    io->work.reset();
  }
  for (const auto& io : state.io_threads) {
    if (io->thread.joinable()) io->thread.join();
  }
}

}  // namespace switchyard
