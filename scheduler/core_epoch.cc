// SchedulerCore: epochs. Sequences stay with the worker that holds their KV; those of a worker that
// is gone wait to be prefilled elsewhere.
#include <algorithm>
#include <set>
#include <unordered_map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "scheduler/scheduler_core.h"
#include "spdlog/spdlog.h"

namespace switchyard {

void SchedulerCore::Install(const EpochView& view) {
  SY_CHECK_GT(view.epoch, epoch_);
  SY_CHECK(!planning_ && !step_in_flight());
  std::unordered_map<uint64_t, int32_t> old_rank;
  for (size_t rank = 0; rank < members_.size(); ++rank)
    old_rank.emplace(members_[rank].worker, static_cast<int32_t>(rank));
  std::vector<int32_t> new_rank(members_.size(), -1);
  std::vector<Member> members;
  for (const AttentionMember& m : view.attention) {
    const auto old = old_rank.find(m.worker);
    if (old == old_rank.end()) {
      members.push_back({.worker = m.worker, .blocks = BlockManager(m.num_kv_blocks), .ended = {}});
      continue;
    }
    SY_CHECK_EQ(new_rank[old->second], -1);  // a worker has one rank
    SY_CHECK_EQ(members_[old->second].blocks.num_blocks(), m.num_kv_blocks);
    new_rank[old->second] = static_cast<int32_t>(members.size());
    members.push_back(std::move(members_[old->second]));
  }
  members_ = std::move(members);
  epoch_ = view.epoch;
  planning_ = true;
  unavailable_ = absl::OkStatus();
  last_participants_.clear();  // a new generation of slots
  const int32_t num_moved = MoveSequences(new_rank);
  if (num_moved > 0) spdlog::info("epoch {}: {} sequences are prefilled again", epoch_, num_moved);
}

// From the ranks before to `new_rank` [old ranks], -1 where the worker is gone.
int32_t SchedulerCore::MoveSequences(const std::vector<int32_t>& new_rank) {
  std::vector<Sequence*> homeless;
  for (const auto& [id, sequence] : running_) {
    const int32_t rank = new_rank[sequence->worker()];
    if (rank < 0) {
      homeless.push_back(sequence);
      continue;
    }
    if (sequence->told()) members_[rank].ended.push_back({id});
    sequence->ForgetTold();
    sequence->Move(rank);
  }
  for (Sequence* sequence : homeless) {
    sequence->Stop();  // its blocks went with the worker
    running_.erase(sequence->id());
    waiting_.emplace(sequence->id(), sequence);
  }
  for (auto& [id, state] : requests_) {
    if (state.worker < 0) continue;
    state.worker = new_rank[state.worker];
    // The prefix that its choices share went as well; one of them computes it again.
    if (state.worker < 0) state.prompt_computed = false;
  }
  stats_.moved_sequences += homeless.size();
  return static_cast<int32_t>(homeless.size());
}

void SchedulerCore::Pause(const EpochPause& pause) {
  if (!planning_ || pause.epoch != epoch_) return;
  planning_ = false;
  pausing_ = true;
}

std::optional<uint64_t> SchedulerCore::TakePaused() {
  if (!pausing_ || step_in_flight()) return std::nullopt;
  pausing_ = false;
  return epoch_;
}

void SchedulerCore::EndEpoch(const EpochEnd& end) {
  if (end.epoch != epoch_) return;
  planning_ = false;
  pausing_ = false;
  if (!step_in_flight()) return;
  const std::deque<StepRecord> records = std::exchange(in_flight_, {});
  stats_.lost_steps += records.size();
  spdlog::warn("epoch {} ended in step {}: {} attention workers lost{}", epoch_,
               records.front().step, end.lost_attention.size(),
               end.expert_lost ? ", and expert workers" : "");
  const bool alone = records.size() == 1 && records.front().num_sequences == 1;
  std::set<SequenceId> struck;  // once each, in however many steps they have rows
  for (const StepRecord& record : records) {
    micro_batch_policy_.Fail(record.sample);
    for (const WorkerShare& share : record.shares) {
      if (share.applied || share.discarded) continue;  // who was discarded has been told anew
      Member& member = members_[share.worker];
      member.ended.insert(member.ended.end(), share.ended.begin(), share.ended.end());
      const bool lost = std::find(end.lost_attention.begin(), end.lost_attention.end(),
                                  member.worker) != end.lost_attention.end();
      if (!end.expert_lost && !lost) continue;
      std::vector<Row> rows;
      for (const Row& row : share.rows) {
        if (LiveRow(row) != nullptr && struck.insert(row.sequence).second) rows.push_back(row);
      }
      StrikeRows(rows, alone, lost ? "its attention worker was lost" : "an expert worker was lost");
    }
  }
  FlushEvents();  // of the shares that were applied, and the failures
}

void SchedulerCore::BecomeUnavailable(const absl::Status& status) {
  unavailable_ = status;
  EndAll(status);
}

}  // namespace switchyard
