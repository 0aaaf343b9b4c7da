#include "server/text/pre_tokenizer.h"

#include <functional>
#include <optional>
#include <utility>

#include "server/text/cat.h"
#include "server/text/json_fields.h"
#include "server/text/pattern.h"
#include "server/text/unicode.h"

namespace switchyard {
namespace {

constexpr int kMaxDepth = 16;
constexpr std::string_view kByteLevelPattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

enum class Behavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

absl::StatusOr<Behavior> ReadBehavior(const nlohmann::json& spec, std::string_view preset) {
  std::string name(preset);
  if (absl::Status s = ReadField(spec, "behavior", &name); !s.ok()) return s;
  if (name == "Removed") return Behavior::kRemoved;
  if (name == "Isolated") return Behavior::kIsolated;
  if (name == "MergedWithPrevious") return Behavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return Behavior::kMergedWithNext;
  if (name == "Contiguous") return Behavior::kContiguous;
  return absl::InvalidArgumentError(Cat("pre_tokenizer behavior '", name, "' is not supported"));
}

// A stretch of a word, and whether the delimiter matches it. Stretches cover the word without gaps.
struct Stretch {
  size_t begin, end;
  bool match;
};

// Cuts `word` into its stretches as `behavior` says and adds them to `out`.
void AddStretches(std::string_view word, const std::vector<Stretch>& stretches, Behavior behavior,
                  Words* out) {
  const size_t n = stretches.size();
  const auto add = [&](size_t begin, size_t end) { out->Add(word.substr(begin, end - begin)); };
  for (size_t i = 0; i < n;) {
    size_t last = i;  // the piece is stretches [i, last]
    switch (behavior) {
      case Behavior::kRemoved:
        if (!stretches[i].match) {
          add(stretches[i].begin, stretches[i].end);
        } else if (out->ends.empty()) {
          out->at_start = false;
        }
        ++i;
        continue;
      case Behavior::kIsolated:
        break;
      case Behavior::kContiguous:
        while (last + 1 < n && stretches[last + 1].match == stretches[i].match) ++last;
        break;
      case Behavior::kMergedWithPrevious:
        if (!stretches[i].match && i + 1 < n && stretches[i + 1].match) ++last;
        break;
      case Behavior::kMergedWithNext:
        if (stretches[i].match && i + 1 < n && !stretches[i + 1].match) ++last;
        break;
    }
    add(stretches[i].begin, stretches[last].end);
    i = last + 1;
  }
}

// The words of `in`, one after another, in a new Words.
absl::Status Rebuild(Words* words,
                     const std::function<absl::Status(std::string_view, Words*)>& cut) {
  Words out;
  out.text.reserve(words->text.size());
  out.ends.reserve(words->ends.size());
  out.at_start = words->at_start;
  size_t begin = 0;
  const std::string_view text = words->text;
  for (const size_t end : words->ends) {
    if (absl::Status s = cut(text.substr(begin, end - begin), &out); !s.ok()) return s;
    // The first word of the input may be dropped; what follows does not begin where the input
    // begins.
    if (begin == 0 && out.ends.empty()) out.at_start = false;
    begin = end;
  }
  *words = std::move(out);
  return absl::OkStatus();
}

void StretchesOf(const std::vector<std::pair<size_t, size_t>>& matches, size_t size, bool invert,
                 std::vector<Stretch>* out) {
  out->clear();
  size_t done = 0;
  for (const auto& [begin, end] : matches) {
    if (done != begin) out->push_back({done, begin, invert});
    out->push_back({begin, end, !invert});
    done = end;
  }
  if (done != size) out->push_back({done, size, invert});
}

class SplitPreTokenizer : public PreTokenizer {
 public:
  SplitPreTokenizer(Pattern pattern, Behavior behavior, bool invert)
      : pattern_(std::move(pattern)), behavior_(behavior), invert_(invert) {}

  absl::Status Apply(Words* words) const override {
    std::vector<std::pair<size_t, size_t>> matches;
    std::vector<Stretch> stretches;
    return Rebuild(words, [&](std::string_view word, Words* out) {
      matches.clear();
      if (absl::Status s = pattern_.FindAll(word, &matches); !s.ok()) return s;
      StretchesOf(matches, word.size(), invert_, &stretches);
      AddStretches(word, stretches, behavior_, out);
      return absl::OkStatus();
    });
  }

 private:
  const Pattern pattern_;
  const Behavior behavior_;
  const bool invert_;
};

// Cuts by a property of single characters; each matching character is a stretch of its own.
class CharPreTokenizer : public PreTokenizer {
 public:
  CharPreTokenizer(bool (*matches)(char32_t), Behavior behavior)
      : matches_(matches), behavior_(behavior) {}

  absl::Status Apply(Words* words) const override {
    std::vector<Stretch> stretches;
    return Rebuild(words, [&](std::string_view word, Words* out) {
      stretches.clear();
      size_t size = 0;
      for (size_t pos = 0; pos < word.size(); pos += size) {
        const bool match = matches_(unicode::CharAt(word, pos, &size));
        if (match || stretches.empty() || stretches.back().match) {
          stretches.push_back({pos, pos + size, match});
        } else {
          stretches.back().end = pos + size;
        }
      }
      AddStretches(word, stretches, behavior_, out);
      return absl::OkStatus();
    });
  }

 private:
  bool (*const matches_)(char32_t);
  const Behavior behavior_;
};

// \w+|[^\w\s]+ : runs of word characters, runs of the rest, white space dropped.
class WhitespacePreTokenizer : public PreTokenizer {
 public:
  absl::Status Apply(Words* words) const override {
    return Rebuild(words, [](std::string_view word, Words* out) {
      const auto kind = [](char32_t c) {
        return unicode::IsWord(c) ? 1 : unicode::IsSpace(c) ? 0 : 2;
      };
      size_t begin = 0, size = 0;
      int current = 0;
      for (size_t pos = 0; pos < word.size(); pos += size) {
        const int next = kind(unicode::CharAt(word, pos, &size));
        if (next == current) continue;
        if (current != 0) out->Add(word.substr(begin, pos - begin));
        if (next == 0 && out->ends.empty()) out->at_start = false;
        begin = pos;
        current = next;
      }
      if (current != 0) out->Add(word.substr(begin));
      return absl::OkStatus();
    });
  }
};

class MetaspacePreTokenizer : public PreTokenizer {
 public:
  enum class Scheme { kAlways, kFirst, kNever };
  MetaspacePreTokenizer(std::string replacement, Scheme scheme, bool split)
      : replacement_(std::move(replacement)), scheme_(scheme), split_(split) {}

  absl::Status Apply(Words* words) const override {
    bool first = words->at_start;
    return Rebuild(words, [&](std::string_view word, Words* out) {
      std::string text;
      const bool may_prepend = scheme_ == Scheme::kAlways || (scheme_ == Scheme::kFirst && first);
      first = false;
      if (may_prepend && word[0] != ' ' && !word.starts_with(replacement_)) text = replacement_;
      for (const char c : word) {
        if (c == ' ') {
          text += replacement_;
        } else {
          text += c;
        }
      }
      const std::string_view view = text;
      size_t begin = 0;
      for (size_t at = split_ ? view.find(replacement_, 1) : std::string_view::npos;
           at != std::string_view::npos; at = view.find(replacement_, at + 1)) {
        out->Add(view.substr(begin, at - begin));
        begin = at;
      }
      out->Add(view.substr(begin));
      return absl::OkStatus();
    });
  }

 private:
  const std::string replacement_;  // one character
  const Scheme scheme_;
  const bool split_;
};

class ByteLevelPreTokenizer : public PreTokenizer {
 public:
  ByteLevelPreTokenizer(bool add_prefix_space, std::optional<Regex> regex)
      : add_prefix_space_(add_prefix_space), regex_(std::move(regex)) {}

  absl::Status Apply(Words* words) const override {
    std::vector<std::pair<size_t, size_t>> matches;
    std::vector<Stretch> stretches;
    return Rebuild(words, [&](std::string_view word, Words* out) {
      std::string prefixed;
      if (add_prefix_space_ && word[0] != ' ') {
        prefixed = Cat(" ", word);
        word = prefixed;
      }
      stretches.assign(1, {0, word.size(), false});
      if (regex_.has_value()) {
        matches.clear();
        if (absl::Status s = regex_->FindAll(word, &matches); !s.ok()) return s;
        StretchesOf(matches, word.size(), /*invert=*/false, &stretches);
      }
      for (const Stretch& stretch : stretches) {
        for (size_t i = stretch.begin; i < stretch.end; ++i) {
          unicode::AppendChar(unicode::ByteToChar(static_cast<unsigned char>(word[i])), &out->text);
        }
        if (stretch.end > stretch.begin) out->ends.push_back(out->text.size());
      }
      return absl::OkStatus();
    });
  }

 private:
  const bool add_prefix_space_;
  const std::optional<Regex> regex_;
};

class SequencePreTokenizer : public PreTokenizer {
 public:
  explicit SequencePreTokenizer(std::vector<std::unique_ptr<PreTokenizer>> steps)
      : steps_(std::move(steps)) {}
  absl::Status Apply(Words* words) const override {
    for (const auto& step : steps_) {
      if (absl::Status s = step->Apply(words); !s.ok()) return s;
    }
    return absl::OkStatus();
  }

 private:
  const std::vector<std::unique_ptr<PreTokenizer>> steps_;
};

using Result = absl::StatusOr<std::unique_ptr<PreTokenizer>>;

Result CreateMetaspace(const nlohmann::json& spec) {
  std::string replacement = "\xE2\x96\x81";
  std::string scheme_name = "always";
  bool split = true, add_prefix_space = true;
  for (absl::Status s :
       {ReadField(spec, "replacement", &replacement), ReadField(spec, "split", &split),
        ReadField(spec, "add_prefix_space", &add_prefix_space),
        ReadField(spec, "prepend_scheme", &scheme_name)}) {
    if (!s.ok()) return s;
  }
  if (replacement.empty() ||
      unicode::CharSize(static_cast<unsigned char>(replacement[0])) != replacement.size()) {
    return absl::InvalidArgumentError(
        "pre_tokenizer Metaspace: 'replacement' must be one character");
  }
  using Scheme = MetaspacePreTokenizer::Scheme;
  Scheme scheme = Scheme::kAlways;
  if (!add_prefix_space || scheme_name == "never") {
    scheme = Scheme::kNever;
  } else if (scheme_name == "first") {
    scheme = Scheme::kFirst;
  } else if (scheme_name != "always") {
    return absl::InvalidArgumentError(
        Cat("pre_tokenizer Metaspace: prepend_scheme '", scheme_name, "'"));
  }
  return Result(std::make_unique<MetaspacePreTokenizer>(std::move(replacement), scheme, split));
}

Result CreateAt(const nlohmann::json& spec, int depth) {
  if (depth > kMaxDepth)
    return absl::InvalidArgumentError("pre_tokenizer: Sequences are nested too deeply");
  std::vector<std::unique_ptr<PreTokenizer>> steps;
  if (spec.is_null()) return Result(std::make_unique<SequencePreTokenizer>(std::move(steps)));
  auto type = ComponentType(spec, "pre_tokenizer");
  if (!type.ok()) return type.status();
  if (*type == "Sequence") {
    const auto& list = FieldOrNull(spec, "pretokenizers");
    if (!list.is_array())
      return absl::InvalidArgumentError("pre_tokenizer Sequence needs a list 'pretokenizers'");
    for (const auto& item : list) {
      auto step = CreateAt(item, depth + 1);
      if (!step.ok()) return step.status();
      steps.push_back(*std::move(step));
    }
    return Result(std::make_unique<SequencePreTokenizer>(std::move(steps)));
  }
  if (*type == "Split") {
    auto pattern = Pattern::Create(FieldOrNull(spec, "pattern"));
    if (!pattern.ok()) return pattern.status();
    auto behavior = ReadBehavior(spec, "Isolated");
    if (!behavior.ok()) return behavior.status();
    bool invert = false;
    if (absl::Status s = ReadField(spec, "invert", &invert); !s.ok()) return s;
    return Result(std::make_unique<SplitPreTokenizer>(*std::move(pattern), *behavior, invert));
  }
  if (*type == "ByteLevel") {
    bool add_prefix_space = true, use_regex = true;
    if (absl::Status s = ReadField(spec, "add_prefix_space", &add_prefix_space); !s.ok()) return s;
    if (absl::Status s = ReadField(spec, "use_regex", &use_regex); !s.ok()) return s;
    std::optional<Regex> regex;
    if (use_regex) {
      auto compiled = Regex::Compile(kByteLevelPattern);
      if (!compiled.ok()) return compiled.status();
      regex = *std::move(compiled);
    }
    return Result(std::make_unique<ByteLevelPreTokenizer>(add_prefix_space, std::move(regex)));
  }
  if (*type == "Digits") {
    bool individual = false;
    if (absl::Status s = ReadField(spec, "individual_digits", &individual); !s.ok()) return s;
    return Result(std::make_unique<CharPreTokenizer>(
        &unicode::IsNumber, individual ? Behavior::kIsolated : Behavior::kContiguous));
  }
  if (*type == "Punctuation") {
    auto behavior = ReadBehavior(spec, "Isolated");
    if (!behavior.ok()) return behavior.status();
    return Result(std::make_unique<CharPreTokenizer>(&unicode::IsPunctuation, *behavior));
  }
  if (*type == "WhitespaceSplit") {
    return Result(std::make_unique<CharPreTokenizer>(&unicode::IsSpace, Behavior::kRemoved));
  }
  if (*type == "Whitespace") return Result(std::make_unique<WhitespacePreTokenizer>());
  if (*type == "Metaspace") return CreateMetaspace(spec);
  return absl::InvalidArgumentError(Cat("pre_tokenizer '", *type, "' is not supported"));
}

}  // namespace

Result PreTokenizer::Create(const nlohmann::json& spec) { return CreateAt(spec, 0); }

}  // namespace switchyard
