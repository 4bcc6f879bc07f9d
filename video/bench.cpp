#include "video/bench.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <functional>

#include <fmt/format.h>

#include "sla2/error.h"
#include "video/attention.h"
#include "video/device.h"

namespace sla2::video {

namespace {

using Clock = std::chrono::steady_clock;

// One thing to be timed; `prepare` runs outside the clock.
struct Case {
  std::string what, pass;
  double flops = 0;
  std::function<void()> prepare;
  std::function<void()> work;
  std::vector<double> seconds;
};

Quartiles quartiles(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const auto at = [&](double share) {
    return values[static_cast<std::size_t>(share * static_cast<double>(values.size() - 1) + 0.5)];
  };
  return {.q1 = at(0.25), .median = at(0.5), .q3 = at(0.75)};
}

// All cases in turns, so that a change of the machine's speed hits all of them.
void measure(std::vector<Case>& cases, std::int64_t repeats, Run& run) {
  const std::int64_t rounds = repeats + 1;  // the first one warms up
  run.progress.begin("measuring", rounds * static_cast<std::int64_t>(cases.size()));
  std::int64_t done = 0;
  for (std::int64_t round = 0; round < rounds; ++round) {
    for (Case& one : cases) {
      run.check_stop("measuring");
      if (one.prepare) one.prepare();
      synchronize(run.device);
      const auto start = Clock::now();
      one.work();
      synchronize(run.device);
      const std::chrono::duration<double> passed = Clock::now() - start;
      if (round > 0) one.seconds.push_back(passed.count());
      run.progress.update(++done);
    }
  }
  run.progress.end();
}

std::vector<BenchRow> rows_of(const std::vector<Case>& cases, const std::string& ours) {
  std::vector<BenchRow> rows;
  for (const Case& one : cases) {
    const Quartiles seconds = quartiles(one.seconds);
    rows.push_back({.what = one.what,
                    .pass = one.pass,
                    .seconds = seconds,
                    .tflops = one.flops / seconds.median * 1e-12,
                    .speed_up = 0});
  }
  for (BenchRow& row : rows) {
    for (const BenchRow& own : rows) {
      if (own.pass == row.pass && own.what.starts_with(ours)) {
        row.speed_up = row.seconds.median / own.seconds.median;
      }
    }
  }
  return rows;
}

// Selects the reference for as long as it lives.
class ReferenceOnly {
 public:
  ReferenceOnly() {
    if (const char* value = std::getenv(kName)) previous_ = value;
    setenv(kName, "reference", 1);
  }
  ~ReferenceOnly() {
    if (previous_) {
      setenv(kName, previous_->c_str(), 1);
    } else {
      unsetenv(kName);
    }
  }
  ReferenceOnly(const ReferenceOnly&) = delete;
  ReferenceOnly& operator=(const ReferenceOnly&) = delete;

 private:
  static constexpr const char* kName = "SLA2_IMPLEMENTATION";
  std::optional<std::string> previous_;
};

torch::Tensor random_input(const std::array<std::int64_t, 4>& shape, std::int64_t tokens,
                           std::int64_t which, const Run& run) {
  auto generator = make_generator(torch::kCPU, run.seed, kStreamEvaluate, which);
  return torch::randn({shape[0], shape[1], tokens, shape[3]}, generator, torch::kFloat32)
      .to(run.device);
}

// Both calls get one routing, so that near ties cannot make them differ.
double verify(const OpBenchOptions& options, const Run& run) {
  const torch::NoGradGuard no_grad;
  std::array<std::int64_t, 4> shape = options.shape;
  shape[0] = shape[1] = 1;
  const std::int64_t tokens = std::min<std::int64_t>(1024, shape[2]);
  const torch::Tensor q = random_input(shape, tokens, 0, run);
  const torch::Tensor k = random_input(shape, tokens, 1, run);
  const torch::Tensor v = random_input(shape, tokens, 2, run);
  nn::AttentionArguments arguments;
  arguments.given_blocks = nn::route(q, k, {}, options.config).blocks;
  const torch::Tensor got = nn::attention(q, k, v, arguments, options.config);
  const ReferenceOnly reference;
  const torch::Tensor want = nn::attention(q.cpu(), k.cpu(), v.cpu(), arguments, options.config);
  const double error = ((got.cpu().to(torch::kFloat64) - want.to(torch::kFloat64)).norm() /
                        want.to(torch::kFloat64).norm())
                           .item<double>();
  // The integers agree exactly; rounding p to 8 bits under another chunk maximum changes a weight
  // by up to half of 1/255 of the largest, bf16 products by 2^-8 each.
  const bool exact = options.config.precision == Precision::kFp32;
  const double bound = exact ? 1e-4 : 2e-2;
  if (!(error <= bound)) {
    throw Error(ErrorKind::kRuntime,
                fmt::format("the operator's result differs from the reference by {:.2e} (relative "
                            "L2), allowed {:.0e}",
                            error, bound));
  }
  return error;
}

}  // namespace

OpBenchResult bench_operator(const OpBenchOptions& options, Run& run) {
  const auto& shape = options.shape;
  OpBenchResult result;
  result.error = verify(options, run);
  const double forward_flops = 4.0 * static_cast<double>(shape[0] * shape[1]) *
                               static_cast<double>(shape[2]) * static_cast<double>(shape[2]) *
                               static_cast<double>(shape[3]);
  std::vector<Case> cases;
  using Attend = std::function<torch::Tensor(const torch::Tensor&, const torch::Tensor&,
                                             const torch::Tensor&)>;
  const auto add = [&](const std::string& what, torch::Dtype dtype, const Attend& attend) {
    std::array<torch::Tensor, 3> inputs;
    for (std::size_t i = 0; i < 3; ++i) {
      inputs[i] = random_input(shape, shape[2], static_cast<std::int64_t>(i), run).to(dtype);
    }
    auto leaves = std::make_shared<std::array<torch::Tensor, 3>>();
    for (std::size_t i = 0; i < 3; ++i)
      (*leaves)[i] = inputs[i].detach().clone().set_requires_grad(true);
    auto out = std::make_shared<torch::Tensor>();
    const torch::Tensor seed = random_input(shape, shape[2], 3, run).to(dtype);
    cases.push_back({.what = what,
                     .pass = "forward",
                     .flops = forward_flops,
                     .prepare = {},
                     .work =
                         [=] {
                           const torch::NoGradGuard no_grad;
                           attend(inputs[0], inputs[1], inputs[2]);
                         },
                     .seconds = {}});
    cases.push_back(
        {.what = what,
         .pass = "backward",
         .flops = 2.5 * forward_flops,
         .prepare = [=] { *out = attend((*leaves)[0], (*leaves)[1], (*leaves)[2]); },
         .work =
             [=] {
               torch::autograd::grad({*out}, {(*leaves)[0], (*leaves)[1], (*leaves)[2]}, {seed});
               out->reset();
             },
         .seconds = {}});
  };
  const Config config = options.config;
  add("sla2", torch::kFloat32, [config](const auto& q, const auto& k, const auto& v) {
    return nn::attention(q, k, v, {}, config);
  });
  const Attend full = [](const auto& q, const auto& k, const auto& v) {
    return at::scaled_dot_product_attention(q, k, v);
  };
  add("torch sdpa fp32", torch::kFloat32, full);
  add("torch sdpa bf16", torch::kBFloat16, full);
  measure(cases, options.repeats, run);
  result.rows = rows_of(cases, "sla2");
  return result;
}

std::vector<BenchRow> bench_model(Denoiser& denoiser, std::int64_t repeats, Run& run) {
  const torch::InferenceMode inference;
  std::vector<std::int64_t> shape = denoiser.sample_shape();
  shape.insert(shape.begin(), 1);
  const torch::Tensor x = seeded_noise(shape, run.seed, run.device);
  const torch::Tensor t = torch::full({1}, 0.5, x.options());
  const torch::Tensor text = denoiser.text_of_rows({denoiser.no_caption_row()});
  const std::int64_t layers = denoiser.transformer->config().num_layers;
  std::vector<nn::Attention> modules;
  for (std::int64_t i = 0; i < layers; ++i) modules.push_back(denoiser.transformer->attention(i));
  const auto set = [&](bool sparse) {
    for (std::int64_t i = 0; i < layers; ++i) {
      denoiser.transformer->set_attention(
          i, sparse ? modules[static_cast<std::size_t>(i)] : nn::Attention(nullptr));
    }
  };
  const auto step = [&] { denoiser.velocity(x, t, text); };
  std::vector<Case> cases;
  cases.push_back(
      {.what = "sla2", .pass = "step", .prepare = [&] { set(true); }, .work = step, .seconds = {}});
  cases.push_back({.what = "full",
                   .pass = "step",
                   .prepare = [&] { set(false); },
                   .work = step,
                   .seconds = {}});
  measure(cases, repeats, run);
  set(true);
  return rows_of(cases, "sla2");
}

}  // namespace sla2::video
