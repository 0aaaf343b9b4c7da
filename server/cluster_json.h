// The JSON of GET /admin/cluster. Pure.
#pragma once

#include <string>

#include "scheduler/cluster_snapshot.h"

namespace switchyard {

std::string ClusterJson(const ClusterSnapshot& cluster);

}  // namespace switchyard
