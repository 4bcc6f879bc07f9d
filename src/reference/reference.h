// The oracle: naive loops beside the maths, forward and backward, in float or double. Dense
// row-major vectors in and out, every option of the operator, int8 and fp8 emulated exactly.
#pragma once

#include <cstdint>
#include <vector>

#include "sla2/attention.h"

namespace sla2::reference {

/// Dense copies of a call's inputs. Empty vectors mean what null pointers mean in Inputs.
template <typename Real>
struct Operands {
  std::vector<Real> q;                    // [B, H, Nq, d]
  std::vector<Real> k;                    // [B, Hkv, Nk, d]
  std::vector<Real> v;                    // [B, Hkv, Nk, dv]
  std::vector<Real> proj_q;               // [num_routers, d, d]
  std::vector<Real> proj_k;               // [num_routers, d, d]
  std::vector<Real> alpha_logit;          // [H, alpha_blocks]
  std::vector<Real> proj_out;             // [dv, dv]
  std::vector<std::int64_t> key_lengths;  // [B]
};

template <typename Real>
struct RoutingResult {
  std::vector<Real> scores;          // [B, H, M, T] s_ij (Eq. 16), -inf behind a key length; empty
                                     // if the routing was given: then no gradient reaches a router
  std::vector<std::int32_t> blocks;  // [B, H, M, L]
  std::vector<Real> logits;          // [B, H, M, T], soft routing only
};

template <typename Real>
struct ForwardResult {
  std::vector<Real> out, out_sparse, out_linear;  // [B, H, Nq, dv]
  std::vector<Real> lse;                          // [B, H, Nq]
  std::vector<Real> k_mean;                       // [B, Hkv, d]
  RoutingResult<Real> routing;
};

template <typename Real>
struct GradientResult {
  std::vector<Real> d_q, d_k, d_v, d_alpha_logit, d_proj_q, d_proj_k, d_proj_out;
};

/// Copies a call's views and parameters.
template <typename Real>
Operands<Real> make_operands(const Problem& problem, const Inputs& inputs);

template <typename Real>
RoutingResult<Real> route(const Problem& problem, const Operands<Real>& operands);

/// `given` replaces the router: its blocks (hard) or logits (soft) are used as they are.
/// Without an executor everything runs in the calling thread. out_linear is zero in query blocks
/// whose complement is empty, also with linear_scope = all: it is not part of their output.
template <typename Real>
ForwardResult<Real> forward(const Problem& problem, const Operands<Real>& operands,
                            const RoutingResult<Real>* given = nullptr,
                            Executor* executor = nullptr);

/// `d_out` [B, H, Nq, dv]. backward = matched recomputes o_s and lse in Real and uses them
/// throughout, in d_alpha_logit too.
template <typename Real>
GradientResult<Real> backward(const Problem& problem, const Operands<Real>& operands,
                              const ForwardResult<Real>& saved, const std::vector<Real>& d_out,
                              Executor* executor = nullptr);

/// The integers of precision int8, for tests that compare backends bit for bit. A scale that is
/// not finite (NaN or Inf in the input) is NaN, its integers 0. Behind a key length all is 0.
struct QuantizedOperands {
  std::vector<std::int8_t> q;  // [B, H, Nq, d]
  std::vector<std::int8_t> k;  // [B, Hkv, Nk, d], smoothed
  std::vector<std::int8_t> v;  // [B, Hkv, Nk, dv]
  std::vector<float> q_scale;  // [B, H, Nq]
  std::vector<float> k_scale;  // [B, Hkv, T]
  std::vector<float> v_scale;  // [B, Hkv, dv]
};
template <typename Real>
QuantizedOperands quantize(const Problem& problem, const Operands<Real>& operands);

}  // namespace sla2::reference
