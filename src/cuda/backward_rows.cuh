// Factors of a query block that several kernels of the backward need.
#pragma once

#include <type_traits>

#include "cuda/terms.cuh"

namespace sla2::SLA2_CUDA_ROOM {

/// alpha of a query block (method sla2).
SLA2_DEVICE float back_alpha(const Backward& back, int h, int i) {
  const Call& c = back.call;
  if (c.alpha_logit == nullptr) return 0.5f;
  const int column = c.alpha_blocks == 1 ? 0 : i;
  return 1.0f / (1.0f + exact_exp(-c.alpha_logit[h * c.alpha_blocks + column]));
}
SLA2_DEVICE float linear_factor(const Backward& back, int b, int h, int i) {
  const Call& c = back.call;
  if (back.complement_empty[(static_cast<std::int64_t>(b) * c.H + h) * c.M + i] != 0) return 0.0f;
  return c.is_sla ? 1.0f : 1.0f - back_alpha(back, h, i);
}

/// Calls `run(terms, D)` with the call's sizes as std::integral_constants.
template <typename Run>
void with_sizes(const Backward& back, Run run) {
  const auto by_d = [&](auto terms) {
    switch (back.call.D) {
      case 64:
        return run(terms, std::integral_constant<int, 64>{});
      case 128:
        return run(terms, std::integral_constant<int, 128>{});
      default:
        return run(terms, std::integral_constant<int, 256>{});
    }
  };
  switch (back.q.count) {
    case 1:
      return by_d(std::integral_constant<int, 1>{});
    case 2:
      return by_d(std::integral_constant<int, 2>{});
    default:
      return by_d(std::integral_constant<int, 3>{});
  }
}

}  // namespace sla2::SLA2_CUDA_ROOM
