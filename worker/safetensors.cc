#include "worker/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "nlohmann/json.hpp"
#include "worker/json_fields.h"

namespace switchyard {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr int64_t kMaxRank = 8;

absl::Status Bad(const std::string& file, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat(file, ": ", what));
}

StoredDType DTypeFromName(const std::string& name) {
  if (name == "F32") return StoredDType::kF32;
  if (name == "BF16") return StoredDType::kBF16;
  if (name == "F16") return StoredDType::kF16;
  if (name == "F8_E4M3") return StoredDType::kF8E4M3;
  if (name == "F8_E8M0") return StoredDType::kF8E8M0;
  if (name == "I8") return StoredDType::kI8;
  if (name == "U8") return StoredDType::kU8;
  if (name == "I32") return StoredDType::kI32;
  if (name == "I64") return StoredDType::kI64;
  return StoredDType::kOther;
}

bool IsU64(const json& value) { return value.is_number_unsigned(); }

// Fills `out` from one header entry; `data_begin` is where the file's data starts.
absl::Status ParseEntry(const std::string& file, const std::string& name, const json& entry,
                        uint64_t data_begin, uint64_t file_size, StoredTensor* out) {
  const std::string what = absl::StrCat("tensor ", Shown(json(name)));
  if (!entry.is_object() || !entry.contains("dtype") || !entry["dtype"].is_string() ||
      !entry.contains("shape") || !entry["shape"].is_array() || !entry.contains("data_offsets") ||
      !entry["data_offsets"].is_array() || entry["data_offsets"].size() != 2) {
    return Bad(file, absl::StrCat(what, " lacks dtype, shape or data_offsets"));
  }
  const json& offsets = entry["data_offsets"];
  if (!IsU64(offsets[0]) || !IsU64(offsets[1]))
    return Bad(file, absl::StrCat(what, " has bad data_offsets"));
  const uint64_t begin = offsets[0].get<uint64_t>();
  const uint64_t end = offsets[1].get<uint64_t>();
  const uint64_t data_size = file_size - data_begin;
  if (begin > end || end > data_size) {
    return Bad(file, absl::StrCat(what, " lies at [", begin, ", ", end, ") of ", data_size,
                                  " data bytes: the file is truncated or corrupt"));
  }
  out->dtype_name = entry["dtype"].get<std::string>();
  out->dtype = DTypeFromName(out->dtype_name);
  out->begin = data_begin + begin;
  out->end = data_begin + end;
  if (entry["shape"].size() > kMaxRank)
    return Bad(file, absl::StrCat(what, " has more than ", kMaxRank, " dimensions"));
  unsigned __int128 elements = 1;
  for (const json& dim : entry["shape"]) {
    if (!IsU64(dim) || dim.get<uint64_t>() > (uint64_t{1} << 48)) {
      return Bad(file, absl::StrCat(what, " has a bad shape ", Shown(entry["shape"])));
    }
    out->shape.push_back(static_cast<int64_t>(dim.get<uint64_t>()));
    elements *= dim.get<uint64_t>();
    if (elements > (uint64_t{1} << 60))
      return Bad(file, absl::StrCat(what, " is too large: shape ", Shown(entry["shape"])));
  }
  if (out->dtype == StoredDType::kOther) return absl::OkStatus();
  const uint64_t expected = static_cast<uint64_t>(elements) * StoredDTypeSize(out->dtype);
  if (expected != end - begin) {
    return Bad(file, absl::StrCat(what, " of ", out->dtype_name, " ", Shown(entry["shape"]),
                                  " needs ", expected, " bytes but has ", end - begin));
  }
  return absl::OkStatus();
}

absl::Status CheckOverlaps(const std::string& file, const StoredTensors& tensors) {
  std::vector<const StoredTensors::value_type*> order;
  for (const auto& entry : tensors) {
    if (entry.second.begin != entry.second.end) order.push_back(&entry);
  }
  std::sort(order.begin(), order.end(),
            [](auto* a, auto* b) { return a->second.begin < b->second.begin; });
  for (size_t i = 1; i < order.size(); ++i) {
    if (order[i]->second.begin < order[i - 1]->second.end) {
      return Bad(file, absl::StrCat("tensors ", Shown(json(order[i - 1]->first)), " and ",
                                    Shown(json(order[i]->first)), " overlap"));
    }
  }
  return absl::OkStatus();
}

// Deep nesting is refused while parsing, before it is built.
json ParseShallow(const char* text, size_t size) {
  bool too_deep = false;
  const auto limit_depth = [&](int depth, json::parse_event_t, json&) {
    too_deep = too_deep || depth > 4;
    return depth <= 4;
  };
  json header = json::parse(text, text + size, limit_depth, /*allow_exceptions=*/false);
  return too_deep ? json(json::value_t::discarded) : header;
}

}  // namespace

size_t StoredDTypeSize(StoredDType dtype) {
  switch (dtype) {
    case StoredDType::kI64:
      return 8;
    case StoredDType::kF32:
    case StoredDType::kI32:
      return 4;
    case StoredDType::kBF16:
    case StoredDType::kF16:
      return 2;
    case StoredDType::kF8E4M3:
    case StoredDType::kF8E8M0:
    case StoredDType::kI8:
    case StoredDType::kU8:
      return 1;
    case StoredDType::kOther:
      break;
  }
  SY_CHECK(false);
}

bool IsPlainFloat(StoredDType dtype) {
  return dtype == StoredDType::kF32 || dtype == StoredDType::kBF16 || dtype == StoredDType::kF16;
}

absl::StatusOr<StoredTensors> ParseSafetensorsHeader(std::span<const std::byte> head,
                                                     uint64_t file_size, const std::string& name) {
  if (file_size < 8 || head.size() < 8) {
    return Bad(name, absl::StrCat("has ", file_size, " bytes, too short for a safetensors file"));
  }
  uint64_t length = 0;
  for (size_t i = 0; i < 8; ++i) length |= static_cast<uint64_t>(head[i]) << (8 * i);
  if (length > kMaxHeaderBytes) {
    return Bad(name,
               absl::StrCat("states a header of ", length, " bytes, more than ", kMaxHeaderBytes));
  }
  if (length > file_size - 8 || length > head.size() - 8) {
    return Bad(name, absl::StrCat("states a header of ", length, " bytes but the file has ",
                                  file_size, ": it is truncated or not a safetensors file"));
  }
  const json header =
      ParseShallow(reinterpret_cast<const char*>(head.data()) + 8, static_cast<size_t>(length));
  if (header.is_discarded() || !header.is_object())
    return Bad(name, "the header is not a JSON object");

  StoredTensors tensors;
  for (const auto& [key, entry] : header.items()) {
    if (key == "__metadata__") continue;
    absl::Status status = ParseEntry(name, key, entry, 8 + length, file_size, &tensors[key]);
    if (!status.ok()) return status;
  }
  absl::Status status = CheckOverlaps(name, tensors);
  if (!status.ok()) return status;
  return tensors;
}

absl::StatusOr<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Open(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0)
    return absl::NotFoundError(absl::StrCat("cannot open ", path, ": ", std::strerror(errno)));
  struct stat info {};
  if (::fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    ::close(fd);
    return absl::NotFoundError(absl::StrCat(path, " is not a regular file"));
  }
  const uint64_t size = static_cast<uint64_t>(info.st_size);
  if (size < 8) {
    ::close(fd);
    return Bad(path, absl::StrCat("has ", size, " bytes, too short for a safetensors file"));
  }
  void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
  const int map_error = errno;
  ::close(fd);
  if (data == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat("cannot map ", path, ": ", std::strerror(map_error)));
  }
  // The constructor is private, so make_unique cannot reach it.
  std::unique_ptr<SafetensorsFile> file(
      new SafetensorsFile(static_cast<const std::byte*>(data), size));
  absl::StatusOr<StoredTensors> tensors = ParseSafetensorsHeader({file->data_, size}, size, path);
  if (!tensors.ok()) return tensors.status();
  file->tensors_ = *std::move(tensors);
  return file;
}

SafetensorsFile::~SafetensorsFile() { ::munmap(const_cast<std::byte*>(data_), size_); }

void SafetensorsFile::Release(std::span<const std::byte> bytes) const {
  const uint64_t page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  const uint64_t begin = static_cast<uint64_t>(bytes.data() - data_);
  const uint64_t first =
      (begin + page - 1) / page * page;  // whole pages only: the edges belong to neighbours too
  const uint64_t last = (begin + bytes.size()) / page * page;
  if (last > first) ::madvise(const_cast<std::byte*>(data_) + first, last - first, MADV_DONTNEED);
}

}  // namespace switchyard
