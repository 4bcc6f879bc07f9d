#include "roofline.h"

#include <algorithm>
#include <cstdint>

namespace sla2::bench {

Work least_work(const Problem& p, Pass pass) {
  const auto number = [](std::int64_t x) { return static_cast<double>(x); };
  const double heads = number(p.batch * p.num_heads);
  const double kv_heads = number(p.batch * p.num_kv_heads);
  const double d = number(p.head_dim), dv = number(p.value_dim);
  const double Nq = number(p.q_tokens), Nk = number(p.k_tokens);
  const std::int64_t T = num_k_blocks(p, p.k_tokens);
  const bool soft = p.config.routing == RoutingMode::kSoft;
  const std::int64_t kept = soft ? T : std::min(T, max_routed_blocks(p));
  const double M = number(num_q_blocks(p));
  const double pairs = heads * Nq * std::min(Nk, number(kept) * number(p.config.block_k));
  const bool is_full = kept == T && !soft;  // nothing is left to the linear branch
  const bool backward = pass == Pass::kBackward;

  Work work;
  const double products = pairs * (backward ? 3 * d + 2 * dv : d + dv);
  const Precision precision = p.config.precision;
  const bool is_int8 = precision == Precision::kInt8 && !backward && !soft;
  // bf16 has 3 bits less than fp16.
  const bool is_fp32 = precision == Precision::kFp32 || (p.dtype == DType::kF16 && !is_int8);
  double& sparse = is_fp32 ? work.fp32 : is_int8 ? work.int8 : work.bf16;
  sparse += products;
  work.exponentials = pairs;
  if (!is_full) {
    double& linear = is_fp32 ? work.fp32 : work.bf16;
    linear += d * dv * (backward ? heads * 2 * Nq + kv_heads * 3 * Nk : heads * Nq + kv_heads * Nk);
    work.exponentials += d * (heads * Nq + kv_heads * Nk);
    const double sums = heads * M * number(std::min(kept, T - kept)) * d * dv;
    work.fp32 += backward ? 2 * sums : sums;
  }
  if (!backward)
    work.fp32 += heads * M * number(T) * d + (heads * M + kv_heads * number(T)) * d * d;

  const double size = number(bytes_of(p.dtype));
  const double query_bytes = size * heads * Nq, key_bytes = size * kv_heads * Nk;
  work.bytes = backward ? query_bytes * (2 * d + 3 * dv) + key_bytes * 2 * (d + dv)
                        : query_bytes * (d + dv) + key_bytes * (2 * d + dv);
  return work;
}

double roofline_seconds(const Work& work, const InstructionPeaks& peaks, double bytes_a_second) {
  const auto time = [](double amount, double rate) {
    return amount == 0 || rate == 0 ? 0.0 : amount / rate;
  };
  return time(work.int8, peaks.int8) + time(work.bf16, peaks.bf16) +
         time(work.fp32 + kExpCost * work.exponentials, peaks.fp32) +
         time(work.bytes, bytes_a_second);
}

double full_attention_flops(const Problem& p, Pass pass) {
  const double pairs = static_cast<double>(p.batch * p.num_heads) *
                       static_cast<double>(p.q_tokens) * static_cast<double>(p.k_tokens);
  return (pass == Pass::kBackward ? 5.0 : 2.0) * pairs *
         static_cast<double>(p.head_dim + p.value_dim);
}

}  // namespace sla2::bench
