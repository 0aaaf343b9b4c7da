#include "comm/communicator_conformance.h"

namespace switchyard {
namespace {

INSTANTIATE_TEST_SUITE_P(InProcess, CommunicatorConformance,
                         testing::Values(CommunicatorMaker{"in_process",
                                                           MakeInProcessCommunicators}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace switchyard
