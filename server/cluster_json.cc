#include "server/cluster_json.h"

#include "server/json_writer.h"

namespace switchyard {

std::string ClusterJson(const ClusterSnapshot& cluster) {
  JsonWriter json;
  json.BeginObject()
      .Member("epoch", static_cast<int64_t>(cluster.epoch))
      .Member("phase", cluster.phase);
  json.Key("waits_for");
  cluster.waits_for.empty() ? json.Null() : json.String(cluster.waits_for);
  json.Key("workers").BeginArray();
  for (const ClusterSnapshot::Worker& worker : cluster.workers) {
    json.BeginObject()
        .Member("id", static_cast<int64_t>(worker.id))
        .Member("role", worker.role)
        .Member("name", worker.name)
        .Member("pid", worker.pid)
        .Member("address", worker.address)
        .Member("transport", worker.transport)
        .Member("device", worker.device)
        .Member("threads", worker.threads)
        .Member("memory_bytes", worker.memory_bytes)
        .Member("state", worker.state);
    json.Key("rank");
    worker.rank < 0 ? json.Null() : json.Int(worker.rank);
    if (worker.role == "expert") {
      json.Member("experts", worker.num_experts);
    } else {
      json.Member("kv_blocks", worker.num_kv_blocks);
    }
    json.Key("load").BeginObject().Member("rows", static_cast<int64_t>(worker.rows));
    json.Key("rows_per_second").Double(worker.rows_per_s).EndObject();
    json.Key("last_heartbeat_seconds").Double(worker.heartbeat_age_s).EndObject();
  }
  json.EndArray();
  json.Key("totals")
      .BeginObject()
      .Member("joins", static_cast<int64_t>(cluster.joins))
      .Member("failures", static_cast<int64_t>(cluster.failures))
      .Member("drains", static_cast<int64_t>(cluster.drains))
      .Member("failovers", static_cast<int64_t>(cluster.failovers))
      .Member("rebalances", static_cast<int64_t>(cluster.rebalances))
      .Member("refused_registrations", static_cast<int64_t>(cluster.refusals))
      .EndObject();
  return json.EndObject().Take();
}

}  // namespace switchyard
