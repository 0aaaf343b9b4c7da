#include "server/text/token_decoder.h"

#include <algorithm>
#include <utility>

#include "server/text/cat.h"
#include "server/text/json_fields.h"
#include "server/text/unicode.h"

namespace switchyard {
namespace {

constexpr int kMaxDepth = 16;
constexpr int64_t kMaxStrip = 1024;

// "<0x0A>" → 10; -1 for anything else.
int ByteToken(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return -1;
  int value = 0;
  for (const char c : token.substr(3, 2)) {
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                             : -1;
    if (digit < 0) return -1;
    value = value * 16 + digit;
  }
  return value;
}

std::string FromByteLevel(std::string_view token) {
  std::string bytes;
  for (size_t pos = 0, size = 0; pos < token.size(); pos += size) {
    const int byte = unicode::CharToByte(unicode::CharAt(token, pos, &size));
    if (byte < 0) return std::string(token);
    bytes.push_back(static_cast<char>(byte));
  }
  return bytes;
}

absl::StatusOr<Pattern> LiteralPattern(const std::string& literal) {
  return Pattern::Create(nlohmann::json{{"String", literal}});
}

bool IsOneChar(std::string_view text) {
  return !text.empty() && unicode::CharSize(static_cast<unsigned char>(text[0])) == text.size();
}

}  // namespace

absl::StatusOr<TokenDecoder> TokenDecoder::Create(const nlohmann::json& spec) {
  TokenDecoder decoder;
  if (spec.is_null()) return decoder;
  if (absl::Status s = decoder.AddStep(spec, 0); !s.ok()) return s;
  return decoder;
}

absl::Status TokenDecoder::AddStrip(const nlohmann::json& spec) {
  Step step{Kind::kStrip, {}, " "};
  int64_t start = 0, stop = 0;
  for (absl::Status s : {ReadField(spec, "content", &step.content),
                         ReadField(spec, "start", &start), ReadField(spec, "stop", &stop)}) {
    if (!s.ok()) return s;
  }
  if (step.content.size() != 1 || start < 0 || stop < 0 || start > kMaxStrip || stop > kMaxStrip) {
    return absl::InvalidArgumentError(
        "decoder Strip: 'content' must be one ASCII character, 'start' and 'stop' ≤ 1024");
  }
  if (fused_) {
    if (stop > 0 || num_stripped_ > 0) {
      return absl::InvalidArgumentError(
          "decoder Strip: after Fuse only one, with stop = 0, is supported");
    }
    num_stripped_ = static_cast<size_t>(start);
    strip_char_ = step.content[0];
    return absl::OkStatus();
  }
  step.start = static_cast<size_t>(start);
  step.stop = static_cast<size_t>(stop);
  steps_.push_back(std::move(step));
  return absl::OkStatus();
}

absl::Status TokenDecoder::AddStep(const nlohmann::json& spec, int depth) {
  if (depth > kMaxDepth)
    return absl::InvalidArgumentError("decoder: Sequences are nested too deeply");
  auto type = ComponentType(spec, "decoder");
  if (!type.ok()) return type.status();
  if (*type == "Sequence") {
    const auto& list = FieldOrNull(spec, "decoders");
    if (!list.is_array())
      return absl::InvalidArgumentError("decoder Sequence needs a list 'decoders'");
    for (const auto& item : list) {
      if (absl::Status s = AddStep(item, depth + 1); !s.ok()) return s;
    }
    return absl::OkStatus();
  }
  if (*type == "Fuse") {
    fused_ = true;
    return absl::OkStatus();
  }
  if (*type == "Strip") return AddStrip(spec);
  if (*type == "ByteLevel" || *type == "ByteFallback") {
    if (fused_)
      return absl::InvalidArgumentError(Cat("decoder ", *type, " after Fuse is not supported"));
    steps_.push_back({*type == "ByteLevel" ? Kind::kByteLevel : Kind::kByteFallback, {}, ""});
    return absl::OkStatus();
  }
  if (*type == "Replace") {
    auto pattern = Pattern::Create(FieldOrNull(spec, "pattern"));
    if (!pattern.ok()) return pattern.status();
    if (fused_ && (pattern->literal() == nullptr || !IsOneChar(*pattern->literal()))) {
      return absl::InvalidArgumentError(
          "decoder Replace: after Fuse only a single character may be replaced");
    }
    Step step{Kind::kReplace, *std::move(pattern), ""};
    if (absl::Status s = ReadField(spec, "content", &step.content); !s.ok()) return s;
    steps_.push_back(std::move(step));
    return absl::OkStatus();
  }
  if (*type == "Metaspace") {
    std::string replacement = "\xE2\x96\x81", scheme = "always";
    bool add_prefix_space = true;
    for (absl::Status s :
         {ReadField(spec, "replacement", &replacement), ReadField(spec, "prepend_scheme", &scheme),
          ReadField(spec, "add_prefix_space", &add_prefix_space)}) {
      if (!s.ok()) return s;
    }
    if (!IsOneChar(replacement) || fused_ || !dropped_from_first_.empty()) {
      return absl::InvalidArgumentError(
          "decoder Metaspace: one, before Fuse, with a 'replacement' of one character");
    }
    auto pattern = LiteralPattern(replacement);
    if (!pattern.ok()) return pattern.status();
    if (add_prefix_space && scheme != "never") dropped_from_first_ = replacement;
    steps_.push_back({Kind::kReplace, *std::move(pattern), " "});
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(Cat("decoder '", *type, "' is not supported"));
}

absl::StatusOr<std::string> TokenDecoder::Bytes(std::string_view token, bool added) const {
  std::string bytes(token);
  for (const Step& step : steps_) {
    switch (step.kind) {
      case Kind::kByteLevel:
        if (!added) bytes = FromByteLevel(bytes);
        break;
      case Kind::kByteFallback:
        if (const int byte = ByteToken(bytes); byte >= 0) bytes.assign(1, static_cast<char>(byte));
        break;
      case Kind::kReplace:
        if (!unicode::IsValidUtf8(bytes)) break;  // a byte token is no text to search in
        if (absl::Status s = step.pattern.ReplaceAll(step.content, &bytes); !s.ok()) return s;
        break;
      case Kind::kStrip: {
        size_t begin = 0, end = bytes.size();
        while (begin < std::min(step.start, bytes.size()) && bytes[begin] == step.content[0])
          ++begin;
        while (end > begin && bytes.size() - end < step.stop && bytes[end - 1] == step.content[0])
          --end;
        bytes = bytes.substr(begin, end - begin);
        break;
      }
    }
  }
  return bytes;
}

}  // namespace switchyard
