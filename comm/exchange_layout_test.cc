#include "comm/exchange_layout.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <set>

#include "comm/test_problems.h"

namespace switchyard {
namespace {

using testing::HasSubstr;
using Bytes = std::vector<std::byte>;

// One layer of one step with random sizes: every source's rows and ids, and all messages.
struct Exchange {
  StepHeader step;
  ExchangeKey key;
  ExchangeShape shape;
  ExpertPlacement placement = ExpertPlacement::Even(1, 1, 1);
  int32_t num_sources = 0;
  std::vector<std::vector<int32_t>> ids;  // [num_sources][rows * top_k]
  std::vector<Bytes> rows;                // [num_sources][rows * row_bytes]
  std::vector<int32_t> counts;            // [num_sources * num_experts]
  DispatchPlan plan;
  std::vector<DispatchLists> lists;
  std::vector<Bytes> count_messages;                  // [num_sources]
  std::vector<std::vector<Bytes>> dispatch_messages;  // [num_sources][ranks]

  int32_t num_ranks() const { return placement.num_ranks(); }
  std::span<int32_t> CountsOf(int32_t s) {
    return std::span(counts).subspan(
        static_cast<size_t>(s) * static_cast<size_t>(shape.num_experts),
        static_cast<size_t>(shape.num_experts));
  }
};

void MakeExchange(std::mt19937& rng, Exchange* x) {
  x->num_sources = 1 + Below(rng, 3);
  x->step.epoch = rng();
  x->step.step = rng();
  for (int32_t s = 0; s < x->num_sources; ++s) x->step.participants.push_back(3 * s + 1);
  x->key = {.step = &x->step, .layer = 0, .micro_batch = Below(rng, 2)};
  const int32_t experts = 1 + Below(rng, 20);
  x->shape = {.row_bytes = 2 * (1 + Below(rng, 100)),
              .num_experts = experts,
              .top_k = 1 + Below(rng, std::min(experts, 8)),
              .max_rows = 1 + Below(rng, 30)};
  x->placement = RandomPlacement(rng, 1, experts, 1 + Below(rng, 6));
  x->counts.assign(static_cast<size_t>(x->num_sources * experts), 0);
  x->ids.resize(static_cast<size_t>(x->num_sources));
  x->rows.resize(static_cast<size_t>(x->num_sources));
  const int32_t hot = 1 + Below(rng, experts);  // ids below this one only, when top_k allows
  for (int32_t s = 0; s < x->num_sources; ++s) {
    const auto source = static_cast<size_t>(s);
    const int32_t num_rows = Below(rng, 4) == 0 ? 0 : Below(rng, x->shape.max_rows + 1);
    for (int32_t r = 0; r < num_rows; ++r) {
      std::vector<int32_t> choice;
      for (int32_t e = 0; e < std::max(hot, x->shape.top_k); ++e) choice.push_back(e);
      std::ranges::shuffle(choice, rng);
      for (int32_t j = 0; j < x->shape.top_k; ++j) {
        const bool none = Below(rng, 16) == 0;
        x->ids[source].push_back(none ? -1 : choice[static_cast<size_t>(j)]);
      }
    }
    x->rows[source].resize(static_cast<size_t>(num_rows) * static_cast<size_t>(x->shape.row_bytes));
    for (std::byte& b : x->rows[source]) b = static_cast<std::byte>(rng());
    CountExperts(x->ids[source], x->CountsOf(s));
  }
  x->plan = PlanOnce(x->counts, x->num_sources, x->placement, 0);
  x->lists.resize(static_cast<size_t>(x->num_sources));
  for (int32_t s = 0; s < x->num_sources; ++s) {
    const auto source = static_cast<size_t>(s);
    Bytes& counts = x->count_messages.emplace_back(MaxCountsBytes(x->shape));
    counts.resize(WriteCounts(x->key, s, x->CountsOf(s), counts));
    BuildDispatchLists(x->ids[source], x->shape.top_k, x->plan, s, x->shape.row_bytes,
                       &x->lists[source]);
    x->dispatch_messages.emplace_back();
    for (int32_t p = 0; p < x->num_ranks(); ++p) {
      Bytes& message =
          x->dispatch_messages.back().emplace_back(MaxDispatchBytes(x->shape), std::byte{0xcd});
      message.resize(WriteDispatch(x->key, x->plan, s, p, x->lists[source], x->rows[source].data(),
                                   x->shape.row_bytes, x->CountsOf(s), message));
    }
  }
}

// What "expert" e makes of a row in this test.
void Transform(int32_t expert, std::span<std::byte> row) {
  for (size_t i = 0; i < row.size(); ++i) {
    row[i] = static_cast<std::byte>(static_cast<unsigned>(row[i]) * 3u +
                                    static_cast<unsigned>(expert) * 37u + i);
  }
}

TEST(ExchangeLayout, EveryCopyComesBackFromItsExpertToItsPlace) {
  std::mt19937 rng = SeededRng();
  DispatchLists reused;
  ExpertBatch batch;
  for (int trial = 0; trial < 3000; ++trial) {
    Exchange x;
    MakeExchange(rng, &x);
    const int32_t row_bytes = x.shape.row_bytes;
    const auto row_size = static_cast<size_t>(row_bytes);

    // Each source's combine tensor.
    std::vector<Bytes> combine(static_cast<size_t>(x.num_sources));
    for (int32_t s = 0; s < x.num_sources; ++s) {
      const int64_t rows = x.lists[static_cast<size_t>(s)].combine_rows;
      ASSERT_LE(rows, MaxCombineRows(x.shape, x.num_ranks()));
      combine[static_cast<size_t>(s)].resize(static_cast<size_t>(rows) * row_size);
    }

    for (int32_t p = 0; p < x.num_ranks(); ++p) {
      // The expert side knows the messages, the step and the placement.
      std::vector<int32_t> counts(x.counts.size());
      for (int32_t s = 0; s < x.num_sources; ++s) {
        const Bytes& message = x.num_sources == 1 ? x.dispatch_messages[0][static_cast<size_t>(p)]
                                                  : x.count_messages[static_cast<size_t>(s)];
        const auto experts = static_cast<size_t>(x.shape.num_experts);
        const absl::Status status =
            ParseCounts(message, x.key, s, x.shape,
                        std::span(counts).subspan(static_cast<size_t>(s) * experts, experts));
        ASSERT_TRUE(status.ok()) << status;
      }
      ASSERT_EQ(counts, x.counts);
      const DispatchPlan plan = PlanOnce(counts, x.num_sources, x.placement, 0);
      std::vector<DispatchView> views;
      for (int32_t s = 0; s < x.num_sources; ++s) {
        const Bytes& message = x.dispatch_messages[static_cast<size_t>(s)][static_cast<size_t>(p)];
        const auto view = ParseDispatch(message, x.key, plan, s, p, x.shape);
        ASSERT_TRUE(view.ok()) << view.status();
        views.push_back(*view);
        const std::vector<int32_t>& tokens =
            x.lists[static_cast<size_t>(s)].ranks[static_cast<size_t>(p)].tokens;
        ASSERT_EQ(static_cast<size_t>(view->num_rows),
                  std::set(tokens.begin(), tokens.end()).size())
            << "one row per (token, rank)";
      }
      BuildExpertBatch(plan, p, &batch);
      Bytes grouped(static_cast<size_t>(batch.num_rows) * row_size);
      const size_t half = batch.blocks.size() / 2;
      GatherRows(batch, 0, half, views, row_bytes, grouped.data());
      GatherRows(batch, half, batch.blocks.size(), views, row_bytes, grouped.data());
      int64_t covered = 0;
      for (const ExpertBatch::Group& group : batch.groups) {
        ASSERT_EQ(group.begin, covered);
        covered = group.end;
        for (int64_t r = group.begin; r < group.end; ++r) {
          Transform(group.expert,
                    std::span(grouped).subspan(static_cast<size_t>(r) * row_size, row_size));
        }
      }
      ASSERT_EQ(covered, batch.num_rows);
      std::vector<Bytes> messages(
          static_cast<size_t>(x.num_sources),
          Bytes(static_cast<size_t>(MaxCombineRows(x.shape, 1)) * row_size));
      std::vector<std::byte*> starts;
      for (int32_t s = 0; s < x.num_sources; ++s) {
        Bytes& message = messages[static_cast<size_t>(s)];
        const size_t bytes = WriteCombineHeader(x.key, plan, batch, s, p, row_bytes, message);
        ASSERT_EQ(bytes, CombineBytes(x.lists[static_cast<size_t>(s)], p, row_bytes));
        message.resize(bytes);
        starts.push_back(message.data());
      }
      ScatterResults(batch, half, batch.blocks.size(), grouped.data(), row_bytes, starts);
      ScatterResults(batch, 0, half, grouped.data(), row_bytes, starts);
      for (int32_t s = 0; s < x.num_sources; ++s) {
        const Bytes& message = messages[static_cast<size_t>(s)];
        const absl::Status status = CheckCombine(message, x.key, x.plan, s, p, row_bytes);
        ASSERT_TRUE(status.ok()) << status;
        const int64_t at =
            x.lists[static_cast<size_t>(s)].ranks[static_cast<size_t>(p)].combine_row;
        std::ranges::copy(message, combine[static_cast<size_t>(s)].begin() + at * row_bytes);
      }
    }

    for (int32_t s = 0; s < x.num_sources; ++s) {
      const auto source = static_cast<size_t>(s);
      // Scratch of another problem changes nothing.
      BuildDispatchLists(x.ids[source], x.shape.top_k, x.plan, s, row_bytes, &reused);
      ASSERT_EQ(reused.row_of, x.lists[source].row_of);
      for (size_t i = 0; i < x.ids[source].size(); ++i) {
        const int32_t at = x.lists[source].row_of[i];
        if (x.ids[source][i] < 0) {
          ASSERT_EQ(at, -1);
          continue;
        }
        const size_t token = i / static_cast<size_t>(x.shape.top_k);
        Bytes want(x.rows[source].begin() + static_cast<ptrdiff_t>(token * row_size),
                   x.rows[source].begin() + static_cast<ptrdiff_t>((token + 1) * row_size));
        Transform(x.ids[source][i], want);
        ASSERT_TRUE(std::equal(want.begin(), want.end(),
                               combine[source].begin() + static_cast<ptrdiff_t>(at) * row_bytes))
            << "trial " << trial << " source " << s << " copy " << i;
      }
    }
  }
}

// Damaged bytes: an error or a legal message, never a crash or a read outside (the sanitizers see
// those).
TEST(ExchangeLayout, DamagedMessagesNeverCrash) {
  std::mt19937 rng = SeededRng();
  int refused = 0, num = 0;
  ExpertBatch batch;
  for (int trial = 0; trial < 2000; ++trial) {
    Exchange x;
    MakeExchange(rng, &x);
    for (int i = 0; i < 20; ++i, ++num) {
      const int32_t s = Below(rng, x.num_sources);
      const int32_t p = Below(rng, x.num_ranks());
      const bool counts_message = x.num_sources > 1 && Below(rng, 2) == 0;
      const Bytes& good = counts_message
                              ? x.count_messages[static_cast<size_t>(s)]
                              : x.dispatch_messages[static_cast<size_t>(s)][static_cast<size_t>(p)];
      // A copy of its own on the heap, exactly as long as the message, so that reads past the end
      // are seen.
      Bytes bad = good;
      const int32_t kind = Below(rng, 4);
      if (kind == 0) bad.resize(static_cast<size_t>(Below(rng, static_cast<int32_t>(bad.size()))));
      if (kind == 1) bad.resize(bad.size() + 1 + static_cast<size_t>(Below(rng, 64)));
      if (kind >= 2) {
        for (int32_t j = 1 + Below(rng, 4); j > 0; --j) {
          // Mostly in the header, where the numbers are.
          const size_t range =
              kind == 2 ? std::min(bad.size(), sizeof(ExchangeHeader)) : bad.size();
          bad[static_cast<size_t>(Below(rng, static_cast<int32_t>(range)))] =
              static_cast<std::byte>(rng());
        }
      }
      bad.shrink_to_fit();
      std::vector<int32_t> counts(static_cast<size_t>(x.shape.num_experts));
      absl::Status status = absl::OkStatus();
      if (counts_message || x.num_sources == 1)
        status = ParseCounts(bad, x.key, s, x.shape, counts);
      if (status.ok() && (counts_message || x.num_sources == 1)) {
        std::vector<int32_t> all = x.counts;
        std::ranges::copy(counts, all.begin() + s * x.shape.num_experts);
        (void)PlanOnce(all, x.num_sources, x.placement, 0);  // whatever passed can be planned
      }
      if (!counts_message) {
        const auto view = ParseDispatch(bad, x.key, x.plan, s, p, x.shape);
        if (view.ok()) {
          BuildExpertBatch(x.plan, p, &batch);
          std::vector<DispatchView> views;
          for (int32_t other = 0; other < x.num_sources; ++other) {
            const Bytes& message =
                x.dispatch_messages[static_cast<size_t>(other)][static_cast<size_t>(p)];
            views.push_back(*ParseDispatch(message, x.key, x.plan, other, p, x.shape));
          }
          views[static_cast<size_t>(s)] = *view;
          Bytes grouped(static_cast<size_t>(batch.num_rows) *
                        static_cast<size_t>(x.shape.row_bytes));
          GatherRows(batch, 0, batch.blocks.size(), views, x.shape.row_bytes, grouped.data());
        }
        status = view.status();
      }
      (void)CheckCombine(bad, x.key, x.plan, s, p, x.shape.row_bytes);
      refused += status.ok() ? 0 : 1;
      if (kind <= 1) {
        ASSERT_FALSE(status.ok()) << "a message of another length";
      }
    }
  }
  std::cout << refused << " of " << num << " damaged messages refused\n";
  EXPECT_GT(refused, num / 2);
}

TEST(ExchangeLayout, ErrorsNameTheNumbers) {
  StepHeader step{
      .epoch = 4, .step = 9, .participants = {0, 2}, .micro_batches = 1, .slots_generation = 0};
  const ExchangeKey key{.step = &step, .layer = 3, .micro_batch = 0};
  const ExchangeShape shape{.row_bytes = 8, .num_experts = 2, .top_k = 1, .max_rows = 5};
  Bytes message(MaxCountsBytes(shape));
  std::vector<int32_t> out(2);
  const auto error = [&](const ExchangeKey& at, int32_t source) {
    return std::string(ParseCounts(message, at, source, shape, out).message());
  };
  message.resize(WriteCounts(key, 1, std::vector<int32_t>{2, 3}, message));
  EXPECT_EQ(error(key, 1), "");
  EXPECT_THAT(out, testing::ElementsAre(2, 3));
  EXPECT_THAT(error(key, 0), HasSubstr("count message of source 0: source 1, expected 0"));
  StepHeader other = step;
  other.epoch = 5;
  EXPECT_THAT(error({&other, 3, 0}, 1), HasSubstr("epoch 4, expected 5"));
  other = step;
  other.step = 10;
  EXPECT_THAT(error({&other, 3, 0}, 1), HasSubstr("step 9, expected 10"));
  other = step;
  other.participants = {0, 1};
  EXPECT_THAT(error({&other, 3, 0}, 1), HasSubstr("participants_hash"));
  EXPECT_THAT(error({&step, 2, 0}, 1), HasSubstr("layer 3, expected 2"));
  WriteCounts(key, 1, std::vector<int32_t>{6, 0}, message);
  EXPECT_THAT(error(key, 1), HasSubstr("copies of one expert 6, at most 5"));
  WriteCounts(key, 1, std::vector<int32_t>{-1, 0}, message);
  EXPECT_THAT(error(key, 1), HasSubstr("copies of one expert -1, at most 5"));
  WriteCounts(key, 1, std::vector<int32_t>{4, 4}, message);
  EXPECT_THAT(error(key, 1), HasSubstr("copies 8, at most 5"));
  message.resize(10);
  EXPECT_THAT(error(key, 1), HasSubstr("bytes 10, at least 88"));
}

TEST(ExchangeLayout, WeightsOfAnotherMoveOrPlanAreRefused) {
  StepHeader step{
      .epoch = 1, .step = 1, .participants = {0}, .micro_batches = 1, .slots_generation = 3};
  const ExchangeKey key{.step = &step, .layer = 2, .micro_batch = 0};
  DispatchPlan plan, other;
  plan.hash = 77;
  other.hash = 78;
  const WeightMove move{.expert = 5, .from_rank = 1, .to_rank = 2, .slot = 0};
  const ExchangeHeader header = MakeWeightsHeader(key, plan, move);
  const auto message = std::as_bytes(std::span(&header, 1));
  EXPECT_TRUE(CheckWeightsHeader(message, key, plan, move).ok());
  const auto error = [&](const ExchangeKey& at, const DispatchPlan& of, const WeightMove& wanted) {
    return std::string(CheckWeightsHeader(message, at, of, wanted).message());
  };
  EXPECT_THAT(error(key, other, move), HasSubstr("weights message of source 1: plan_hash 77"));
  WeightMove wanted = move;
  wanted.expert = 6;
  EXPECT_THAT(error(key, plan, wanted), HasSubstr("expert 5, expected 6"));
  wanted = move;
  wanted.slot = 1;
  EXPECT_THAT(error(key, plan, wanted), HasSubstr("slot 0, expected 1"));
  StepHeader later = step;
  later.slots_generation = 4;
  EXPECT_THAT(error({&later, 2, 0}, plan, move), HasSubstr("slots_generation 3, expected 4"));
  EXPECT_FALSE(CheckWeightsHeader(message.first(20), key, plan, move).ok());
}

TEST(ExchangeLayout, RanksWithOtherPlansAreToldApart) {
  StepHeader step{
      .epoch = 1, .step = 1, .participants = {0}, .micro_batches = 1, .slots_generation = 0};
  const ExchangeKey key{.step = &step, .layer = 0, .micro_batch = 0};
  const ExchangeShape shape{.row_bytes = 8, .num_experts = 2, .top_k = 1, .max_rows = 5};
  const std::vector<int32_t> ids = {0, 1, 1}, counts = {1, 2};
  const DispatchPlan mine = PlanOnce(counts, 1, ExpertPlacement::Even(1, 2, 2), 0);
  const DispatchPlan yours = PlanOnce(counts, 1, *ExpertPlacement::Create(2, {{{1}, {0}}}), 0);
  DispatchLists lists;
  BuildDispatchLists(ids, 1, mine, 0, 8, &lists);
  Bytes rows(24), message(MaxDispatchBytes(shape));
  message.resize(WriteDispatch(key, mine, 0, 1, lists, rows.data(), 8, counts, message));
  EXPECT_TRUE(ParseDispatch(message, key, mine, 0, 1, shape).ok());
  EXPECT_THAT(std::string(ParseDispatch(message, key, yours, 0, 1, shape).status().message()),
              HasSubstr("plan_hash"));
  EXPECT_THAT(std::string(ParseDispatch(message, key, mine, 0, 0, shape).status().message()),
              HasSubstr("expert_rank 1, expected 0"));
}

TEST(ExchangeLayout, AllSourcesTogetherHaveNoMoreCopiesThanAStep) {
  const ExchangeShape shape{.row_bytes = 8, .num_experts = 2, .top_k = 2, .max_rows = 5};
  EXPECT_TRUE(CheckTotalCopies(std::vector<int32_t>{3, 2, 2, 3}, shape).ok());
  const absl::Status status = CheckTotalCopies(std::vector<int32_t>{3, 2, 2, 4}, shape);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(status.message(), "11 rows of all participants exceed 5 tokens x 2 experts");
}

}  // namespace
}  // namespace switchyard
