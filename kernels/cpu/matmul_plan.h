// How a grouped matrix product is cut into work items: a pure function of shapes and thread count.
// The cut never changes bits, only speed.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cpu/kernel_table.h"

namespace switchyard::cpu {

// One product of a grouped call: rows of a packed group times all panels of a matrix.
struct GroupShape {
  int64_t rows = 0;
  int64_t panels = 0;
  int64_t k = 0;
  int block_rows = 1;          // at most, in a block
  int64_t panel_multiple = 1;  // of an item's panels, except at the end
};

// Blocks of rows x panels of one group.
struct WorkItem {
  int32_t group = 0;
  int32_t block_begin = 0, block_end = 0;
  int32_t panel_begin = 0, panel_end = 0;
};

// Fills `items` (its capacity is kept).
void PlanItems(const KernelTable& kernels, std::span<const GroupShape> groups, int num_threads,
               std::vector<WorkItem>* items);

// Below this many multiply-adds an op runs on its caller: waking helpers would cost more.
constexpr int64_t kInlineMacs = int64_t{1} << 17;

}  // namespace switchyard::cpu
