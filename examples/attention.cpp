// Sparse-linear attention over 1024 random tokens in 4 heads, on two threads.
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "sla2/sla2.h"

int main() try {
  sla2::Problem problem;
  problem.num_heads = problem.num_kv_heads = 4;
  problem.q_tokens = problem.k_tokens = 1024;
  problem.head_dim = problem.value_dim = 64;
  problem.config.keep = 0.1;  // 1 of 16 key blocks exactly, the others by linear attention

  const std::array<std::int64_t, 4> shape = {1, 4, 1024, 64};
  std::vector<float> q(4 * 1024 * 64), k(q.size()), v(q.size()), out(q.size());
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  for (auto* values : {&q, &k, &v}) {
    for (float& x : *values) x = normal(generator);
  }
  const auto view = [&](auto* data) { return sla2::dense_view(data, sla2::DType::kF32, shape); };
  sla2::Inputs inputs;
  inputs.q = view(static_cast<const void*>(q.data()));
  inputs.k = view(static_cast<const void*>(k.data()));
  inputs.v = view(static_cast<const void*>(v.data()));
  sla2::Outputs outputs;
  outputs.out = view(static_cast<void*>(out.data()));

  const auto pool = sla2::make_thread_pool(2);
  const sla2::Workspace workspace(sla2::workspace_bytes(problem, sla2::Pass::kForward, 2));
  sla2::forward(problem, inputs, outputs, {*pool, workspace.span()});
  std::printf("%s: out[0] = %.4f %.4f ...\n",
              sla2::select_implementation(problem, sla2::Pass::kForward).name, out[0], out[1]);
  return std::isfinite(out[0]) ? 0 : 1;
} catch (const sla2::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
