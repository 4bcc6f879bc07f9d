// What the operator shall compute. Field names, values and defaults are those of Python's Config.
#pragma once

#include <cstdint>
#include <optional>

namespace sla2 {

/// Number format of the sparse branch's forward products (paper, Section 5).
enum class Precision : std::uint8_t { kInt8, kFp8, kBf16, kFp32 };
/// kHard: top-k blocks (stage 2, inference). kSoft: SoftTop-k weights (stage 1, Eq. 17).
enum class RoutingMode : std::uint8_t { kHard, kSoft };
/// phi of the linear branch.
enum class FeatureMap : std::uint8_t { kSoftmax, kElu, kRelu };
/// p in Eq. 17: the scores (Eq. 16) or their row softmax (Alg. 2 line 8).
enum class ScoreNorm : std::uint8_t { kNone, kSoftmax };
enum class LinearKeys : std::uint8_t { kSmoothed, kRaw };
enum class LinearScope : std::uint8_t { kComplement, kAll };
/// kPaper: o_s and lse of the low-bit forward. kMatched: both recomputed unquantised.
enum class BackwardMode : std::uint8_t { kPaper, kMatched };
/// kSla: W = I, no alpha, o = o_s + o_l proj_out.
enum class Method : std::uint8_t { kSla2, kSla };

struct Config {
  double keep = 0.03;           ///< fraction of key blocks routed sparse, (0, 1]
  std::int64_t block_q = 128;   ///< tokens in a query block: 32, 64, 128 or 256
  std::int64_t block_k = 64;    ///< tokens in a key block: 32, 64, 128 or 256
  std::optional<double> scale;  ///< softmax scale; unset: 1/sqrt(head_dim)
  FeatureMap feature_map = FeatureMap::kSoftmax;
  Precision precision = Precision::kInt8;
  RoutingMode routing = RoutingMode::kHard;
  double tau = 0.1;  ///< SoftTop-k temperature, > 0
  ScoreNorm score_norm = ScoreNorm::kNone;
  LinearKeys linear_keys = LinearKeys::kSmoothed;
  LinearScope linear_scope = LinearScope::kComplement;
  BackwardMode backward = BackwardMode::kPaper;
  Method method = Method::kSla2;
};

/// Throws sla2::Error naming the first field that breaks its rule.
void validate(const Config& config);

}  // namespace sla2
