// FailingHost: a role of a worker process whose ways in and out pass the fail points: around the
// host and the communicator that the product uses, so that the product knows nothing of it. Owned
// and used like the RoleHost that it owns.
#pragma once

#include <memory>

#include "tests/fail_points.h"
#include "worker/role_host.h"

namespace switchyard {

// `points` must outlive it.
std::unique_ptr<RoleHost> MakeFailingHost(std::unique_ptr<RoleHost> inner, FailPoints* points);

}  // namespace switchyard
