#include "core/self_test_comparison.h"

#include <cmath>
#include <string>

#include "core/float16.h"
#include "core/message.h"
#include "reference/implementation.h"

namespace sla2 {
namespace {

Problem problem_of(const Case& test) {
  Problem p;
  p.batch = test.transposed ? 2 : 1;
  p.num_heads = 2;
  p.num_kv_heads = test.num_kv_heads;
  p.q_tokens = 150;
  p.k_tokens = 300;
  p.head_dim = test.head_dim;
  p.value_dim = test.value_dim == 0 ? test.head_dim : test.value_dim;
  p.dtype = test.dtype;
  p.config.block_q = 64;
  p.config.block_k = 32;
  p.config.keep = 0.3;
  p.config.precision = test.precision;
  p.config.routing = test.routing;
  p.config.method = test.method;
  if (test.router == Router::kOwn && test.method == Method::kSla2) {
    p.num_routers = p.num_heads;
    p.alpha_blocks = num_q_blocks(p);
  }
  return p;
}

double number_at(const std::vector<std::byte>& bytes, DType dtype, std::size_t at) {
  if (dtype == DType::kF32) {
    return static_cast<double>(reinterpret_cast<const float*>(bytes.data())[at]);
  }
  const std::uint16_t bits = reinterpret_cast<const std::uint16_t*>(bytes.data())[at];
  return static_cast<double>(dtype == DType::kBF16 ? from_bf16(bits) : from_fp16(bits));
}

std::size_t bytes_of_tensor(DType dtype, const std::array<std::int64_t, 4>& shape) {
  return static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3] * bytes_of(dtype));
}

/// Bytes of `count` numbers of four bytes, or none if the case has them not.
std::size_t words(bool present, std::int64_t count) {
  return present ? static_cast<std::size_t>(count) * 4 : 0;
}

}  // namespace

void Buffer::poison() {
  if (host_.empty()) return;
  const std::vector<std::byte> ones(host_.size(), std::byte{0xFF});
  machine_.upload(device<std::byte>(), ones.data(), ones.size());
}

std::vector<std::byte> Buffer::download() {
  std::vector<std::byte> copy(host_.size());
  machine_.download(copy.data(), device<std::byte>(), copy.size());
  return copy;
}

TensorBuffer::TensorBuffer(const Machine& machine, DType type, std::array<std::int64_t, 4> sizes,
                           bool transposed)
    : Buffer(machine, bytes_of_tensor(type, sizes)),
      dtype(type),
      shape(sizes),
      strides(dense_view(static_cast<void*>(nullptr), type, sizes).strides) {
  const auto [b, h, n, d] = sizes;
  if (transposed) strides = {n * h * d, d, h * d, 1};
}

View TensorBuffer::view(bool on_device) { return {at<void>(on_device), dtype, shape, strides}; }

Comparison::Comparison(const Implementation& implementation, const Case& test)
    : implementation_(implementation),
      machine_(*implementation.machine),
      test_(test),
      problem_(problem_of(test)),
      q_(machine_, test.dtype,
         {problem_.batch, problem_.num_heads, problem_.q_tokens, problem_.head_dim},
         test.transposed),
      k_(machine_, test.dtype,
         {problem_.batch, problem_.num_kv_heads, problem_.k_tokens, problem_.head_dim},
         test.transposed),
      v_(machine_, test.dtype,
         {problem_.batch, problem_.num_kv_heads, problem_.k_tokens, problem_.value_dim},
         test.transposed),
      d_out_(machine_, test.dtype,
             {problem_.batch, problem_.num_heads, problem_.q_tokens, problem_.value_dim},
             test.transposed),
      out_(machine_, test.dtype, d_out_.shape, test.transposed),
      out_sparse_(machine_, test.dtype, d_out_.shape, test.transposed),
      out_linear_(machine_, test.dtype, d_out_.shape, test.transposed),
      d_q_(machine_, test.dtype, q_.shape, test.transposed),
      d_k_(machine_, test.dtype, k_.shape, test.transposed),
      d_v_(machine_, test.dtype, v_.shape, test.transposed),
      lengths_(machine_, words(test.transposed, problem_.batch * 2)),
      lse_(machine_, words(true, problem_.batch * problem_.num_heads * problem_.q_tokens)),
      k_mean_(machine_, words(true, problem_.batch * problem_.num_kv_heads * problem_.head_dim)),
      blocks_(machine_, words(true, problem_.batch * problem_.num_heads * num_q_blocks(problem_) *
                                        max_routed_blocks(problem_))),
      logits_(machine_, words(test.routing == RoutingMode::kSoft,
                              problem_.batch * problem_.num_heads * num_q_blocks(problem_) *
                                  num_k_blocks(problem_, problem_.k_tokens))),
      proj_q_(machine_, words(problem_.num_routers > 1,
                              problem_.num_routers * problem_.head_dim * problem_.head_dim)),
      proj_k_(machine_, proj_q_.bytes().size()),
      alpha_logit_(machine_,
                   words(problem_.alpha_blocks > 1, problem_.num_heads * problem_.alpha_blocks)),
      proj_out_(machine_, words(test.router == Router::kOwn && test.method == Method::kSla,
                                problem_.value_dim * problem_.value_dim)),
      d_proj_q_(machine_,
                test.routing == RoutingMode::kSoft ? proj_q_.bytes().size() : std::size_t{0}),
      d_proj_k_(machine_, d_proj_q_.bytes().size()),
      d_alpha_logit_(machine_, alpha_logit_.bytes().size()),
      d_proj_out_(machine_, proj_out_.bytes().size()) {
  fill();
  SerialExecutor serial;
  const Context context{serial, {}, nullptr};
  reference::kReference.forward(problem_, inputs(false), outputs(false), context);
  reference::kReference.backward(problem_, inputs(false), saved(false),
                                 as_const(d_out_.view(false)), gradients(false), context);
}

/// Normal numbers, plus `shared` times the factor of the row's block of 32 (none: 1).
void Comparison::set(TensorBuffer& tensor, double shared, const std::vector<double>& by_block) {
  std::normal_distribution<double> normal;
  const auto [B, H, N, D] = tensor.shape;
  for (std::int64_t at = 0; at < B * H * N * D; ++at) {
    const std::int64_t n = at / D % N;
    const double factor = by_block.empty() ? 1 : by_block[static_cast<std::size_t>(n / 32)];
    const auto x = static_cast<float>(normal(generator_) + shared * factor);
    const std::int64_t to = at / (D * N * H) * tensor.strides[0] +
                            at / (D * N) % H * tensor.strides[1] + n * tensor.strides[2] + at % D;
    if (tensor.dtype == DType::kF32) {
      tensor.host<float>()[to] = x;
    } else {
      tensor.host<std::uint16_t>()[to] = tensor.dtype == DType::kBF16 ? to_bf16(x) : to_fp16(x);
    }
  }
}

void Comparison::fill() {
  // Routed by itself, the rows of a block must score far apart: queries along one direction, key
  // blocks along it by different amounts, in no order.
  const bool own = test_.router == Router::kOwn;
  set(q_, own ? 0.5 : 0.0, {});
  set(k_, own ? 0.5 : 0.0,
      own ? std::vector<double>{0.6, 1.8, 0.0, 1.2, 0.3, 1.5, 0.9, 2.1, 2.4, 2.7}
          : std::vector<double>{});
  set(v_, 0, {});
  set(d_out_, 0, {});
  std::normal_distribution<float> normal;
  const auto random = [&](Buffer& buffer, float deviation, std::int64_t identity_of) {
    for (std::size_t at = 0; at < buffer.bytes().size() / 4; ++at) {
      const auto i = static_cast<std::int64_t>(at);
      const bool on_diagonal = identity_of > 0 && i / identity_of % identity_of == i % identity_of;
      buffer.host<float>()[at] = deviation * normal(generator_) + (on_diagonal ? 1.0F : 0.0F);
    }
  };
  random(proj_q_, 0.01F, problem_.head_dim);
  random(proj_k_, 0.01F, problem_.head_dim);
  random(alpha_logit_, 1.0F, 0);
  random(proj_out_, 0.1F, 0);
  if (test_.transposed) {
    lengths_.host<std::int64_t>()[0] = problem_.k_tokens;
    lengths_.host<std::int64_t>()[1] = problem_.k_tokens - 75;  // in the middle of a block
  }
}

Inputs Comparison::inputs(bool on_device) {
  Inputs in;
  in.q = as_const(q_.view(on_device));
  in.k = as_const(k_.view(on_device));
  in.v = as_const(v_.view(on_device));
  in.parameters = {proj_q_.at<float>(on_device), proj_k_.at<float>(on_device),
                   alpha_logit_.at<float>(on_device), proj_out_.at<float>(on_device)};
  in.key_lengths = lengths_.at<std::int64_t>(on_device);
  return in;
}

Outputs Comparison::outputs(bool on_device) {
  return {out_.view(on_device),
          out_sparse_.view(on_device),
          out_linear_.view(on_device),
          lse_.at<float>(on_device),
          k_mean_.at<float>(on_device),
          {blocks_.at<std::int32_t>(on_device), logits_.at<float>(on_device)}};
}

Saved Comparison::saved(bool on_device) {
  const Outputs out = outputs(on_device);
  return {as_const(out.out_sparse),
          as_const(out.out_linear),
          out.lse,
          out.k_mean,
          {out.routing.blocks, out.routing.logits}};
}

Gradients Comparison::gradients(bool on_device) {
  return {d_q_.view(on_device),
          d_k_.view(on_device),
          d_v_.view(on_device),
          d_alpha_logit_.at<float>(on_device),
          d_proj_q_.at<float>(on_device),
          d_proj_k_.at<float>(on_device),
          d_proj_out_.at<float>(on_device)};
}

void Comparison::run_forward(const Problem& problem, const Context& context) {
  const bool own = test_.router == Router::kOwn;
  const bool soft = test_.routing == RoutingMode::kSoft;
  Inputs in = inputs(true);
  Outputs out = outputs(true);
  if (own) {
    blocks_.poison();
    logits_.poison();
  } else {  // near ties are not wrong
    in.routing = saved(true).routing;
    out.routing = {};
  }
  Buffer* const results[] = {&out_, &out_sparse_, &out_linear_, &lse_, &k_mean_};
  for (Buffer* const result : results) result->poison();
  implementation_.forward(problem, in, out, context);
  const double bound = test_.bounds.forward;
  if (own && !soft) compare_blocks();
  if (own && soft) compare("forward", "routing.logits", logits_, DType::kF32, bound);
  compare("forward", "out", out_, test_.dtype, bound);
  compare("forward", "out_sparse", out_sparse_, test_.dtype, bound);
  compare("forward", "out_linear", out_linear_, test_.dtype, bound);
  compare("forward", "lse", lse_, DType::kF32, bound);
  compare("forward", "k_mean", k_mean_, DType::kF32, bound);
}

void Comparison::run_backward(const Problem& problem, const Context& context) {
  // What the reference saved, not what the machine's forward left there.
  Buffer* const from_forward[] = {&out_sparse_, &out_linear_, &lse_, &k_mean_, &blocks_, &logits_};
  for (Buffer* const buffer : from_forward) {
    if (buffer->bytes().empty()) continue;
    machine_.upload(buffer->device<std::byte>(), buffer->bytes().data(), buffer->bytes().size());
  }
  struct Result {
    const char* name;
    Buffer& buffer;
    DType dtype;
    double bound;
  };
  const Bounds& bounds = test_.bounds;
  const Result results[] = {{"d_q", d_q_, test_.dtype, bounds.backward},
                            {"d_k", d_k_, test_.dtype, bounds.backward},
                            {"d_v", d_v_, test_.dtype, bounds.backward},
                            {"d_alpha_logit", d_alpha_logit_, DType::kF32, bounds.parameters},
                            {"d_proj_q", d_proj_q_, DType::kF32, bounds.parameters},
                            {"d_proj_k", d_proj_k_, DType::kF32, bounds.parameters},
                            {"d_proj_out", d_proj_out_, DType::kF32, bounds.parameters}};
  for (const Result& result : results) result.buffer.poison();
  implementation_.backward(problem, inputs(true), saved(true), as_const(d_out_.view(true)),
                           gradients(true), context);
  for (const Result& result : results) {
    compare("backward", result.name, result.buffer, result.dtype, result.bound);
  }
}

int Comparison::run() {
  Problem on_device = problem_;
  on_device.device = implementation_.device;
  int passes = 0;
  for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
    if (!implementation_.refusal(on_device, pass).empty()) continue;
    const std::size_t bytes = implementation_.workspace_bytes(on_device, pass, 1);
    Buffer scratch(machine_, bytes + 1);
    SerialExecutor serial;
    const Context context{serial, {scratch.device<std::byte>(), bytes}, nullptr};
    if (pass == Pass::kForward) {
      run_forward(on_device, context);
    } else {
      run_backward(on_device, context);
    }
    ++passes;
  }
  return passes;
}

void Comparison::compare(const char* pass, const char* what, Buffer& buffer, DType dtype,
                         double bound) {
  if (buffer.bytes().empty()) return;  // not part of the case
  const std::vector<std::byte> got = buffer.download();
  const std::size_t count = got.size() / static_cast<std::size_t>(bytes_of(dtype));
  double difference = 0;
  double norm = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const double wanted = number_at(buffer.bytes(), dtype, i);
    const double found = number_at(got, dtype, i);
    if (wanted == found) {  // infinities too: blocks behind a key length
      norm += std::isfinite(wanted) ? wanted * wanted : 0;
      continue;
    }
    difference += (found - wanted) * (found - wanted);
    norm += wanted * wanted;
  }
  const double error = difference == 0 ? 0 : std::sqrt(difference / norm);
  if (!(error <= bound)) fail(pass, what, bound, error);  // NaN too
}

void Comparison::compare_blocks() {
  const std::vector<std::byte> got = blocks_.download();
  const auto* const found = reinterpret_cast<const std::int32_t*>(got.data());
  double wrong = 0;
  for (std::size_t i = 0; i < got.size() / 4; ++i) {
    if (found[i] != blocks_.host<std::int32_t>()[i]) ++wrong;
  }
  if (wrong > 0)
    fail("forward", "routing.blocks", 0, wrong / (static_cast<double>(got.size()) / 4));
}

void Comparison::fail(const char* pass, const char* what, double bound, double error) const {
  throw Error(
      ErrorKind::kRuntime,
      message("self-test: ", implementation_.name, " ", pass, " (", test_.name, ") gives a wrong ",
              what, " on ", machine_.name(), ", driver ", machine_.driver(),
              ": relative error must be at most ", bound, ", got ", error));
}

}  // namespace sla2
