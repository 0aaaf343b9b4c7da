#include "server/text/normalizer.h"

#include <utility>

#include "server/text/cat.h"
#include "server/text/json_fields.h"
#include "server/text/pattern.h"
#include "server/text/unicode.h"

namespace switchyard {
namespace {

constexpr int kMaxDepth = 16;

class FormNormalizer : public Normalizer {
 public:
  explicit FormNormalizer(unicode::Form form) : form_(form) {}
  absl::Status Apply(std::string* text) const override {
    *text = unicode::Normalize(*text, form_);
    return absl::OkStatus();
  }

 private:
  const unicode::Form form_;
};

class LowercaseNormalizer : public Normalizer {
 public:
  absl::Status Apply(std::string* text) const override {
    *text = unicode::Lowercase(*text);
    return absl::OkStatus();
  }
};

class PrependNormalizer : public Normalizer {
 public:
  explicit PrependNormalizer(std::string prefix) : prefix_(std::move(prefix)) {}
  absl::Status Apply(std::string* text) const override {
    if (!text->empty()) text->insert(0, prefix_);
    return absl::OkStatus();
  }

 private:
  const std::string prefix_;
};

class ReplaceNormalizer : public Normalizer {
 public:
  ReplaceNormalizer(Pattern pattern, std::string content)
      : pattern_(std::move(pattern)), content_(std::move(content)) {}
  absl::Status Apply(std::string* text) const override {
    return pattern_.ReplaceAll(content_, text);
  }

 private:
  const Pattern pattern_;
  const std::string content_;
};

class StripNormalizer : public Normalizer {
 public:
  StripNormalizer(bool left, bool right) : left_(left), right_(right) {}
  absl::Status Apply(std::string* text) const override {
    size_t begin = 0, end = text->size(), size = 0;
    while (left_ && begin < end && unicode::IsSpace(unicode::CharAt(*text, begin, &size)))
      begin += size;
    while (right_ && end > begin) {
      size_t last = end - 1;
      while (last > begin && (static_cast<unsigned char>((*text)[last]) & 0xC0) == 0x80) --last;
      if (!unicode::IsSpace(unicode::CharAt(*text, last, &size))) break;
      end = last;
    }
    *text = text->substr(begin, end - begin);
    return absl::OkStatus();
  }

 private:
  const bool left_, right_;
};

class SequenceNormalizer : public Normalizer {
 public:
  explicit SequenceNormalizer(std::vector<std::unique_ptr<Normalizer>> steps)
      : steps_(std::move(steps)) {}
  absl::Status Apply(std::string* text) const override {
    for (const auto& step : steps_) {
      if (absl::Status s = step->Apply(text); !s.ok()) return s;
    }
    return absl::OkStatus();
  }

 private:
  const std::vector<std::unique_ptr<Normalizer>> steps_;
};

absl::StatusOr<std::unique_ptr<Normalizer>> CreateAt(const nlohmann::json& spec, int depth) {
  using Result = absl::StatusOr<std::unique_ptr<Normalizer>>;
  if (depth > kMaxDepth)
    return absl::InvalidArgumentError("normalizer: Sequences are nested too deeply");
  std::vector<std::unique_ptr<Normalizer>> steps;
  if (spec.is_null()) return Result(std::make_unique<SequenceNormalizer>(std::move(steps)));
  auto type = ComponentType(spec, "normalizer");
  if (!type.ok()) return type.status();
  if (*type == "NFC") return Result(std::make_unique<FormNormalizer>(unicode::Form::kNfc));
  if (*type == "NFD") return Result(std::make_unique<FormNormalizer>(unicode::Form::kNfd));
  if (*type == "NFKC") return Result(std::make_unique<FormNormalizer>(unicode::Form::kNfkc));
  if (*type == "NFKD") return Result(std::make_unique<FormNormalizer>(unicode::Form::kNfkd));
  if (*type == "Lowercase") return Result(std::make_unique<LowercaseNormalizer>());
  if (*type == "Prepend") {
    std::string prefix;
    if (absl::Status s = ReadField(spec, "prepend", &prefix); !s.ok()) return s;
    return Result(std::make_unique<PrependNormalizer>(std::move(prefix)));
  }
  if (*type == "Replace") {
    auto pattern = Pattern::Create(FieldOrNull(spec, "pattern"));
    if (!pattern.ok()) return pattern.status();
    std::string content;
    if (absl::Status s = ReadField(spec, "content", &content); !s.ok()) return s;
    return Result(std::make_unique<ReplaceNormalizer>(*std::move(pattern), std::move(content)));
  }
  if (*type == "Strip") {
    bool left = true, right = true;
    if (absl::Status s = ReadField(spec, "strip_left", &left); !s.ok()) return s;
    if (absl::Status s = ReadField(spec, "strip_right", &right); !s.ok()) return s;
    return Result(std::make_unique<StripNormalizer>(left, right));
  }
  if (*type == "Sequence") {
    const auto& list = FieldOrNull(spec, "normalizers");
    if (!list.is_array())
      return absl::InvalidArgumentError("normalizer Sequence needs a list 'normalizers'");
    for (const auto& item : list) {
      auto step = CreateAt(item, depth + 1);
      if (!step.ok()) return step.status();
      steps.push_back(*std::move(step));
    }
    return Result(std::make_unique<SequenceNormalizer>(std::move(steps)));
  }
  return absl::InvalidArgumentError(Cat("normalizer '", *type, "' is not supported"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Normalizer>> Normalizer::Create(const nlohmann::json& spec) {
  return CreateAt(spec, 0);
}

}  // namespace switchyard
