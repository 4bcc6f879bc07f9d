#include "bench.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace sla2::bench {
namespace {

/// A tensor of the problem's type without gaps, aligned as PyTorch's are: to 64 bytes.
class Tensor {
 public:
  Tensor(DType dtype, Layout layout, std::array<std::int64_t, 4> shape)
      : dtype_(dtype), layout_(layout), shape_(shape) {
    bytes_.reset(new (kAlignment) std::byte[static_cast<std::size_t>(size() * bytes_of(dtype))]());
  }
  [[nodiscard]] std::int64_t size() const { return shape_[0] * shape_[1] * shape_[2] * shape_[3]; }
  [[nodiscard]] View view() {
    View view = dense_view(static_cast<void*>(bytes_.get()), dtype_, shape_);
    if (layout_ == Layout::kBNHD)
      view.strides = {view.strides[0], shape_[3], shape_[1] * shape_[3], 1};
    return view;
  }
  /// In the order of the memory.
  [[nodiscard]] std::vector<float> values() const {
    std::vector<float> result(static_cast<std::size_t>(size()));
    for (std::int64_t i = 0; i < size(); ++i) result[static_cast<std::size_t>(i)] = get(i);
    return result;
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

  [[nodiscard]] float get(std::int64_t i) const {
    float value;
    if (dtype_ == DType::kF32) {
      std::memcpy(&value, &bytes_[static_cast<std::size_t>(i * 4)], 4);
      return value;
    }
    std::uint16_t half;
    std::memcpy(&half, &bytes_[static_cast<std::size_t>(i * 2)], 2);
    if (dtype_ == DType::kBF16) {
      const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
      std::memcpy(&value, &bits, 4);
      return value;
    }
    const int exponent = half >> 10 & 31;
    const auto fraction = static_cast<float>(half & 1023) * 0x1p-10F;
    value = exponent == 0 ? std::ldexp(fraction, -14) : std::ldexp(1 + fraction, exponent - 15);
    return (half & 0x8000) != 0 ? -value : value;
  }

  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(std::byte* bytes) const { ::operator delete[](bytes, kAlignment); }
  };

  DType dtype_;
  Layout layout_;
  std::array<std::int64_t, 4> shape_;
  std::unique_ptr<std::byte[], Free> bytes_;
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

double seconds_of(const std::function<void()>& run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct Data {
  Layout layout;
  Tensor q, k, v, d_out, out, d_q, d_k, d_v;
  Workspace workspace;
};

namespace {
Tensor queries(const Problem& p, Layout layout, std::int64_t width) {
  return {p.dtype, layout, {p.batch, p.num_heads, p.q_tokens, width}};
}
Tensor keys(const Problem& p, Layout layout, std::int64_t width) {
  return {p.dtype, layout, {p.batch, p.num_kv_heads, p.k_tokens, width}};
}
std::vector<float> floats(std::int64_t n) {
  return std::vector<float>(static_cast<std::size_t>(n));
}
}  // namespace

std::shared_ptr<Data> make_data(const Problem& p, Layout layout) {
  validate(p);
  std::mt19937 generator(1);
  auto data = std::make_shared<Data>(Data{layout,
                                          queries(p, layout, p.head_dim),
                                          keys(p, layout, p.head_dim),
                                          keys(p, layout, p.value_dim),
                                          queries(p, layout, p.value_dim),
                                          queries(p, layout, p.value_dim),
                                          queries(p, layout, p.head_dim),
                                          keys(p, layout, p.head_dim),
                                          keys(p, layout, p.value_dim),
                                          {}});
  for (Tensor* x : {&data->q, &data->k, &data->v, &data->d_out}) x->randomise(generator);
  return data;
}

struct Operator::Own {
  Tensor sparse, linear;
  std::vector<float> lse, mean, logits, d_alpha, d_router;
};

Operator::Operator(const Problem& p, Executor& executor, std::shared_ptr<Data> data)
    : problem_(p), executor_(executor), data_(std::move(data)) {
  validate(p);
  const std::int64_t rows = p.batch * p.num_heads * num_q_blocks(p);
  blocks_.resize(static_cast<std::size_t>(rows * max_routed_blocks(p)));
  own_ = std::make_unique<Own>(Own{
      queries(p, data_->layout, p.value_dim), queries(p, data_->layout, p.value_dim),
      floats(p.batch * p.num_heads * p.q_tokens), floats(p.batch * p.num_kv_heads * p.head_dim),
      floats(is_soft() ? rows * num_k_blocks(p, p.k_tokens) : 0),
      floats(p.num_heads * p.alpha_blocks), floats(2 * p.num_routers * p.head_dim * p.head_dim)});
}
Operator::~Operator() = default;
Operator::Operator(Operator&&) noexcept = default;

std::string Operator::implementation(Pass pass) const {
  return select_implementation(problem_, pass).name;
}
std::size_t Operator::workspace_bytes(Pass pass) const {
  return sla2::workspace_bytes(problem_, pass, executor_.num_threads());
}

ConstView Operator::out() const { return as_const(data_->out.view()); }

void Operator::forward(bool for_backward) { run(Pass::kForward, for_backward, nullptr); }
void Operator::backward() { run(Pass::kBackward, true, nullptr); }

void Operator::run(Pass pass, bool for_backward,
                   const std::function<void(const char*)>* after_stage) {
  Data& x = *data_;
  x.workspace.reserve(workspace_bytes(pass));
  const Context context{executor_, x.workspace.span(), nullptr, after_stage};
  Inputs inputs;
  inputs.q = as_const(x.q.view());
  inputs.k = as_const(x.k.view());
  inputs.v = as_const(x.v.view());
  float* logits = is_soft() ? own_->logits.data() : nullptr;
  if (pass == Pass::kForward) {
    Outputs outputs;
    outputs.out = x.out.view();
    outputs.routing = {blocks_.data(), logits};
    if (for_backward) {
      outputs.out_sparse = own_->sparse.view();
      outputs.out_linear = own_->linear.view();
      outputs.lse = own_->lse.data();
      outputs.k_mean = own_->mean.data();
    }
    sla2::forward(problem_, inputs, outputs, context);
    return;
  }
  Gradients gradients;
  gradients.d_q = x.d_q.view();
  gradients.d_k = x.d_k.view();
  gradients.d_v = x.d_v.view();
  const bool sla = problem_.config.method == Method::kSla;
  if (!sla) gradients.d_alpha_logit = own_->d_alpha.data();
  if (is_soft() && !sla) {
    gradients.d_proj_q = own_->d_router.data();
    gradients.d_proj_k = own_->d_router.data() + own_->d_router.size() / 2;
  }
  const Saved saved{as_const(own_->sparse.view()),
                    as_const(own_->linear.view()),
                    own_->lse.data(),
                    own_->mean.data(),
                    {blocks_.data(), logits}};
  sla2::backward(problem_, inputs, saved, as_const(x.d_out.view()), gradients, context);
}

std::vector<std::pair<std::string, double>> Operator::stages(Pass pass) {
  using Clock = std::chrono::steady_clock;
  std::vector<std::pair<std::string, double>> times;
  Clock::time_point last;
  const std::function<void(const char*)> after_stage = [&](const char* name) {
    const auto now = Clock::now();
    auto found = std::find_if(times.begin(), times.end(),
                              [&](const auto& one) { return one.first == name; });
    if (found == times.end()) found = times.insert(times.end(), {name, 0.0});
    found->second += std::chrono::duration<double>(now - last).count();
    last = Clock::now();
  };
  last = Clock::now();
  run(pass, pass == Pass::kBackward, &after_stage);
  return times;
}

namespace {

/// The results of one implementation: out, d_q, d_k, d_v; routed by `blocks` unless it is empty.
std::vector<std::vector<float>> results(Problem p, const char* implementation, Executor& executor,
                                        Data& x, std::vector<std::int32_t>& blocks) {
  p.implementation = implementation;
  const bool is_given = !blocks.empty();
  blocks.resize(
      static_cast<std::size_t>(p.batch * p.num_heads * num_q_blocks(p) * max_routed_blocks(p)));
  x.workspace.reserve(std::max(workspace_bytes(p, Pass::kForward, executor.num_threads()),
                               workspace_bytes(p, Pass::kBackward, executor.num_threads())));
  const Context context{executor, x.workspace.span()};
  Tensor sparse = queries(p, x.layout, p.value_dim), linear = queries(p, x.layout, p.value_dim);
  std::vector<float> lse = floats(p.batch * p.num_heads * p.q_tokens);
  std::vector<float> mean = floats(p.batch * p.num_kv_heads * p.head_dim);
  Inputs inputs;
  inputs.q = as_const(x.q.view());
  inputs.k = as_const(x.k.view());
  inputs.v = as_const(x.v.view());
  if (is_given) inputs.routing.blocks = blocks.data();
  Outputs outputs{x.out.view(), sparse.view(), linear.view(), lse.data(), mean.data(), {}};
  if (!is_given) outputs.routing.blocks = blocks.data();
  forward(p, inputs, outputs, context);
  Gradients gradients;
  gradients.d_q = x.d_q.view();
  gradients.d_k = x.d_k.view();
  gradients.d_v = x.d_v.view();
  backward(p, inputs,
           {as_const(sparse.view()),
            as_const(linear.view()),
            lse.data(),
            mean.data(),
            {blocks.data(), nullptr}},
           as_const(x.d_out.view()), gradients, context);
  return {x.out.values(), x.d_q.values(), x.d_k.values(), x.d_v.values()};
}

}  // namespace

void require_close(const std::string& name, const std::vector<float>& got,
                   const std::vector<float>& want, double bound) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double x = static_cast<double>(got[i]) - static_cast<double>(want[i]);
    difference += x * x;
    norm += static_cast<double>(want[i]) * static_cast<double>(want[i]);
  }
  const double error = std::sqrt(difference / std::max(norm, 1e-300));
  if (error <= bound) return;
  throw Error(ErrorKind::kRuntime, name + " differs from the reference by " +
                                       std::to_string(error) + " (relative L2), allowed " +
                                       std::to_string(bound));
}

void verify(const Problem& problem, Executor& executor, Layout layout) {
  Problem p = problem;
  p.batch = 1;
  p.num_heads = p.num_kv_heads = std::min<std::int64_t>(2, p.num_heads);
  p.num_routers = p.alpha_blocks = 1;
  p.q_tokens = std::min<std::int64_t>(512, p.q_tokens);
  p.k_tokens = std::min<std::int64_t>(512, p.k_tokens);
  p.config.routing = RoutingMode::kHard;
  const auto data = make_data(p, layout);
  std::vector<std::int32_t> blocks;
  const auto got = results(p, problem.implementation, executor, *data, blocks);
  const auto want = results(p, "reference", executor, *data, blocks);
  // The integers agree exactly; rounding p to 8 bits under another chunk maximum changes a weight
  // by up to half of 1/255 of the largest, products and results of 16 bits by 2^-8 each.
  const bool exact = p.config.precision == Precision::kFp32 && p.dtype == DType::kF32;
  const double bound = exact ? 1e-4 : 2e-2;
  const char* const names[] = {"out", "d_q", "d_k", "d_v"};
  for (std::size_t i = 0; i < got.size(); ++i) require_close(names[i], got[i], want[i], bound);
}

}  // namespace sla2::bench
