#include "scheduler/scheduler_core.h"

#include <algorithm>
#include <limits>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "spdlog/spdlog.h"

namespace switchyard {
namespace {

// Blocks that admission leaves free on a worker that runs something, so that decodes can grow for a
// while before anything must be preempted.
int32_t AdmissionReserve(int32_t num_blocks) { return (num_blocks + 99) / 100; }

}  // namespace

SchedulerCore::SchedulerCore(const SchedulerOptions& options, const ModelInfo& model)
    : options_(options),
      vocab_size_(model.vocab_size),
      max_model_len_(model.max_model_len),
      num_routing_profiles_(model.num_routing_profiles),
      block_size_(model.block_size),
      num_blocks_(model.num_kv_blocks),
      capacity_(static_cast<int64_t>(model.block_size) * model.num_kv_blocks),
      micro_batch_policy_(options.micro_batches) {
  SY_CHECK_GE(block_size_, 1);
  SY_CHECK_GE(num_blocks_, 1);
  SY_CHECK_GE(options_.max_num_seqs, 1);
  SY_CHECK_GE(options_.max_num_batched_tokens, 1);
  SY_CHECK_GE(options_.max_steps_in_flight, 1);
  if (capacity_ < max_model_len_) {
    spdlog::warn("KV cache holds {} positions per attention worker, fewer than max_model_len {}",
                 capacity_, max_model_len_);
  }
}

absl::Status SchedulerCore::Validate(const Request& request) const {
  const int64_t length = static_cast<int64_t>(request.prompt.size());
  if (length == 0) return absl::InvalidArgumentError("the prompt is empty");
  if (request.choices.empty()) return absl::InvalidArgumentError("the request has no choices");
  for (const SamplingParams& sampling : request.choices) {
    if (sampling.routing_profile != request.choices[0].routing_profile) {
      return absl::InvalidArgumentError(
          absl::StrCat("the choices of a request share one routing profile, got ",
                       request.choices[0].routing_profile, " and ", sampling.routing_profile));
    }
  }
  if (request.choices[0].routing_profile >= num_routing_profiles_) {
    return absl::InvalidArgumentError(
        absl::StrCat("routing profile ", request.choices[0].routing_profile,
                     " does not exist, the model has ", num_routing_profiles_));
  }
  if (request.max_tokens < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_tokens is ", request.max_tokens, ", it must not be negative"));
  }
  if (length + (request.max_tokens > 0) > max_model_len_) {
    return absl::InvalidArgumentError(absl::StrCat("the prompt has ", length,
                                                   " tokens, the context holds ", max_model_len_,
                                                   " with the output"));
  }
  if (length > capacity_) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the prompt has ", length, " tokens and needs ", BlocksFor(static_cast<int32_t>(length)),
        " KV blocks, an attention worker has ", num_blocks_, " of ", block_size_, " tokens"));
  }
  for (int32_t token : request.prompt) {
    if (token < 0 || token >= vocab_size_) {
      return absl::InvalidArgumentError(
          absl::StrCat("token id ", token, " is outside the vocabulary of ", vocab_size_));
    }
  }
  return absl::OkStatus();
}

void SchedulerCore::Submit(RequestId id, Request request) {
  const int64_t length = static_cast<int64_t>(request.prompt.size());
  // The last token needs no KV, hence + 1.
  const int32_t limit = static_cast<int32_t>(
      request.max_tokens == 0 ? length
                              : std::min({length + request.max_tokens,
                                          static_cast<int64_t>(max_model_len_), capacity_ + 1}));
  RequestState state;
  state.root = hasher_.Root(request.cache_salt, request.choices[0].routing_profile);
  state.live = static_cast<int32_t>(request.choices.size());
  state.queued = state.live;
  for (int32_t choice = 0; choice < state.live; ++choice) {
    SamplingParams sampling = request.choices[choice];
    if (sampling.min_tokens > 0) sampling.banned_before_min = request.stop_token_ids;
    auto sequence =
        std::make_unique<Sequence>(next_sequence_++, id, choice, request.prompt, limit,
                                   std::make_shared<const SamplingParams>(std::move(sampling)));
    waiting_.emplace_hint(waiting_.end(), sequence->id(), sequence.get());
    state.choices.push_back(std::move(sequence));
  }
  state.request = std::make_shared<const Request>(std::move(request));
  SY_CHECK(requests_.emplace(id, std::move(state)).second);
}

void SchedulerCore::Cancel(RequestId id) {
  events_.erase(id);
  const auto it = requests_.find(id);
  if (it == requests_.end()) return;
  // End() of the last live choice erases the request.
  for (int32_t left = it->second.live, choice = 0; left > 0; ++choice) {
    if (Sequence* sequence = it->second.choices[choice].get()) {
      --left;
      End(*sequence);
    }
  }
}

void SchedulerCore::CancelChoice(RequestId id, int32_t choice) {
  if (const auto it = events_.find(id); it != events_.end()) {
    std::erase_if(it->second.events, [&](const ChoiceEvent& e) { return e.choice == choice; });
  }
  const auto it = requests_.find(id);
  if (it == requests_.end()) return;
  const auto& choices = it->second.choices;
  if (choice < 0 || choice >= static_cast<int32_t>(choices.size()) || !choices[choice]) return;
  End(*choices[choice]);
}

void SchedulerCore::LeaveQueue(RequestState& state) {
  if (--state.queued == 0) ++left_queue_.requests;
  left_queue_.tokens += static_cast<int64_t>(state.request->prompt.size());
}

void SchedulerCore::End(Sequence& sequence) {
  RequestState& state = requests_.at(sequence.request());
  if (sequence.running()) {
    Member& member = members_[sequence.worker()];
    if (sequence.told()) member.ended.push_back({sequence.id()});
    member.blocks.Release(sequence.mutable_blocks());
  }
  running_.erase(sequence.id());
  waiting_.erase(sequence.id());
  if (!sequence.admitted) LeaveQueue(state);
  const RequestId id = sequence.request();
  state.choices[sequence.choice()].reset();
  if (--state.live > 0) return;
  requests_.erase(id);
}

bool SchedulerCore::HasHome(const Sequence& sequence) const {
  const int32_t needed = BlocksFor(sequence.total());
  return std::any_of(members_.begin(), members_.end(),
                     [&](const Member& m) { return needed <= m.blocks.num_blocks(); });
}

// A choice waits until the prompt it shares with its siblings is computed once and can be had from
// the prefix cache.
bool SchedulerCore::WaitsForSibling(const Sequence& sequence) const {
  if (!options_.enable_prefix_caching || sequence.needs_prompt_logprobs()) return false;
  if (sequence.prompt_length() <= block_size_) return false;
  const RequestState& state = requests_.at(sequence.request());
  if (state.prompt_computed) return false;
  for (int32_t choice = 0; choice < sequence.choice(); ++choice) {
    if (state.choices[choice] && HasHome(*state.choices[choice])) return true;
  }
  return false;
}

// The worker with the least rows to wait for among those with enough blocks; the siblings' worker
// first.
std::optional<SchedulerCore::Placement> SchedulerCore::Place(Sequence& sequence) {
  const RequestState& state = requests_.at(sequence.request());
  std::vector<int64_t> queued(members_.size(), 0);
  std::vector<int32_t> num_running(members_.size(), 0);
  for (const auto& [id, other] : running_) {
    queued[other->worker()] += OutlookOf(*other).pending;
    ++num_running[other->worker()];
  }
  const int32_t num_blocks = BlocksFor(sequence.total());
  std::span<const BlockHash> hashes;
  if (options_.enable_prefix_caching) {
    // Computed in any case, in a block of its own: the last token, and what gives missing prompt
    // logprobs.
    const int32_t reusable =
        sequence.needs_prompt_logprobs() ? sequence.first_unscored() - 1 : sequence.total() - 1;
    hashes = sequence.Hashes(hasher_, state.root, block_size_, reusable / block_size_);
  }
  std::optional<Placement> best;
  int64_t best_cost = std::numeric_limits<int64_t>::max();
  for (int32_t worker = 0; worker < static_cast<int32_t>(members_.size()); ++worker) {
    const BlockManager& blocks = members_[worker].blocks;
    Placement placement{worker, blocks.FindPrefix(hashes)};
    const int32_t num_hits = static_cast<int32_t>(placement.prefix.size());
    const int32_t reserve = num_running[worker] == 0 ? 0 : AdmissionReserve(blocks.num_blocks());
    if (!blocks.CanAcquire(placement.prefix, num_blocks - num_hits, reserve)) continue;
    if (worker == state.worker && state.live > 1) return placement;
    const int64_t cost = queued[worker] + sequence.total() - int64_t{num_hits} * block_size_;
    if (cost >= best_cost) continue;
    best_cost = cost;
    best = std::move(placement);
  }
  return best;
}

void SchedulerCore::Start(Sequence& sequence, Placement placement) {
  RequestState& state = requests_.at(sequence.request());
  const int32_t num_hits = static_cast<int32_t>(placement.prefix.size());
  const int32_t computed = num_hits * block_size_;
  std::vector<int32_t> table;
  members_[placement.worker].blocks.Acquire(placement.prefix,
                                            BlocksFor(sequence.total()) - num_hits, &table);
  sequence.Start(placement.worker, computed, std::move(table));
  state.worker = placement.worker;
  if (!sequence.admitted) {
    sequence.admitted = true;
    sequence.cached_tokens = computed;
    LeaveQueue(state);
  }
  if (!state.counted) {
    state.counted = true;
    stats_.prompt_tokens += sequence.prompt_length();
    stats_.cached_tokens += computed;
  }
  running_.emplace(sequence.id(), &sequence);
}

void SchedulerCore::Admit() {
  if (!planning_) return;
  int64_t decodes = 0;
  int64_t prefill_rows = 0;
  for (const auto& [id, sequence] : running_) {
    const Outlook outlook = OutlookOf(*sequence);
    if (outlook.decoding) {
      ++decodes;
    } else {
      prefill_rows += outlook.pending;
    }
  }
  // No more prompts than the next step can begin: those that wait may find more in the prefix
  // cache.
  const int32_t budget = options_.max_num_batched_tokens;
  const int64_t room = std::max<int64_t>(PrefillReserve(budget), budget - decodes);
  for (auto it = waiting_.begin(); it != waiting_.end();) {
    if (static_cast<int32_t>(running_.size()) >= options_.max_num_seqs || prefill_rows >= room) {
      return;
    }
    Sequence& sequence = *it->second;
    if (!HasHome(sequence) || WaitsForSibling(sequence)) {
      ++it;
      continue;
    }
    std::optional<Placement> placement = Place(sequence);
    if (!placement) return;  // nobody overtakes the oldest
    Start(sequence, *std::move(placement));
    prefill_rows += sequence.pending();
    it = waiting_.erase(it);
  }
}

SchedulerStats SchedulerCore::Stats() const {
  SchedulerStats stats = stats_;
  stats.running = static_cast<int32_t>(running_.size());
  stats.waiting = static_cast<int32_t>(waiting_.size());
  int64_t used = 0, total = 0;
  for (const Member& member : members_) {
    used += member.blocks.num_used();
    total += member.blocks.num_blocks();
  }
  stats.kv_usage = total == 0 ? 0 : static_cast<double>(used) / static_cast<double>(total);
  stats.epoch = epoch_;
  stats.unavailable = !unavailable_.ok();
  return stats;
}

void SchedulerCore::CheckIntegrity() const {
  std::vector<std::vector<int32_t>> refs;
  for (const Member& member : members_) refs.emplace_back(member.blocks.num_blocks(), 0);
  size_t live = 0;
  for (const auto& [id, state] : requests_) {
    for (const auto& sequence : state.choices) {
      if (!sequence) continue;
      ++live;
      sequence->CheckInvariants();
      SY_CHECK_EQ(running_.contains(sequence->id()), sequence->running());
      SY_CHECK_NE(waiting_.contains(sequence->id()), sequence->running());
      if (!sequence->running()) continue;
      SY_CHECK_LE(sequence->computed(),
                  static_cast<int64_t>(sequence->blocks().size()) * block_size_);
      for (int32_t block : sequence->blocks()) ++refs[sequence->worker()][block];
    }
  }
  SY_CHECK_EQ(live, running_.size() + waiting_.size());
  for (size_t rank = 0; rank < members_.size(); ++rank)
    members_[rank].blocks.CheckIntegrity(refs[rank]);
}

}  // namespace switchyard
