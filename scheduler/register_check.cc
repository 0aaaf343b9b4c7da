#include "scheduler/register_check.h"

#include "absl/strings/str_cat.h"
#include "proto/step_wire.h"

namespace switchyard {
namespace {

constexpr int32_t kMaxKvBlocks = 1 << 26;  // of one worker

}  // namespace

std::string RegisterRefusal(const v1::Register& facts, const ModelInfo& model, uint64_t model_hash,
                            const std::map<WorkerId, std::string>& numerics) {
  if (facts.protocol_version() != kProtocolVersion) {
    return absl::StrCat("the worker speaks protocol ", facts.protocol_version(), ", the scheduler ",
                        kProtocolVersion);
  }
  if (facts.version() != SWITCHYARD_VERSION) {
    return absl::StrCat("the worker is version ", facts.version(), ", the scheduler ",
                        SWITCHYARD_VERSION);
  }
  if (facts.role() != v1::WORKER_ROLE_ATTENTION && facts.role() != v1::WORKER_ROLE_EXPERT)
    return absl::StrCat("the worker names no role (", static_cast<int>(facts.role()), ")");
  if (facts.model_hash() != model_hash) {
    return absl::StrCat("the worker has another model: its hash is ",
                        absl::Hex(facts.model_hash(), absl::kZeroPad16), ", that of ", model.name,
                        " here is ", absl::Hex(model_hash, absl::kZeroPad16));
  }
  if (facts.data_address().empty()) return "the worker has no data address";
  if (facts.role() == v1::WORKER_ROLE_ATTENTION) {
    if (facts.num_kv_blocks() <= 0 || facts.num_kv_blocks() > kMaxKvBlocks) {
      return absl::StrCat("the worker has ", facts.num_kv_blocks(), " KV blocks, not from 1 to ",
                          kMaxKvBlocks);
    }
    if (facts.max_model_len() < model.max_model_len) {
      return absl::StrCat("the worker serves ", facts.max_model_len(),
                          " positions, the scheduler asks for ", model.max_model_len);
    }
    const int64_t positions = int64_t{facts.num_kv_blocks()} * model.block_size;
    if (positions < model.max_model_len) {
      return absl::StrCat("the worker's ", facts.num_kv_blocks(), " KV blocks hold ", positions,
                          " positions, a sequence may need ", model.max_model_len);
    }
  }
  // One pool, one way to compute: those who are here decide.
  for (const auto& [id, numerics_id] : numerics) {
    if (numerics_id != facts.numerics_id()) {
      return absl::StrCat("the worker computes as ", facts.numerics_id(), ", worker ", id,
                          " of this cell as ", numerics_id,
                          "; --isa and --dtype choose a common way");
    }
  }
  return "";
}

}  // namespace switchyard
