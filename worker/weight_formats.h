// WeightFormats: in which format each matrix of a model is kept in memory: the model's own type, or
// int8 or int4 by --quantization, changed by the rules of an overrides file. Embedding, router,
// norms and the gate of a shared expert always have the model's type. A plain value, immutable
// after Create; any thread.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "worker/checkpoint.h"
#include "worker/model_config.h"
#include "worker/model_tensors.h"

namespace switchyard {

struct WeightFormatOptions {
  std::string quantization = "none";  // "none", "int8", "int4"
  std::string overrides_file;         // JSON, see worker/README.md; "": none
};

// The matrices that a rule may name. An MLP's three have one format.
enum class WeightRole : uint8_t {
  kQuery,
  kKey,
  kValue,
  kOutput,
  kExpert,
  kShared,
  kDense,
  kLmHead
};

class WeightFormats {
 public:
  WeightFormats() = default;
  // kInvalidArgument for an unknown name, and for a bad file with its line and the reason.
  static absl::StatusOr<WeightFormats> Create(const WeightFormatOptions& options,
                                              const ModelConfig& config, DType dtype);
  // The same from the text of a file called `name`; "": no rules.
  static absl::StatusOr<WeightFormats> Parse(const std::string& quantization, std::string_view text,
                                             const std::string& name, const ModelConfig& config,
                                             DType dtype);

  // Matrices that the checkpoint stores in integers of the width that they are to have keep its
  // codes, scales and zero points instead of being rounded again, where the back end's groups allow
  // it (not with act-order; an MLP only as a whole).
  void KeepStored(const Checkpoint& checkpoint, const ModelConfig& config);
  bool keeps_stored(const TensorKey& key) const;
  int64_t num_kept() const { return static_cast<int64_t>(kept_.size()); }  // matrices and MLPs

  // Of the matrix that `key` names; a tied lm_head has the key of lm_head.
  WeightFormat Of(const TensorKey& key) const;
  // Of all experts of a layer; nothing when they differ.
  std::optional<WeightFormat> OfExperts(const ModelConfig& config, int32_t layer) const;
  // "" without quantisation, "int8", "int4", with rules "int8+" and a hash of them: part of the
  // numerics id.
  const std::string& name() const { return name_; }

 private:
  struct Range {
    int32_t first = 0;
    int32_t last = 0;
  };
  struct Rule {
    std::vector<WeightRole> roles;
    std::vector<Range> layers;   // empty: all
    std::vector<Range> experts;  // empty: all
    WeightFormat format;
  };
  friend class RuleParser;

  DType dtype_ = DType::kF32;
  WeightFormat standard_;                   // of what is quantised
  WeightFormat lm_head_;                    // of lm_head
  std::vector<Rule> rules_;                 // the last that fits wins
  std::map<TensorKey, WeightFormat> kept_;  // as stored; an MLP by the key of its down projection
  std::string name_;
};

}  // namespace switchyard
