// ModelText: what the front end reads of a checkpoint folder: tokenizer, chat template, sampling
// defaults; no weights. Immutable once loaded; it outlives the Engine that points at it.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/engine.h"

namespace CLI {
class App;
}

namespace switchyard {

struct ModelText {
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<ChatTemplate> chat_template;  // null: the checkpoint has none
  SamplingDefaults defaults;

  // The text parts of `engine`.
  void Bind(Engine* engine) const;
};

// `chat_template`: a Jinja file instead of the checkpoint's own; "": that one. A checkpoint without
// one is logged.
absl::StatusOr<ModelText> LoadModelText(const std::string& model_dir,
                                        const std::string& chat_template);

void AddModelFlag(CLI::App* app, std::string* model_dir);
void AddChatTemplateFlag(CLI::App* app, std::string* chat_template);

}  // namespace switchyard
