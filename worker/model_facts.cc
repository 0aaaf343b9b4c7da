#include "worker/model_facts.h"

#include <algorithm>
#include <filesystem>
#include <memory>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "comm/hash64.h"
#include "kernels/backend.h"
#include "kernels/thread_pool.h"
#include "spdlog/spdlog.h"
#include "worker/kv_cache.h"
#include "worker/model_tensors.h"
#include "worker/weight_memory.h"

namespace switchyard {
namespace {

constexpr int kMaxModelLen = 1 << 27;
constexpr int64_t kMaxConfigBytes = 16 << 20;
constexpr size_t kSampleBytes = 256;  // of each tensor, from its middle

// "auto": the type that the config states, or that of the embedding when it states none.
absl::StatusOr<DType> ChooseDType(const std::string& name, const ModelConfig& config,
                                  const Checkpoint& checkpoint) {
  if (name != "auto") return ParseDType(name);
  if (config.stored_dtype.empty()) {
    const StoredDType stored = checkpoint.Parts({TensorRole::kEmbedding}).front().dtype;
    return stored == StoredDType::kBF16 ? DType::kBF16 : DType::kF32;
  }
  if (config.stored_dtype == "float16") spdlog::info("float16 weights are computed in float32");
  return config.dtype;
}

absl::StatusOr<int32_t> ChooseMaxModelLen(int requested, const ModelConfig& config) {
  const int64_t limit = config.max_position;
  if (requested < 0 || requested > kMaxModelLen) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_model_len is ", requested, ", not from 0 to ", kMaxModelLen));
  }
  if (requested > limit) {
    return absl::InvalidArgumentError(absl::StrCat(
        "max_model_len ", requested, " exceeds the model's max_position_embeddings ", limit));
  }
  return static_cast<int32_t>(requested > 0 ? requested : limit);
}

std::string BaseName(const std::string& dir) {
  const std::filesystem::path path =
      std::filesystem::path(dir + "/.").lexically_normal().parent_path();
  const std::string name = path.filename().string();
  return name.empty() || name == "." || name == ".." ? "model" : name;
}

std::string NumericsId(const ComputeBackend& backend, const OpenedModel& model) {
  const std::string id = absl::StrCat(backend.numerics_id(), "/", DTypeName(model.dtype));
  return model.formats.name().empty() ? id : absl::StrCat(id, "/", model.formats.name());
}

}  // namespace

absl::StatusOr<OpenedModel> OpenModel(const ModelFactsOptions& options) {
  OpenedModel model;
  absl::StatusOr<ModelConfig> config = LoadModelConfig(options.model_dir);
  if (!config.ok()) return config.status();
  model.config = *std::move(config);
  absl::StatusOr<Checkpoint> checkpoint = Checkpoint::Open(options.model_dir, model.config);
  if (!checkpoint.ok()) return checkpoint.status();
  model.checkpoint = *std::move(checkpoint);
  const absl::StatusOr<DType> dtype = ChooseDType(options.dtype, model.config, model.checkpoint);
  if (!dtype.ok()) return dtype.status();
  model.dtype = *dtype;
  absl::StatusOr<WeightFormats> formats =
      WeightFormats::Create(options.formats, model.config, model.dtype);
  if (!formats.ok()) return formats.status();
  model.formats = *std::move(formats);
  model.formats.KeepStored(model.checkpoint, model.config);
  const absl::StatusOr<int32_t> max_model_len =
      ChooseMaxModelLen(options.max_model_len, model.config);
  if (!max_model_len.ok()) return max_model_len.status();

  ThreadPool pool(1);
  std::string error;
  const std::unique_ptr<ComputeBackend> backend = MakeCpuBackend(&pool, options.isa, &error);
  if (backend == nullptr) return absl::InvalidArgumentError(error);
  model.kv_bytes_per_block = KvBytesPerBlock(model.config, model.dtype, *backend);
  model.expert_bytes = LargestExpertBytes(model.config, model.formats, *backend);
  const ModelConfig& c = model.config;
  model.info = {.name = BaseName(options.model_dir),
                .architecture = c.architecture,
                .numerics_id = NumericsId(*backend, model),
                .dtype = DTypeName(model.dtype),
                .vocab_size = static_cast<int32_t>(c.vocab_size),
                .max_model_len = *max_model_len,
                .num_layers = static_cast<int32_t>(c.num_layers),
                .num_moe_layers = static_cast<int32_t>(c.num_moe_layers()),
                .num_experts = c.moe.routing.num_experts,
                .top_k = c.moe.routing.top_k,
                .block_size = kKvBlockSize,
                .kv_bytes_per_token = model.kv_bytes_per_block / kKvBlockSize,
                .num_kv_blocks = 0,
                .eos_token_ids = c.eos_token_ids};
  return model;
}

absl::StatusOr<uint64_t> ModelHash(const std::string& model_dir, const OpenedModel& model) {
  const absl::StatusOr<std::string> config =
      ReadSmallFile(absl::StrCat(model_dir, "/config.json"), kMaxConfigBytes);
  if (!config.ok()) return config.status();
  Hash64 hash;
  hash.Text(*config);
  hash.Text(model.formats.name());
  for (const TensorSpec& spec : ModelTensors(model.config)) {
    hash.Text(spec.name);
    for (int64_t dim : spec.shape) hash.Number(static_cast<uint64_t>(dim));
    for (const StoredPart& part : model.checkpoint.Parts(spec.key)) {
      hash.Number(static_cast<uint64_t>(part.dtype));
      hash.Number(part.bytes.size());
      const size_t sample = std::min(part.bytes.size(), kSampleBytes);
      hash.Bytes(part.bytes.subspan((part.bytes.size() - sample) / 2, sample));
    }
  }
  return hash.value();
}

absl::StatusOr<ModelFacts> ReadModelFacts(const ModelFactsOptions& options) {
  absl::StatusOr<OpenedModel> model = OpenModel(options);
  if (!model.ok()) return model.status();
  const absl::StatusOr<uint64_t> hash = ModelHash(options.model_dir, *model);
  if (!hash.ok()) return hash.status();
  return ModelFacts{
      .info = std::move(model->info), .model_hash = *hash, .expert_bytes = model->expert_bytes};
}

}  // namespace switchyard
