#include "worker/synth_tokenizer.h"

#include "nlohmann/json.hpp"

namespace switchyard {
namespace {

using nlohmann::json;

// UTF-8 of a code point below 0x800.
std::string Utf8(uint32_t code) {
  if (code < 0x80) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xc0 | (code >> 6)), static_cast<char>(0x80 | (code & 0x3f))};
}

// The visible character that byte-level BPE writes for a byte: itself when printable, else from 256
// on in byte order.
std::string ByteCharacter(uint32_t byte) {
  const auto printable = [](uint32_t b) {
    return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  };
  if (printable(byte)) return Utf8(byte);
  uint32_t code = 256;
  for (uint32_t b = 0; b < byte; ++b) code += printable(b) ? 0 : 1;
  return Utf8(code);
}

json SpecialToken(int32_t id, const char* content) {
  return {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", true}};
}

}  // namespace

std::string SynthTokenizerJson() {
  json vocab = json::object();
  for (uint32_t byte = 0; byte < 256; ++byte) vocab[ByteCharacter(byte)] = byte;
  const json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", true},
                           {"use_regex", true}};
  const json tokenizer = {
      {"version", "1.0"},
      {"truncation", nullptr},
      {"padding", nullptr},
      {"added_tokens",
       {SpecialToken(kSynthEndOfText, "<|endoftext|>"),
        SpecialToken(kSynthTurnStart, "<|im_start|>"), SpecialToken(kSynthTurnEnd, "<|im_end|>")}},
      {"normalizer", nullptr},
      {"pre_tokenizer", byte_level},
      {"post_processor", nullptr},
      {"decoder", byte_level},
      {"model",
       {{"type", "BPE"},
        {"dropout", nullptr},
        {"unk_token", nullptr},
        {"continuing_subword_prefix", nullptr},
        {"end_of_word_suffix", nullptr},
        {"fuse_unk", false},
        {"byte_fallback", false},
        {"ignore_merges", false},
        {"vocab", vocab},
        {"merges", json::array()}}}};
  return tokenizer.dump(1) + "\n";
}

std::string SynthTokenizerConfigJson(int64_t max_length) {
  const char* chat_template =
      "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] "
      "}}<|im_end|>\n{% endfor %}"
      "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
  const json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                       {"bos_token", nullptr},
                       {"eos_token", "<|im_end|>"},
                       {"pad_token", "<|endoftext|>"},
                       {"add_prefix_space", false},
                       {"clean_up_tokenization_spaces", false},
                       {"model_max_length", max_length},
                       {"chat_template", chat_template}};
  return config.dump(1) + "\n";
}

std::string SynthGenerationConfigJson() {
  const json config = {{"eos_token_id", {kSynthTurnEnd, kSynthEndOfText}},
                       {"pad_token_id", kSynthEndOfText}};
  return config.dump(1) + "\n";
}

}  // namespace switchyard
