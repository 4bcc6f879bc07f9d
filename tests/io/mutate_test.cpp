// Damaged input: an error or the right result, never a crash, a hang or another exception.
#include "tests/io/mutate.h"

#include <chrono>
#include <cstring>
#include <memory>
#include <numeric>

#include "io/config_json.h"
#include "io/files.h"
#include "io/model_files.h"
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

/// Damages `whole` kCases times and hands each to `read`, the parser that the program itself uses.
template <typename Read>
void fuzz_json(std::uint64_t seed, const std::string& whole, const Read& read) {
  Mutator mutator(seed);
  ASSERT_NO_THROW(read(parse_json(whole, "whole"), whole));
  Tally tally;
  for (int i = 0; i < kCases && !testing::Test::HasFailure(); ++i) {
    const std::string damaged = mutator.json(whole);
    tally.run([&] { read(parse_json(damaged, "mutated"), damaged); });
  }
  tally.check(1.0);
}

TEST(IoMutate, FoldersOfWeights) {
  nlohmann::json whole = to_json(Config{});
  whole.update(nlohmann::json::parse(R"({"token_order": "tiles", "tile": [4, 4, 4],
    "grid": [16, 16, 16], "router": "layer", "alpha": "block", "keeps": [0.05, 0.04, 0.03],
    "layers": ["blocks.0.attn1", "blocks.1.attn1"]})"));
  fuzz_json(test::fuzz_seed() + 1, whole.dump(1), [](const auto& json, const std::string& text) {
    const Sla2Text read = sla2_from_json(json, "mutated");
    EXPECT_NO_THROW(validate(read.config)) << text;
    EXPECT_EQ(read.layers.size(), json["layers"].size()) << text;
    for (const std::string& layer : read.layers) EXPECT_GE(layer_of_attention(layer), 0) << text;
    EXPECT_LE(read.grid[0] * read.grid[1] * read.grid[2], 1 << 24) << text;
  });
}

TEST(IoMutate, ModelConfigs) {
  const std::string whole = R"({"_class_name": "WanTransformer3DModel", "patch_size": [1, 8, 8],
    "num_attention_heads": 4, "attention_head_dim": 64, "in_channels": 3, "out_channels": 3,
    "text_dim": 128, "freq_dim": 256, "ffn_dim": 768, "num_layers": 8, "cross_attn_norm": true,
    "qk_norm": "rms_norm_across_heads", "eps": 1e-06, "rope_max_seq_len": 1024,
    "image_dim": null, "added_kv_proj_dim": null, "pos_embed_seq_len": null})";
  fuzz_json(test::fuzz_seed() + 2, whole, [](const auto& json, const std::string& text) {
    const WanConfig read = wan_config_from_json(json, "mutated");
    EXPECT_GT(read.dim(), 0) << text;
    EXPECT_EQ(read.attention_head_dim % 2, 0) << text;
    EXPECT_LE(read.num_layers, 1 << 24) << text;
  });
}

TEST(IoMutate, ModelCards) {
  const std::string whole = R"({"frames": 16, "height": 128, "width": 128, "fps": 8.0,
    "prediction": "x", "shift": 1.0, "captions": ["bikes", "carphone"]})";
  fuzz_json(test::fuzz_seed() + 3, whole, [](const auto& json, const std::string& text) {
    const CardText read = card_from_json(json, "mutated");
    EXPECT_GT(read.fps, 0) << text;
    EXPECT_GE(std::min({read.frames, read.height, read.width}), 1) << text;
    EXPECT_LE(std::max({read.frames, read.height, read.width}), 1 << 16) << text;
  });
}

TEST(IoMutate, ShardIndexes) {
  const std::string whole = R"({"metadata": {"total_size": 123}, "weight_map": {
    "proj_out.weight": "a-00001-of-00002.safetensors", "proj_out.bias": "a-00002.safetensors"}})";
  fuzz_json(test::fuzz_seed() + 4, whole, [](const auto& json, const std::string& text) {
    for (const auto& [tensor, file] : weight_map_from_json(json, "mutated")) {
      EXPECT_EQ(file.find('/'), std::string::npos) << text;
      EXPECT_TRUE(!file.empty() && file != "..") << text;
    }
  });
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
