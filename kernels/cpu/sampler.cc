#include "kernels/cpu/sampler.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>
#include <vector>

#include "kernels/exact_math.h"
#include "kernels/philox.h"

namespace switchyard::cpu {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

struct Candidate {
  float logit;
  int32_t id;
};
// The order of candidates: higher logit first, ties to the lower id.
bool Before(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// Grown to the largest vocabulary seen by this thread and kept.
struct Scratch {
  std::vector<float> adjusted;
  std::vector<float> weights;
  std::vector<int32_t> counts;  // all zero between rows
  std::vector<Candidate> candidates;
};
Scratch& ThreadScratch() {
  thread_local Scratch scratch;
  return scratch;
}

bool InVocabulary(int32_t id, std::span<const float> logits) {
  return id >= 0 && static_cast<size_t>(id) < logits.size();
}

// The n best candidates, sorted: one pass with a heap whose top is the worst kept.
void BestCandidates(std::span<const float> logits, size_t n, std::vector<Candidate>* best) {
  best->clear();
  n = std::min(n, logits.size());
  if (n == 0) return;
  for (size_t i = 0; i < n; ++i) best->push_back({logits[i], static_cast<int32_t>(i)});
  if (n < logits.size()) {
    std::make_heap(best->begin(), best->end(), Before);
    for (size_t i = n; i < logits.size(); ++i) {
      if (logits[i] <= best->front().logit)
        continue;  // a tie goes to the lower id, which is kept already
      std::pop_heap(best->begin(), best->end(), Before);
      best->back() = {logits[i], static_cast<int32_t>(i)};
      std::push_heap(best->begin(), best->end(), Before);
    }
  }
  std::sort(best->begin(), best->end(), Before);
}

// Divides positive logits of seen tokens by the penalty and multiplies the others (CTRL, arXiv
// 1909.05858).
void PenalizeRepetition(const SamplingRow& row, std::span<float> logits,
                        std::vector<int32_t>& counts) {
  for (const std::span<const int32_t> ids : {row.prompt, row.generated}) {
    for (int32_t id : ids) {
      if (!InVocabulary(id, logits) || counts[static_cast<size_t>(id)]++ != 0) continue;
      float& x = logits[static_cast<size_t>(id)];
      x = x > 0.0f ? x / row.repetition_penalty : x * row.repetition_penalty;
    }
  }
  for (const std::span<const int32_t> ids : {row.prompt, row.generated})
    for (int32_t id : ids)
      if (InVocabulary(id, logits)) counts[static_cast<size_t>(id)] = 0;
}

void PenalizeGenerated(const SamplingRow& row, std::span<float> logits,
                       std::vector<int32_t>& counts) {
  for (int32_t id : row.generated)
    if (InVocabulary(id, logits)) ++counts[static_cast<size_t>(id)];
  for (int32_t id : row.generated) {
    if (!InVocabulary(id, logits)) continue;
    int32_t& count = counts[static_cast<size_t>(id)];
    if (count == 0) continue;
    logits[static_cast<size_t>(id)] -=
        row.frequency_penalty * static_cast<float>(count) + row.presence_penalty;
    count = 0;
  }
}

void Adjust(const SamplingRow& row, std::span<float> logits, Scratch& scratch) {
  for (const auto& [id, bias] : row.logit_bias)
    if (InVocabulary(id, logits)) logits[static_cast<size_t>(id)] += bias;
  if (scratch.counts.size() < logits.size()) scratch.counts.resize(logits.size(), 0);
  if (row.repetition_penalty != 1.0f) PenalizeRepetition(row, logits, scratch.counts);
  if (row.presence_penalty != 0.0f || row.frequency_penalty != 0.0f)
    PenalizeGenerated(row, logits, scratch.counts);
  for (int32_t id : row.banned)
    if (InVocabulary(id, logits)) logits[static_cast<size_t>(id)] = kMinusInfinity;
}

// The distribution after temperature, relative to its highest term (which is 1).
struct Distribution {
  std::span<const float> logits;
  std::span<const float> weights;
  float min_weight = 0.0f;  // min-p: lighter tokens are out
  double total = 0.0;       // of the weights that are in

  double WeightOf(int32_t id) const {
    const float w = weights[static_cast<size_t>(id)];
    return w >= min_weight ? static_cast<double>(w) : 0.0;
  }
};

// The first of ids in order whose cumulative weight exceeds u * total; rounding at the end falls to
// the last that has weight.
template <typename IdAt>
int32_t DrawFrom(const Distribution& d, size_t count, const IdAt& id_at, double u, double total) {
  const double target = u * total;
  double cumulative = 0.0;
  int32_t last = -1;
  for (size_t i = 0; i < count; ++i) {
    const int32_t id = id_at(i);
    const double w = d.WeightOf(id);
    if (w == 0.0) continue;
    last = id;
    cumulative += w;
    if (cumulative > target) return id;
  }
  return last;
}

struct Nucleus {
  size_t size = 0;
  double weight = 0.0;
};
// The shortest prefix of sorted candidates with at least top_p of `total`: a token is in when what
// comes before it is less than that.
Nucleus CutNucleus(const Distribution& d, std::span<const Candidate> sorted, float top_p,
                   double total) {
  Nucleus n;
  const double wanted = static_cast<double>(top_p) * total;
  for (const Candidate& c : sorted) {
    if (n.size > 0 && n.weight >= wanted) break;
    n.weight += d.WeightOf(c.id);
    ++n.size;
  }
  return n;
}

int32_t Draw(const Distribution& d, const SamplingRow& row, Scratch& scratch) {
  const double u =
      Uniform({.seed = row.seed, .choice = row.choice, .position = row.position, .draw = 0});
  const size_t vocab = d.logits.size();
  const bool use_top_k = row.top_k > 0 && static_cast<size_t>(row.top_k) < vocab;
  const bool use_top_p = row.top_p < 1.0f;
  std::vector<Candidate>& sorted = scratch.candidates;
  const auto sorted_id = [&](size_t i) { return sorted[i].id; };

  if (!use_top_k && !use_top_p)
    return DrawFrom(
        d, vocab, [](size_t i) { return static_cast<int32_t>(i); }, u, d.total);
  if (use_top_k) {
    BestCandidates(d.logits, static_cast<size_t>(row.top_k), &sorted);
    double total = 0.0;
    for (const Candidate& c : sorted) total += d.WeightOf(c.id);
    const Nucleus n = CutNucleus(d, sorted, use_top_p ? row.top_p : 2.0f, total);
    return DrawFrom(d, n.size, sorted_id, u, n.weight);
  }
  // The nucleus is small for most distributions: sort no more than it takes.
  for (const size_t size : std::array{size_t{64}, size_t{1024}, vocab}) {
    BestCandidates(d.logits, size, &sorted);
    const Nucleus n = CutNucleus(d, sorted, row.top_p, d.total);
    if (n.size < sorted.size() || sorted.size() == vocab)
      return DrawFrom(d, n.size, sorted_id, u, n.weight);
  }
  return -1;  // not reached: the last size is the vocabulary
}

int32_t Choose(const KernelTable& kernels, std::span<const float> logits, float max,
               const SamplingRow& row, Scratch& scratch) {
  if (row.temperature < SamplingRow::kGreedyTemperature)
    return static_cast<int32_t>(std::find(logits.begin(), logits.end(), max) - logits.begin());
  // Kept normal, so that -inf times it stays -inf.
  const float scale = std::max(1.0f / row.temperature, std::numeric_limits<float>::min());
  if (scratch.weights.size() < logits.size()) scratch.weights.resize(logits.size());
  Distribution d;
  d.logits = logits;
  d.weights = std::span<const float>(scratch.weights).first(logits.size());
  d.total = kernels.exp_sum(logits.data(), static_cast<int64_t>(logits.size()), max, scale,
                            scratch.weights.data());
  if (row.min_p > 0.0f) {
    d.min_weight = std::min(row.min_p, 1.0f);
    d.total = 0.0;
    for (size_t i = 0; i < logits.size(); ++i) d.total += d.WeightOf(static_cast<int32_t>(i));
  }
  return Draw(d, row, scratch);
}

// ln of the sum of e^logit.
double LogSumExp(const KernelTable& kernels, std::span<const float> logits, float max) {
  return static_cast<double>(max) +
         ExactLog(kernels.exp_sum(logits.data(), static_cast<int64_t>(logits.size()), max, 1.0f,
                                  nullptr));
}

void AddLogprobs(const KernelTable& kernels, std::span<const float> logits, float max,
                 int32_t num_top, Scratch& scratch, SampledToken* out) {
  const double norm = LogSumExp(kernels, logits, max);
  const auto logprob = [&](float logit) {
    return static_cast<float>(static_cast<double>(logit) - norm);
  };
  out->logprob = logprob(logits[static_cast<size_t>(out->token)]);
  BestCandidates(logits, static_cast<size_t>(num_top), &scratch.candidates);
  for (const Candidate& c : scratch.candidates) out->top.emplace_back(c.id, logprob(c.logit));
}

}  // namespace

SampledToken SampleRow(const KernelTable& kernels, std::span<const float> logits,
                       const SamplingRow& row) {
  Scratch& scratch = ThreadScratch();
  SampledToken out;
  const int64_t vocab = static_cast<int64_t>(logits.size());
  const LogitStats raw = kernels.logit_stats(logits.data(), vocab);
  LogitStats stats = raw;
  std::span<const float> adjusted = logits;
  if (raw.finite && row.Adjusts()) {
    scratch.adjusted.assign(logits.begin(), logits.end());
    Adjust(row, scratch.adjusted, scratch);
    adjusted = scratch.adjusted;
    stats = kernels.logit_stats(adjusted.data(), vocab);
  }
  out.finite = raw.finite && stats.finite;
  if (!out.finite) return out;
  out.token = Choose(kernels, adjusted, stats.max, row, scratch);
  if (row.num_top_logprobs >= 0)
    AddLogprobs(kernels, logits, raw.max, row.num_top_logprobs, scratch, &out);
  return out;
}

SampledToken ScoreRow(const KernelTable& kernels, std::span<const float> logits, int32_t token,
                      int32_t num_top) {
  SampledToken out;
  const LogitStats stats = kernels.logit_stats(logits.data(), static_cast<int64_t>(logits.size()));
  out.finite = stats.finite;
  if (!out.finite) return out;
  SY_CHECK(InVocabulary(token, logits));
  out.token = token;
  if (num_top >= 0) AddLogprobs(kernels, logits, stats.max, num_top, ThreadScratch(), &out);
  return out;
}

size_t SamplerScratchBytes(int64_t vocab_size) {
  // The list of candidates may have doubled.
  return static_cast<size_t>(vocab_size) *
         (2 * sizeof(float) + sizeof(int32_t) + 2 * sizeof(Candidate));
}

}  // namespace switchyard::cpu
