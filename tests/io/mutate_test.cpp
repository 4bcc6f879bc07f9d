// Damaged input: an error or the right result, never a crash, a hang or another exception.
#include "tests/io/mutate.h"

#include <chrono>
#include <cstring>
#include <memory>
#include <numeric>

#include "io/config_json.h"
#include "io/files.h"
#include "io/safetensors.h"
#include "io/video_file.h"
#include "tests/io/helpers.h"

namespace sla2::io {
namespace {
using test::Mutator;

constexpr int kCases = 10'000;

struct Tally {
  int accepted = 0, refused = 0;
  std::chrono::duration<double> slowest{0};

  /// Runs one case; anything thrown but sla2::Error ends the test.
  template <typename Case>
  void run(const Case& one) {
    const auto begin = std::chrono::steady_clock::now();
    try {
      one();
      ++accepted;
    } catch (const Error& error) {
      EXPECT_GT(std::strlen(error.what()), 0U);
      ++refused;
    }
    slowest =
        std::max(slowest, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin));
  }
  void check(double limit_seconds) const {
    std::cout << accepted << " accepted, " << refused << " refused, slowest " << slowest.count()
              << " s" << std::endl;
    EXPECT_GT(accepted, 0);
    EXPECT_GT(refused, 0);
    EXPECT_LT(slowest.count(), limit_seconds);
  }
};

const std::string kHeader =
    R"({"__metadata__":{"format":"pt"},"blocks.0.attn1.proj_q":{"dtype":"F32","shape":[2,3],)"
    R"("data_offsets":[0,24]},"blocks.0.attn1.alpha_logit":{"dtype":"BF16","shape":[4,1],)"
    R"("data_offsets":[24,32]},"empty":{"dtype":"I64","shape":[0],"data_offsets":[32,32]},)"
    R"("mask":{"dtype":"BOOL","shape":[],"data_offsets":[32,33]}})";

std::string with_length(const std::string& header, const std::string& data) {
  const std::uint64_t length = header.size();
  std::string bytes(sizeof(length), '\0');
  std::memcpy(bytes.data(), &length, sizeof(length));
  return bytes + header + data;
}

// What holds for whatever was accepted: every byte of data belongs to exactly one tensor.
void check_safetensors(const std::string& text) {
  // A block of exactly this size: the sanitizer sees the first byte read behind it.
  const auto copy = std::make_unique<std::byte[]>(text.size());
  std::memcpy(copy.get(), text.data(), text.size());
  const SafetensorsFile file({copy.get(), text.size()}, "mutated");
  std::uint64_t header = 0;
  std::memcpy(&header, copy.get(), sizeof(header));
  std::size_t total = 0;
  unsigned sum = 0;
  for (const auto& [name, entry] : file.tensors()) {
    std::size_t bytes = bytes_of(entry.type);
    for (const std::int64_t size : entry.shape) bytes *= static_cast<std::size_t>(size);
    EXPECT_EQ(bytes, entry.data.size()) << name;
    total += bytes;
    for (const std::byte byte : entry.data) sum += std::to_integer<unsigned>(byte);
  }
  EXPECT_EQ(total, text.size() - sizeof(header) - header);
  const auto data = std::span(copy.get(), text.size()).subspan(sizeof(header) + header);
  const unsigned expected =
      std::accumulate(data.begin(), data.end(), 0U,
                      [](unsigned a, std::byte b) { return a + std::to_integer<unsigned>(b); });
  EXPECT_EQ(sum, expected);
}

TEST(IoMutate, Safetensors) {
  Mutator mutator(test::fuzz_seed());
  std::string data(33, '\0');
  std::iota(data.begin(), data.end(), '\1');
  const std::string whole = with_length(kHeader, data);
  ASSERT_NO_THROW(check_safetensors(whole));
  Tally tally;
  for (int i = 0; i < kCases && !testing::Test::HasFailure(); ++i) {
    // With the length put right the damage reaches the header's rules instead of the length's.
    const std::string damaged =
        i % 3 == 0 ? mutator.bytes(whole) : with_length(mutator.json(kHeader), data);
    tally.run([&] { check_safetensors(damaged); });
  }
  tally.check(1.0);
}

TEST(IoMutate, Configs) {
  Mutator mutator(test::fuzz_seed());
  const std::string whole = to_json(Config{.keep = 0.1, .scale = 0.125}).dump(1);
  Tally tally;
  for (int i = 0; i < kCases && !testing::Test::HasFailure(); ++i) {
    const std::string damaged = mutator.json(whole);
    tally.run([&] {
      const Config config = config_from_json(parse_json(damaged, "mutated"));
      EXPECT_NO_THROW(validate(config)) << damaged;
      EXPECT_EQ(to_json(config_from_json(to_json(config))), to_json(config)) << damaged;
    });
  }
  tally.check(1.0);
}

TEST(IoMutate, FoldersOfWeights) {
  Mutator mutator(test::fuzz_seed() + 1);
  const std::string whole = R"({"config": )" + to_json(Config{}).dump() + R"(,
    "token_order": "tiles", "tile": [4, 4, 4], "grid": [16, 16, 16], "router": "layer",
    "alpha": "block", "keeps": [0.05, 0.04, 0.03], "layers": ["blocks.0.attn1", "blocks.1.attn1"]})";
  Tally tally;
  for (int i = 0; i < kCases && !testing::Test::HasFailure(); ++i) {
    const std::string damaged = mutator.json(whole);
    tally.run([&] {
      const nlohmann::json json = parse_json(damaged, "mutated");
      nlohmann::json config;
      std::string order, router, alpha;
      std::array<std::int64_t, 3> tile{}, grid{};
      std::vector<double> keeps;
      std::vector<std::string> layers;
      JsonObject(json, "mutated")
          .required("config", config)
          .required("token_order", order)
          .required("tile", tile)
          .required("grid", grid)
          .required("router", router)
          .required("alpha", alpha)
          .required("keeps", keeps)
          .required("layers", layers)
          .finish();
      const Config read = config_from_json(config);
      EXPECT_EQ(to_json(config_from_json(to_json(read))), to_json(read)) << damaged;
      EXPECT_EQ(json["layers"].size(), layers.size());
    });
  }
  tally.check(1.0);
}

TEST(IoMutate, Videos) {
  try {
    (void)find_ffmpeg();
  } catch (const Error& error) {
    GTEST_SKIP() << error.what();
  }
  Mutator mutator(test::fuzz_seed());
  test::TemporaryFolder folder;
  Frames frames{.count = 12, .height = 32, .width = 32, .fps = 12, .rgb = {}};
  for (std::size_t i = 0; i < 12 * 32 * 32 * 3; ++i) {
    frames.rgb.push_back(static_cast<std::uint8_t>(i / 7 + i / 3072 * 5));
  }
  write_mp4(folder / "whole.mp4", frames, 30);
  const std::string whole = read_file(folder / "whole.mp4", 1 << 20);
  Tally tally;
  for (int i = 0; i < 30; ++i) {
    // Damage anywhere mostly ends in the container; half of the cases keep its front whole.
    const std::size_t kept = i % 2 == 0 ? 0 : whole.size() / 2;
    write_file(folder / "damaged.mp4", whole.substr(0, kept) + mutator.bytes(whole.substr(kept)));
    tally.run([&] {
      const Frames decoded = decode_video(
          folder / "damaged.mp4",
          {.height = 16, .width = 16, .fps = i % 4 < 2 ? 0.0 : 8.0, .max_bytes = 1 << 20});
      EXPECT_GE(decoded.count, 1);
      EXPECT_EQ(static_cast<std::int64_t>(decoded.rgb.size()), decoded.count * 16 * 16 * 3);
    });
  }
  tally.check(20.0);
}

}  // namespace
}  // namespace sla2::io
