#include "video/contents.h"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <string_view>

#include <fmt/format.h>

#include "io/video_file.h"
#include "sla2/error.h"
#include "video/latents.h"

namespace sla2::video {

namespace fs = std::filesystem;

namespace {

constexpr std::uintmax_t kWholeBytes = std::uintmax_t{64} << 20;
constexpr std::size_t kSampleBytes = std::size_t{256} << 10;
constexpr std::uintmax_t kSamples = 64;

/// FNV-1a over 64-bit words: a check against a mistake, not against an attack.
class Hash {
 public:
  void add(std::string_view bytes) {
    std::size_t i = 0;
    for (; i + sizeof(std::uint64_t) <= bytes.size(); i += sizeof(std::uint64_t)) {
      std::uint64_t word = 0;
      std::copy_n(bytes.data() + i, sizeof(word), reinterpret_cast<char*>(&word));
      mix(word);
    }
    for (; i < bytes.size(); ++i) mix(static_cast<unsigned char>(bytes[i]));
    mix(bytes.size());
  }
  [[nodiscard]] std::uint64_t value() const { return state_ ^ (state_ >> 29); }

 private:
  void mix(std::uint64_t word) {
    state_ = (state_ ^ word) * 0x100000001b3ULL;
    state_ ^= state_ >> 32;
  }
  std::uint64_t state_ = 0xcbf29ce484222325ULL;
};

void add_file(const fs::path& path, Hash& hash) {
  std::ifstream file(path, std::ios::binary);
  std::error_code failed;
  const std::uintmax_t size = fs::file_size(path, failed);
  if (!file || failed) throw Error(ErrorKind::kRuntime, path.string() + ": cannot be read");
  std::string buffer(kSampleBytes, '\0');
  const auto read_at = [&](std::uintmax_t offset) {
    file.seekg(static_cast<std::streamoff>(offset));
    const auto wanted = std::min<std::uintmax_t>(kSampleBytes, size - offset);
    if (!file.read(buffer.data(), static_cast<std::streamsize>(wanted))) {
      throw Error(ErrorKind::kRuntime, path.string() + ": cannot be read");
    }
    hash.add(std::string_view(buffer).substr(0, wanted));
  };
  hash.add(path.filename().string());
  hash.add(std::to_string(size));
  if (size <= kWholeBytes) {
    for (std::uintmax_t offset = 0; offset < size; offset += kSampleBytes) read_at(offset);
  } else {
    for (std::uintmax_t i = 0; i < kSamples; ++i) {
      read_at((size - kSampleBytes) / (kSamples - 1) * i);
    }
    read_at(size - kSampleBytes);
  }
}

std::string contents_of(std::vector<fs::path> files) {
  if (files.empty()) return {};
  std::sort(files.begin(), files.end(), [](const fs::path& a, const fs::path& b) {
    return std::pair(a.filename(), a) < std::pair(b.filename(), b);
  });
  Hash hash;
  for (const fs::path& file : files) add_file(file, hash);
  return fmt::format("{} file{}, {:016x}", files.size(), files.size() == 1 ? "" : "s",
                     hash.value());
}

void list_model(const fs::path& folder, std::vector<fs::path>& files) {
  std::error_code failed;
  for (fs::directory_iterator entry(folder, failed), end; !failed && entry != end;
       entry.increment(failed)) {
    const std::string name = entry->path().filename().string();
    const bool weights = entry->path().extension() == ".safetensors" &&
                         name != "checkpoint.safetensors" && name != "sla2.safetensors";
    const bool text = name == "config.json" || name == "model_card.json";
    if (weights || text) files.push_back(entry->path());
  }
}

}  // namespace

std::string contents_of_model(const fs::path& folder) {
  std::vector<fs::path> files;
  list_model(folder, files);
  return contents_of(std::move(files));
}

std::string contents_of_sla2(const fs::path& folder) {
  if (folder.empty()) return {};
  std::vector<fs::path> files{folder / "sla2.json", folder / "sla2.safetensors"};
  list_model(folder / "transformer", files);
  return contents_of(std::move(files));
}

std::string contents_of_data(const std::vector<fs::path>& inputs) {
  std::vector<fs::path> files, others;
  for (const fs::path& input : inputs) {
    const std::vector<fs::path> found = list_latents(input);
    if (found.empty()) others.push_back(input);
    files.insert(files.end(), found.begin(), found.end());
  }
  if (!others.empty()) {
    const std::vector<fs::path> videos = io::list_videos(others);
    files.insert(files.end(), videos.begin(), videos.end());
  }
  return contents_of(std::move(files));
}

}  // namespace sla2::video
