#include "video/bench.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <ATen/Context.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <fmt/format.h>

#include "bench/rivals.h"
#include "sla2/sla2.h"
#include "torch_ops/cuda_stream.h"
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
  std::function<double()> clocked;  // instead of work: runs in another process, which times it
  std::vector<double> seconds;
};

Quartiles quartiles(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const auto at = [&](double share) {
    return values[static_cast<std::size_t>(share * static_cast<double>(values.size() - 1) + 0.5)];
  };
  return {.q1 = at(0.25), .median = at(0.5), .q3 = at(0.75)};
}

// More than any GPU's second-level cache holds.
constexpr std::int64_t kFlushBytes = std::int64_t{256} << 20;

// Times work by the device's events on a GPU, the L2 cache flushed before, and by the clock else.
class Timer {
 public:
  explicit Timer(torch::Device device) : device_(device) {
    if (device.is_cuda()) {
      flush_ = torch::empty({kFlushBytes}, torch::dtype(torch::kUInt8).device(device));
    }
  }
  double seconds(const std::function<void()>& work) {
    if (!device_.is_cuda()) {
      const auto start = Clock::now();
      work();
      return std::chrono::duration<double>(Clock::now() - start).count();
    }
    flush_.zero_();
    const c10::Event start = mark();
    work();
    const c10::Event end = mark();
    synchronize(device_);
    return start.elapsedTime(end) * 1e-3;
  }
  // An event on the current stream.
  [[nodiscard]] c10::Event mark() const {
    c10::Event event(c10::DeviceType::CUDA, c10::EventFlag::BACKEND_DEFAULT);
    event.record(c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getStream(device_));
    return event;
  }
  void flush() { flush_.zero_(); }

 private:
  torch::Device device_;
  torch::Tensor flush_;
};

// All cases in turns, so that a change of the machine's speed hits all of them.
void measure(std::vector<Case>& cases, std::int64_t repeats, Run& run) {
  const std::int64_t rounds = repeats + 1;  // the first one warms up
  Timer timer(run.device);
  run.progress.begin("measuring", rounds * static_cast<std::int64_t>(cases.size()));
  std::int64_t done = 0;
  for (std::int64_t round = 0; round < rounds; ++round) {
    for (Case& one : cases) {
      run.check_stop("measuring");
      if (one.prepare) one.prepare();
      synchronize(run.device);
      const double seconds = one.clocked ? one.clocked() : timer.seconds(one.work);
      if (round > 0) one.seconds.push_back(seconds);
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

// Flash attention or cuDNN's, and no other, for as long as it lives.
class SdpaChoice {
 public:
  explicit SdpaChoice(bool flash) { set(flash, !flash, false); }
  ~SdpaChoice() { set(true, true, true); }
  SdpaChoice(const SdpaChoice&) = delete;
  SdpaChoice& operator=(const SdpaChoice&) = delete;

 private:
  static void set(bool flash, bool cudnn, bool others) {
    at::Context& context = at::globalContext();
    context.setSDPUseFlash(flash);
    context.setSDPUseCuDNN(cudnn);
    context.setSDPUseMemEfficient(others);
    context.setSDPUseMath(others);
  }
};

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
  arguments.given_blocks = arguments.given_blocks.cpu();
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

DType dtype_of(const torch::Tensor& tensor) {
  return tensor.scalar_type() == torch::kBFloat16 ? DType::kBF16 : DType::kF32;
}
View view_of(const torch::Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return dense_view(tensor.mutable_data_ptr(), dtype_of(tensor),
                    {sizes[0], sizes[1], sizes[2], sizes[3]});
}

std::string label_of(Pass pass) { return pass == Pass::kBackward ? "backward" : "forward"; }

// The library called without torch's operators, its stages timed one by one.
std::vector<StageTime> time_stages(const OpBenchOptions& options, Run& run) {
  const c10::DeviceGuard guard(run.device);
  const auto& shape = options.shape;
  Problem problem;
  problem.batch = shape[0];
  problem.num_heads = problem.num_kv_heads = shape[1];
  problem.q_tokens = problem.k_tokens = shape[2];
  problem.head_dim = problem.value_dim = shape[3];
  problem.dtype = DType::kBF16;
  problem.device = Device::kCuda;
  problem.config = options.config;
  std::vector<torch::Tensor> tensors;  // q, k, v, d_out, then results
  for (std::int64_t i = 0; i < 4; ++i) {
    tensors.push_back(random_input(shape, shape[2], i, run).to(torch::kBFloat16));
  }
  for (int i = 0; i < 6; ++i) tensors.push_back(torch::empty_like(tensors[0]));
  const auto f32 = torch::dtype(torch::kFloat32).device(run.device);
  const torch::Tensor lse = torch::empty({shape[0], shape[1], shape[2]}, f32);
  const torch::Tensor k_mean = torch::empty({shape[0], shape[1], shape[3]}, f32);
  const torch::Tensor blocks =
      torch::empty({shape[0], shape[1], num_q_blocks(problem), max_routed_blocks(problem)},
                   f32.dtype(torch::kInt32));
  const std::size_t bytes = std::max(workspace_bytes(problem, Pass::kForward, 1),
                                     workspace_bytes(problem, Pass::kBackward, 1));
  const torch::Tensor workspace =
      torch::empty({static_cast<std::int64_t>(bytes)}, f32.dtype(torch::kUInt8));

  Timer timer(run.device);
  std::vector<std::pair<std::string, c10::Event>> marks;
  const std::function<void(const char*)> after_stage = [&](const char* stage) {
    marks.emplace_back(stage, timer.mark());
  };
  SerialExecutor serial;
  const Context context{.executor = serial,
                        .workspace = {static_cast<std::byte*>(workspace.mutable_data_ptr()), bytes},
                        .stream = torch_ops::current_cuda_stream(run.device.index()),
                        .after_stage = &after_stage};
  Inputs inputs;
  inputs.q = as_const(view_of(tensors[0]));
  inputs.k = as_const(view_of(tensors[1]));
  inputs.v = as_const(view_of(tensors[2]));
  const Outputs outputs{view_of(tensors[4]),
                        view_of(tensors[5]),
                        view_of(tensors[6]),
                        lse.mutable_data_ptr<float>(),
                        k_mean.mutable_data_ptr<float>(),
                        {blocks.mutable_data_ptr<std::int32_t>(), nullptr}};
  const Saved saved{as_const(outputs.out_sparse),
                    as_const(outputs.out_linear),
                    outputs.lse,
                    outputs.k_mean,
                    {outputs.routing.blocks, nullptr}};
  Gradients gradients;
  gradients.d_q = view_of(tensors[7]);
  gradients.d_k = view_of(tensors[8]);
  gradients.d_v = view_of(tensors[9]);

  forward(problem, inputs, outputs,
          {.executor = serial,
           .workspace = context.workspace,
           .stream = context.stream});  // what the backward reads
  std::vector<StageTime> stages;
  std::vector<std::vector<double>> samples;
  for (std::int64_t round = 0; round <= options.repeats; ++round) {
    std::size_t at = 0;
    for (const Pass pass : options.passes) {
      marks.clear();
      timer.flush();
      marks.emplace_back("", timer.mark());
      if (pass == Pass::kForward) {
        forward(problem, inputs, outputs, context);
      } else {
        backward(problem, inputs, saved, as_const(view_of(tensors[3])), gradients, context);
      }
      synchronize(run.device);
      for (std::size_t i = 1; i < marks.size(); ++i, ++at) {
        if (at == stages.size()) {
          stages.push_back({.pass = label_of(pass), .stage = marks[i].first, .seconds = {}});
          samples.emplace_back();
        }
        if (round > 0) {
          samples[at].push_back(marks[i - 1].second.elapsedTime(marks[i].second) * 1e-3);
        }
      }
    }
  }
  for (std::size_t i = 0; i < stages.size(); ++i) stages[i].seconds = quartiles(samples[i]);
  return stages;
}

// FlexAttention's cases, forward and backward, or the reason why there is none.
void add_flex(const OpBenchOptions& options, double forward_flops, bench::Rivals& rivals,
              std::vector<Case>& cases, OpBenchResult& result, Run& run) {
  const auto& shape = options.shape;
  Problem problem;  // what FlexAttention is told of it
  problem.batch = shape[0];
  problem.num_heads = problem.num_kv_heads = shape[1];
  problem.q_tokens = problem.k_tokens = shape[2];
  problem.head_dim = problem.value_dim = shape[3];
  problem.config = options.config;
  problem.config.block_q = problem.config.block_k = 128;  // the fastest that it has
  const std::string name = "flex_attention_bf16";
  if (!rivals.reason().empty()) {
    result.left_out.push_back({name, rivals.reason()});
    return;
  }
  std::vector<std::int32_t> blocks;
  {
    const torch::NoGradGuard no_grad;
    const torch::Tensor q = random_input(shape, shape[2], 0, run).to(torch::kBFloat16);
    const torch::Tensor k = random_input(shape, shape[2], 1, run).to(torch::kBFloat16);
    const torch::Tensor table = nn::route(q, k, {}, problem.config).blocks.cpu().contiguous();
    const auto* first = table.const_data_ptr<std::int32_t>();
    blocks.assign(first, first + table.numel());
  }
  for (const Pass pass : options.passes) {
    const bool backward = pass == Pass::kBackward;
    const std::string label = label_of(pass);
    run.check_stop("measuring");
    const std::string reason = rivals.prepare(label, name, pass, problem, 1, blocks);
    if (!reason.empty()) {
      result.left_out.push_back({name + " " + label, reason});
      continue;
    }
    result.rivals_torch = rivals.torch_version();
    cases.push_back({.what = name,
                     .pass = label,
                     .flops = (backward ? 2.5 : 1.0) * forward_flops,
                     .prepare = {},
                     .work = {},
                     .clocked = [&rivals, label] { return rivals.run(label); },
                     .seconds = {}});
  }
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
    auto leaves = std::make_shared<std::array<torch::Tensor, 3>>();
    for (std::size_t i = 0; i < 3; ++i) {
      (*leaves)[i] = random_input(shape, shape[2], static_cast<std::int64_t>(i), run).to(dtype);
      (*leaves)[i].set_requires_grad(true);
    }
    auto out = std::make_shared<torch::Tensor>();
    const torch::Tensor seed = random_input(shape, shape[2], 3, run).to(dtype);
    const auto attended = [=] { return attend((*leaves)[0], (*leaves)[1], (*leaves)[2]); };
    for (const Pass pass : options.passes) {
      Case one{.what = what,
               .pass = label_of(pass),
               .flops = (pass == Pass::kBackward ? 2.5 : 1.0) * forward_flops,
               .prepare = {},
               .work = {},
               .clocked = {},
               .seconds = {}};
      if (pass == Pass::kForward) {
        one.work = [=] {
          const torch::NoGradGuard no_grad;
          attended();
        };
      } else {
        one.prepare = [=] { *out = attended(); };
        one.work = [=] {
          torch::autograd::grad({*out}, {(*leaves)[0], (*leaves)[1], (*leaves)[2]}, {seed});
          out->reset();
        };
      }
      cases.push_back(std::move(one));
    }
  };
  // A rival that this torch or this GPU lacks is left out, with what it said.
  const auto add_rival = [&](const std::string& what, const Attend& attend) {
    const auto before = cases.size();
    add(what, torch::kBFloat16, attend);
    for (auto one = cases.begin() + static_cast<std::ptrdiff_t>(before); one != cases.end();) {
      try {
        if (one->prepare) one->prepare();
        one->work();
        synchronize(run.device);
        ++one;
      } catch (const c10::Error& error) {
        result.left_out.push_back({what + " " + one->pass, error.what_without_backtrace()});
        one = cases.erase(one);
      }
    }
  };
  const Config config = options.config;
  const Attend ours = [config](const auto& q, const auto& k, const auto& v) {
    return nn::attention(q, k, v, {}, config);
  };
  const Attend full = [](const auto& q, const auto& k, const auto& v) {
    return at::scaled_dot_product_attention(q, k, v);
  };
  const auto only = [&](bool flash) -> Attend {
    return [=](const auto& q, const auto& k, const auto& v) {
      const SdpaChoice choice(flash);
      return full(q, k, v);
    };
  };
  add("sla2", torch::kBFloat16, ours);
  std::unique_ptr<bench::Rivals> rivals;
  if (options.rivals) {
    add_rival("torch flash bf16", only(true));
    add_rival("torch cudnn bf16", only(false));
    rivals = std::make_unique<bench::Rivals>("", run.device.str(),
                                             [&run] { run.check_stop("measuring"); });
    add_flex(options, forward_flops, *rivals, cases, result, run);
  }
  measure(cases, options.repeats, run);
  result.stages = time_stages(options, run);
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
  cases.push_back({.what = "sla2",
                   .pass = "step",
                   .prepare = [&] { set(true); },
                   .work = step,
                   .clocked = {},
                   .seconds = {}});
  cases.push_back({.what = "full",
                   .pass = "step",
                   .prepare = [&] { set(false); },
                   .work = step,
                   .clocked = {},
                   .seconds = {}});
  measure(cases, repeats, run);
  set(true);
  return rows_of(cases, "sla2");
}

}  // namespace sla2::video
