#include "server/text/unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <vector>

namespace switchyard::unicode {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

struct ByteTable {
  std::array<char32_t, 256> to_char;
  std::array<int, 0x144> to_byte;
};

const ByteTable& Bytes() {
  static const ByteTable table = [] {
    ByteTable t;
    t.to_byte.fill(-1);
    char32_t next = 0x100;
    for (int b = 0; b < 256; ++b) {
      const bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
      t.to_char[b] = printable ? static_cast<char32_t>(b) : next++;
      t.to_byte[t.to_char[b]] = b;
    }
    return t;
  }();
  return table;
}

utf8proc_category_t Category(char32_t c) {
  return utf8proc_category(static_cast<utf8proc_int32_t>(c));
}

bool IsAscii(std::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}

}  // namespace

CharScan ScanChar(std::string_view bytes) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(bytes[i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return {CharKind::kValid, 1, lead};
  size_t size;
  unsigned char low = 0x80, high = 0xBF;  // legal second byte (Unicode table 3-7)
  char32_t value;
  if (lead >= 0xC2 && lead <= 0xDF) {
    size = 2;
    value = lead & 0x1F;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    size = 3;
    value = lead & 0x0F;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    size = 4;
    value = lead & 0x07;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return {CharKind::kInvalid, 1, 0};
  }
  for (size_t i = 1; i < size; ++i) {
    if (i == bytes.size()) return {CharKind::kIncomplete, i, 0};
    if (byte(i) < low || byte(i) > high) return {CharKind::kInvalid, i, 0};
    low = 0x80;
    high = 0xBF;
    value = (value << 6) | (byte(i) & 0x3F);
  }
  return {CharKind::kValid, size, value};
}

bool IsValidUtf8(std::string_view text) {
  while (!text.empty()) {
    const CharScan scan = ScanChar(text);
    if (scan.kind != CharKind::kValid) return false;
    text.remove_prefix(scan.size);
  }
  return true;
}

size_t CharSize(unsigned char lead) {
  return lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
}

char32_t CharAt(std::string_view text, size_t pos, size_t* size) {
  const CharScan scan = ScanChar(text.substr(pos));
  *size = scan.size;
  return scan.kind == CharKind::kValid ? scan.value : 0xFFFD;
}

void AppendChar(char32_t value, std::string* out) {
  utf8proc_uint8_t buffer[4];
  const auto size = utf8proc_encode_char(static_cast<utf8proc_int32_t>(value), buffer);
  out->append(reinterpret_cast<const char*>(buffer), static_cast<size_t>(size));
}

void AppendLossy(std::string_view bytes, bool flush, std::string* held, std::string* out) {
  std::string joined;
  std::string_view rest = bytes;
  if (!held->empty()) {
    joined = *held + std::string(bytes);
    rest = joined;
  }
  size_t keep = 0;
  while (!rest.empty()) {
    const CharScan scan = ScanChar(rest);
    if (scan.kind == CharKind::kIncomplete && !flush) {
      keep = rest.size();
      break;
    }
    if (scan.kind == CharKind::kValid) {
      out->append(rest.substr(0, scan.size));
    } else {
      out->append(kReplacement);
    }
    rest.remove_prefix(scan.size);
  }
  *held = std::string(rest.substr(0, keep));
}

std::string Lossy(std::string_view bytes) {
  std::string held, out;
  AppendLossy(bytes, /*flush=*/true, &held, &out);
  return out;
}

bool IsSpace(char32_t c) {
  return (c >= 9 && c <= 13) || c == ' ' || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

bool IsPunctuation(char32_t c) {
  if (c < 0x80)
    return (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') ||
           (c >= '{' && c <= '~');
  const auto category = Category(c);
  return category >= UTF8PROC_CATEGORY_PC && category <= UTF8PROC_CATEGORY_PO;
}

bool IsNumber(char32_t c) {
  const auto category = Category(c);
  return category >= UTF8PROC_CATEGORY_ND && category <= UTF8PROC_CATEGORY_NO;
}

bool IsDecimalDigit(char32_t c) { return Category(c) == UTF8PROC_CATEGORY_ND; }

bool IsLetter(char32_t c) {
  const auto category = Category(c);
  return category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_LO;
}

bool IsWord(char32_t c) {
  if (c < 0x80)
    return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '_';
  const auto category = Category(c);
  return (category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_ME) ||
         category == UTF8PROC_CATEGORY_ND || category == UTF8PROC_CATEGORY_NL ||
         category == UTF8PROC_CATEGORY_PC || c == 0x200C || c == 0x200D ||
         (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) ||
         (c >= 0x1F150 && c <= 0x1F169) ||
         (c >= 0x1F170 && c <= 0x1F189);  // Other_Alphabetic among the symbols
}

bool IsPrintable(char32_t c) {
  const auto category = Category(c);
  return c == ' ' || (category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_SO);
}

std::string Normalize(std::string_view text, Form form) {
  if (IsAscii(text)) return std::string(text);
  const bool compat = form == Form::kNfkc || form == Form::kNfkd;
  const bool compose = form == Form::kNfc || form == Form::kNfkc;
  const auto decompose = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE |
                                                        (compat ? UTF8PROC_COMPAT : 0));
  std::vector<utf8proc_int32_t> chars;
  chars.reserve(text.size());
  for (size_t pos = 0, size = 0; pos < text.size(); pos += size) {
    const auto c = static_cast<utf8proc_int32_t>(CharAt(text, pos, &size));
    utf8proc_int32_t parts[32];  // the longest decomposition has 18
    int last_boundclass = 0;
    const auto n = utf8proc_decompose_char(c, parts, 32, decompose, &last_boundclass);
    if (n < 1 || n > 32) {
      chars.push_back(c);
    } else {
      chars.insert(chars.end(), parts, parts + n);
    }
  }
  // Canonical ordering. utf8proc_decompose() would do it by insertion, quadratic in a run of
  // combining marks.
  const auto ccc = [](utf8proc_int32_t c) { return utf8proc_get_property(c)->combining_class; };
  for (size_t i = 0; i < chars.size();) {
    if (ccc(chars[i]) == 0) {
      ++i;
      continue;
    }
    size_t end = i;
    while (end < chars.size() && ccc(chars[end]) != 0) ++end;
    std::stable_sort(chars.begin() + static_cast<ptrdiff_t>(i),
                     chars.begin() + static_cast<ptrdiff_t>(end),
                     [&](auto a, auto b) { return ccc(a) < ccc(b); });
    i = end;
  }
  auto count = static_cast<utf8proc_ssize_t>(chars.size());
  if (compose) {
    const auto options = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    count = utf8proc_normalize_utf32(chars.data(), count, options);
  }
  std::string out;
  out.reserve(text.size());
  for (utf8proc_ssize_t i = 0; i < count; ++i)
    AppendChar(static_cast<char32_t>(chars[static_cast<size_t>(i)]), &out);
  return out;
}

std::string Lowercase(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t pos = 0, size = 0; pos < text.size(); pos += size) {
    const char32_t c = CharAt(text, pos, &size);
    if (c == 0x130) {
      out += "i\xCC\x87";  // the one unconditional lower-case mapping to two characters
    } else {
      AppendChar(static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c))), &out);
    }
  }
  return out;
}

std::string Uppercase(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t pos = 0, size = 0; pos < text.size(); pos += size) {
    const char32_t c = CharAt(text, pos, &size);
    if (c == 0xDF) {
      out += "SS";
    } else {
      AppendChar(static_cast<char32_t>(utf8proc_toupper(static_cast<utf8proc_int32_t>(c))), &out);
    }
  }
  return out;
}

char32_t ByteToChar(unsigned char byte) { return Bytes().to_char[byte]; }

int CharToByte(char32_t c) { return c < Bytes().to_byte.size() ? Bytes().to_byte[c] : -1; }

}  // namespace switchyard::unicode
