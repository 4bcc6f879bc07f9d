// The least work of one pass and the time that it takes at this machine's peaks.
#pragma once

#include "peaks.h"
#include "sla2/sla2.h"

namespace sla2::bench {

/// Multiply-adds by the format they are made in, and bytes to and from memory.
struct Work {
  double int8 = 0, bf16 = 0, fp32 = 0;
  double exponentials = 0;
  double bytes = 0;
};

/// Counted: the products of the routed pairs in the row's precision (forward 2, backward 5), their
/// exponentials and phi's; the linear branch's products in bf16 (fp32 if asked for); for inputs in
/// fp16 all these products in fp32, which they need, but in an INT8 forward; H_i and dh_j as sums
/// over routed blocks; scores of the router; every input read and every output written once, and k
/// twice forward (its mean comes first). Not counted: quantisation, packing, pooling, top-k.
[[nodiscard]] Work least_work(const Problem& problem, Pass pass);

/// The sum of the times of each kind of work, one behind the other: an exponential counts as
/// kExpCost multiply-adds in fp32.
inline constexpr double kExpCost = 8;  // range reduction 2, polynomial of degree 5, scaling 1
[[nodiscard]] double roofline_seconds(const Work& work, const InstructionPeaks& peaks,
                                      double bytes_a_second);

/// FLOPs of full attention: 4 Nq Nk d forward (2 Nq Nk (d + dv)), 2.5 times that backward.
[[nodiscard]] double full_attention_flops(const Problem& problem, Pass pass);

}  // namespace sla2::bench
