#include "kernels/cpu/matmul_plan.h"

#include <algorithm>

namespace switchyard::cpu {
namespace {

constexpr int64_t kMaxItemRows = 96;
// Long streams: tiles of whole slabs find an item's first bytes in no cache.
constexpr int64_t kMaxItemPanels = 64;
static_assert(kActGroupPanels <= kMaxItemTiles / kMaxBlockRows);
constexpr int64_t kMinItemMacs = int64_t{1} << 16;
constexpr int64_t kItemsPerThread = 4;

}  // namespace

void PlanItems(const KernelTable& kernels, std::span<const GroupShape> groups, int num_threads,
               std::vector<WorkItem>* items) {
  items->clear();
  int64_t total = 0;
  for (const GroupShape& g : groups) total += g.rows * g.panels * kPanelColumns * g.k;
  // Small enough that every thread gets several items, large enough to be worth a hand-out.
  const int64_t target = std::max(kMinItemMacs, total / (kItemsPerThread * num_threads));
  for (size_t i = 0; i < groups.size(); ++i) {
    const GroupShape& g = groups[i];
    if (g.rows == 0) continue;
    const int64_t blocks = NumBlocks(g.rows, g.block_rows);
    const int64_t multiple =
        std::max<int64_t>(g.panel_multiple, kernels.panels_for_rows(g.rows, g.block_rows));
    const int64_t max_rows = std::min(kMaxItemRows, kMaxItemTiles / multiple);
    const int64_t blocks_per_item =
        std::max<int64_t>(1, std::min({blocks, max_rows / g.block_rows, kMaxItemBlocks}));
    const int64_t item_rows = std::min(g.rows, blocks_per_item * g.block_rows);
    const int64_t max_panels = std::min(kMaxItemPanels, kMaxItemTiles / item_rows);
    const int64_t panels = std::clamp(target / (item_rows * kPanelColumns * g.k), multiple,
                                      std::max(multiple, max_panels)) /
                           multiple * multiple;
    for (int64_t p = 0; p < g.panels; p += panels) {
      for (int64_t b = 0; b < blocks; b += blocks_per_item) {
        items->push_back({.group = static_cast<int32_t>(i),
                          .block_begin = static_cast<int32_t>(b),
                          .block_end = static_cast<int32_t>(std::min(blocks, b + blocks_per_item)),
                          .panel_begin = static_cast<int32_t>(p),
                          .panel_end = static_cast<int32_t>(std::min(g.panels, p + panels))});
      }
    }
  }
}

}  // namespace switchyard::cpu
