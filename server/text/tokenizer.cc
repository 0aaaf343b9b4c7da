#include "server/text/tokenizer.h"

#include <utility>

#include "server/text/detokenizer.h"
#include "server/text/tokenizer_parts.h"
#include "server/text/unicode.h"

namespace switchyard {
namespace {

// The texts that an encoding consists of, joined, and where they may be trusted: sorted [begin,
// end), merged.
struct Input {
  std::string text;
  std::vector<std::pair<size_t, size_t>> trusted;
};

Input Join(absl::Span<const TextSegment> segments) {
  Input input;
  for (const TextSegment& segment : segments) {
    const size_t begin = input.text.size();
    input.text += segment.text;
    if (!segment.trusted || segment.text.empty()) continue;
    if (!input.trusted.empty() && input.trusted.back().second == begin) {
      input.trusted.back().second = input.text.size();
    } else {
      input.trusted.emplace_back(begin, input.text.size());
    }
  }
  return input;
}

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}
Tokenizer::~Tokenizer() = default;

std::optional<int32_t> Tokenizer::Parts::IdOf(std::string_view token) const {
  for (const AddedToken& t : added) {
    if (t.content == token) return t.id;
  }
  return bpe->IdOf(token);
}

std::string_view Tokenizer::Parts::BytesOf(int32_t id, bool first) const {
  if (id < 0 || static_cast<size_t>(id) >= tokens.size()) return {};
  const TokenInfo& info = tokens[static_cast<size_t>(id)];
  return first && info.first_bytes ? *info.first_bytes : std::string_view(info.bytes);
}

absl::StatusOr<std::vector<int32_t>> Tokenizer::Encode(std::string_view text,
                                                       const EncodeOptions& options) const {
  const TextSegment segment{std::string(text), false};
  return Encode(absl::MakeConstSpan(&segment, 1), options);
}

absl::StatusOr<std::vector<int32_t>> Tokenizer::Encode(absl::Span<const TextSegment> segments,
                                                       const EncodeOptions& options) const {
  const Input input = Join(segments);
  const std::string_view text = input.text;
  if (!unicode::IsValidUtf8(text)) return absl::InvalidArgumentError("the text is not valid UTF-8");

  std::vector<int32_t> ids;
  if (options.add_special_tokens) ids = parts_->prefix_ids;

  // One run between added tokens: pre-tokenise, merge.
  const auto encode_run = [&](std::string run, bool at_start) -> absl::Status {
    if (run.empty()) return absl::OkStatus();
    Words words;
    words.text = std::move(run);
    words.ends.push_back(words.text.size());
    words.at_start = at_start;
    if (absl::Status s = parts_->pre_tokenizer->Apply(&words); !s.ok()) return s;
    size_t begin = 0;
    for (const size_t end : words.ends) {
      parts_->bpe->Encode(std::string_view(words.text).substr(begin, end - begin), &ids);
      begin = end;
    }
    return absl::OkStatus();
  };
  // One stretch between the tokens of the raw text: normalise, cut out the tokens of the normalised
  // text.
  const auto encode_stretch = [&](std::string_view raw, bool at_start) -> absl::Status {
    if (raw.empty()) return absl::OkStatus();
    std::string stretch(raw);
    if (absl::Status s = parts_->normalizer->Apply(&stretch); !s.ok()) return s;
    std::vector<AddedTokenMatcher::Match> matches;
    if (!parts_->normalized_tokens.empty()) {
      const auto any = [](const AddedToken&, size_t, size_t) {
        return true;
      };  // none of them is a control token
      parts_->normalized_tokens.FindAll(stretch, any, &matches);
    }
    size_t done = 0;
    for (const auto& match : matches) {
      if (absl::Status s =
              encode_run(stretch.substr(done, match.begin - done), at_start && done == 0);
          !s.ok()) {
        return s;
      }
      ids.push_back(match.id);
      done = match.end;
    }
    return encode_run(stretch.substr(done), at_start && done == 0);
  };

  size_t range = 0;  // of input.trusted; matches are asked about from left to right
  const auto allowed = [&](const AddedToken& token, size_t begin, size_t end) {
    if (options.parse_special || !token.IsControl()) return true;
    while (range < input.trusted.size() && input.trusted[range].second <= begin) ++range;
    return range < input.trusted.size() && input.trusted[range].first <= begin &&
           end <= input.trusted[range].second;
  };
  std::vector<AddedTokenMatcher::Match> matches;
  parts_->raw_tokens.FindAll(text, allowed, &matches);
  size_t done = 0;
  for (const auto& match : matches) {
    if (absl::Status s = encode_stretch(text.substr(done, match.begin - done), done == 0); !s.ok())
      return s;
    ids.push_back(match.id);
    done = match.end;
  }
  if (absl::Status s = encode_stretch(text.substr(done), done == 0); !s.ok()) return s;
  if (options.add_special_tokens)
    ids.insert(ids.end(), parts_->suffix_ids.begin(), parts_->suffix_ids.end());
  return ids;
}

std::string Tokenizer::Decode(absl::Span<const int32_t> ids, const DecodeOptions& options) const {
  Detokenizer detokenizer(this, options);
  std::string text;
  for (const int32_t id : ids) text += detokenizer.Push(id);
  return text + detokenizer.Flush();
}

std::string_view Tokenizer::TokenBytes(int32_t id) const {
  return parts_->BytesOf(id, /*first=*/false);
}

std::string Tokenizer::TokenText(int32_t id) const { return unicode::Lossy(TokenBytes(id)); }

int32_t Tokenizer::vocab_size() const { return static_cast<int32_t>(parts_->tokens.size()); }

bool Tokenizer::IsSpecial(int32_t id) const {
  return id >= 0 && id < vocab_size() && parts_->tokens[static_cast<size_t>(id)].special;
}

std::optional<int32_t> Tokenizer::TokenToId(std::string_view token) const {
  return parts_->IdOf(token);
}

const std::string& Tokenizer::bos_token() const { return parts_->bos.text; }
const std::string& Tokenizer::eos_token() const { return parts_->eos.text; }
const std::string& Tokenizer::unk_token() const { return parts_->unk.text; }
const std::string& Tokenizer::pad_token() const { return parts_->pad.text; }
std::optional<int32_t> Tokenizer::bos_id() const { return parts_->bos.id; }
std::optional<int32_t> Tokenizer::eos_id() const { return parts_->eos.id; }

}  // namespace switchyard
