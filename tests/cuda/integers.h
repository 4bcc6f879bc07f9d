// Where a forward's workspace holds the integers of int8.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sla2/attention.h"

namespace sla2::test {

struct IntegersAt {
  std::int64_t D;       // features of a row
  const void* q;        // s8 [B, H, Nq, D]
  const void* q_scale;  // float [B, H, Nq]
  const void* k;        // s8 [B, Hkv, T * bk, D]
  const void* k_scale;  // float [B, Hkv, T]
  const void* v;        // s8 [B, Hkv, T * bk / 32, D, 32], keys permuted within 16
  const void* v_scale;  // float [B, Hkv, dv]
};

/// Defined for the machine that the suite runs on.
IntegersAt integers_at(const Problem& problem, std::byte* workspace);

}  // namespace sla2::test
