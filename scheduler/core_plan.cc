// SchedulerCore: planning a step, preemption.
#include <algorithm>
#include <utility>

#include "kernels/check.h"
#include "scheduler/scheduler_core.h"

namespace switchyard {

SchedulerCore::Outlook SchedulerCore::OutlookOf(const Sequence& sequence) const {
  Outlook outlook{.computed = sequence.computed(), .total = sequence.total()};
  for (const StepRecord& record : in_flight_) {
    for (const WorkerShare& share : record.shares) {
      if (share.worker != sequence.worker() || share.applied || share.discarded) continue;
      const auto row = std::ranges::lower_bound(share.rows, sequence.id(), {}, &Row::sequence);
      if (row == share.rows.end() || row->sequence != sequence.id() || row->run != sequence.run())
        continue;
      outlook.in_flight = true;
      outlook.computed = row->start + row->count;
      if (row->sample) ++outlook.total;
    }
  }
  // The last token needs no KV. Who outgrows its worker by a token that is only expected waits for
  // it: preempted before that, it would be sent back there.
  const bool expects = outlook.total > sequence.total();
  const bool complete = expects && outlook.total >= sequence.limit();
  const bool outgrows =
      expects && BlocksFor(outlook.computed + 1) > members_[sequence.worker()].blocks.num_blocks();
  outlook.pending = complete || outgrows ? 0 : outlook.total - outlook.computed;
  outlook.decoding = outlook.total > sequence.prompt_length() && outlook.pending == 1;
  return outlook;
}

// Whoever is suspected of breaking steps has the workers to itself: nothing is in flight beside it.
bool SchedulerCore::CanPlan() const {
  if (!planning_ || static_cast<int32_t>(in_flight_.size()) >= options_.max_steps_in_flight)
    return false;
  return in_flight_.empty() || std::ranges::none_of(running_, [](const auto& entry) {
           return entry.second->strikes() >= kMaxStrikes - 1;
         });
}

// Its rows in flight would come back for nothing, and a failure of theirs strike nobody.
void SchedulerCore::Preempt(Sequence& sequence) {
  SY_CHECK(!OutlookOf(sequence).in_flight);
  Member& member = members_[sequence.worker()];
  if (sequence.told()) member.ended.push_back({sequence.id()});
  std::vector<int32_t> table = sequence.Stop();
  member.blocks.Release(&table);
  running_.erase(sequence.id());
  waiting_.emplace(sequence.id(), &sequence);
  ++stats_.preemptions;
}

Sequence& SchedulerCore::YoungestOn(int32_t worker) {
  const auto it = std::find_if(running_.rbegin(), running_.rend(),
                               [&](const auto& entry) { return entry.second->worker() == worker; });
  SY_CHECK(it != running_.rend());
  return *it->second;
}

// Grows the block table for `positions`, or preempts the sequence: it is the youngest, or its
// worker is too small and a larger one must take it. False: it must wait, because whoever is to be
// preempted has rows in flight, which would be computed for nothing; perhaps it ends with them.
bool SchedulerCore::Reserve(Sequence& sequence, int32_t positions) {
  const int32_t needed = BlocksFor(positions);
  BlockManager& blocks = members_[sequence.worker()].blocks;
  if (needed > blocks.num_blocks()) Preempt(sequence);
  while (sequence.running() && static_cast<int32_t>(sequence.blocks().size()) < needed) {
    if (blocks.CanAcquire({}, 1, 0)) {
      blocks.Acquire({}, 1, sequence.mutable_blocks());
      continue;
    }
    Sequence& victim = YoungestOn(sequence.worker());
    if (OutlookOf(victim).in_flight) return false;
    Preempt(victim);
  }
  return true;
}

std::vector<RowPick> SchedulerCore::PickAndReserve() {
  std::vector<RowCandidate> candidates;
  for (const auto& [id, s] : running_) {
    const Outlook outlook = OutlookOf(*s);
    if (outlook.pending == 0) continue;  // until a step in flight is applied
    candidates.push_back({.sequence = id,
                          .pending = outlook.pending,
                          .decoding = outlook.decoding,
                          .alone = s->strikes() >= kMaxStrikes - 1,
                          .last_step = s->last_step});
  }
  if (candidates.empty()) return {};
  const std::vector<RowPick> picks = PickRows(candidates, options_.max_num_batched_tokens);
  std::vector<RowPick> kept;
  std::vector<bool> short_of_blocks(members_.size(), false);  // by rank
  for (const RowPick& pick : picks) {                         // by age: victims come later
    const auto it = running_.find(pick.sequence);
    if (it == running_.end()) continue;
    Sequence& sequence = *it->second;
    const int32_t worker = sequence.worker();
    const int32_t positions = OutlookOf(sequence).computed + pick.count;
    if (short_of_blocks[worker]) {
      // Somebody older waits for the youngest to have no rows in flight: it gets none, and nobody
      // takes a block meanwhile.
      const bool fits = BlocksFor(positions) <= static_cast<int32_t>(sequence.blocks().size());
      if (!fits || &sequence == &YoungestOn(worker)) continue;
    } else if (!Reserve(sequence, positions)) {
      short_of_blocks[worker] = true;
      continue;
    }
    if (sequence.running()) kept.push_back(pick);
  }
  return kept;
}

// `fullest`: becomes the rows of the participant that has most.
StepHeader SchedulerCore::NextHeader(const std::vector<RowPick>& picks, int32_t* fullest) {
  StepHeader header;
  header.epoch = epoch_;
  header.step = next_step_++;
  std::vector<int32_t> rows(members_.size(), 0);  // by rank
  for (const RowPick& pick : picks) rows[running_.at(pick.sequence)->worker()] += pick.count;
  for (size_t rank = 0; rank < rows.size(); ++rank) {
    if (rows[rank] > 0) header.participants.push_back(static_cast<int32_t>(rank));
  }
  *fullest = *std::max_element(rows.begin(), rows.end());
  header.micro_batches = micro_batch_policy_.Choose(*fullest);
  // Foreign slots are replicated state of those who saw all steps of a generation.
  if (!std::includes(last_participants_.begin(), last_participants_.end(),
                     header.participants.begin(), header.participants.end())) {
    ++slots_generation_;
  }
  header.slots_generation = slots_generation_;
  last_participants_ = header.participants;
  return header;
}

std::vector<RowPick> SchedulerCore::PickSome() {
  for (;;) {
    const uint64_t preemptions = stats_.preemptions;
    std::vector<RowPick> picks = PickAndReserve();
    if (!picks.empty()) return picks;
    if (stats_.preemptions > preemptions) continue;  // fewer each time
    if (!running_.empty()) {
      SY_CHECK(step_in_flight());  // it has their rows, or those of whom they wait for
      return {};
    }
    Admit();  // one that grew out of a small worker starts on a larger one
    if (running_.empty()) break;
  }
  // Something always gets on.
  SY_CHECK(std::none_of(waiting_.begin(), waiting_.end(),
                        [&](const auto& entry) { return HasHome(*entry.second); }));
  return {};
}

std::optional<SchedulerCore::Step> SchedulerCore::Plan(TimePoint now) {
  if (!CanPlan()) return std::nullopt;
  const std::vector<RowPick> picks = PickSome();
  if (picks.empty()) return std::nullopt;

  StepRecord record;
  const StepHeader header = NextHeader(picks, &record.sample.rows);
  record.sample.micro_batches = header.micro_batches;
  Step step{.step = header.step, .plans = {}};
  record.step = header.step;
  record.planned = now;
  for (int32_t worker : header.participants) {
    StepPlan plan{.header = header, .work = {}, .ended = std::exchange(members_[worker].ended, {})};
    WorkerShare share{.worker = worker, .rows = {}, .ended = plan.ended};
    for (const RowPick& pick : picks) {
      Sequence& sequence = *running_.at(pick.sequence);
      if (sequence.worker() != worker) continue;
      if (sequence.first_scheduled == TimePoint()) sequence.first_scheduled = now;
      sequence.last_step = header.step;
      const Outlook outlook = OutlookOf(sequence);
      SequenceWork work = sequence.MakeWork(outlook.computed, pick.count, outlook.total);
      share.rows.push_back({work.sequence, work.run, work.start, work.count, work.sample});
      record.num_rows += pick.count;
      ++record.num_sequences;
      plan.work.push_back(std::move(work));
    }
    record.shares.push_back(std::move(share));
    step.plans.emplace_back(worker, std::move(plan));
  }
  record.outstanding = static_cast<int32_t>(record.shares.size());
  in_flight_.push_back(std::move(record));
  return step;
}

}  // namespace switchyard
