// UTF-8, character classes and normalisation forms, as the tokenizer components need them (a thin
// layer over utf8proc).
//
// Owner: server/text. Free functions, no state, any thread. Must never read beyond a view or take
// more than linear time (runs of combining marks included) on any input.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace switchyard::unicode {

// What stands at the start of a byte string.
enum class CharKind { kValid, kInvalid, kIncomplete };
struct CharScan {
  CharKind kind;
  size_t size;  // kValid: of the character; kInvalid: of the maximal subpart (1–3); kIncomplete:
                // all that is left
  char32_t value;  // of a valid character
};
// REQUIRES: !bytes.empty(). kIncomplete: every byte so far fits the beginning of a character.
CharScan ScanChar(std::string_view bytes);

bool IsValidUtf8(std::string_view text);
// The character at `pos` of valid UTF-8 and its size in bytes. REQUIRES: pos < text.size() at a
// character's start.
char32_t CharAt(std::string_view text, size_t pos, size_t* size);
size_t CharSize(unsigned char lead);  // 1–4, from the first byte of valid UTF-8
void AppendChar(char32_t value, std::string* out);

// Appends `bytes` to `*held` and moves what is certain to `*out`: whole characters, and U+FFFD for
// each maximal run that can never become one. Leaves at most 3 bytes in `*held`; with `flush` none
// (the rest becomes one U+FFFD).
void AppendLossy(std::string_view bytes, bool flush, std::string* held, std::string* out);
std::string Lossy(std::string_view bytes);

bool IsSpace(char32_t c);         // White_Space
bool IsPunctuation(char32_t c);   // ASCII punctuation and categories P*
bool IsNumber(char32_t c);        // categories N*
bool IsDecimalDigit(char32_t c);  // category Nd
bool IsLetter(char32_t c);        // categories L*
bool IsWord(char32_t c);          // \w of Rust's regex: Alphabetic, M, Nd, Pc, Join_Control

bool IsPrintable(
    char32_t c);  // Python's str.isprintable(): neither separators nor C*, except for the space

enum class Form { kNfc, kNfd, kNfkc, kNfkd };
std::string Normalize(std::string_view text, Form form);  // REQUIRES: valid UTF-8
std::string Lowercase(std::string_view text);             // full mappings, without context rules
std::string Uppercase(std::string_view text);

// GPT-2's printable stand-ins for bytes: byte → character (< U+0144) and back (-1 where it is
// none).
char32_t ByteToChar(unsigned char byte);
int CharToByte(char32_t c);

}  // namespace switchyard::unicode
