// The rules of Config and Problem.
#include <array>
#include <cmath>
#include <cstdint>

#include "core/message.h"
#include "sla2/config.h"
#include "sla2/problem.h"

namespace sla2 {
namespace {

// More elements than any machine holds, and few enough that a kernel may multiply them by a head
// size and an element size without overflow.
constexpr std::int64_t kMaxElements = std::int64_t{1} << 48;
constexpr std::int64_t kMaxCount = (std::int64_t{1} << 31) - 1;  // block indices are int32

void check_block(const char* name, std::int64_t block) {
  require(block == 32 || block == 64 || block == 128 || block == 256, name,
          " must be 32, 64, 128 or 256, got ", block);
}

void check_feature_size(const char* name, std::int64_t size) {
  require(size > 0 && size <= 256 && size % 16 == 0, name,
          " must be a multiple of 16 up to 256, got ", size);
}

void check_count(const char* name, std::int64_t count) {
  require(count >= 1 && count <= kMaxCount, name, " must be in [1, ", kMaxCount, "], got ", count);
}

template <typename Enum>
void check_enum(const char* name, Enum value, Enum last) {
  require(value <= last, name, " must be one of its named values (0 to ", static_cast<int>(last),
          "), got ", static_cast<int>(value));
}

void check_elements(const char* name, std::array<std::int64_t, 4> shape) {
  std::int64_t product = 1;
  for (const std::int64_t extent : shape) {
    require(product <= kMaxElements / extent, name, " must have at most 2^48 elements, got [",
            shape[0], ", ", shape[1], ", ", shape[2], ", ", shape[3], "]");
    product *= extent;
  }
}

}  // namespace

void validate(const Config& config) {
  require(config.keep > 0 && config.keep <= 1, "keep must be in (0, 1], got ", config.keep);
  check_block("block_q", config.block_q);
  check_block("block_k", config.block_k);
  if (config.scale) {
    require(*config.scale > 0 && std::isfinite(*config.scale),
            "scale must be positive and finite, got ", *config.scale);
  }
  check_enum("feature_map", config.feature_map, FeatureMap::kRelu);
  check_enum("precision", config.precision, Precision::kFp32);
  check_enum("routing", config.routing, RoutingMode::kSoft);
  require(config.tau > 0 && std::isfinite(config.tau), "tau must be positive and finite, got ",
          config.tau);
  check_enum("score_norm", config.score_norm, ScoreNorm::kSoftmax);
  check_enum("linear_keys", config.linear_keys, LinearKeys::kRaw);
  check_enum("linear_scope", config.linear_scope, LinearScope::kAll);
  check_enum("backward", config.backward, BackwardMode::kMatched);
  check_enum("method", config.method, Method::kSla);
}

void validate(const Problem& problem) {
  validate(problem.config);
  check_count("batch", problem.batch);
  check_count("num_heads", problem.num_heads);
  check_count("num_kv_heads", problem.num_kv_heads);
  require(problem.num_heads % problem.num_kv_heads == 0, "num_kv_heads must divide num_heads (",
          problem.num_heads, "), got ", problem.num_kv_heads);
  check_count("q_tokens", problem.q_tokens);
  check_count("k_tokens", problem.k_tokens);
  check_feature_size("head_dim", problem.head_dim);
  check_feature_size("value_dim", problem.value_dim);
  check_enum("dtype", problem.dtype, DType::kF16);
  check_enum("device", problem.device, Device::kCuda);

  const std::int64_t q_blocks = num_q_blocks(problem);
  require(problem.num_routers == 1 || problem.num_routers == problem.num_heads,
          "num_routers must be 1 or num_heads (", problem.num_heads, "), got ",
          problem.num_routers);
  require(problem.alpha_blocks == 1 || problem.alpha_blocks == q_blocks,
          "alpha_blocks must be 1 or the number of query blocks (", q_blocks, "), got ",
          problem.alpha_blocks);
  const TokenRange& range = problem.protected_keys;
  require(range.begin >= 0 && range.begin <= range.end && range.end <= problem.k_tokens,
          "protected_keys must satisfy 0 <= begin <= end <= k_tokens (", problem.k_tokens,
          "), got [", range.begin, ", ", range.end, ")");

  check_elements("q", {problem.batch, problem.num_heads, problem.q_tokens, problem.head_dim});
  check_elements("k", {problem.batch, problem.num_kv_heads, problem.k_tokens, problem.head_dim});
  check_elements("v", {problem.batch, problem.num_kv_heads, problem.k_tokens, problem.value_dim});
  check_elements("out", {problem.batch, problem.num_heads, problem.q_tokens, problem.value_dim});
  const bool soft = problem.config.routing == RoutingMode::kSoft;
  const std::int64_t columns =
      soft ? num_k_blocks(problem, problem.k_tokens) : max_routed_blocks(problem);
  check_elements("routing", {problem.batch, problem.num_heads, q_blocks, columns});
}

}  // namespace sla2
