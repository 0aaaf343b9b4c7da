#include "comm/routing_trace.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "comm/hash64.h"
#include "kernels/check.h"

namespace switchyard {
namespace {

static_assert(std::endian::native == std::endian::little, "the structs are the file's bytes");

constexpr uint64_t kMagic = 0x534554554f525953;  // "SYROUTES"
constexpr uint32_t kVersion = 1;
constexpr uint32_t kBlockMagic = 0x50455453;  // "STEP"

struct Header {
  uint64_t magic = kMagic;
  uint32_t version = kVersion;
  uint32_t num_layers = 0;
  uint32_t num_experts = 0;
  uint32_t top_k = 0;
  uint32_t weight_bytes = 0;
  uint32_t zero = 0;
  uint64_t checksum = 0;
};
static_assert(sizeof(Header) == 40);
constexpr size_t kHeaderSummed = 32;

struct BlockHeader {
  uint32_t magic = kBlockMagic;
  uint32_t num_runs = 0;
  uint32_t num_rows = 0;
  uint32_t zero = 0;
  uint64_t checksum = 0;
};
static_assert(sizeof(BlockHeader) == 24);
constexpr size_t kBlockSummed = 16;

static_assert(sizeof(RoutingRun) == 16);

size_t IdBytes(const RoutingTraceShape& shape) { return shape.num_experts < 255 ? 1 : 2; }

size_t CopiesPerRow(const RoutingTraceShape& shape) {
  return static_cast<size_t>(shape.num_layers) * static_cast<size_t>(shape.top_k);
}

// At most 2^20 x 16 + 2^20 x 4096 x 256 x 6: no overflow.
uint64_t PayloadBytes(const RoutingTraceShape& shape, uint32_t num_runs, uint32_t num_rows) {
  const uint64_t copies = uint64_t{num_rows} * CopiesPerRow(shape);
  return uint64_t{num_runs} * sizeof(RoutingRun) +
         copies * (IdBytes(shape) + (shape.has_weights ? 4 : 0));
}

uint64_t Checksum(std::span<const std::byte> head, std::span<const std::byte> payload) {
  Hash64 hash;
  hash.Bytes(head);
  hash.Bytes(payload);
  return hash.value();
}

absl::Status SystemError(const char* what, const std::string& path) {
  return absl::UnavailableError(
      absl::StrCat("cannot ", what, " ", path, ": ", std::generic_category().message(errno)));
}

// Unsigned Narrow of -1 is all ones.
template <typename Narrow>
void AppendIds(std::span<const int32_t> ids, std::byte* out) {
  for (size_t i = 0; i < ids.size(); ++i) {
    const auto id = static_cast<Narrow>(ids[i]);
    std::memcpy(out + i * sizeof(Narrow), &id, sizeof(Narrow));
  }
}

}  // namespace

absl::Status CheckRoutingTraceShape(const RoutingTraceShape& shape) {
  if (shape.num_layers >= 1 && shape.num_layers <= 4096 && shape.num_experts >= 1 &&
      shape.num_experts <= 65534 && shape.top_k >= 1 && shape.top_k <= 256) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("a routing trace has 1 to 4096 MoE layers, 1 to 65534 experts and top 1 to 256, "
                   "not ",
                   shape.num_layers, ", ", shape.num_experts, " and ", shape.top_k));
}

absl::StatusOr<std::unique_ptr<RoutingTraceWriter>> RoutingTraceWriter::Create(
    const std::string& path, const RoutingTraceShape& shape) {
  if (absl::Status status = CheckRoutingTraceShape(shape); !status.ok()) return status;
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (file < 0) return SystemError("make", path);
  std::unique_ptr<RoutingTraceWriter> writer(new RoutingTraceWriter(path, shape, file));
  Header header{.num_layers = static_cast<uint32_t>(shape.num_layers),
                .num_experts = static_cast<uint32_t>(shape.num_experts),
                .top_k = static_cast<uint32_t>(shape.top_k),
                .weight_bytes = shape.has_weights ? 4u : 0u};
  header.checksum = Checksum(std::as_bytes(std::span(&header, 1)).first(kHeaderSummed), {});
  writer->buffer_.resize(sizeof(header));
  std::memcpy(writer->buffer_.data(), &header, sizeof(header));
  if (absl::Status status = writer->WriteBuffer(); !status.ok()) return status;
  return writer;
}

RoutingTraceWriter::~RoutingTraceWriter() { Close().IgnoreError(); }

absl::Status RoutingTraceWriter::WriteBuffer() {
  for (size_t at = 0; at < buffer_.size();) {
    const ssize_t wrote = write(file_, buffer_.data() + at, buffer_.size() - at);
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote < 0) return SystemError("write", path_);
    at += static_cast<size_t>(wrote);
  }
  num_bytes_ += static_cast<int64_t>(buffer_.size());
  return absl::OkStatus();
}

absl::Status RoutingTraceWriter::Append(const RoutingStep& step) {
  SY_CHECK(file_ >= 0);
  int64_t num_rows = 0;
  for (const RoutingRun& run : step.runs) num_rows += run.count;
  SY_CHECK(num_rows >= 1 && num_rows <= kMaxRoutingStepRows);
  SY_CHECK_EQ(step.ids.size(), static_cast<size_t>(num_rows) * CopiesPerRow(shape_));
  BlockHeader header{.num_runs = static_cast<uint32_t>(step.runs.size()),
                     .num_rows = static_cast<uint32_t>(num_rows)};
  const size_t id_bytes = IdBytes(shape_);
  buffer_.resize(sizeof(header) + PayloadBytes(shape_, header.num_runs, header.num_rows));
  std::byte* out = buffer_.data() + sizeof(header);
  std::memcpy(out, step.runs.data(), step.runs.size_bytes());
  out += step.runs.size_bytes();
  if (id_bytes == 1) AppendIds<uint8_t>(step.ids, out);
  if (id_bytes == 2) AppendIds<uint16_t>(step.ids, out);
  out += step.ids.size() * id_bytes;
  if (shape_.has_weights) {
    SY_CHECK_EQ(step.weights.size(), step.ids.size());
    std::memcpy(out, step.weights.data(), step.weights.size_bytes());
  }
  header.checksum = Checksum(std::as_bytes(std::span(&header, 1)).first(kBlockSummed),
                             std::span(buffer_).subspan(sizeof(header)));
  std::memcpy(buffer_.data(), &header, sizeof(header));
  return WriteBuffer();
}

absl::Status RoutingTraceWriter::Close() {
  if (file_ < 0) return absl::OkStatus();
  if (close(std::exchange(file_, -1)) != 0) return SystemError("close", path_);
  return absl::OkStatus();
}

namespace {

// One row of one block, by where it stands.
struct FoundRow {
  RoutingTrace::Row row;
  const std::byte* ids = nullptr;  // of the block, [num_layers, num_rows, top_k]
  uint32_t num_rows = 0;           // of the block
  uint32_t index = 0;              // in the block
};

class Parser {
 public:
  Parser(std::span<const std::byte> bytes, const std::string& name) : bytes_(bytes), name_(name) {}

  absl::StatusOr<RoutingTrace> Parse() {
    if (absl::Status status = ReadHeader(); !status.ok()) return status;
    while (at_ < bytes_.size()) {
      const absl::StatusOr<bool> whole = ReadBlock();
      if (!whole.ok()) return whole.status();
      if (!*whole) break;
    }
    trace_.num_unread_bytes = static_cast<int64_t>(bytes_.size() - at_);
    KeepLast();
    Fill();
    return std::move(trace_);
  }

 private:
  template <typename... T>
  absl::Status Error(const T&... message) const {
    return absl::DataLossError(absl::StrCat(name_, ": ", message...));
  }

  absl::Status ReadHeader() {
    Header header;
    if (bytes_.size() < sizeof(header)) {
      return Error(bytes_.size(), " bytes are no routing trace, whose header has ", sizeof(header));
    }
    std::memcpy(&header, bytes_.data(), sizeof(header));
    if (header.magic != kMagic) return Error("not a routing trace");
    if (header.version != kVersion) {
      return Error("version ", header.version, " of routing traces, this reads ", kVersion);
    }
    const uint64_t checksum = Checksum(bytes_.first(kHeaderSummed), {});
    if (header.checksum != checksum) {
      return Error("the header's checksum is ", absl::Hex(header.checksum), ", of its bytes ",
                   absl::Hex(checksum));
    }
    RoutingTraceShape& shape = trace_.shape;
    const auto number = [](uint32_t value) {
      return static_cast<int32_t>(std::min<uint32_t>(value, INT32_MAX));
    };
    shape = {.num_layers = number(header.num_layers),
             .num_experts = number(header.num_experts),
             .top_k = number(header.top_k),
             .has_weights = header.weight_bytes != 0};
    if (absl::Status status = CheckRoutingTraceShape(shape); !status.ok()) {
      return Error(std::string(status.message()));
    }
    if ((header.weight_bytes != 0 && header.weight_bytes != 4) || header.zero != 0) {
      return Error("weights of ", header.weight_bytes, " bytes, not 0 or 4, and a ", header.zero,
                   " that must be 0");
    }
    at_ = sizeof(header);
    return absl::OkStatus();
  }

  // False: the file ends inside the block.
  absl::StatusOr<bool> ReadBlock() {
    BlockHeader header;
    if (bytes_.size() - at_ < sizeof(header)) return false;
    std::memcpy(&header, bytes_.data() + at_, sizeof(header));
    if (header.magic != kBlockMagic || header.zero != 0) {
      return Error("no block at byte ", at_, ": ", absl::Hex(header.magic));
    }
    if (header.num_rows < 1 || header.num_rows > uint32_t{kMaxRoutingStepRows} ||
        header.num_runs < 1 || header.num_runs > header.num_rows) {
      return Error("the block at byte ", at_, " has ", header.num_runs, " runs of ",
                   header.num_rows, " rows in all, not 1 to ", kMaxRoutingStepRows);
    }
    const uint64_t bytes = PayloadBytes(trace_.shape, header.num_runs, header.num_rows);
    if (bytes_.size() - at_ - sizeof(header) < bytes) return false;
    const auto payload = bytes_.subspan(at_ + sizeof(header), bytes);
    const uint64_t checksum = Checksum(bytes_.subspan(at_, kBlockSummed), payload);
    if (checksum != header.checksum) {
      return Error("the checksum of the block at byte ", at_, " is ", absl::Hex(header.checksum),
                   ", of its ", bytes, " bytes ", absl::Hex(checksum));
    }
    if (absl::Status status = AddRows(header, payload); !status.ok()) return status;
    at_ += sizeof(header) + bytes;
    return true;
  }

  absl::Status AddRows(const BlockHeader& header, std::span<const std::byte> payload) {
    const std::byte* ids = payload.data() + header.num_runs * sizeof(RoutingRun);
    uint32_t index = 0;
    for (uint32_t r = 0; r < header.num_runs; ++r) {
      RoutingRun run;
      std::memcpy(&run, payload.data() + r * sizeof(run), sizeof(run));
      if (run.position < 0 || run.count < 1 || run.position > INT32_MAX - run.count ||
          static_cast<uint32_t>(run.count) > header.num_rows - index) {
        return Error("the block at byte ", at_, ": run ", r, " has ", run.count,
                     " rows from position ", run.position, " on, ", header.num_rows - index,
                     " are left");
      }
      for (int32_t i = 0; i < run.count; ++i, ++index) {
        found_.push_back({{run.sequence, run.position + i}, ids, header.num_rows, index});
      }
    }
    if (index != header.num_rows) {
      return Error("the block at byte ", at_, ": runs of ", index, " rows, not ", header.num_rows);
    }
    const size_t copies = header.num_rows * trace_.row_ids();
    for (size_t i = 0; i < copies; ++i) {
      const uint16_t id = Id(ids, i);
      if (id >= trace_.shape.num_experts && id != RoutingTrace::kNoExpert) {
        return Error("the block at byte ", at_, ": expert ", id, " of ", trace_.shape.num_experts);
      }
    }
    return absl::OkStatus();
  }

  uint16_t Id(const std::byte* ids, size_t i) const {
    if (IdBytes(trace_.shape) == 1) {
      const auto id = std::to_integer<uint8_t>(ids[i]);
      return id == 0xff ? RoutingTrace::kNoExpert : id;
    }
    uint16_t id;
    std::memcpy(&id, ids + 2 * i, 2);
    return id;
  }

  // In order; of equal rows the one that came last.
  void KeepLast() {
    const auto key = [](const FoundRow& f) { return std::pair(f.row.sequence, f.row.position); };
    std::ranges::stable_sort(found_, {}, key);
    size_t kept = 0;
    for (size_t i = 0; i < found_.size(); ++i) {
      if (i + 1 < found_.size() && found_[i].row == found_[i + 1].row) continue;
      found_[kept++] = found_[i];
    }
    trace_.num_replaced = static_cast<int64_t>(found_.size() - kept);
    found_.resize(kept);
  }

  void Fill() {
    const RoutingTraceShape& shape = trace_.shape;
    const size_t id_bytes = IdBytes(shape), top_k = static_cast<size_t>(shape.top_k);
    trace_.rows.reserve(found_.size());
    trace_.ids.reserve(found_.size() * trace_.row_ids());
    if (shape.has_weights) trace_.weights.reserve(found_.size() * trace_.row_ids());
    for (const FoundRow& f : found_) {
      trace_.rows.push_back(f.row);
      const std::byte* weights = f.ids + f.num_rows * trace_.row_ids() * id_bytes;
      for (size_t layer = 0; layer < static_cast<size_t>(shape.num_layers); ++layer) {
        const size_t first = (layer * f.num_rows + f.index) * top_k;
        for (size_t j = 0; j < top_k; ++j) trace_.ids.push_back(Id(f.ids, first + j));
        if (!shape.has_weights) continue;
        const size_t end = trace_.weights.size();
        trace_.weights.resize(end + top_k);
        std::memcpy(trace_.weights.data() + end, weights + 4 * first, 4 * top_k);
      }
    }
  }

  const std::span<const std::byte> bytes_;
  const std::string& name_;
  size_t at_ = 0;
  std::vector<FoundRow> found_;
  RoutingTrace trace_;
};

}  // namespace

absl::StatusOr<RoutingTrace> ParseRoutingTrace(std::span<const std::byte> bytes,
                                               const std::string& name) {
  return Parser(bytes, name).Parse();
}

absl::StatusOr<RoutingTrace> ReadRoutingTrace(const std::string& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error))  // a folder can be opened, but not read
    return absl::NotFoundError(absl::StrCat("'", path, "' is not a file"));
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) return absl::NotFoundError(absl::StrCat("cannot read '", path, "'"));
  const std::streamoff size = file.tellg();
  std::vector<char> bytes(static_cast<size_t>(std::max<std::streamoff>(size, 0)));
  file.seekg(0);
  if (!file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()))) {
    return absl::UnavailableError(absl::StrCat("cannot read '", path, "' of ", size, " bytes"));
  }
  return ParseRoutingTrace(std::as_bytes(std::span(bytes)), path);
}

std::vector<size_t> RoutingTrace::SequenceBegins() const {
  std::vector<size_t> begins;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (i == 0 || rows[i].sequence != rows[i - 1].sequence) begins.push_back(i);
  }
  begins.push_back(rows.size());
  return begins;
}

std::vector<RoutingLayerLoad> RoutingLayerLoads(const RoutingTrace& trace) {
  std::vector<RoutingLayerLoad> loads;
  std::vector<int64_t> copies;
  for (int32_t layer = 0; layer < trace.shape.num_layers; ++layer) {
    copies.assign(static_cast<size_t>(trace.shape.num_experts), 0);
    RoutingLayerLoad& load = loads.emplace_back();
    for (size_t row = 0; row < trace.rows.size(); ++row) {
      for (uint16_t expert : trace.Experts(row, layer)) {
        if (expert == RoutingTrace::kNoExpert) continue;
        ++load.copies;
        load.distinct_experts += copies[expert]++ == 0;
      }
    }
    if (load.copies == 0) continue;
    load.max_mean = static_cast<double>(std::ranges::max(copies)) * trace.shape.num_experts /
                    static_cast<double>(load.copies);
  }
  return loads;
}

}  // namespace switchyard
