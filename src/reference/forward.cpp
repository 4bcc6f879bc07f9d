// Steps 0 to 4 (Alg. 2), one head after the other.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "reference/stages.h"

namespace sla2::reference {

template <typename Real>
Real alpha_of(const Problem& problem, const Operands<Real>& operands, std::int64_t h,
              std::int64_t q_block) {
  if (operands.alpha_logit.empty()) return Real(0.5);
  const std::int64_t column = problem.alpha_blocks == 1 ? 0 : q_block;
  return 1 / (1 + std::exp(-operands.alpha_logit[h * problem.alpha_blocks + column]));
}

namespace {

/// Step 4 (Eq. 13) for one head; SLA: o = o_s + o_l P.
template <typename Real>
void mix(const Problem& problem, const Operands<Real>& operands, std::int64_t h,
         const std::vector<bool>& complement_empty,
         const Real* sparse,  // [Nq, dv]
         const Real* linear,  // [Nq, dv]
         Real* out) {         // [Nq, dv]
  const Sizes s(problem);
  for (std::int64_t row = 0; row < s.Nq; ++row) {
    const std::int64_t i = row / s.bq;
    const Real* o_s = sparse + row * s.dv;
    const Real* o_l = linear + row * s.dv;
    Real* o = out + row * s.dv;
    if (complement_empty[i]) {
      std::copy_n(o_s, s.dv, o);
    } else if (problem.config.method == Method::kSla2) {
      const Real alpha = alpha_of(problem, operands, h, i);
      for (std::int64_t c = 0; c < s.dv; ++c) o[c] = alpha * o_s[c] + (1 - alpha) * o_l[c];
    } else {
      std::copy_n(o_s, s.dv, o);
      if (operands.proj_out.empty()) continue;
      for (std::int64_t a = 0; a < s.dv; ++a) {
        for (std::int64_t c = 0; c < s.dv; ++c) o[c] += o_l[a] * operands.proj_out[a * s.dv + c];
      }
    }
  }
}

/// Means of rows of v fit in the caller's type, their roundings may not: near fp16's largest a
/// finite mean is held at it.
template <typename Real>
void hold_in_range(const Problem& problem, Real* means, std::int64_t count) {
  if (problem.dtype != DType::kF16) return;
  constexpr Real kLargest = 65504;
  for (std::int64_t at = 0; at < count; ++at) {
    if (std::isfinite(means[at])) means[at] = std::clamp(means[at], -kLargest, kLargest);
  }
}

/// A given routing as the router would have returned it.
template <typename Real>
RoutingResult<Real> adopt(const Problem& problem, const Operands<Real>& operands,
                          const RoutingResult<Real>& given) {
  const Sizes s(problem);
  RoutingResult<Real> routing = given;
  routing.scores.clear();
  if (problem.config.routing == RoutingMode::kHard || !routing.blocks.empty()) return routing;
  for (std::int64_t row = 0; row < s.B * s.H * s.M; ++row) {  // for display, by the weights
    const std::int64_t length = key_length(s, operands, row / (s.H * s.M));
    const std::int64_t k_blocks = num_k_blocks(problem, length);
    const auto blocks =
        choose_blocks(given.logits.data() + row * s.T, k_blocks, num_kept_blocks(problem, k_blocks),
                      protected_blocks(problem, length), s.L);
    routing.blocks.insert(routing.blocks.end(), blocks.begin(), blocks.end());
  }
  return routing;
}

}  // namespace

template <typename Real>
ForwardResult<Real> forward(const Problem& problem, const Operands<Real>& operands,
                            const RoutingResult<Real>* given, Executor* executor) {
  const Sizes s(problem);
  const Arithmetic arithmetic = sparse_arithmetic(problem);
  const bool is_low_bit = arithmetic == Arithmetic::kInt8 || arithmetic == Arithmetic::kFp8;
  const int bits = arithmetic == Arithmetic::kRound16 ? bits_of_16(problem.dtype) : 0;

  const Smoothed<Real> smoothed = smooth(problem, operands);
  ForwardResult<Real> result;
  result.k_mean = smoothed.k_mean;
  result.routing = given != nullptr ? adopt(problem, operands, *given)
                                    : route_smoothed(problem, operands, smoothed);
  LowBit low;
  if (is_low_bit) low = low_bit(problem, operands, smoothed, arithmetic);
  result.out.resize(s.B * s.H * s.Nq * s.dv);
  result.out_sparse.resize(result.out.size());
  result.out_linear.resize(result.out.size());
  result.lse.resize(s.B * s.H * s.Nq);

  SerialExecutor serial;
  (executor != nullptr ? *executor : serial)
      .parallel_for(s.B * s.H, [&](std::int64_t at, std::int64_t) {
        const Head<Real> head = make_head(s, operands, smoothed.ks, at / s.H, at % s.H);
        const BlockWeights<Real> weights =
            block_weights(problem, result.routing, head.b, head.h, head.k_blocks);
        Real* o_s = result.out_sparse.data() + at * s.Nq * s.dv;
        Real* o_l = result.out_linear.data() + at * s.Nq * s.dv;
        Real* lse = result.lse.data() + at * s.Nq;
        if (is_low_bit) {
          sparse_forward_low_bit(problem, head, weights, low, arithmetic, o_s, lse);
        } else {
          sparse_forward(problem, head, weights, bits, o_s, lse);
        }
        linear_forward(problem, head, weights, o_l);
        hold_in_range(problem, o_s, s.Nq * s.dv);
        hold_in_range(problem, o_l, s.Nq * s.dv);
        mix(problem, operands, head.h, weights.complement_empty, o_s, o_l,
            result.out.data() + at * s.Nq * s.dv);
      });
  return result;
}

#define SLA2_INSTANTIATE(Real)                                                               \
  template Real alpha_of(const Problem&, const Operands<Real>&, std::int64_t, std::int64_t); \
  template ForwardResult<Real> forward(const Problem&, const Operands<Real>&,                \
                                       const RoutingResult<Real>*, Executor*);
SLA2_INSTANTIATE(float)
SLA2_INSTANTIATE(double)
#undef SLA2_INSTANTIATE

}  // namespace sla2::reference
