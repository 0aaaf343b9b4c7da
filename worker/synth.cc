#include "worker/synth.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "kernels/tensor.h"
#include "kernels/thread_pool.h"
#include "nlohmann/json.hpp"
#include "worker/model_config.h"
#include "worker/model_tensors.h"
#include "worker/synth_tokenizer.h"

namespace switchyard {
namespace {

using nlohmann::json;

constexpr int64_t kChunkElements = 1 << 20;
constexpr int64_t kChunksInFlight = 16;  // elements in memory: 16 Mi
constexpr int64_t kMaxConfigBytes = 16 << 20;

uint64_t Mix(uint64_t x) {  // splitmix64's finaliser
  x ^= x >> 30;
  x *= 0xbf58476d1ce4e5b9u;
  x ^= x >> 27;
  x *= 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// A bell-shaped number of variance 1: the sum of four uniform ones.
float Bell(uint64_t bits) {
  const uint64_t sum =
      (bits & 0xffff) + ((bits >> 16) & 0xffff) + ((bits >> 32) & 0xffff) + (bits >> 48);
  return (static_cast<float>(sum) - 131070.0f) *
         (1.0f / 37837.2f);  // 4 uniforms: sigma = 65536 * sqrt(4 / 12)
}

// Scales that keep activations near one through all layers, give the router and the last layer
// logits of a few units, and so make routing and text varied.
float StandardDeviation(const TensorSpec& spec, const ModelConfig& config) {
  const double fan_in = static_cast<double>(spec.shape.back());
  const double layers = static_cast<double>(config.num_layers);
  switch (spec.key.role) {
    case TensorRole::kEmbedding:
      return static_cast<float>(config.tie_word_embeddings ? 2.0 / std::sqrt(fan_in) : 1.0);
    case TensorRole::kLmHead:
    case TensorRole::kRouter:
      return static_cast<float>(2.0 / std::sqrt(fan_in));
    case TensorRole::kOutput:
    case TensorRole::kDenseDown:
    case TensorRole::kExpertDown:
    case TensorRole::kSharedDown:
      return static_cast<float>(1.0 / std::sqrt(fan_in * 2.0 * layers));
    default:
      return static_cast<float>(IsBiasRole(spec.key.role) ? 0.1 : 1.0 / std::sqrt(fan_in));
  }
}

// Fills elements [begin, end) of a tensor into `out`, row-major, in `dtype`.
struct TensorFiller {
  uint64_t key = 0;  // of the tensor
  float scale = 0.0f;
  bool is_norm = false;
  DType dtype = DType::kF32;

  void Fill(int64_t begin, int64_t end, std::byte* out) const {
    for (int64_t i = begin; i < end; ++i) {
      const float value =
          is_norm ? 1.0f
                  : scale * Bell(Mix(key + 0x9e3779b97f4a7c15u * static_cast<uint64_t>(i + 1)));
      if (dtype == DType::kF32) {
        std::memcpy(out, &value, 4);
      } else {
        const bf16 half = ToBF16(value);
        std::memcpy(out, &half, 2);
      }
      out += DTypeSize(dtype);
    }
  }
};

// A file that reports the first failed write with its path and the system's reason.
class OutputFile {
 public:
  explicit OutputFile(std::string path)
      : path_(std::move(path)), file_(std::fopen(path_.c_str(), "wb")) {}
  ~OutputFile() {
    if (file_ != nullptr) std::fclose(file_);
  }
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  absl::Status Write(const void* data, size_t bytes) {
    if (file_ == nullptr || std::fwrite(data, 1, bytes, file_) != bytes) return Error();
    return absl::OkStatus();
  }
  absl::Status Close() {
    std::FILE* file = file_;
    file_ = nullptr;
    return file == nullptr || std::fclose(file) != 0 ? Error() : absl::OkStatus();
  }

 private:
  absl::Status Error() const {
    return absl::ResourceExhaustedError(
        absl::StrCat("cannot write ", path_, ": ", std::strerror(errno)));
  }

  const std::string path_;
  std::FILE* file_;
};

absl::Status WriteText(const std::string& path, const std::string& text) {
  OutputFile file(path);
  if (absl::Status status = file.Write(text.data(), text.size()); !status.ok()) return status;
  return file.Close();
}

struct Shard {
  std::string name;
  std::vector<size_t> tensors;  // indices into the list of specs
};

// Writes the tensors of one model.
class Writer {
 public:
  Writer(const SynthOptions& options, const ModelConfig& config, DType dtype)
      : options_(options),
        config_(config),
        dtype_(dtype),
        specs_(ModelTensors(config)),
        pool_(Threads(options)) {
    for (const TensorSpec& spec : specs_) total_bytes_ += Bytes(spec);
  }

  int64_t total_bytes() const { return total_bytes_; }

  absl::Status WriteAll() {
    const std::vector<Shard> shards = MakeShards();
    for (const Shard& shard : shards) {
      if (absl::Status status = WriteShard(shard); !status.ok()) return status;
    }
    return shards.size() > 1 ? WriteIndex(shards) : absl::OkStatus();
  }

 private:
  static int Threads(const SynthOptions& options) {
    return options.threads > 0 ? options.threads
                               : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  }
  int64_t Bytes(const TensorSpec& spec) const {
    return spec.numel() * static_cast<int64_t>(DTypeSize(dtype_));
  }

  std::vector<Shard> MakeShards() const {
    std::vector<Shard> shards(1);
    int64_t bytes = 0;
    for (size_t i = 0; i < specs_.size(); ++i) {
      if (!shards.back().tensors.empty() && bytes + Bytes(specs_[i]) > options_.max_file_bytes) {
        shards.emplace_back();
        bytes = 0;
      }
      shards.back().tensors.push_back(i);
      bytes += Bytes(specs_[i]);
    }
    for (size_t i = 0; i < shards.size(); ++i) {
      shards[i].name = shards.size() == 1 ? "model.safetensors"
                                          : absl::StrFormat("model-%05d-of-%05d.safetensors", i + 1,
                                                            shards.size());
    }
    return shards;
  }

  absl::Status WriteShard(const Shard& shard) {
    json header = {{"__metadata__", {{"format", "pt"}}}};
    int64_t offset = 0;
    for (size_t i : shard.tensors) {
      const TensorSpec& spec = specs_[i];
      header[spec.name] = {{"dtype", dtype_ == DType::kF32 ? "F32" : "BF16"},
                           {"shape", spec.shape},
                           {"data_offsets", {offset, offset + Bytes(spec)}}};
      offset += Bytes(spec);
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');  // the data starts aligned
    const uint64_t length = text.size();
    OutputFile file(absl::StrCat(options_.out_dir, "/", shard.name));
    if (absl::Status status = file.Write(&length, 8); !status.ok()) return status;
    if (absl::Status status = file.Write(text.data(), text.size()); !status.ok()) return status;
    for (size_t i : shard.tensors) {
      if (absl::Status status = WriteTensor(i, &file); !status.ok()) return status;
    }
    return file.Close();
  }

  absl::Status WriteTensor(size_t index, OutputFile* file) {
    const TensorSpec& spec = specs_[index];
    const TensorFiller filler{.key = Mix(options_.seed ^ Mix(index + 1)),
                              .scale = StandardDeviation(spec, config_),
                              .is_norm = IsNormRole(spec.key.role),
                              .dtype = dtype_};
    const int64_t size = static_cast<int64_t>(DTypeSize(dtype_));
    for (int64_t begin = 0; begin < spec.numel(); begin += kChunksInFlight * kChunkElements) {
      const int64_t end = std::min(spec.numel(), begin + kChunksInFlight * kChunkElements);
      buffer_.resize(static_cast<size_t>((end - begin) * size));
      pool_.ParallelFor((end - begin + kChunkElements - 1) / kChunkElements, [&](int64_t chunk) {
        const int64_t first = begin + chunk * kChunkElements;
        filler.Fill(first, std::min(end, first + kChunkElements),
                    buffer_.data() + (first - begin) * size);
      });
      if (absl::Status status = file->Write(buffer_.data(), buffer_.size()); !status.ok())
        return status;
      done_bytes_ += static_cast<int64_t>(buffer_.size());
      if (options_.progress) options_.progress(done_bytes_, total_bytes_);
    }
    return absl::OkStatus();
  }

  absl::Status WriteIndex(const std::vector<Shard>& shards) const {
    json index = {{"metadata", {{"total_size", total_bytes_}}}, {"weight_map", json::object()}};
    for (const Shard& shard : shards) {
      for (size_t i : shard.tensors) index["weight_map"][specs_[i].name] = shard.name;
    }
    return WriteText(options_.out_dir + "/model.safetensors.index.json", index.dump(1) + "\n");
  }

  const SynthOptions& options_;
  const ModelConfig& config_;
  const DType dtype_;
  const std::vector<TensorSpec> specs_;
  ThreadPool pool_;
  std::vector<std::byte> buffer_;
  int64_t total_bytes_ = 0;
  int64_t done_bytes_ = 0;
};

absl::Status PrepareFolder(const std::string& dir, int64_t bytes) {
  std::error_code error;
  if (std::filesystem::exists(dir + "/config.json", error)) {
    return absl::AlreadyExistsError(absl::StrCat(dir, " already holds a checkpoint (config.json)"));
  }
  std::filesystem::create_directories(dir, error);
  if (error)
    return absl::InvalidArgumentError(absl::StrCat("cannot create ", dir, ": ", error.message()));
  const std::filesystem::space_info space = std::filesystem::space(dir, error);
  if (!error && space.available < static_cast<uintmax_t>(bytes)) {
    return absl::ResourceExhaustedError(absl::StrCat(dir, ": the checkpoint takes ", bytes,
                                                     " bytes but the disk has ", space.available,
                                                     " left"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status Synthesize(const SynthOptions& options) {
  const absl::StatusOr<std::string> text = ReadSmallFile(options.config_path, kMaxConfigBytes);
  if (!text.ok()) return text.status();
  ConfigReport report;
  const ModelConfig config = ParseModelConfig(*text, &report);
  if (!report.refusals.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(options.config_path, ": ", absl::StrJoin(report.refusals, "; ")));
  }
  if (config.vocab_size < kSynthVocabSize) {
    return absl::InvalidArgumentError(
        absl::StrCat(options.config_path, ": vocab_size = ", config.vocab_size,
                     " is less than the ", kSynthVocabSize, " tokens of the byte-level tokenizer"));
  }
  DType dtype = config.dtype;
  if (options.dtype != "auto") {
    const absl::StatusOr<DType> parsed = ParseDType(options.dtype);
    if (!parsed.ok()) return parsed.status();
    dtype = *parsed;
  }
  Writer writer(options, config, dtype);
  if (absl::Status status = PrepareFolder(options.out_dir, writer.total_bytes()); !status.ok())
    return status;
  if (absl::Status status = writer.WriteAll(); !status.ok()) return status;

  json written = json::parse(*text, nullptr, /*allow_exceptions=*/false);
  written.erase("dtype");
  written["torch_dtype"] = DTypeName(dtype);
  written["bos_token_id"] = nullptr;
  written["eos_token_id"] = kSynthTurnEnd;
  written["pad_token_id"] = kSynthEndOfText;
  const std::vector<std::pair<std::string, std::string>> files = {
      {"tokenizer.json", SynthTokenizerJson()},
      {"tokenizer_config.json", SynthTokenizerConfigJson(config.max_position)},
      {"generation_config.json", SynthGenerationConfigJson()},
      {"config.json", written.dump(1, ' ', false, json::error_handler_t::replace) + "\n"}};
  for (const auto& [name, content] : files) {
    if (absl::Status status = WriteText(absl::StrCat(options.out_dir, "/", name), content);
        !status.ok())
      return status;
  }
  return absl::OkStatus();
}

}  // namespace switchyard
