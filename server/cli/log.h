// The log of the process. Set up once, by the subcommand, before any other thread.
#pragma once

#include <string>

namespace CLI {
class App;
}

namespace switchyard {

// `format`: text or json. Logs go to stderr: stdout is for results, the ready line and JSON.
void ConfigureLog(const std::string& format);

void AddLogFormatFlag(CLI::App* app, std::string* format);

}  // namespace switchyard
