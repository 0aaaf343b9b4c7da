#include "server/openai_format.h"

#include <set>

#include "absl/strings/str_cat.h"
#include "server/api_error.h"
#include "server/json_writer.h"

namespace switchyard {
namespace {

void WriteFinish(FinishReason reason, JsonWriter& json) {
  json.Key("finish_reason");
  switch (reason) {
    case FinishReason::kNone:
      json.Null();
      break;
    case FinishReason::kLength:
      json.String("length");
      break;
    default:
      json.String("stop");
  }
}

void WriteUsage(const Usage& usage, JsonWriter& json) {
  json.Key("usage").BeginObject();
  json.Member("prompt_tokens", int64_t{usage.prompt_tokens});
  json.Member("completion_tokens", int64_t{usage.completion_tokens});
  json.Member("total_tokens", int64_t{usage.prompt_tokens} + usage.completion_tokens);
  json.Key("prompt_tokens_details").BeginObject();
  json.Member("cached_tokens", int64_t{usage.cached_tokens});
  json.EndObject().EndObject();
}

void WriteBytes(std::string_view bytes, JsonWriter& json) {
  json.Key("bytes").BeginArray();
  for (const char c : bytes) json.Int(static_cast<unsigned char>(c));
  json.EndArray();
}

// The bytes of a token in an answer; of a token that a stop string cut, what was kept.
std::string_view KeptBytes(const Tokenizer& tokenizer, const OutputToken& token) {
  if (!token.whole || tokenizer.IsSpecial(token.id)) return token.text;
  return tokenizer.TokenBytes(token.id);
}

// Chat: content[]{token, logprob, bytes, top_logprobs[]}.
void WriteChatLogprobs(const AnswerIdentity& identity, const std::vector<OutputToken>& tokens,
                       JsonWriter& json) {
  json.Key("logprobs");
  if (!identity.logprobs) {
    json.Null();
    return;
  }
  json.BeginObject().Key("content").BeginArray();
  for (const OutputToken& token : tokens) {
    json.BeginObject().Member("token", token.text).Key("logprob").Float(token.logprob);
    WriteBytes(KeptBytes(*identity.tokenizer, token), json);
    json.Key("top_logprobs").BeginArray();
    int32_t written = 0;
    for (const auto& [id, logprob] : token.top) {
      if (written++ == identity.num_top_logprobs) break;
      json.BeginObject()
          .Member("token", identity.tokenizer->TokenText(id))
          .Key("logprob")
          .Float(logprob);
      WriteBytes(identity.tokenizer->TokenBytes(id), json);
      json.EndObject();
    }
    json.EndArray().EndObject();
  }
  json.EndArray().Key("refusal").Null().EndObject();
}

int64_t NumCharacters(std::string_view utf8) {
  int64_t count = 0;
  for (const char c : utf8) count += (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  return count;
}

// {token: logprob} of the best and of the chosen one. Two ids may spell the same: the first, better
// one stays.
void WriteTopMap(const AnswerIdentity& identity, const OutputToken& token, JsonWriter& json) {
  std::set<std::string> seen;
  json.BeginObject();
  int32_t written = 0;
  bool chosen_written = false;
  for (const auto& [id, logprob] : token.top) {
    if (written++ == identity.num_top_logprobs) break;
    const bool chosen = id == token.id;
    const std::string text = chosen ? token.text : identity.tokenizer->TokenText(id);
    chosen_written |= chosen;
    if (seen.insert(text).second) json.Key(text).Float(logprob);
  }
  if (!chosen_written && seen.insert(token.text).second) json.Key(token.text).Float(token.logprob);
  json.EndObject();
}

// Completions: {tokens, token_logprobs, top_logprobs, text_offset}. `offset`: characters before
// these tokens; advanced.
void WriteCompletionLogprobs(const AnswerIdentity& identity, const std::vector<OutputToken>& tokens,
                             int64_t* offset, JsonWriter& json) {
  json.Key("logprobs");
  if (!identity.logprobs) {
    json.Null();
    return;
  }
  json.BeginObject().Key("tokens").BeginArray();
  for (const OutputToken& token : tokens) json.String(token.text);
  json.EndArray().Key("token_logprobs").BeginArray();
  for (const OutputToken& token : tokens) {
    if (token.scored) {
      json.Float(token.logprob);
    } else {
      json.Null();
    }
  }
  json.EndArray().Key("top_logprobs").BeginArray();
  for (const OutputToken& token : tokens) {
    if (token.scored) {
      WriteTopMap(identity, token, json);
    } else {
      json.Null();
    }
  }
  json.EndArray().Key("text_offset").BeginArray();
  for (const OutputToken& token : tokens) {
    json.Int(*offset);
    *offset += NumCharacters(token.text);
  }
  json.EndArray().EndObject();
}

void WriteTokenIds(const AnswerIdentity& identity, const std::vector<int32_t>& ids,
                   JsonWriter& json) {
  if (!identity.token_ids) return;
  json.Key("token_ids").BeginArray();
  for (const int32_t id : ids) json.Int(id);
  json.EndArray();
}

void BeginAnswer(const AnswerIdentity& identity, std::string_view object, JsonWriter& json) {
  json.BeginObject().Member("id", identity.id).Member("object", object);
  json.Member("created", identity.created).Member("model", identity.model);
}

}  // namespace

std::string FormatWhole(const AnswerIdentity& identity, const std::vector<WholeChoice>& choices,
                        const Usage& usage) {
  JsonWriter json;
  BeginAnswer(identity, identity.chat ? "chat.completion" : "text_completion", json);
  json.Key("choices").BeginArray();
  for (size_t i = 0; i < choices.size(); ++i) {
    const WholeChoice& choice = choices[i];
    json.BeginObject().Member("index", static_cast<int64_t>(i));
    if (identity.chat) {
      json.Key("message").BeginObject().Member("role", "assistant").Member("content", choice.text);
      json.Key("refusal").Null().EndObject();
      WriteChatLogprobs(identity, choice.tokens, json);
    } else {
      json.Member("text", choice.text);
      int64_t offset = 0;
      WriteCompletionLogprobs(identity, choice.tokens, &offset, json);
    }
    WriteFinish(choice.finish, json);
    WriteTokenIds(identity, choice.token_ids, json);
    json.EndObject();
  }
  json.EndArray();
  WriteUsage(usage, json);
  json.EndObject();
  return json.Take();
}

std::string StreamFormat::Delta(const ChoiceDelta& delta) {
  const size_t index = static_cast<size_t>(delta.index);
  if (role_sent_.size() <= index) {
    role_sent_.resize(index + 1, false);
    text_offset_.resize(index + 1, 0);
  }
  std::string events;
  // Writes one event; `body` fills the choice's members after the index.
  const auto event = [&](const auto& body) {
    JsonWriter json;
    BeginAnswer(identity_, identity_.chat ? "chat.completion.chunk" : "text_completion", json);
    json.Key("choices").BeginArray().BeginObject().Member("index", int64_t{delta.index});
    body(json);
    json.EndObject().EndArray();
    if (usage_asked_) json.Key("usage").Null();
    json.EndObject();
    absl::StrAppend(&events, "data: ", json.str(), "\n\n");
  };
  const bool ends = delta.finish != FinishReason::kNone;
  const bool has_content = !delta.text.empty() || !delta.tokens.empty() || !delta.token_ids.empty();

  if (!identity_.chat) {
    if (!has_content && !ends) return events;
    event([&](JsonWriter& json) {
      json.Member("text", delta.text);
      WriteCompletionLogprobs(identity_, delta.tokens, &text_offset_[index], json);
      WriteFinish(delta.finish, json);
      WriteTokenIds(identity_, delta.token_ids, json);
    });
    return events;
  }
  if (!role_sent_[index]) {
    role_sent_[index] = true;
    event([&](JsonWriter& json) {
      json.Key("delta").BeginObject().Member("role", "assistant").Member("content", "").EndObject();
      json.Key("logprobs").Null();
      WriteFinish(FinishReason::kNone, json);
    });
  }
  if (has_content) {
    event([&](JsonWriter& json) {
      json.Key("delta").BeginObject().Member("content", delta.text).EndObject();
      WriteChatLogprobs(identity_, delta.tokens, json);
      WriteFinish(FinishReason::kNone, json);
      WriteTokenIds(identity_, delta.token_ids, json);
    });
  }
  if (ends) {
    event([&](JsonWriter& json) {
      json.Key("delta").BeginObject().EndObject();
      json.Key("logprobs").Null();
      WriteFinish(delta.finish, json);
    });
  }
  return events;
}

std::string StreamFormat::UsageChunk(const Usage& usage) const {
  JsonWriter json;
  BeginAnswer(identity_, identity_.chat ? "chat.completion.chunk" : "text_completion", json);
  json.Key("choices").BeginArray().EndArray();
  WriteUsage(usage, json);
  json.EndObject();
  return absl::StrCat("data: ", json.str(), "\n\n");
}

std::string StreamFormat::Error(const absl::Status& status) {
  return absl::StrCat("data: ", ErrorBody(ErrorFromStatus(status)), "\n\n");
}

}  // namespace switchyard
