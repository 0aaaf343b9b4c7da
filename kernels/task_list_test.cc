#include "kernels/cpu/task_list.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>

#include "kernels/thread_pool.h"

namespace switchyard::cpu {
namespace {

// Chains of three stages, the later ones behind the next chain's earlier ones, as a grouped MLP is;
// the list is used again with other numbers of stages.
TEST(TaskListTest, NoTaskBeginsBeforeWhatItNeeds) {
  TaskList list;
  constexpr int kMaxChains = 9;
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (int round = 0; round < 300; ++round) {
      const int chains = 1 + round % kMaxChains;
      list.Reset(2 * chains);
      for (int c = 0; c < chains; ++c)
        for (int i = 0; i < 3; ++i) list.Add({.kind = 0, .index = c, .serves = 2 * c});
      for (int c = 0; c <= chains; ++c) {
        for (int i = 0; c < chains && i < 2; ++i)
          list.Add({.kind = 1, .index = c, .needs = 2 * c, .serves = 2 * c + 1});
        for (int i = 0; c > 0 && i < 2; ++i)
          list.Add({.kind = 2, .index = c - 1, .needs = 2 * (c - 1) + 1});
      }
      ASSERT_EQ(list.size(), 7 * chains);
      // Plain ints for what a stage leaves behind: TSan sees a task that begins too early.
      std::array<std::array<std::atomic<int>, 3>, kMaxChains> done{};
      std::array<int, kMaxChains> plain{};
      std::atomic<int> early{0};
      pool.ParallelFor(list.size(), [&](int64_t i) {
        list.Run(i, [&](const TaskList::Task& task) {
          auto& chain = done[static_cast<size_t>(task.index)];
          if (task.kind == 1 && chain[0].load() != 3) early.fetch_add(1);
          if (task.kind == 2 && chain[1].load() != 2) early.fetch_add(1);
          if (task.kind == 2 && plain[static_cast<size_t>(task.index)] != 1) early.fetch_add(1);
          const int before = chain[static_cast<size_t>(task.kind)].fetch_add(1);
          if (task.kind == 1 && before == 0) plain[static_cast<size_t>(task.index)] = 1;
        });
      });
      ASSERT_EQ(early.load(), 0) << chains << " chains, " << threads << " threads";
      for (int c = 0; c < chains; ++c)
        ASSERT_EQ(done[static_cast<size_t>(c)][2].load(), 2) << "chain " << c;
    }
  }
}

}  // namespace
}  // namespace switchyard::cpu
