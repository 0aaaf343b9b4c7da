// Who may work in a cell: what a worker says of itself, against what the cell is. Pure.
#pragma once

#include <map>
#include <string>

#include "proto/model_info.h"
#include "scheduler/membership.h"
#include "switchyard/v1/control.pb.h"

namespace switchyard {

// Why the worker is refused, both values named; empty: welcome. numerics: how the workers compute
// that are here already.
std::string RegisterRefusal(const v1::Register& facts, const ModelInfo& model, uint64_t model_hash,
                            const std::map<WorkerId, std::string>& numerics);

}  // namespace switchyard
