// The flags of every subcommand with a front end: where it listens, whom it serves, what it lets
// wait. The same names everywhere.
#pragma once

#include <cstdint>
#include <string>

#include "scheduler/scheduler.h"
#include "server/server.h"

namespace CLI {
class App;
}

namespace switchyard {

struct FrontEndFlags {
  ServerOptions server;
  std::string served_model_name;  // "": the folder's name
  std::string chat_template;
  int32_t max_queued_requests = SchedulerOptions().max_queued_requests;
  int shutdown_timeout_s = 30;
  std::string log_format = "text";

  ServerOptions server_options() const;
};

void AddFrontEndFlags(CLI::App* app, FrontEndFlags* flags);

// What a step may hold.
void AddStepFlags(CLI::App* app, SchedulerOptions* scheduler);

}  // namespace switchyard
