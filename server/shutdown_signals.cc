#include "server/shutdown_signals.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "kernels/check.h"

namespace switchyard {

struct ShutdownSignals::State {
  std::atomic<bool> requested{false};
};

ShutdownSignals::ShutdownSignals() : state_(std::make_shared<State>()) {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  SY_CHECK(pthread_sigmask(SIG_BLOCK, &signals, nullptr) == 0);
  // Lives as long as the process: it must see the second signal while everything else shuts down.
  std::thread([state = state_, signals] {
    int signal = 0;
    while (sigwait(&signals, &signal) != 0) {
    }
    state->requested.store(true);
    state->requested.notify_all();
    while (sigwait(&signals, &signal) != 0) {
    }
    _exit(128 + signal);
  }).detach();
}

ShutdownSignals::~ShutdownSignals() = default;

void ShutdownSignals::Wait() { state_->requested.wait(false); }
bool ShutdownSignals::requested() const { return state_->requested.load(); }

}  // namespace switchyard
