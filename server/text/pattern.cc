#include "server/text/pattern.h"

#include "server/text/json_fields.h"

namespace switchyard {

absl::StatusOr<Pattern> Pattern::Create(const nlohmann::json& spec) {
  Pattern pattern;
  if (const auto& literal = FieldOrNull(spec, "String"); literal.is_string()) {
    pattern.literal_ = literal.get<std::string>();
    return pattern;
  }
  if (const auto& regex = FieldOrNull(spec, "Regex"); regex.is_string()) {
    auto compiled = Regex::Compile(regex.get_ref<const std::string&>());
    if (!compiled.ok()) return compiled.status();
    pattern.regex_ = *std::move(compiled);
    return pattern;
  }
  return absl::InvalidArgumentError("a pattern must be {\"String\": …} or {\"Regex\": …}");
}

absl::Status Pattern::FindAll(std::string_view text,
                              std::vector<std::pair<size_t, size_t>>* matches) const {
  if (regex_.has_value()) return regex_->FindAll(text, matches);
  if (literal_.empty()) return absl::OkStatus();
  for (size_t at = text.find(literal_); at != std::string_view::npos;
       at = text.find(literal_, at + literal_.size())) {
    matches->emplace_back(at, at + literal_.size());
  }
  return absl::OkStatus();
}

absl::Status Pattern::ReplaceAll(std::string_view replacement, std::string* text) const {
  std::vector<std::pair<size_t, size_t>> matches;
  if (absl::Status s = FindAll(*text, &matches); !s.ok()) return s;
  if (matches.empty()) return absl::OkStatus();
  std::string out;
  out.reserve(text->size());
  size_t done = 0;
  for (const auto& [begin, end] : matches) {
    out.append(*text, done, begin - done);
    out += replacement;
    done = end;
  }
  out.append(*text, done);
  *text = std::move(out);
  return absl::OkStatus();
}

}  // namespace switchyard
