#include "scheduler/cluster_messages.h"

#include <set>
#include <span>

namespace switchyard {

v1::SchedulerMessage AssignMessage(const AssignAction& action, int64_t load_bytes_per_step) {
  v1::SchedulerMessage message;
  v1::Assign* assign = message.mutable_assign();
  assign->set_assignment(action.assignment);
  assign->set_bytes_per_step(action.urgent ? 0 : load_bytes_per_step);
  for (const std::set<int32_t>& experts : action.experts)
    assign->add_layers()->mutable_experts()->Add(experts.begin(), experts.end());
  return message;
}

v1::SchedulerMessage InstallMessage(const InstallAction& action, const std::string& balance,
                                    const v1::PlanCosts& costs) {
  const EpochSpec& spec = *action.spec;
  v1::SchedulerMessage message;
  v1::Install* install = message.mutable_install();
  install->set_epoch(spec.epoch);
  install->set_rank(action.rank);
  install->set_num_attention(spec.num_attention);
  for (size_t r = 0; r < spec.members.size(); ++r) {
    v1::Member* member = install->add_members();
    member->set_worker(spec.members[r]);
    member->set_data_address(spec.data_addresses[r]);
  }
  for (int32_t l = 0; l < spec.placement->num_layers(); ++l) {
    for (int32_t e = 0; e < spec.placement->num_experts(); ++e) {
      const std::span<const int32_t> hosts = spec.placement->Hosts(l, e);
      install->add_hosts()->mutable_ranks()->Add(hosts.begin(), hosts.end());
    }
  }
  install->set_secret(spec.secret);
  install->set_balance(balance);
  *install->mutable_costs() = costs;
  return message;
}

}  // namespace switchyard
