// Seeded random calls for the tests of every backend: problems, tensors with strides and sentinels,
// and a whole call (inputs, outputs, gradients) through the public API.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <span>
#include <vector>

#include "core/float16.h"
#include "reference/reference.h"
#include "sla2/sla2.h"

namespace sla2::test {

using Shape = std::array<std::int64_t, 4>;

inline double load(const void* data, DType dtype, std::int64_t at) {
  if (dtype == DType::kF32) return static_cast<const float*>(data)[at];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(data)[at];
  return dtype == DType::kBF16 ? from_bf16(bits) : from_fp16(bits);
}

inline void store(void* data, DType dtype, std::int64_t at, double value) {
  const auto narrow = static_cast<float>(value);
  if (dtype == DType::kF32) {
    static_cast<float*>(data)[at] = narrow;
  } else {
    static_cast<std::uint16_t*>(data)[at] =
        dtype == DType::kBF16 ? to_bf16(narrow) : to_fp16(narrow);
  }
}

enum class Layout {
  kDense,       // [B, H, N, D]
  kTransposed,  // memory is [B, N, H, D]
  kPadded,      // rows 3 elements apart, the first one at an odd element: not 16-byte aligned; an
                // axis of one element has a stride that leads nowhere
};

/// A tensor inside a larger buffer. Everything outside the tensor's elements is a sentinel.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, Shape shape, Layout layout) : dtype_(dtype), shape_(shape) {
    const auto [b, h, n, d] = shape;
    const std::int64_t row = layout == Layout::kPadded ? d + 3 : d;
    strides_ = layout == Layout::kTransposed ? Shape{n * h * row, row, h * row, 1}
                                             : Shape{h * n * row, n * row, row, 1};
    for (std::size_t axis = 0; axis < 3 && layout == Layout::kPadded; ++axis) {
      if (shape[axis] == 1) strides_[axis] = std::int64_t{1} << 60;
    }
    offset_ = layout == Layout::kPadded ? kGuard + 1 : kGuard;
    bytes_.assign(static_cast<std::size_t>((b * h * n * row + 2 * kGuard + 1) * bytes_of(dtype)),
                  kSentinel);
  }

  [[nodiscard]] View view() { return {data(), dtype_, shape_, strides_}; }
  [[nodiscard]] ConstView const_view() { return as_const(view()); }
  /// All bytes, sentinels included.
  [[nodiscard]] std::span<std::byte> storage() { return std::as_writable_bytes(std::span(bytes_)); }
  [[nodiscard]] std::int64_t size() const { return shape_[0] * shape_[1] * shape_[2] * shape_[3]; }

  void set(const std::vector<double>& values) {
    for (std::int64_t i = 0; i < size(); ++i) store(data(), dtype_, offset_of(i), values[i]);
  }
  /// Row-major values.
  [[nodiscard]] std::vector<double> values() {
    std::vector<double> result(size());
    for (std::int64_t i = 0; i < size(); ++i) result[i] = load(data(), dtype_, offset_of(i));
    return result;
  }
  /// True if nothing outside the tensor was written.
  [[nodiscard]] bool guards_intact() {
    std::vector<std::uint8_t> outside = bytes_;
    const std::int64_t width = bytes_of(dtype_);
    for (std::int64_t i = 0; i < size(); ++i) {
      std::fill_n(outside.begin() + (offset_ + offset_of(i)) * width, width, kSentinel);
    }
    return std::all_of(outside.begin(), outside.end(), [](auto x) { return x == kSentinel; });
  }

 private:
  static constexpr std::int64_t kGuard = 64;       // elements before and behind
  static constexpr std::uint8_t kSentinel = 0xFF;  // as a number: NaN in every type

  [[nodiscard]] void* data() { return bytes_.data() + offset_ * bytes_of(dtype_); }
  [[nodiscard]] std::int64_t offset_of(std::int64_t i) const {
    const std::int64_t c = i % shape_[3];
    const std::int64_t n = i / shape_[3] % shape_[2];
    const std::int64_t h = i / (shape_[3] * shape_[2]) % shape_[1];
    const std::int64_t b = i / (shape_[3] * shape_[2] * shape_[1]);
    return b * strides_[0] + h * strides_[1] + n * strides_[2] + c;
  }

  DType dtype_ = DType::kF32;
  Shape shape_{};
  Shape strides_{};
  std::int64_t offset_ = 0;
  std::vector<std::uint8_t> bytes_;
};

/// A plain array with a sentinel on either side.
template <typename T>
class Array {
 public:
  Array() = default;
  explicit Array(std::int64_t size) : size_(size), values_(size + 2 * kGuard, sentinel()) {}
  [[nodiscard]] T* data() { return size_ == 0 ? nullptr : values_.data() + kGuard; }
  [[nodiscard]] const T* data() const { return size_ == 0 ? nullptr : values_.data() + kGuard; }
  [[nodiscard]] std::span<std::byte> storage() {
    return std::as_writable_bytes(std::span(values_));
  }
  [[nodiscard]] std::int64_t size() const { return size_; }
  [[nodiscard]] T& operator[](std::int64_t i) { return data()[i]; }
  [[nodiscard]] std::vector<double> values() const { return {data(), data() + size_}; }
  [[nodiscard]] bool guards_intact() const {
    const auto is_sentinel = [](T x) { return x == sentinel(); };
    return std::all_of(values_.begin(),
                       values_.begin() + std::min<std::int64_t>(kGuard, std::ssize(values_)),
                       is_sentinel) &&
           std::all_of(values_.end() - std::min<std::int64_t>(kGuard, std::ssize(values_)),
                       values_.end(), is_sentinel);
  }

 private:
  static constexpr std::int64_t kGuard = 16;
  static constexpr T sentinel() { return static_cast<T>(-77777); }
  std::int64_t size_ = 0;
  std::vector<T> values_;
};

inline std::vector<double> random_normal(std::mt19937_64& generator, std::int64_t count,
                                         double deviation = 1) {
  std::normal_distribution<double> normal(0, deviation);
  std::vector<double> values(count);
  for (double& value : values) value = normal(generator);
  return values;
}

/// A problem of one batch element and one head; set what the test is about.
inline Problem small_problem(std::int64_t q_tokens, std::int64_t k_tokens, std::int64_t head_dim,
                             std::int64_t value_dim) {
  Problem problem;
  problem.q_tokens = q_tokens;
  problem.k_tokens = k_tokens;
  problem.head_dim = head_dim;
  problem.value_dim = value_dim;
  problem.config.block_q = 32;
  problem.config.block_k = 32;
  problem.config.keep = 0.4;
  problem.config.precision = Precision::kFp32;
  return problem;
}

/// Everything that one call reads and writes, random from a seed.
struct Call {
  Problem problem;
  std::vector<std::int64_t> key_lengths;
  Tensor q, k, v, d_out;
  std::vector<float> proj_q, proj_k, alpha_logit, proj_out;
  Tensor out, out_sparse, out_linear, d_q, d_k, d_v;
  Array<float> lse, k_mean, logits, d_alpha_logit, d_proj_q, d_proj_k, d_proj_out;
  Array<std::int32_t> blocks;
  bool workspaces_intact = true;  // no run wrote beside its workspace

  explicit Call(const Problem& of, std::uint64_t seed = 1, Layout layout = Layout::kDense,
                std::vector<std::int64_t> lengths = {})
      : problem(of), key_lengths(std::move(lengths)) {
    std::mt19937_64 generator(seed);
    const auto [B, H, Hkv, Nq, Nk] =
        std::array{of.batch, of.num_heads, of.num_kv_heads, of.q_tokens, of.k_tokens};
    const std::int64_t d = of.head_dim;
    const std::int64_t dv = of.value_dim;
    const auto tensor = [&](Shape shape) { return Tensor(of.dtype, shape, layout); };
    q = tensor({B, H, Nq, d});
    k = tensor({B, Hkv, Nk, d});
    v = tensor({B, Hkv, Nk, dv});
    d_out = tensor({B, H, Nq, dv});
    out = tensor({B, H, Nq, dv});
    out_sparse = tensor({B, H, Nq, dv});
    out_linear = tensor({B, H, Nq, dv});
    d_q = tensor({B, H, Nq, d});
    d_k = tensor({B, Hkv, Nk, d});
    d_v = tensor({B, Hkv, Nk, dv});
    q.set(random_normal(generator, q.size()));
    // Keys with a mean of their own, and blocks that differ: smoothing and routing have work to do.
    std::vector<double> keys = random_normal(generator, k.size());
    const std::vector<double> shift = random_normal(generator, Hkv * d * (Nk / 32 + 1));
    for (std::int64_t i = 0; i < k.size(); ++i) {
      keys[i] += 1 + shift[(i / d % Nk / 32 * Hkv + i / (d * Nk) % Hkv) * d + i % d];
    }
    k.set(keys);
    v.set(random_normal(generator, v.size()));
    d_out.set(random_normal(generator, d_out.size()));

    const auto floats = [&](std::int64_t count, double deviation) {
      const std::vector<double> values = random_normal(generator, count, deviation);
      return std::vector<float>(values.begin(), values.end());
    };
    lse = Array<float>(B * H * Nq);
    k_mean = Array<float>(B * Hkv * d);
    blocks = Array<std::int32_t>(B * H * num_q_blocks(of) * max_routed_blocks(of));
    const bool soft = of.config.routing == RoutingMode::kSoft;
    if (soft) logits = Array<float>(B * H * num_q_blocks(of) * num_k_blocks(of, Nk));
    if (of.config.method == Method::kSla) {
      proj_out = floats(dv * dv, 1 / std::sqrt(static_cast<double>(dv)));
      d_proj_out = Array<float>(dv * dv);
      return;
    }
    const std::int64_t router = of.num_routers * d * d;
    proj_q = floats(router, 1 / std::sqrt(static_cast<double>(d)));
    proj_k = floats(router, 1 / std::sqrt(static_cast<double>(d)));
    alpha_logit = floats(H * of.alpha_blocks, 1);
    d_alpha_logit = Array<float>(H * of.alpha_blocks);
    if (soft) {
      d_proj_q = Array<float>(router);
      d_proj_k = Array<float>(router);
    }
  }

  [[nodiscard]] Inputs inputs() {
    const auto pointer = [](const std::vector<float>& x) { return x.empty() ? nullptr : x.data(); };
    Inputs result;
    result.q = q.const_view();
    result.k = k.const_view();
    result.v = v.const_view();
    result.parameters = {pointer(proj_q), pointer(proj_k), pointer(alpha_logit), pointer(proj_out)};
    result.key_lengths = key_lengths.empty() ? nullptr : key_lengths.data();
    return result;
  }
  [[nodiscard]] Routing routing() { return {blocks.data(), logits.data()}; }
  [[nodiscard]] ConstRouting const_routing() { return {blocks.data(), logits.data()}; }
  [[nodiscard]] Outputs outputs() {
    return {out.view(), out_sparse.view(), out_linear.view(), lse.data(), k_mean.data(), routing()};
  }
  [[nodiscard]] Saved saved() {
    return {out_sparse.const_view(), out_linear.const_view(), lse.data(), k_mean.data(),
            const_routing()};
  }
  [[nodiscard]] Gradients gradients() {
    return {d_q.view(),      d_k.view(),      d_v.view(),       d_alpha_logit.data(),
            d_proj_q.data(), d_proj_k.data(), d_proj_out.data()};
  }
  [[nodiscard]] bool guards_intact() {
    return workspaces_intact && out.guards_intact() && out_sparse.guards_intact() &&
           out_linear.guards_intact() && d_q.guards_intact() && d_k.guards_intact() &&
           d_v.guards_intact() && lse.guards_intact() && k_mean.guards_intact() &&
           logits.guards_intact() && d_alpha_logit.guards_intact() && d_proj_q.guards_intact() &&
           d_proj_k.guards_intact() && d_proj_out.guards_intact() && blocks.guards_intact();
  }

  /// A workspace of NaN with sentinels on either side. It begins one byte above a multiple of 64,
  /// so that what the library aligns to 64 ends one byte before the sentinels.
  class Scratch {
   public:
    explicit Scratch(std::size_t bytes) : bytes_(bytes), storage_(bytes + 3 * kGuard, kSentinel) {}
    [[nodiscard]] std::span<std::byte> span() {
      return std::span(storage_).subspan(begin(), bytes_);
    }
    [[nodiscard]] bool guards_intact() const {
      const auto is_sentinel = [](std::byte x) { return x == kSentinel; };
      const auto at = static_cast<std::ptrdiff_t>(begin());
      const auto size = static_cast<std::ptrdiff_t>(bytes_);
      return std::all_of(storage_.begin(), storage_.begin() + at, is_sentinel) &&
             std::all_of(storage_.begin() + at + size, storage_.end(), is_sentinel);
    }

   private:
    static constexpr std::size_t kGuard = 512;  // more than any vector or tile store reaches
    static constexpr std::byte kSentinel{0xFF};
    [[nodiscard]] std::size_t begin() const {
      const auto address = reinterpret_cast<std::uintptr_t>(storage_.data()) + kGuard;
      return kGuard + (64 - address % 64) + 1;
    }
    std::size_t bytes_;
    std::vector<std::byte> storage_;
  };
  [[nodiscard]] Scratch workspace(Pass pass, std::int64_t num_threads) const {
    return Scratch(workspace_bytes(problem, pass, num_threads));
  }
  /// `given`: route by what `blocks` or `logits` hold, and leave them.
  void run_forward(Executor& executor, bool given = false) {
    Scratch scratch = workspace(Pass::kForward, executor.num_threads());
    Inputs in = inputs();
    Outputs to = outputs();
    if (given) {
      in.routing = const_routing();
      to.routing = {};
    }
    forward(problem, in, to, {executor, scratch.span()});
    workspaces_intact = workspaces_intact && scratch.guards_intact();
  }
  void run_backward(Executor& executor, bool given = false) {
    Scratch scratch = workspace(Pass::kBackward, executor.num_threads());
    Inputs in = inputs();
    if (given) in.routing = const_routing();
    backward(problem, in, saved(), d_out.const_view(), gradients(), {executor, scratch.span()});
    workspaces_intact = workspaces_intact && scratch.guards_intact();
  }

  template <typename Real>
  [[nodiscard]] reference::Operands<Real> operands() {
    return reference::make_operands<Real>(problem, inputs());
  }
};

/// v of +-65504, fp16's largest, under weights that all round up in fp16 but for the first key's:
/// it has weight 1, the others the middle between 1/2 and the next number and a little more. Sums
/// of such products are above 65520, which is Inf in fp16. For 256 keys, head size 16, keep 1.
inline void use_the_largest_fp16(Call& call) {
  const double weight = 0.5 + 0x1p-12 + 0x1p-15;
  const double dot = -std::log(weight) * std::sqrt(16.0);  // of q and the first key
  const double coarse = std::floor(dot / 2 * 512) / 512;
  std::vector<double> q(call.q.size(), 0.0), k(call.k.size(), 0.0), v(call.v.size());
  for (std::size_t at = 0; at < q.size(); at += 16) {
    q[at] = coarse;
    q[at + 1] = (dot - 2 * coarse) * 64;
  }
  k[0] = 2;  // its mean, over 256 keys, and what is left of it are exact in fp16
  k[1] = 1.0 / 64;
  for (std::size_t at = 0; at < v.size(); ++at) v[at] = at % 2 == 0 ? 65504 : -65504;
  call.q.set(q);
  call.k.set(k);
  call.v.set(v);
}

/// |a - b| / |b| in the Euclidean norm.
template <typename A, typename B>
[[nodiscard]] double relative_error(const std::vector<A>& a, const std::vector<B>& b) {
  double difference = 0;
  double norm = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    const double x = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    difference += x * x;
    norm += static_cast<double>(b[i]) * static_cast<double>(b[i]);
  }
  return std::sqrt(difference / std::max(norm, 1e-300));
}

/// The worst of the errors of `part` consecutive values (rows, blocks of rows), each relative to
/// the norm of those values, or to what such a part has on average if that is more: where a part
/// nearly vanishes, rounding goes by what cancelled in it.
template <typename A, typename B>
[[nodiscard]] double worst_part_error(const std::vector<A>& a, const std::vector<B>& b,
                                      std::size_t part) {
  double all = 0;
  for (const B x : b) all += static_cast<double>(x) * static_cast<double>(x);
  const double average = all * static_cast<double>(part) / static_cast<double>(b.size());
  double worst = 0;
  for (std::size_t first = 0; first < b.size(); first += part) {
    double difference = 0;
    double norm = 0;
    for (std::size_t i = first; i < std::min(first + part, b.size()); ++i) {
      const double x = static_cast<double>(a[i]) - static_cast<double>(b[i]);
      difference += x * x;
      norm += static_cast<double>(b[i]) * static_cast<double>(b[i]);
    }
    const double error = difference / std::max({norm, average, 1e-300});
    if (std::isnan(error)) return error;  // the worst of all
    worst = std::max(worst, error);
  }
  return std::sqrt(worst);
}

}  // namespace sla2::test
