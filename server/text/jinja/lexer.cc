#include "server/text/jinja/lexer.h"

#include <algorithm>
#include <cstdint>

#include "server/text/cat.h"
#include "server/text/jinja/builtins.h"
#include "server/text/jinja/try.h"
#include "server/text/unicode.h"

namespace switchyard::jinja {
namespace {

absl::Status Error(int line, std::string_view what) { return Invalid("line ", line, ": ", what); }

bool IsAsciiSpace(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
bool IsDigit(char c) { return c >= '0' && c <= '9'; }
bool IsNameStart(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' ||
         static_cast<unsigned char>(c) >= 0x80;
}
bool IsHex(char c) { return IsDigit(c) || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F'); }

// "\r\n" and "\r" become "\n", one newline at the end is dropped.
std::string NormalizeNewlines(std::string_view source) {
  std::string out;
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] != '\r') {
      out += source[i];
    } else {
      out += '\n';
      if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
    }
  }
  if (!out.empty() && out.back() == '\n') out.pop_back();
  return out;
}

size_t SkipSpaces(std::string_view text, size_t pos) {
  while (pos < text.size()) {
    size_t size = 0;
    if (!IsPythonSpace(unicode::CharAt(text, pos, &size))) break;
    pos += size;
  }
  return pos;
}

std::string_view StripRight(std::string_view text) {
  while (!text.empty()) {
    size_t last = text.size() - 1, size = 0;
    while (last > 0 && (static_cast<unsigned char>(text[last]) & 0xC0) == 0x80) --last;
    if (!IsPythonSpace(unicode::CharAt(text, last, &size))) break;
    text = text.substr(0, last);
  }
  return text;
}

class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(source) {}

  absl::StatusOr<std::vector<Token>> Run() {
    while (pos_ < source_.size()) SY_OK(Next());
    Add(TokenKind::kEnd, "");
    return std::move(tokens_);
  }

 private:
  void Add(TokenKind kind, std::string_view text) {
    tokens_.push_back({kind, std::string(text), line_});
  }

  void Advance(size_t to) {
    line_ += static_cast<int>(std::count(source_.begin() + static_cast<ptrdiff_t>(pos_),
                                         source_.begin() + static_cast<ptrdiff_t>(to), '\n'));
    pos_ = to;
  }

  // The text before the next tag, and the tag's beginning.
  absl::Status Next() {
    size_t at = pos_;
    for (;; ++at) {
      at = source_.find('{', at);
      if (at == std::string_view::npos || at + 1 >= source_.size()) {
        at = source_.size();
        break;
      }
      const char c = source_[at + 1];
      if (c == '{' || c == '%' || c == '#') break;
    }
    std::string_view text = source_.substr(pos_, at - pos_);
    if (at == source_.size()) {
      AddText(text);
      Advance(at);
      return absl::OkStatus();
    }
    const char type = source_[at + 1];
    const char sign = at + 2 < source_.size() ? source_[at + 2] : ' ';
    if (sign == '-') {
      text = StripRight(text);
    } else if (sign != '+' && type != '{') {
      const size_t newline = text.rfind('\n');
      const size_t line_begin = newline == std::string_view::npos ? 0 : newline + 1;
      if ((line_begin > 0 || at_line_start_) && SkipSpaces(text, line_begin) == text.size()) {
        text = text.substr(0, line_begin);
      }
    }
    AddText(text);
    Advance(at);
    const size_t inside = at + 2 + (sign == '-' || sign == '+' ? 1 : 0);
    if (type == '#') return Comment(inside);
    if (type == '%') {
      const size_t word = SkipSpaces(source_, inside);
      if (source_.substr(word, 3) == "raw") {
        const size_t end = SkipSpaces(source_, word + 3);
        if (source_.substr(end, 2) == "%}" || source_.substr(end, 3) == "-%}") return Raw(end);
      }
    }
    Add(type == '%' ? TokenKind::kBlockBegin : TokenKind::kVariableBegin, "");
    Advance(inside);
    return Expression(type == '%');
  }

  void AddText(std::string_view text) {
    if (!text.empty()) Add(TokenKind::kText, text);
  }

  // Behind a tag's end at `pos`: what `-`, or trim_blocks, takes along.
  void EndTag(size_t pos, bool strip, bool trim) {
    if (strip) {
      pos = SkipSpaces(source_, pos);
    } else if (trim && pos < source_.size() && source_[pos] == '\n') {
      ++pos;
    }
    at_line_start_ = source_[pos - 1] == '\n';
    Advance(pos);
  }

  absl::Status Comment(size_t inside) {
    const size_t end = source_.find("#}", inside);
    if (end == std::string_view::npos) return Error(line_, "a comment is not closed");
    const char sign = end > inside ? source_[end - 1] : ' ';
    EndTag(end + 2, sign == '-', sign != '+');
    return absl::OkStatus();
  }

  absl::Status Raw(size_t tag_end) {
    const int line = line_;
    const bool strip_first = source_[tag_end] == '-';
    size_t begin = tag_end + (strip_first ? 3 : 2);
    if (strip_first) begin = SkipSpaces(source_, begin);
    for (size_t at = source_.find("{%", begin); at != std::string_view::npos;
         at = source_.find("{%", at + 2)) {
      size_t word = at + 2;
      const char sign = word < source_.size() ? source_[word] : ' ';
      if (sign == '-' || sign == '+') ++word;
      word = SkipSpaces(source_, word);
      if (source_.substr(word, 6) != "endraw") continue;
      size_t end = SkipSpaces(source_, word + 6);
      const char end_sign = end < source_.size() ? source_[end] : ' ';
      if (end_sign == '-' || end_sign == '+') ++end;
      if (source_.substr(end, 2) != "%}") continue;
      std::string_view text = source_.substr(begin, at - begin);
      if (sign == '-') {
        text = StripRight(text);
      } else if (sign != '+') {
        const size_t newline = text.rfind('\n');
        if (newline != std::string_view::npos && SkipSpaces(text, newline + 1) == text.size()) {
          text = text.substr(0, newline + 1);
        }
      }
      AddText(text);
      EndTag(end + 2, end_sign == '-', end_sign != '+');
      return absl::OkStatus();
    }
    return Error(line, "{% raw %} is not closed");
  }

  // The tokens up to %} or }}.
  absl::Status Expression(bool block) {
    const int begin_line = line_;
    std::string brackets;
    while (pos_ < source_.size()) {
      const char c = source_[pos_];
      if (IsAsciiSpace(c)) {
        Advance(pos_ + 1);
        continue;
      }
      if (brackets.empty()) {
        const std::string_view end = block ? "%}" : "}}";
        const bool signed_end =
            (c == '-' || (c == '+' && block)) && source_.substr(pos_ + 1, 2) == end;
        if (signed_end || source_.substr(pos_, 2) == end) {
          Add(block ? TokenKind::kBlockEnd : TokenKind::kVariableEnd, "");
          EndTag(pos_ + (signed_end ? 3 : 2), signed_end && c == '-', block && !signed_end);
          return absl::OkStatus();
        }
      }
      if (c == '"' || c == '\'') {
        SY_OK(String(c));
      } else if (IsDigit(c)) {
        Number();
      } else if (IsNameStart(c)) {
        size_t end = pos_;
        while (end < source_.size() && (IsNameStart(source_[end]) || IsDigit(source_[end]))) ++end;
        Add(TokenKind::kName, source_.substr(pos_, end - pos_));
        pos_ = end;
      } else {
        SY_OK(Operator(&brackets));
      }
    }
    return Error(begin_line, block ? "{% is not closed" : "{{ is not closed");
  }

  absl::Status Operator(std::string* brackets) {
    for (const std::string_view op : {"==", "!=", "<=", ">=", "//", "**"}) {
      if (source_.substr(pos_, 2) != op) continue;
      Add(TokenKind::kOperator, op);
      pos_ += 2;
      return absl::OkStatus();
    }
    const char c = source_[pos_];
    if (std::string_view("+-*/%~<>=()[]{}.,:|;").find(c) == std::string_view::npos) {
      return Error(line_, Cat("unexpected character '", std::string_view(&c, 1), "'"));
    }
    if (c == '(' || c == '[' || c == '{')
      brackets->push_back(c == '(' ? ')' : c == '[' ? ']' : '}');
    if (c == ')' || c == ']' || c == '}') {
      if (brackets->empty() || brackets->back() != c) {
        return Error(line_, Cat("unexpected '", std::string_view(&c, 1), "'"));
      }
      brackets->pop_back();
    }
    Add(TokenKind::kOperator, source_.substr(pos_, 1));
    ++pos_;
    return absl::OkStatus();
  }

  void Number() {
    size_t end = pos_;
    std::string text;
    bool is_float = false;
    const auto digits = [&](bool (*accept)(char)) {
      while (end < source_.size() &&
             (accept(source_[end]) ||
              (source_[end] == '_' && end + 1 < source_.size() && accept(source_[end + 1])))) {
        if (source_[end] != '_') text += source_[end];
        ++end;
      }
    };
    if (source_[end] == '0' && end + 2 < source_.size() && (source_[end + 1] | 32) == 'x' &&
        IsHex(source_[end + 2])) {
      text = "0x";
      end += 2;
      digits(&IsHex);
    } else {
      digits(&IsDigit);
      if (end + 1 < source_.size() && source_[end] == '.' && IsDigit(source_[end + 1])) {
        is_float = true;
        text += '.';
        ++end;
        digits(&IsDigit);
      }
      size_t exponent = end + 1;
      if (exponent < source_.size() && (source_[exponent] == '+' || source_[exponent] == '-'))
        ++exponent;
      if (end < source_.size() && (source_[end] | 32) == 'e' && exponent < source_.size() &&
          IsDigit(source_[exponent])) {
        is_float = true;
        text += source_.substr(end, exponent - end);
        end = exponent;
        digits(&IsDigit);
      }
    }
    Add(is_float ? TokenKind::kFloat : TokenKind::kInteger, text);
    pos_ = end;
  }

  absl::Status String(char quote) {
    std::string out;
    const int line = line_;
    size_t i = pos_ + 1;
    const auto hex = [&](size_t count) -> int64_t {
      int64_t value = 0;
      for (size_t k = 0; k < count; ++k) {
        if (i + k >= source_.size() || !IsHex(source_[i + k])) return -1;
        const char h = source_[i + k];
        value = value * 16 + (IsDigit(h) ? h - '0' : (h | 32) - 'a' + 10);
      }
      i += count;
      return value;
    };
    while (i < source_.size() && source_[i] != quote) {
      if (source_[i] != '\\' || i + 1 >= source_.size()) {
        out += source_[i++];
        continue;
      }
      const char c = source_[i + 1];
      i += 2;
      static constexpr std::string_view kSimple = "n\nt\tr\rb\bf\fv\va\a\\\\'\'\"\"";
      bool found = false;
      for (size_t k = 0; k < kSimple.size(); k += 2) {
        if (kSimple[k] != c) continue;
        out += kSimple[k + 1];
        found = true;
      }
      if (found || c == '\n') continue;  // a backslash at the end of a line continues it
      if (c >= '0' && c <= '7') {
        uint32_t value = static_cast<uint32_t>(c - '0');
        for (int k = 0; k < 2 && i < source_.size() && source_[i] >= '0' && source_[i] <= '7';
             ++k) {
          value = value * 8 + static_cast<uint32_t>(source_[i++] - '0');
        }
        unicode::AppendChar(value, &out);
      } else if (c == 'x' || c == 'u' || c == 'U') {
        const int64_t value = hex(c == 'x' ? 2 : c == 'u' ? 4 : 8);
        if (value < 0 || value > 0x10FFFF || (value >= 0xD800 && value < 0xE000)) {
          return Error(line, "a string has a bad \\x, \\u or \\U escape");
        }
        unicode::AppendChar(static_cast<char32_t>(value), &out);
      } else if (c == 'N') {
        return Error(line, "\\N{…} in a string is not supported");
      } else {
        out += '\\';
        out += c;
      }
    }
    if (i >= source_.size()) return Error(line, "a string is not closed");
    Add(TokenKind::kString, out);
    Advance(i + 1);
    return absl::OkStatus();
  }

  const std::string_view source_;
  size_t pos_ = 0;
  int line_ = 1;
  bool at_line_start_ = true;
  std::vector<Token> tokens_;
};

}  // namespace

absl::StatusOr<std::vector<Token>> Tokenize(std::string_view source) {
  if (!unicode::IsValidUtf8(source))
    return absl::InvalidArgumentError("the template is not valid UTF-8");
  const std::string normalized = NormalizeNewlines(source);
  return Lexer(normalized).Run();
}

}  // namespace switchyard::jinja
