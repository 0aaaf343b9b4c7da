#include "comm/communicator_conformance.h"
#include "kernels/thread_pool.h"

namespace switchyard {
namespace {

Communicators Make(int32_t size) {
  static ThreadPool pool(2);
  return MakeInProcessCommunicators(size, &pool);
}

INSTANTIATE_TEST_SUITE_P(InProcess, CommunicatorConformance,
                         testing::Values(CommunicatorMaker{"in_process", Make}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace switchyard
