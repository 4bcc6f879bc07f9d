#include "bench.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <random>
#include <vector>

namespace sla2::bench {
namespace {

/// A dense tensor of the problem's type.
class Tensor {
 public:
  Tensor(DType dtype, std::array<std::int64_t, 4> shape) : dtype_(dtype), shape_(shape) {
    bytes_.resize(static_cast<std::size_t>(size() * bytes_of(dtype)));
  }
  [[nodiscard]] std::int64_t size() const { return shape_[0] * shape_[1] * shape_[2] * shape_[3]; }
  [[nodiscard]] View view() {
    return dense_view(static_cast<void*>(bytes_.data()), dtype_, shape_);
  }
  Tensor& randomise(std::mt19937& generator) {
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < size(); ++i) set(i, normal(generator));
    return *this;
  }

 private:
  void set(std::int64_t i, float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (dtype_ == DType::kF32) {
      std::memcpy(&bytes_[static_cast<std::size_t>(i * 4)], &value, 4);
      return;
    }
    // Truncated: bf16 keeps the upper half; fp16 rebiases the exponent (normal values are in range,
    // those under 2^-14 become 0).
    auto half = static_cast<std::uint16_t>(bits >> 16);
    if (dtype_ == DType::kF16) {
      const std::uint32_t magnitude = bits & 0x7fffffffU;
      half = static_cast<std::uint16_t>(
          (bits >> 16 & 0x8000U) | (magnitude < 0x38800000U ? 0 : (magnitude - 0x38000000U) >> 13));
    }
    std::memcpy(&bytes_[static_cast<std::size_t>(i * 2)], &half, 2);
  }

  DType dtype_;
  std::array<std::int64_t, 4> shape_;
  std::vector<std::byte> bytes_;
};

}  // namespace

Seconds quartiles(std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  const auto at = [&](double share) {
    return samples[static_cast<std::size_t>(
        std::lround(share * static_cast<double>(samples.size() - 1)))];
  };
  return {at(0.5), at(0.25), at(0.75)};
}

Seconds measure(const std::function<void()>& run, std::int64_t repeats) {
  run();
  std::vector<double> samples;
  for (std::int64_t i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    run();
    samples.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return quartiles(std::move(samples));
}

Result measure_operator(const Problem& p, Executor& executor, std::int64_t repeats,
                        bool with_backward) {
  std::mt19937 generator(1);
  const auto queries = [&](std::int64_t width) {
    return Tensor(p.dtype, {p.batch, p.num_heads, p.q_tokens, width});
  };
  const auto keys = [&](std::int64_t width) {
    return Tensor(p.dtype, {p.batch, p.num_kv_heads, p.k_tokens, width});
  };
  Tensor q = queries(p.head_dim).randomise(generator);
  Tensor k = keys(p.head_dim).randomise(generator);
  Tensor v = keys(p.value_dim).randomise(generator);
  Tensor out = queries(p.value_dim), sparse = queries(p.value_dim), linear = queries(p.value_dim);
  const std::int64_t rows = p.batch * p.num_heads * num_q_blocks(p);
  const auto floats = [](std::int64_t n) {
    return std::vector<float>(static_cast<std::size_t>(n));
  };
  std::vector<float> lse = floats(p.batch * p.num_heads * p.q_tokens);
  std::vector<float> mean = floats(p.batch * p.num_kv_heads * p.head_dim);
  std::vector<std::int32_t> blocks(static_cast<std::size_t>(rows * max_routed_blocks(p)));
  const bool soft = p.config.routing == RoutingMode::kSoft;
  std::vector<float> logits = floats(soft ? rows * num_k_blocks(p, p.k_tokens) : 0);
  const Routing routing{blocks.data(), soft ? logits.data() : nullptr};

  Inputs inputs{as_const(q.view()), as_const(k.view()), as_const(v.view()), {}, nullptr, {}};
  const Outputs outputs{out.view(), sparse.view(), linear.view(), lse.data(), mean.data(), routing};
  const std::int64_t threads = executor.num_threads();
  std::vector<std::byte> workspace(workspace_bytes(p, Pass::kForward, threads));
  Result result;
  result.forward_implementation = select_implementation(p, Pass::kForward).name;
  result.workspace_mib = static_cast<double>(workspace.size()) / (1 << 20);
  result.forward = measure([&] { forward(p, inputs, outputs, {executor, workspace}); }, repeats);
  if (!with_backward) return result;

  Tensor d_out = queries(p.value_dim).randomise(generator);
  Tensor d_q = queries(p.head_dim), d_k = keys(p.head_dim), d_v = keys(p.value_dim);
  const bool sla = p.config.method == Method::kSla;
  std::vector<float> d_alpha = floats(p.num_heads * p.alpha_blocks);
  std::vector<float> d_router = floats(2 * p.num_routers * p.head_dim * p.head_dim);
  Gradients gradients{d_q.view(), d_k.view(), d_v.view(), nullptr, nullptr, nullptr, nullptr};
  if (!sla) gradients.d_alpha_logit = d_alpha.data();
  if (soft && !sla) {
    gradients.d_proj_q = d_router.data();
    gradients.d_proj_k = d_router.data() + d_router.size() / 2;
  }
  const Saved saved{as_const(sparse.view()),
                    as_const(linear.view()),
                    lse.data(),
                    mean.data(),
                    {blocks.data(), soft ? logits.data() : nullptr}};
  workspace.resize(workspace_bytes(p, Pass::kBackward, threads));
  result.backward_implementation = select_implementation(p, Pass::kBackward).name;
  result.workspace_mib =
      std::max(result.workspace_mib, static_cast<double>(workspace.size()) / (1 << 20));
  result.backward = measure(
      [&] {
        backward(p, inputs, saved, as_const(d_out.view()), gradients, {executor, workspace});
      },
      repeats);
  return result;
}

double effective_tflops(const Problem& p, Pass pass, double seconds) {
  const double pairs = static_cast<double>(p.batch * p.num_heads) *
                       static_cast<double>(p.q_tokens) * static_cast<double>(p.k_tokens);
  const double forward = 2 * pairs * static_cast<double>(p.head_dim + p.value_dim);
  return (pass == Pass::kBackward ? 2.5 : 1.0) * forward / seconds * 1e-12;
}

}  // namespace sla2::bench
