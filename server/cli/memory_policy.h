// Where the process' memory lies on machines with several NUMA nodes.
#pragma once

namespace switchyard {

// Spreads what is allocated from now on, by this thread and those that it starts, page by page over
// all nodes that the process may use, as threads on all of them read the weights. Does nothing
// where there is one node, where taskset or numactl chose processors or a policy, or where the
// system refuses.
void InterleaveMemory();

}  // namespace switchyard
