// ChildWorkers: the workers of `serve --processes`: child processes of this one that run
// `switchyard worker`. One thread of its own starts them, starts again whoever dies, and ends them.
// Owned by the subcommand's function.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "kernels/mutex.h"

namespace switchyard {

struct ChildWorkersOptions {
  int attention_workers = 1;
  int expert_workers = 2;
  // The cores. The workers of a pool get twice their share: pools take turns within a step, and
  // what an unevenly loaded worker leaves idle another can use. Threads without work sleep.
  int threads = 1;
  std::vector<std::string> arguments;  // of every worker, besides --role, --name and --threads
  std::string token;  // handed over in the environment, where others cannot read it
};

class ChildWorkers {
 public:
  explicit ChildWorkers(ChildWorkersOptions options);
  ~ChildWorkers();  // ends the children: SIGTERM, then SIGKILL

 private:
  struct Child {
    std::string role, name;
    int threads = 1;
    pid_t pid = 0;  // 0: not running
    std::chrono::steady_clock::time_point start_at;
  };
  void Run();
  void Start(Child* child);
  void Reap();
  void EndAll();

  const ChildWorkersOptions options_;
  std::vector<Child> children_;  // the thread's only

  Mutex mu_;
  CondVar changed_;
  bool stopping_ SY_GUARDED_BY(mu_) = false;

  std::thread thread_;  // last: it uses the members above
};

}  // namespace switchyard
