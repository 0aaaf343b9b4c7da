// Cell: a whole serving cell in one process for tests: the scheduler over a model's workers.
// Requests go in as the server would submit them; replies collect every event. A test owns the
// cell; Submit may be called from any thread.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/mutex.h"
#include "proto/model_info.h"
#include "scheduler/request.h"
#include "scheduler/scheduler.h"
#include "worker/local_cell.h"

namespace switchyard {

// Everything one choice received.
struct ChoiceReply {
  std::vector<int32_t> tokens;
  std::vector<TokenLogprob> logprobs;
  std::vector<TokenLogprob> prompt_logprobs;
  int32_t cached_tokens = 0;
  FinishReason reason = FinishReason::kNone;
  absl::Status error;

  // Tokens and logprobs, byte for byte: equal strings mean equal bits.
  std::string Bits() const;
};

// Fills on the scheduler's thread; any thread may wait.
class Reply {
 public:
  explicit Reply(size_t num_choices) : choices_(num_choices) {}
  // CHECK-fails after two minutes: a lost request.
  std::vector<ChoiceReply> Wait();
  // Until `choice` has `n` tokens or has ended.
  void WaitForTokens(size_t choice, size_t n);
  std::vector<ChoiceReply> Now() const;

 private:
  friend class Cell;
  void Take(std::vector<ChoiceEvent> events);
  bool Finished() const SY_REQUIRES(mu_);

  mutable Mutex mu_;
  CondVar changed_;
  std::vector<ChoiceReply> choices_ SY_GUARDED_BY(mu_);
};

class Cell {
 public:
  // The scheduler's batch limit follows the workers'. CHECKs that the checkpoint loads.
  // `tamper`, if any, may change each plan on its way to its worker (the scheduler's thread).
  explicit Cell(const CellOptions& workers, SchedulerOptions scheduler = {},
                std::function<void(StepPlan*)> tamper = nullptr);
  ~Cell();

  const ModelInfo& model() const;
  SchedulerStats Stats() const;
  uint64_t weights_moved() const;  // experts moved into foreign slots
  struct Submitted {
    RequestId id = 0;
    std::shared_ptr<Reply> reply;
  };
  // The request's sink is replaced.
  absl::StatusOr<Submitted> Submit(Request request);
  void Cancel(RequestId id);
  void CancelChoice(RequestId id, int32_t choice);
  // Submits and waits. CHECKs that the request is accepted.
  std::vector<ChoiceReply> Run(Request request);
  // Waits until nothing is left; refuses what comes later.
  void Drain();

 private:
  class Client;
  // The scheduler uses the client, which owns the workers.
  std::unique_ptr<Client> client_;
  std::unique_ptr<Scheduler> scheduler_;
};

// The folder of a fixture, tests/fixtures/<name>, or of the demo model.
std::string FixtureDir(const std::string& name);
std::string DemoDir();

}  // namespace switchyard
