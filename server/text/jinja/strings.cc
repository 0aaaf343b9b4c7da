// Operations on strings that filters and methods share.
#include <algorithm>
#include <cmath>

#include "absl/strings/str_format.h"
#include "server/text/cat.h"
#include "server/text/jinja/builtins.h"
#include "server/text/jinja/try.h"
#include "server/text/unicode.h"

namespace switchyard::jinja {
namespace {

// Calls f(character, its bytes, trusted) for every character.
template <typename F>
void ForEachChar(const Str& text, F f) {
  for (const TextSegment& segment : text.Segments()) {
    for (size_t pos = 0, size = 0; pos < segment.text.size(); pos += size) {
      const char32_t c = unicode::CharAt(segment.text, pos, &size);
      f(c, std::string_view(segment.text).substr(pos, size), segment.trusted);
    }
  }
}

}  // namespace

bool IsPythonSpace(char32_t c) { return unicode::IsSpace(c) || (c >= 0x1C && c <= 0x1F); }

Str Strip(const Str& text, const Value* chars, bool left, bool right) {
  const std::string& bytes = text.text();
  const auto strips = [&](size_t pos, size_t* size) {
    const char32_t c = unicode::CharAt(bytes, pos, size);
    if (chars == nullptr) return IsPythonSpace(c);
    return chars->text().find(std::string_view(bytes).substr(pos, *size)) != std::string::npos;
  };
  size_t begin = 0, end = bytes.size(), size = 0;
  while (left && begin < end && strips(begin, &size)) begin += size;
  while (right && end > begin) {
    size_t last = end - 1;
    while (last > begin && (static_cast<unsigned char>(bytes[last]) & 0xC0) == 0x80) --last;
    if (!strips(last, &size)) break;
    end = last;
  }
  return text.Sub(begin, end);
}

std::vector<Str> SplitLines(const Str& text) {
  std::vector<Str> lines;
  Str line;
  bool after_return = false, open = false;
  ForEachChar(text, [&](char32_t c, std::string_view bytes, bool trusted) {
    const bool joins = after_return && c == '\n';
    after_return = c == '\r';
    if (joins) return;
    if ((c >= 0x0A && c <= 0x0D) || (c >= 0x1C && c <= 0x1E) || c == 0x85 || c == 0x2028 ||
        c == 0x2029) {
      lines.push_back(std::exchange(line, {}));
      open = false;
    } else {
      line.Append(bytes, trusted);
      open = true;
    }
  });
  if (open) lines.push_back(std::move(line));
  return lines;
}

Str ChangeCase(const Str& text, std::string_view how) {
  if (how == "upper")
    return text.MapRuns([](std::string_view run) { return unicode::Uppercase(run); });
  if (how == "lower")
    return text.MapRuns([](std::string_view run) { return unicode::Lowercase(run); });
  Str out;
  bool begins = true;  // the next letter begins a word
  ForEachChar(text, [&](char32_t c, std::string_view bytes, bool trusted) {
    out.Append(begins ? unicode::Uppercase(bytes) : unicode::Lowercase(bytes), trusted);
    if (how == "capitalize") {
      begins = false;
    } else if (how == "title") {
      begins = !unicode::IsLetter(c);
    } else {  // the filter: a word begins behind these
      begins = IsPythonSpace(c) || c == '-' || c == '(' || c == '{' || c == '[' || c == '<';
    }
  });
  return out;
}

absl::StatusOr<Value> ReplaceIn(Evaluator& evaluator, const Str& text, const Value& from,
                                const Value& to, int64_t count) {
  if (!from.is_string() || !to.is_string())
    return absl::InvalidArgumentError("replace() needs strings");
  if (count < 0) count = INT64_MAX;
  const std::string& bytes = text.text();
  const std::string& needle = from.text();
  SY_OK(evaluator.Charge(bytes.size()));
  Str out;
  size_t done = 0;
  if (needle.empty()) {  // before every character and at the end
    for (size_t pos = 0; count > 0; --count) {
      SY_OK(evaluator.Charge(to.text().size() + bytes.size() / 64));
      out.Append(to.as_str());
      if (pos >= bytes.size()) break;
      const size_t size = unicode::CharSize(static_cast<unsigned char>(bytes[pos]));
      out.Append(text.Sub(pos, pos + size));
      done = pos += size;
    }
  } else {
    std::vector<size_t> places;
    for (size_t at = bytes.find(needle); at != std::string::npos && count > 0;
         at = bytes.find(needle, at + needle.size())) {
      places.push_back(at);
      --count;
    }
    SY_OK(evaluator.Charge(places.size() * to.text().size()));
    // Run by run, since Sub() looks for its place from the start.
    for (const size_t at : places) {
      SY_OK(evaluator.Charge(16));
      out.Append(text.Sub(done, at));
      out.Append(to.as_str());
      done = at + needle.size();
    }
  }
  out.Append(text.Sub(done, bytes.size()));
  return Value(std::move(out));
}

absl::StatusOr<Value> JoinList(Evaluator& evaluator, const std::vector<Value>& items,
                               const Str& separator) {
  Str out;
  for (size_t i = 0; i < items.size(); ++i) {
    const Str piece = items[i].ToStr();
    SY_OK(evaluator.Charge(piece.size() + separator.size()));
    if (i > 0) out.Append(separator);
    out.Append(piece);
  }
  return Value(std::move(out));
}

absl::StatusOr<int64_t> IntArg(const Value* value, int64_t preset, std::string_view what) {
  if (value == nullptr) return preset;
  if (!value->is_integral()) return Invalid(what, " must be an integer, not ", value->TypeName());
  return value->as_int();
}

absl::StatusOr<Value> FormatPercent(Evaluator& evaluator, const Str& format,
                                    const Value& arguments) {
  const std::vector<Value> list =
      arguments.is_tuple() ? arguments.items() : std::vector<Value>{arguments};
  const std::string& text = format.text();
  Str out;
  size_t next = 0, done = 0;
  for (size_t at = text.find('%'); at != std::string::npos; at = text.find('%', done)) {
    out.Append(format.Sub(done, at));
    size_t end = at + 1;
    int precision = -1;
    if (end < text.size() && text[end] == '.') {
      precision = 0;
      for (++end; end < text.size() && text[end] >= '0' && text[end] <= '9' && precision < 100;
           ++end) {
        precision = precision * 10 + (text[end] - '0');
      }
    }
    const char kind = end < text.size() ? text[end] : '\0';
    done = end + 1;
    if (kind == '%') {
      out.Append("%", true);
      continue;
    }
    if (std::string_view("sdirf").find(kind) == std::string_view::npos) {
      return absl::InvalidArgumentError(
          "only %s %d %i %r %f %.Nf and %% are supported in a format");
    }
    if (next >= list.size())
      return absl::InvalidArgumentError("not enough arguments for the format");
    const Value& value = list[next++];
    if (kind == 's') {
      out.Append(value.ToStr());
    } else if (kind == 'r') {
      out.Append(value.Repr(), false);
    } else if (!value.is_number()) {
      return Invalid("%", std::string_view(&kind, 1), " needs a number, not ", value.TypeName());
    } else if (kind == 'f') {
      out.Append(absl::StrFormat("%.*f", precision < 0 ? 6 : precision, value.as_double()), true);
    } else {
      const double d = value.as_double();
      if (value.is_float() && !(std::abs(d) < 9e18))
        return absl::InvalidArgumentError("%d: the number is out of range");
      out.Append(std::to_string(value.is_float() ? static_cast<int64_t>(d) : value.as_int()), true);
    }
    SY_OK(evaluator.Charge(out.size() / 16 + 1));
  }
  if (next < list.size() && arguments.is_tuple())
    return absl::InvalidArgumentError("too many arguments for the format");
  out.Append(format.Sub(std::min(done, text.size()), text.size()));
  SY_OK(evaluator.Charge(out.size()));
  return Value(std::move(out));
}

}  // namespace switchyard::jinja
