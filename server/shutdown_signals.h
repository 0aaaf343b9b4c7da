// ShutdownSignals: SIGTERM and SIGINT as an orderly shutdown; the second one exits at once. Owned
// by main(), made before any other thread, so that all threads inherit the blocked signals; one per
// process.
#pragma once

#include <memory>

namespace switchyard {

class ShutdownSignals {
 public:
  ShutdownSignals();
  ~ShutdownSignals();

  // Returns when the first signal came.
  void Wait();
  bool requested() const;

 private:
  struct State;
  const std::shared_ptr<State> state_;
};

}  // namespace switchyard
