// The tokenizer that `synth` writes: one token per byte (id = byte value) and three special tokens,
// in the format of the `tokenizers` library, with a ChatML template. Pure functions.
#pragma once

#include <cstdint>
#include <string>

namespace switchyard {

constexpr int32_t kSynthEndOfText = 256;  // <|endoftext|>
constexpr int32_t kSynthTurnStart = 257;  // <|im_start|>
constexpr int32_t kSynthTurnEnd = 258;    // <|im_end|>
constexpr int32_t kSynthVocabSize = 259;

std::string SynthTokenizerJson();
std::string SynthTokenizerConfigJson(int64_t max_length);
std::string SynthGenerationConfigJson();

}  // namespace switchyard
