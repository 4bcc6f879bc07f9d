#include "sla2/problem.h"

namespace sla2 {

std::int64_t num_q_blocks(const Problem& problem) {
  return (problem.q_tokens + problem.config.block_q - 1) / problem.config.block_q;
}

}  // namespace sla2
