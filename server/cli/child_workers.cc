#include "server/cli/child_workers.h"

#include <signal.h>
#include <spawn.h>
#include <spdlog/spdlog.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"

extern char** environ;

namespace switchyard {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kPoll = std::chrono::milliseconds(50);
constexpr auto kBackoff = std::chrono::seconds(1);  // before a dead worker is started again
constexpr auto kGoodbye = std::chrono::seconds(5);  // between SIGTERM and SIGKILL

std::vector<char*> Pointers(std::vector<std::string>* strings) {
  std::vector<char*> pointers;
  for (std::string& s : *strings) pointers.push_back(s.data());
  pointers.push_back(nullptr);
  return pointers;
}

}  // namespace

ChildWorkers::ChildWorkers(ChildWorkersOptions options) : options_(std::move(options)) {
  const auto add = [&](const char* role, int count) {
    const int share = 2 * options_.threads / std::max(count, 1);
    const int threads = std::clamp(share, 1, std::max(options_.threads, 1));
    for (int i = 0; i < count; ++i)
      children_.push_back({role, absl::StrCat(role, "-", i), threads, 0, {}});
  };
  add("attention", options_.attention_workers);
  add("expert", options_.expert_workers);
  thread_ = std::thread([this] { Run(); });
}

ChildWorkers::~ChildWorkers() {
  {
    MutexLock lock(mu_);
    stopping_ = true;
    changed_.NotifyAll();
  }
  thread_.join();
}

void ChildWorkers::Run() {
  for (;;) {
    for (Child& child : children_) {
      if (child.pid == 0 && Clock::now() >= child.start_at) Start(&child);
    }
    {
      MutexLock lock(mu_);
      if (!stopping_) changed_.WaitUntil(mu_, Clock::now() + kPoll);
      if (stopping_) break;
    }
    Reap();
  }
  EndAll();
}

void ChildWorkers::Start(Child* child) {
  std::vector<std::string> arguments = {
      "switchyard",         "worker",    "--role",
      child->role,          "--name",    child->name,
      "--exit-with-parent", "--threads", absl::StrCat(child->threads)};
  arguments.insert(arguments.end(), options_.arguments.begin(), options_.arguments.end());
  std::vector<std::string> environment;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    if (std::strncmp(*entry, "SWITCHYARD_CLUSTER_TOKEN=", 25) != 0) environment.push_back(*entry);
  }
  environment.push_back(absl::StrCat("SWITCHYARD_CLUSTER_TOKEN=", options_.token));
  const std::vector<char*> argv = Pointers(&arguments);
  const std::vector<char*> envp = Pointers(&environment);
  // This process has the shutdown signals blocked; the children must not.
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  sigset_t none;
  sigemptyset(&none);
  posix_spawnattr_setsigmask(&attributes, &none);
  // A process group of their own: Ctrl-C is for this process, which lets requests finish first.
  posix_spawnattr_setpgroup(&attributes, 0);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETPGROUP);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, STDERR_FILENO, STDOUT_FILENO);  // stdout is ours
  const int error =
      posix_spawn(&child->pid, "/proc/self/exe", &actions, &attributes, argv.data(), envp.data());
  posix_spawn_file_actions_destroy(&actions);
  posix_spawnattr_destroy(&attributes);
  if (error != 0) {
    spdlog::error("cannot start {}: {}", child->name, std::strerror(error));
    child->pid = 0;
    child->start_at = Clock::now() + kBackoff;
  }
}

void ChildWorkers::Reap() {
  for (Child& child : children_) {
    int status = 0;
    if (child.pid == 0 || waitpid(child.pid, &status, WNOHANG) != child.pid) continue;
    spdlog::warn("{} (pid {}) ended with {} {}; it is started again", child.name, child.pid,
                 WIFSIGNALED(status) ? "signal" : "exit code",
                 WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
    child.pid = 0;
    child.start_at = Clock::now() + kBackoff;
  }
}

void ChildWorkers::EndAll() {
  for (const Child& child : children_) {
    if (child.pid != 0) kill(child.pid, SIGTERM);
  }
  const Clock::time_point deadline = Clock::now() + kGoodbye;
  for (Child& child : children_) {
    while (child.pid != 0 && waitpid(child.pid, nullptr, WNOHANG) == 0) {
      if (Clock::now() >= deadline) kill(child.pid, SIGKILL);
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  }
}

}  // namespace switchyard
