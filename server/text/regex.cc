#include "server/text/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "server/text/cat.h"
#include "server/text/unicode.h"

namespace switchyard {
namespace {

constexpr uint32_t kMatchLimit = 50'000'000;
constexpr size_t kMaxPatternBytes = 64 << 10;
constexpr size_t kJitStackBytes = 4 << 20;

// White_Space. PCRE2's own \s also takes U+180E.
constexpr std::string_view kSpaces =
    R"(\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";
constexpr std::string_view kWords = R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc})";
constexpr std::string_view kHexDigits = "0-9a-fA-F";

bool IsHex(char c) {
  return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
}

absl::Status Refuse(std::string_view pattern, std::string_view what) {
  return absl::InvalidArgumentError(Cat("pattern '", pattern, "': ", what, " is not supported"));
}

// Rewrites one escape at pattern[*pos] == '\\'; moves *pos behind it.
absl::Status TranslateEscape(std::string_view pattern, bool in_class, size_t* pos,
                             std::string* out) {
  if (*pos + 1 >= pattern.size()) return Refuse(pattern, "a backslash at the end");
  const char c = pattern[*pos + 1];
  *pos += 2;
  std::string_view members;
  switch (c) {
    case 's':
    case 'S':
      members = kSpaces;
      break;
    case 'w':
    case 'W':
      members = kWords;
      break;
    case 'h':
    case 'H':
      members = kHexDigits;
      break;
    case 'u':
      if (*pos + 4 > pattern.size()) return Refuse(pattern, "\\u without four digits");
      for (size_t i = 0; i < 4; ++i) {
        if (!IsHex(pattern[*pos + i])) return Refuse(pattern, "\\u without four digits");
      }
      *out += Cat("\\x{", pattern.substr(*pos, 4), "}");
      *pos += 4;
      return absl::OkStatus();
    default:
      out->push_back('\\');
      out->push_back(c);
      return absl::OkStatus();
  }
  const bool negated = c < 'a';
  if (!in_class) {
    *out += Cat(negated ? "[^" : "[", members, "]");
  } else if (!negated) {
    *out += members;
  } else if (c == 'S') {
    *out += R"(\S\x{180e})";
  } else {
    return Refuse(pattern, Cat("\\", std::string(1, c), " inside a character class"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> Translate(std::string_view pattern) {
  std::string out;
  bool in_class = false;
  size_t class_start = 0;  // of the first member, where ']' is literal
  for (size_t pos = 0; pos < pattern.size();) {
    const char c = pattern[pos];
    if (c == '\\') {
      if (absl::Status s = TranslateEscape(pattern, in_class, &pos, &out); !s.ok()) return s;
      continue;
    }
    if (!in_class && c == '[') {
      in_class = true;
      class_start = pos + 1 + (pattern.substr(pos + 1, 1) == "^" ? 1 : 0);
    } else if (in_class && c == '[') {
      if (pattern.substr(pos, 2) != "[:") return Refuse(pattern, "a class inside a class");
      const size_t end = pattern.find(":]", pos);
      if (end == std::string_view::npos) return Refuse(pattern, "a class inside a class");
      out += pattern.substr(pos, end + 2 - pos);
      pos = end + 2;
      continue;
    } else if (in_class && c == '&' && pattern.substr(pos, 2) == "&&") {
      return Refuse(pattern, "&& inside a character class");
    } else if (in_class && c == ']' && pos != class_start) {
      in_class = false;
    }
    out.push_back(c);
    ++pos;
  }
  return out;
}

std::string ErrorText(int code) {
  PCRE2_UCHAR buffer[256];
  pcre2_get_error_message(code, buffer, sizeof(buffer));
  return reinterpret_cast<const char*>(buffer);
}

// What one thread needs to search; grows once, lives as long as the thread.
struct Scratch {
  pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
  pcre2_match_context* context = pcre2_match_context_create(nullptr);
  pcre2_jit_stack* stack = pcre2_jit_stack_create(32 << 10, kJitStackBytes, nullptr);
  Scratch() {
    if (context == nullptr) return;
    pcre2_set_match_limit(context, kMatchLimit);
    if (stack != nullptr) pcre2_jit_stack_assign(context, nullptr, stack);
  }
  ~Scratch() {
    pcre2_match_data_free(data);
    pcre2_match_context_free(context);
    pcre2_jit_stack_free(stack);
  }
};

}  // namespace

absl::StatusOr<Regex> Regex::Compile(std::string_view pattern) {
  if (pattern.size() > kMaxPatternBytes) {
    return absl::InvalidArgumentError(
        Cat("pattern of ", pattern.size(), " bytes exceeds ", kMaxPatternBytes));
  }
  auto translated = Translate(pattern);
  if (!translated.ok()) return translated.status();
  pcre2_compile_context* context = pcre2_compile_context_create(nullptr);
  if (context == nullptr) return absl::ResourceExhaustedError("out of memory for a pattern");
  pcre2_set_newline(context, PCRE2_NEWLINE_LF);
  int error = 0;
  size_t offset = 0;
  pcre2_code* code = pcre2_compile(
      reinterpret_cast<PCRE2_SPTR>(translated->data()), translated->size(),
      PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &error, &offset, context);
  pcre2_compile_context_free(context);
  if (code == nullptr) {
    return absl::InvalidArgumentError(Cat("pattern '", pattern, "': ", ErrorText(error)));
  }
  pcre2_jit_compile(
      code, PCRE2_JIT_COMPLETE);  // where it is refused the interpreter does the same, more slowly
  Regex regex;
  regex.code_ = std::shared_ptr<const void>(
      code, [](const void* p) { pcre2_code_free(static_cast<pcre2_code*>(const_cast<void*>(p))); });
  return regex;
}

absl::Status Regex::FindAll(std::string_view text,
                            std::vector<std::pair<size_t, size_t>>* matches) const {
  thread_local Scratch scratch;
  if (scratch.data == nullptr || scratch.context == nullptr) {
    return absl::ResourceExhaustedError("out of memory for a pattern search");
  }
  const auto* code = static_cast<const pcre2_code*>(code_.get());
  size_t last_end = std::string_view::npos;
  size_t pos = 0;
  while (pos <= text.size()) {
    const int rc =
        pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(text.data() == nullptr ? "" : text.data()),
                    text.size(), pos, PCRE2_NO_UTF_CHECK, scratch.data, scratch.context);
    if (rc == PCRE2_ERROR_NOMATCH) break;
    if (rc < 0) {
      return absl::ResourceExhaustedError(
          Cat("pattern search at byte ", pos, " of ", text.size(), ": ", ErrorText(rc)));
    }
    const size_t* bounds = pcre2_get_ovector_pointer(scratch.data);
    const size_t begin = bounds[0];
    const size_t end = bounds[1];
    if (end < begin || end < pos)
      return absl::InvalidArgumentError("a pattern moves backwards (\\K)");
    if (begin != end || begin != last_end) {
      matches->emplace_back(begin, end);
      last_end = end;
    }
    pos = end;
    if (begin == end)
      pos += pos < text.size() ? unicode::CharSize(static_cast<unsigned char>(text[pos])) : 1;
  }
  return absl::OkStatus();
}

}  // namespace switchyard
