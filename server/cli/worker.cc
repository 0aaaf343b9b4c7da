#include <signal.h>
#include <spdlog/spdlog.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <array>
#include <chrono>
#include <cstdio>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "kernels/mutex.h"
#include "server/cli/cluster_engine.h"
#include "server/cli/command.h"
#include "server/cli/local_engine.h"
#include "server/cli/log.h"
#include "server/progress_bar.h"
#include "server/shutdown_signals.h"
#include "worker/worker_process.h"

namespace switchyard {
namespace {

struct WorkerFlags {
  WorkerProcessOptions process;
  std::vector<std::string> roles;
  std::string token_file;
  int shutdown_timeout_s = 30;
  bool exit_with_parent = false;
  std::string log_format = "text";
};

std::string HostName() {
  std::array<char, 256> name{};
  return gethostname(name.data(), name.size() - 1) == 0 ? name.data() : "worker";
}

// One ready line per role; a later registration is a matter of the log.
class ReadyLines {
 public:
  explicit ReadyLines(std::string scheduler) : scheduler_(std::move(scheduler)) {}

  void Print(const RegisteredRole& registered) {
    MutexLock lock(mu_);
    const char* role = RoleName(registered.role);
    if (!printed_.insert(registered.role).second) {
      spdlog::info("{} worker: registered again as {}, data at {}", role, registered.worker,
                   registered.data_address);
      return;
    }
    std::printf("switchyard worker ready role=%s id=%llu scheduler=%s data=%s\n", role,
                static_cast<unsigned long long>(registered.worker), scheduler_.c_str(),
                registered.data_address.c_str());
    std::fflush(stdout);
  }

 private:
  const std::string scheduler_;
  Mutex mu_;
  std::set<int> printed_ SY_GUARDED_BY(mu_);
};

// Waits for the end of every role, asking for it when a signal comes.
absl::Status Follow(WorkerProcess* process, const ShutdownSignals& shutdown,
                    std::chrono::seconds timeout) {
  constexpr std::chrono::milliseconds kPoll{50};
  std::optional<std::chrono::steady_clock::time_point> deadline;
  for (;;) {
    if (const std::optional<absl::Status> end = process->WaitFor(kPoll)) return *end;
    if (!shutdown.requested()) continue;
    const auto now = std::chrono::steady_clock::now();
    if (!deadline) {
      spdlog::info("draining: the scheduler has {} s to let this worker go", timeout.count());
      deadline = now + timeout;
      process->Drain();
    } else if (now >= *deadline) {
      spdlog::warn("leaving without the scheduler's goodbye");
      return absl::OkStatus();
    }
  }
}

int RunWorker(const WorkerFlags& flags) {
  ConfigureLog(flags.log_format);
  ShutdownSignals shutdown;  // before any other thread
  if (flags.exit_with_parent) prctl(PR_SET_PDEATHSIG, SIGTERM);
  WorkerProcessOptions options = flags.process;
  for (const std::string& role : flags.roles) {
    options.roles.push_back(role == "attention" ? v1::WORKER_ROLE_ATTENTION
                                                : v1::WORKER_ROLE_EXPERT);
  }
  if (!flags.token_file.empty()) {
    absl::StatusOr<std::string> token = ReadToken(flags.token_file);
    if (!token.ok()) return Fail(token.status());
    options.control.token = *std::move(token);
  }
  ReadyLines ready(options.control.scheduler);
  options.on_registered = [&](const RegisteredRole& registered) { ready.Print(registered); };
  std::unique_ptr<ProgressBar> bar;
  options.progress = [&](int64_t done, int64_t total) {
    if (shutdown.requested()) std::_Exit(0);  // nobody knows of it yet
    if (bar == nullptr)
      bar = std::make_unique<ProgressBar>("loading", total, flags.log_format == "json");
    bar->Update(done);
  };
  absl::StatusOr<std::unique_ptr<WorkerProcess>> process = WorkerProcess::Create(options);
  bar.reset();
  if (!process.ok()) return Fail(process.status());
  const absl::Status end =
      Follow(process->get(), shutdown, std::chrono::seconds(flags.shutdown_timeout_s));
  process->reset();
  if (!end.ok()) {
    Fail(end);
    return kFailed;
  }
  spdlog::info("bye");
  return 0;
}

}  // namespace

Command AddWorker(CLI::App* parent, WrapHost wrap_host) {
  CLI::App* app =
      parent->add_subcommand("worker", "compute for a `switchyard server` on this or another host");
  app->footer(
      "Attention workers serve a share of the sequences, expert workers a share of the experts. A "
      "worker may\nbe started before the server, and looks for it again when it is gone. When it "
      "is registered it prints\none line per role on stdout: switchyard worker ready role=ROLE "
      "id=ID scheduler=HOST:PORT data=ADDRESS.\nSIGTERM lets it finish its part and leave without "
      "a pause.\n\nExample: switchyard worker --role expert --scheduler 127.0.0.1:9000 --model "
      "models/demo");
  auto flags = std::make_shared<WorkerFlags>();
  flags->process.name = HostName();
  flags->process.wrap_host = std::move(wrap_host);
  WorkerProcessOptions& process = flags->process;
  app->add_option("--role", flags->roles, "attention, expert or attention,expert")
      ->required()
      ->delimiter(',')
      ->check(CLI::IsMember({"attention", "expert"}));
  app->add_option("--scheduler", process.control.scheduler,
                  "HOST:PORT of the server's --control-port")
      ->required();
  app->add_option("--model", process.model.model_dir,
                  "checkpoint folder, the same as the server's: config.json, *.safetensors")
      ->required();
  app->add_option("--cluster-token", process.control.token, "what the server asks of workers")
      ->envname("SWITCHYARD_CLUSTER_TOKEN");
  app->add_option("--cluster-token-file", flags->token_file, "a file whose first line is the token")
      ->check(CLI::ExistingFile);
  app->add_option("--cluster-cert", process.control.certificate, "mutual TLS: own certificate, PEM")
      ->check(CLI::ExistingFile);
  app->add_option("--cluster-key", process.control.private_key, "mutual TLS: own private key, PEM")
      ->check(CLI::ExistingFile);
  app->add_option("--cluster-ca", process.control.ca,
                  "mutual TLS: who signs the server's certificate, PEM")
      ->check(CLI::ExistingFile);
  app->add_option("--data-host", process.data_host,
                  "IPv4 address of this host that the other workers can reach")
      ->capture_default_str();
  app->add_option("--threads", process.threads, "compute threads in total (0: all cores)")
      ->capture_default_str()
      ->check(CLI::Range(0, 1024));
  app->add_option("--dtype", process.model.dtype, "auto (as stored), float32 or bfloat16")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "float32", "bfloat16"}));
  AddWeightFormatFlags(app, &process.model.formats);
  app->add_option("--isa", process.model.isa,
                  "instruction path: auto, avx512, avx2 or portable; all workers use the same")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "avx512", "avx2", "portable"}));
  app->add_option("--max-model-len", process.model.max_model_len,
                  "prompt + output tokens of a sequence, at least the server's (0: as the model "
                  "says)")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  app->add_option("--kv-cache-memory", process.kv_cache_memory,
                  "KV cache of an attention worker, e.g. 2GiB (0: what the sequences can use, at "
                  "most half of the free memory)")
      ->capture_default_str()
      ->transform(CLI::AsSizeValue(false));
  app->add_option("--expert-memory", process.expert_memory,
                  "weights of an expert worker, e.g. 8GiB (0: as many experts as the server says)")
      ->capture_default_str()
      ->transform(CLI::AsSizeValue(false));
  app->add_option("--name", process.name, "how people know it")->capture_default_str();
  app->add_option("--shutdown-timeout", flags->shutdown_timeout_s,
                  "seconds that the server gets after SIGTERM to let this worker go")
      ->capture_default_str()
      ->check(CLI::Range(0, 86400));
  app->add_flag("--exit-with-parent", flags->exit_with_parent,
                "leave as on SIGTERM when the process that started this one ends");
  AddLogFormatFlag(app, &flags->log_format);
  return {app, [flags] { return RunWorker(*flags); }};
}

}  // namespace switchyard
