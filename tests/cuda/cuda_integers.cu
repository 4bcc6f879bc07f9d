#include "cuda/integers.h"
#include "cuda/stages.h"

namespace sla2::test {

IntegersAt integers_at(const Problem& problem, std::byte* workspace) {
  const auto c = cuda::make_forward(problem, {}, {}, workspace);
  return {c.D, c.q_low, c.q_scale, c.k_low, c.k_scale, c.v_low, c.v_scale};
}

}  // namespace sla2::test
