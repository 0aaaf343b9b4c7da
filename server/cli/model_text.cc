#include "server/cli/model_text.h"

#include <spdlog/spdlog.h>

#include <CLI/CLI.hpp>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/sampling_defaults.h"

namespace switchyard {

void ModelText::Bind(Engine* engine) const {
  engine->tokenizer = tokenizer.get();
  if (const ChatTemplate* chat = chat_template.get()) {
    engine->render_chat = [chat](const ChatPrompt& prompt) { return chat->Render(prompt); };
  }
  engine->defaults = defaults;
}

absl::StatusOr<ModelText> LoadModelText(const std::string& model_dir,
                                        const std::string& chat_template) {
  const std::filesystem::path dir = model_dir;
  if (!std::filesystem::is_directory(dir)) {
    return absl::NotFoundError(
        absl::StrCat("--model ", dir.string(), " is not a folder with a checkpoint"));
  }
  ModelText text;
  auto tokenizer = Tokenizer::Load(dir);
  if (!tokenizer.ok()) return tokenizer.status();
  text.tokenizer = *std::move(tokenizer);
  auto chat = ChatTemplate::Load(dir, chat_template, *text.tokenizer);
  if (chat.ok()) {
    text.chat_template = *std::move(chat);
  } else if (absl::IsNotFound(chat.status()) && chat_template.empty()) {
    spdlog::warn("{}: chat completions will be refused", std::string(chat.status().message()));
  } else {
    return chat.status();
  }
  const auto defaults = LoadSamplingDefaults(dir);
  if (!defaults.ok()) return defaults.status();
  text.defaults = *defaults;
  return text;
}

void AddModelFlag(CLI::App* app, std::string* model_dir) {
  app->add_option("--model", *model_dir,
                  "checkpoint folder: config.json, *.safetensors, tokenizer.json")
      ->required();
}

void AddChatTemplateFlag(CLI::App* app, std::string* chat_template) {
  app->add_option("--chat-template", *chat_template,
                  "Jinja file to use instead of the checkpoint's template")
      ->check(CLI::ExistingFile);
}

}  // namespace switchyard
