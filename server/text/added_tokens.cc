#include "server/text/added_tokens.h"

#include <algorithm>
#include <utility>

#include "server/text/bpe.h"
#include "server/text/cat.h"
#include "server/text/json_fields.h"
#include "server/text/unicode.h"

namespace switchyard {
namespace {

// The start of the last character of `text`. REQUIRES: !text.empty()
size_t LastCharAt(std::string_view text) {
  size_t pos = text.size() - 1;
  while (pos > 0 && (static_cast<unsigned char>(text[pos]) & 0xC0) == 0x80) --pos;
  return pos;
}

bool StandsAlone(std::string_view text, size_t begin, size_t end) {
  size_t size = 0;
  if (begin > 0 && unicode::IsWord(unicode::CharAt(text, LastCharAt(text.substr(0, begin)), &size)))
    return false;
  return end == text.size() || !unicode::IsWord(unicode::CharAt(text, end, &size));
}

}  // namespace

bool AddedToken::IsControl() const {
  return special || (content.starts_with("<|") && content.ends_with("|>")) ||
         (content.starts_with("<\xEF\xBD\x9C") && content.ends_with("\xEF\xBD\x9C>"));
}

absl::StatusOr<AddedToken> AddedToken::Create(const nlohmann::json& spec) {
  AddedToken token;
  int64_t id = -1;
  for (absl::Status s :
       {ReadField(spec, "content", &token.content), ReadField(spec, "id", &id),
        ReadField(spec, "single_word", &token.single_word),
        ReadField(spec, "lstrip", &token.lstrip), ReadField(spec, "rstrip", &token.rstrip),
        ReadField(spec, "normalized", &token.normalized),
        ReadField(spec, "special", &token.special)}) {
    if (!s.ok()) return s;
  }
  if (id < -1 || id > Bpe::kMaxId) {
    return absl::InvalidArgumentError(Cat("added token '", token.content, "' has the id ", id));
  }
  token.id = static_cast<int32_t>(id);
  return token;
}

void AddedTokenMatcher::Add(const AddedToken& token, std::string_view spelling) {
  if (spelling.empty()) return;
  starts_[static_cast<unsigned char>(spelling[0])] = true;
  uint32_t node = 0;
  for (const char c : spelling) {
    const uint64_t key = (static_cast<uint64_t>(node) << 8) | static_cast<unsigned char>(c);
    const auto [it, fresh] = next_.try_emplace(key, static_cast<uint32_t>(token_at_node_.size()));
    if (fresh) token_at_node_.push_back(-1);
    node = it->second;
  }
  token_at_node_[node] = static_cast<int32_t>(tokens_.size());
  tokens_.push_back(token);
}

void AddedTokenMatcher::FindAll(std::string_view text, const Allowed& allowed,
                                std::vector<Match>* matches) const {
  size_t done = 0;  // end of the last match
  for (size_t pos = 0; pos < text.size();) {
    if (!starts_[static_cast<unsigned char>(text[pos])]) {
      ++pos;
      continue;
    }
    const AddedToken* best = nullptr;
    size_t best_end = pos;
    uint32_t node = 0;
    for (size_t i = pos; i < text.size(); ++i) {
      const auto it =
          next_.find((static_cast<uint64_t>(node) << 8) | static_cast<unsigned char>(text[i]));
      if (it == next_.end()) break;
      node = it->second;
      if (token_at_node_[node] < 0) continue;
      const AddedToken& token = tokens_[static_cast<size_t>(token_at_node_[node])];
      if (!allowed(token, pos, i + 1)) continue;
      best = &token;
      best_end = i + 1;
    }
    if (best == nullptr) {
      ++pos;
      continue;
    }
    if (best->single_word && !StandsAlone(text, pos, best_end)) {
      pos = best_end;  // as the reference: the spelling is consumed, not split
      continue;
    }
    size_t begin = pos, end = best_end, size = 0;
    while (best->lstrip && begin > done) {
      const size_t last = LastCharAt(text.substr(0, begin));
      if (!unicode::IsSpace(unicode::CharAt(text, last, &size))) break;
      begin = last;
    }
    while (best->rstrip && end < text.size() && unicode::IsSpace(unicode::CharAt(text, end, &size)))
      end += size;
    matches->push_back({begin, end, best->id});
    done = pos = end;
  }
}

}  // namespace switchyard
