// From tokenizer.json and tokenizer_config.json to Tokenizer::Parts.
#include <algorithm>
#include <fstream>
#include <sstream>
#include <utility>

#include "server/text/cat.h"
#include "server/text/json_fields.h"
#include "server/text/tokenizer_parts.h"

namespace switchyard {
namespace {

absl::StatusOr<nlohmann::json> ParseJson(std::string_view text, std::string_view name) {
  nlohmann::json parsed = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (parsed.is_discarded() || !parsed.is_object()) {
    return absl::InvalidArgumentError(Cat(name, " is not a JSON object"));
  }
  return parsed;
}

absl::StatusOr<std::string> ReadFile(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(Cat("cannot open ", path.string()));
  std::ostringstream text;
  text << file.rdbuf();
  if (!file) return absl::DataLossError(Cat("cannot read ", path.string()));
  return std::move(text).str();
}

// A special token of tokenizer_config.json: a string or an added-token object.
std::string TokenString(const nlohmann::json& config, std::string_view key) {
  const auto& field = FieldOrNull(config, key);
  if (field.is_string()) return field.get<std::string>();
  const auto& content = FieldOrNull(field, "content");
  return content.is_string() ? content.get<std::string>() : "";
}

}  // namespace

absl::Status Tokenizer::Parts::ReadAddedTokens(const nlohmann::json& tokenizer,
                                               const nlohmann::json& config) {
  const auto& list = FieldOrNull(tokenizer, "added_tokens");
  if (!list.is_array() && !list.is_null())
    return absl::InvalidArgumentError("'added_tokens' must be a list");
  for (const auto& item : list) {
    auto token = AddedToken::Create(item);
    if (!token.ok()) return token.status();
    if (token->id < 0)
      return absl::InvalidArgumentError(Cat("added token '", token->content, "' has no id"));
    added.push_back(*std::move(token));
  }
  // `transformers` adds what only tokenizer_config.json lists.
  const auto& more = FieldOrNull(config, "added_tokens_decoder");
  if (more.is_object()) {
    for (const auto& [key, item] : more.items()) {
      auto token = AddedToken::Create(item);
      if (!token.ok()) return token.status();
      int64_t id = 0;
      for (const char c : key) {
        if (c < '0' || c > '9' || id > Bpe::kMaxId) {
          return absl::InvalidArgumentError(
              Cat("added_tokens_decoder: '", key, "' is not a token id"));
        }
        id = id * 10 + (c - '0');
      }
      if (key.empty() || id > Bpe::kMaxId) {
        return absl::InvalidArgumentError(
            Cat("added_tokens_decoder: '", key, "' is not a token id"));
      }
      token->id = static_cast<int32_t>(id);
      const auto known = [&](const AddedToken& t) {
        return t.id == token->id || t.content == token->content;
      };
      if (std::none_of(added.begin(), added.end(), known)) added.push_back(*std::move(token));
    }
  }
  for (const AddedToken& token : added) {
    if (!token.normalized || token.IsControl()) {
      raw_tokens.Add(token, token.content);
    } else {
      std::string spelling = token.content;
      if (absl::Status s = normalizer->Apply(&spelling); !s.ok()) return s;
      normalized_tokens.Add(token, spelling);
    }
  }
  return absl::OkStatus();
}

absl::Status Tokenizer::Parts::ReadPostProcessor(const nlohmann::json& spec) {
  if (spec.is_null()) return absl::OkStatus();
  auto type = ComponentType(spec, "post_processor");
  if (!type.ok()) return type.status();
  if (*type == "ByteLevel") return absl::OkStatus();  // moves offsets only
  if (*type == "Sequence") {
    const auto& list = FieldOrNull(spec, "processors");
    if (!list.is_array())
      return absl::InvalidArgumentError("post_processor Sequence needs a list 'processors'");
    for (const auto& item : list) {
      if (FieldOrNull(item, "type") == "Sequence") {
        return absl::InvalidArgumentError(
            "post_processor Sequence inside a Sequence is not supported");
      }
      if (absl::Status s = ReadPostProcessor(item); !s.ok()) return s;
    }
    return absl::OkStatus();
  }
  if (*type != "TemplateProcessing") {
    return absl::InvalidArgumentError(Cat("post_processor '", *type, "' is not supported"));
  }
  const auto& single = FieldOrNull(spec, "single");
  if (!single.is_array())
    return absl::InvalidArgumentError("TemplateProcessing needs a list 'single'");
  std::vector<int32_t> before, after;
  int num_sequences = 0;
  for (const auto& piece : single) {
    if (piece.is_object() && piece.contains("Sequence")) {
      ++num_sequences;
      continue;
    }
    const auto& name = FieldOrNull(FieldOrNull(piece, "SpecialToken"), "id");
    if (!name.is_string())
      return absl::InvalidArgumentError(
          "TemplateProcessing: a piece is neither token nor sequence");
    const auto& ids = FieldOrNull(
        FieldOrNull(FieldOrNull(spec, "special_tokens"), name.get_ref<const std::string&>()),
        "ids");
    if (!ids.is_array()) {
      return absl::InvalidArgumentError(Cat("TemplateProcessing: no ids for ", name.dump()));
    }
    for (const auto& id : ids) {
      if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() > Bpe::kMaxId) {
        return absl::InvalidArgumentError(Cat("TemplateProcessing: bad id for ", name.dump()));
      }
      (num_sequences == 0 ? before : after).push_back(static_cast<int32_t>(id.get<int64_t>()));
    }
  }
  if (num_sequences != 1)
    return absl::InvalidArgumentError("TemplateProcessing: 'single' must hold one sequence");
  prefix_ids.insert(prefix_ids.begin(), before.begin(), before.end());
  suffix_ids.insert(suffix_ids.end(), after.begin(), after.end());
  return absl::OkStatus();
}

absl::Status Tokenizer::Parts::ReadConfig(const nlohmann::json& config) {
  const auto read = [&](std::string_view key, SpecialString* out) {
    out->text = TokenString(config, key);
    if (!out->text.empty()) out->id = IdOf(out->text);
  };
  read("bos_token", &bos);
  read("eos_token", &eos);
  read("unk_token", &unk);
  read("pad_token", &pad);
  // These flags override the post-processor, as `transformers` does.
  const auto& add_bos = FieldOrNull(config, "add_bos_token");
  if (add_bos.is_boolean() && bos.id) {
    const bool has = !prefix_ids.empty() && prefix_ids.front() == *bos.id;
    if (add_bos.get<bool>() && !has) prefix_ids.insert(prefix_ids.begin(), *bos.id);
    if (!add_bos.get<bool>() && has) prefix_ids.erase(prefix_ids.begin());
  }
  const auto& add_eos = FieldOrNull(config, "add_eos_token");
  if (add_eos.is_boolean() && eos.id) {
    const bool has = !suffix_ids.empty() && suffix_ids.back() == *eos.id;
    if (add_eos.get<bool>() && !has) suffix_ids.push_back(*eos.id);
    if (!add_eos.get<bool>() && has) suffix_ids.pop_back();
  }
  return absl::OkStatus();
}

absl::Status Tokenizer::Parts::FillTokens() {
  absl::Status status;
  const auto fill = [&](std::string_view token, int32_t id, bool is_added) {
    if (static_cast<size_t>(id) >= tokens.size()) tokens.resize(static_cast<size_t>(id) + 1);
    TokenInfo& info = tokens[static_cast<size_t>(id)];
    auto bytes = decoder.Bytes(token, is_added);
    if (!bytes.ok()) {
      status = bytes.status();
      return;
    }
    info.bytes = *std::move(bytes);
    info.exists = true;
    info.first_bytes.reset();
    const std::string& dropped = decoder.dropped_from_first_token();
    if (dropped.empty() || token.find(dropped) == std::string_view::npos) return;
    std::string first;
    for (size_t pos = 0; pos < token.size();) {
      if (token.substr(pos, dropped.size()) == dropped) {
        pos += dropped.size();
      } else {
        first.push_back(token[pos++]);
      }
    }
    info.first_bytes = std::move(first);
  };
  bpe->ForEach([&](const std::string& token, int32_t id) { fill(token, id, /*is_added=*/false); });
  for (const AddedToken& token : added) {
    fill(token.content, token.id, /*is_added=*/true);
    tokens[static_cast<size_t>(token.id)].special = token.special;
  }
  return status;
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Parse(std::string_view tokenizer_json,
                                                            std::string_view config_json) {
  auto tokenizer = ParseJson(tokenizer_json, "tokenizer.json");
  if (!tokenizer.ok()) return tokenizer.status();
  auto config = ParseJson(config_json.empty() ? "{}" : config_json, "tokenizer_config.json");
  if (!config.ok()) return config.status();

  auto parts = std::make_unique<Parts>();
  auto bpe = Bpe::Create(FieldOrNull(*tokenizer, "model"));
  if (!bpe.ok()) return bpe.status();
  parts->bpe = *std::move(bpe);
  auto normalizer = Normalizer::Create(FieldOrNull(*tokenizer, "normalizer"));
  if (!normalizer.ok()) return normalizer.status();
  parts->normalizer = *std::move(normalizer);
  auto pre_tokenizer = PreTokenizer::Create(FieldOrNull(*tokenizer, "pre_tokenizer"));
  if (!pre_tokenizer.ok()) return pre_tokenizer.status();
  parts->pre_tokenizer = *std::move(pre_tokenizer);
  const auto& decoder_spec = FieldOrNull(*tokenizer, "decoder");
  auto decoder = TokenDecoder::Create(decoder_spec);
  if (!decoder.ok()) return decoder.status();
  parts->decoder = *std::move(decoder);
  parts->spaces_between = decoder_spec.is_null();

  if (absl::Status s = parts->ReadAddedTokens(*tokenizer, *config); !s.ok()) return s;
  if (absl::Status s = parts->ReadPostProcessor(FieldOrNull(*tokenizer, "post_processor")); !s.ok())
    return s;
  if (absl::Status s = parts->ReadConfig(*config); !s.ok()) return s;
  if (absl::Status s = parts->FillTokens(); !s.ok()) return s;
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(parts)));
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::filesystem::path& dir) {
  auto tokenizer = ReadFile(dir / "tokenizer.json");
  if (!tokenizer.ok()) return tokenizer.status();
  std::string config;
  if (std::error_code error; std::filesystem::exists(dir / "tokenizer_config.json", error)) {
    auto text = ReadFile(dir / "tokenizer_config.json");
    if (!text.ok()) return text.status();
    config = *std::move(text);
  }
  auto result = Parse(*tokenizer, config);
  if (!result.ok()) {
    return absl::Status(result.status().code(),
                        Cat(dir.string(), ": ", std::string(result.status().message())));
  }
  return result;
}

}  // namespace switchyard
