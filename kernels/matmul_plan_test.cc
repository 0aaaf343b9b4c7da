// PlanItems: every panel of every block of rows in exactly one item, within the limits of an item.
#include "kernels/cpu/matmul_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/cpu_features.h"
#include "kernels/test_seed.h"

namespace switchyard::cpu {
namespace {

TEST(PlanItemsTest, ItemsCoverEveryGroupOnceWithinTheirLimits) {
  std::mt19937 random(TestSeed());
  const auto draw = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  for (const std::string& path : CpuIsaPaths()) {
    const KernelTable& kernels = *FindKernelTable(path);
    for (int turn = 0; turn < 300; ++turn) {
      std::vector<GroupShape> groups(static_cast<size_t>(draw(1, 9)));
      for (GroupShape& g : groups) {
        const int64_t multiples[] = {1, 2, kActGroupPanels};
        g = {.rows = draw(0, 1) == 0 ? draw(0, 20) : draw(0, 900),
             .panels = 2 * draw(1, 100),
             .k = 8 * draw(1, 300),
             .block_rows = static_cast<int>(draw(1, kernels.max_rows(FormatOf(DType::kBF16)))),
             .panel_multiple = multiples[draw(0, 2)]};
      }
      std::vector<WorkItem> items;
      PlanItems(kernels, groups, static_cast<int>(draw(1, 64)), &items);
      std::vector<std::vector<int>> covered(groups.size());
      for (size_t i = 0; i < groups.size(); ++i) {
        const int64_t blocks = NumBlocks(groups[i].rows, groups[i].block_rows);
        covered[i].resize(static_cast<size_t>(blocks * groups[i].panels));
      }
      for (const WorkItem& item : items) {
        const GroupShape& g = groups[static_cast<size_t>(item.group)];
        const int64_t blocks = NumBlocks(g.rows, g.block_rows);
        const int64_t rows = BlockBegin(g.rows, blocks, item.block_end) -
                             BlockBegin(g.rows, blocks, item.block_begin);
        ASSERT_LE(item.block_end - item.block_begin, kMaxItemBlocks);
        ASSERT_LE(rows * (item.panel_end - item.panel_begin), kMaxItemTiles) << path;
        ASSERT_EQ(item.panel_begin % g.panel_multiple, 0);
        for (int64_t b = item.block_begin; b < item.block_end; ++b) {
          for (int64_t p = item.panel_begin; p < item.panel_end; ++p)
            ++covered[static_cast<size_t>(item.group)][static_cast<size_t>(b * g.panels + p)];
        }
      }
      for (const std::vector<int>& counts : covered)
        ASSERT_TRUE(std::ranges::all_of(counts, [](int n) { return n == 1; })) << path;
    }
  }
}

}  // namespace
}  // namespace switchyard::cpu
