// Speed of the CUDA backend on random tensors, by CUDA events, the L2 cache flushed before every
// run: one JSON line a row. Links sla2 and the driver alone. cuda_bench --help.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "core/float16.h"
#include "cuda/backward_plan.h"
#include "cuda/stages.h"
#include "sla2/sla2.h"

namespace {

using namespace sla2;

constexpr const char* kUsage =
    "cuda_bench [--shape B,H,N,D] [--keep 0.03] [--repeats 20] [--pass forward|both]\n"
    "           [--precision int8|fp8|bf16|all] [--stages 0|1]\n";

struct Options {
  std::int64_t shape[4] = {1, 12, 32760, 128};
  double keep = 0.03;
  int repeats = 20;
  bool with_backward = true;
  bool with_stages = true;
  std::vector<Precision> precisions = {Precision::kInt8, Precision::kFp8, Precision::kBf16};
};

const char* name_of(Precision precision) {
  return precision == Precision::kInt8 ? "int8" : precision == Precision::kFp8 ? "fp8" : "bf16";
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--help") {
      std::fputs(kUsage, stdout);
      std::exit(0);
    }
    if (i + 1 == argc) throw Error("every option needs a value, got " + name + " without one");
    const std::string value = argv[++i];
    if (name == "--shape") {
      auto& s = options.shape;
      long long x[4];
      if (std::sscanf(value.c_str(), "%lld,%lld,%lld,%lld", x, x + 1, x + 2, x + 3) != 4) {
        throw Error("--shape must be B,H,N,D, got " + value);
      }
      std::copy_n(x, 4, s);
    } else if (name == "--keep") {
      options.keep = std::atof(value.c_str());
    } else if (name == "--repeats") {
      options.repeats = std::max(1, std::atoi(value.c_str()));
    } else if (name == "--pass") {
      options.with_backward = value == "both";
    } else if (name == "--stages") {
      options.with_stages = value != "0";
    } else if (name == "--precision") {
      const std::map<std::string, std::vector<Precision>> values = {{"int8", {Precision::kInt8}},
                                                                    {"fp8", {Precision::kFp8}},
                                                                    {"bf16", {Precision::kBf16}},
                                                                    {"all", options.precisions}};
      const auto found = values.find(value);
      if (found == values.end()) {
        throw Error("--precision must be int8, fp8, bf16 or all, got " + value);
      }
      options.precisions = found->second;
    } else {
      throw Error("unknown option " + name + "\n" + kUsage);
    }
  }
  return options;
}

/// Device memory for as long as it lives.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes) {
    cuda::check(cudaMalloc(&data_, std::max<std::size_t>(bytes, 1)), "memory of the benchmark");
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  template <typename T>
  [[nodiscard]] T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

/// About normal: the sum of four bytes of a counter's hash, as bf16.
std::vector<std::uint16_t> random_numbers(std::int64_t count, std::uint64_t seed) {
  std::vector<std::uint16_t> values(static_cast<std::size_t>(count));
  std::uint64_t state = seed;
  for (std::uint16_t& value : values) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    const std::uint64_t x = state >> 24;
    const auto sum =
        static_cast<float>((x & 255) + (x >> 8 & 255) + (x >> 16 & 255) + (x >> 24 & 255));
    value = to_bf16((sum - 510.0f) / 147.8f);
  }
  return values;
}

struct Quartiles {
  double median, low, high;
};
Quartiles quartiles(std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  return {samples[samples.size() / 2], samples[samples.size() / 4],
          samples[samples.size() * 3 / 4]};
}

/// Times of each of `steps`, in ms, in one run of all of them, `repeats` runs.
class Clock {
 public:
  Clock() : flush_(kFlushBytes) {}
  std::vector<Quartiles> measure(const std::vector<std::function<void()>>& steps, int repeats) {
    std::vector<cudaEvent_t> events(steps.size() + 1);
    for (cudaEvent_t& event : events) cuda::check(cudaEventCreate(&event), "event");
    std::vector<std::vector<double>> samples(steps.size());
    for (int run = -2; run < repeats; ++run) {  // two that do not count
      cuda::check(cudaMemsetAsync(flush_.as<void>(), run & 255, kFlushBytes), "flush");
      cuda::check(cudaEventRecord(events[0]), "event");
      for (std::size_t s = 0; s < steps.size(); ++s) {
        steps[s]();
        cuda::check(cudaEventRecord(events[s + 1]), "event");
      }
      cuda::check(cudaDeviceSynchronize(), "run");
      for (std::size_t s = 0; s < steps.size() && run >= 0; ++s) {
        float ms = 0;
        cuda::check(cudaEventElapsedTime(&ms, events[s], events[s + 1]), "time");
        samples[s].push_back(static_cast<double>(ms));
      }
    }
    for (const cudaEvent_t event : events) cudaEventDestroy(event);
    std::vector<Quartiles> result;
    for (const auto& of_step : samples) result.push_back(quartiles(of_step));
    return result;
  }
  /// Times of the stages of `call`, which tells the end of each.
  std::vector<Quartiles> measure_stages(
      const std::function<void(const std::function<void(const char*)>&)>& call, int repeats,
      std::vector<std::string>& names) {
    std::vector<cudaEvent_t> events(kMostStages + 1);
    for (cudaEvent_t& event : events) cuda::check(cudaEventCreate(&event), "event");
    std::vector<std::vector<double>> samples(kMostStages);
    for (int run = -2; run < repeats; ++run) {
      names.clear();
      cuda::check(cudaMemsetAsync(flush_.as<void>(), run & 255, kFlushBytes), "flush");
      cuda::check(cudaEventRecord(events[0]), "event");
      call([&](const char* stage) {
        names.emplace_back(stage);
        cuda::check(cudaEventRecord(events.at(names.size())), "event");
      });
      cuda::check(cudaDeviceSynchronize(), "run");
      for (std::size_t s = 0; s < names.size() && run >= 0; ++s) {
        float ms = 0;
        cuda::check(cudaEventElapsedTime(&ms, events[s], events[s + 1]), "time");
        samples[s].push_back(static_cast<double>(ms));
      }
    }
    for (const cudaEvent_t event : events) cudaEventDestroy(event);
    samples.resize(names.size());
    std::vector<Quartiles> result;
    for (const auto& of_stage : samples) result.push_back(quartiles(of_stage));
    return result;
  }

 private:
  static constexpr std::size_t kMostStages = 16;
  static constexpr std::size_t kFlushBytes = std::size_t{256} << 20;
  Buffer flush_;
};

/// Everything that one problem reads and writes.
struct Tensors {
  Problem problem;
  std::vector<std::int64_t> sizes;
  Buffer q, k, v, d_out, out, out_sparse, out_linear, d_q, d_k, d_v, lse, k_mean, blocks, alpha,
      d_alpha;
  static std::size_t elements(const Problem& p) {
    return static_cast<std::size_t>(p.batch * p.num_heads * p.q_tokens * p.head_dim);
  }
  static std::size_t query_blocks(const Problem& p) {
    return static_cast<std::size_t>(p.batch * p.num_heads * num_q_blocks(p));
  }
  explicit Tensors(const Problem& p)
      : problem(p),
        q(elements(p) * 2),
        k(elements(p) * 2),
        v(elements(p) * 2),
        d_out(elements(p) * 2),
        out(elements(p) * 2),
        out_sparse(elements(p) * 2),
        out_linear(elements(p) * 2),
        d_q(elements(p) * 2),
        d_k(elements(p) * 2),
        d_v(elements(p) * 2),
        lse(elements(p) * 4 / static_cast<std::size_t>(p.head_dim)),
        k_mean(static_cast<std::size_t>(p.batch * p.num_kv_heads * p.head_dim) * 4),
        blocks(query_blocks(p) * static_cast<std::size_t>(max_routed_blocks(p)) * 4),
        alpha(static_cast<std::size_t>(p.num_heads * p.alpha_blocks) * 4),
        d_alpha(static_cast<std::size_t>(p.num_heads * p.alpha_blocks) * 4) {
    cuda::check(cudaMemset(alpha.as<void>(), 0, static_cast<std::size_t>(p.num_heads) * 4),
                "alpha");
    std::uint64_t seed = 1;
    for (const Buffer* buffer : {&q, &k, &v, &d_out}) {
      const auto values = random_numbers(static_cast<std::int64_t>(elements(p)), seed++);
      cuda::check(
          cudaMemcpy(buffer->as<void>(), values.data(), values.size() * 2, cudaMemcpyHostToDevice),
          "inputs");
    }
  }
  [[nodiscard]] View view(const Buffer& buffer) const {
    return dense_view(buffer.as<void>(), problem.dtype,
                      {problem.batch, problem.num_heads, problem.q_tokens, problem.head_dim});
  }
  [[nodiscard]] Inputs inputs() const {
    Inputs in;
    in.q = as_const(view(q));
    in.k = as_const(view(k));
    in.v = as_const(view(v));
    in.parameters.alpha_logit = alpha.as<float>();
    return in;
  }
  /// As in training: everything that the backward needs.
  [[nodiscard]] Outputs saved_outputs() const {
    return {view(out),       view(out_sparse),   view(out_linear),
            lse.as<float>(), k_mean.as<float>(), {blocks.as<std::int32_t>(), nullptr}};
  }
  [[nodiscard]] Saved saved() const {
    return {as_const(view(out_sparse)),
            as_const(view(out_linear)),
            lse.as<float>(),
            k_mean.as<float>(),
            {blocks.as<std::int32_t>(), nullptr}};
  }
};

void print_row(const Options& o, const char* pass, const char* precision, const Quartiles& time,
               double workspace_mib, const std::string& stages) {
  const double flops = 4.0 * static_cast<double>(o.shape[0] * o.shape[1] * o.shape[2]) *
                       static_cast<double>(o.shape[2] * o.shape[3]) *
                       (std::string(pass) == "backward" ? 2.5 : 1.0);
  std::printf(
      "{\"name\": \"op\", \"impl\": \"cuda\", \"pass\": \"%s\", \"shape\": [%lld, %lld, %lld, "
      "%lld], \"keep\": %g, \"precision\": \"%s\", \"ms_median\": %.4f, \"ms_q1\": %.4f, "
      "\"ms_q3\": %.4f, \"effective_tflops\": %.1f, \"workspace_mib\": %.0f%s}\n",
      pass, static_cast<long long>(o.shape[0]), static_cast<long long>(o.shape[1]),
      static_cast<long long>(o.shape[2]), static_cast<long long>(o.shape[3]), o.keep, precision,
      time.median, time.low, time.high, flops / (time.median * 1e-3) * 1e-12, workspace_mib,
      stages.c_str());
  std::fflush(stdout);
}

std::string stage_text(const std::vector<std::string>& names, const std::vector<Quartiles>& times) {
  std::string text = ", \"stages_ms\": {";
  for (std::size_t s = 0; s < names.size(); ++s) {
    char number[64];
    std::snprintf(number, sizeof number, "%s\"%s\": %.4f", s == 0 ? "" : ", ", names[s].c_str(),
                  times[s].median);
    text += number;
  }
  return text + "}";
}

void bench_forward(const Options& options, const Tensors& tensors, Clock& clock) {
  const Problem& p = tensors.problem;
  SerialExecutor serial;
  const std::size_t bytes = workspace_bytes(p, Pass::kForward, 1);
  const Buffer workspace(bytes);
  const Context context{serial, {workspace.as<std::byte>(), bytes}, nullptr};
  const Inputs inputs = tensors.inputs();
  Outputs inference;
  inference.out = tensors.view(tensors.out);
  const Outputs training = tensors.saved_outputs();
  std::string stages;
  if (options.with_stages) {
    const cuda::Call call = cuda::make_forward(p, inputs, inference, workspace.as<std::byte>());
    std::vector<std::string> names;
    std::vector<std::function<void()>> steps;
    for (const cuda::Stage& stage : cuda::forward_stages(call)) {
      names.emplace_back(stage.name);
      steps.emplace_back([stage, &call] { stage.run(call, nullptr); });
    }
    stages = stage_text(names, clock.measure(steps, options.repeats));
  }
  const auto whole =
      clock.measure({[&] { forward(p, inputs, inference, context); }}, options.repeats);
  const auto mib = static_cast<double>(bytes) / 1048576.0;
  print_row(options, "forward", name_of(p.config.precision), whole[0], mib, stages);
  const auto with_saved =
      clock.measure({[&] { forward(p, inputs, training, context); }}, options.repeats);
  print_row(options, "forward_saving", name_of(p.config.precision), with_saved[0], mib, "");
}

void bench_backward(const Options& options, const Tensors& tensors, Clock& clock) {
  const Problem& p = tensors.problem;
  SerialExecutor serial;
  const std::size_t bytes = workspace_bytes(p, Pass::kBackward, 1);
  const Buffer workspace(bytes);
  const Context context{serial, {workspace.as<std::byte>(), bytes}, nullptr};
  const Inputs inputs = tensors.inputs();
  Gradients gradients;
  gradients.d_q = tensors.view(tensors.d_q);
  gradients.d_k = tensors.view(tensors.d_k);
  gradients.d_v = tensors.view(tensors.d_v);
  gradients.d_alpha_logit = tensors.d_alpha.as<float>();
  const ConstView d_out = as_const(tensors.view(tensors.d_out));
  std::string stages;
  if (options.with_stages) {
    std::vector<std::string> names;
    const std::vector<Quartiles> times = clock.measure_stages(
        [&](const std::function<void(const char*)>& after_stage) {
          const Context timed{serial, {workspace.as<std::byte>(), bytes}, nullptr, &after_stage};
          backward(p, inputs, tensors.saved(), d_out, gradients, timed);
        },
        options.repeats, names);
    stages = stage_text(names, times);
  }
  const auto whole = clock.measure(
      {[&] { backward(p, inputs, tensors.saved(), d_out, gradients, context); }}, options.repeats);
  print_row(options, "backward", "bf16", whole[0], static_cast<double>(bytes) / 1048576.0, stages);
}

void run(const Options& options) {
  int device = 0;
  cudaDeviceProp properties;
  cuda::check(cudaGetDevice(&device), "device");
  cuda::check(cudaGetDeviceProperties(&properties, device), "device");
  int driver = 0;
  cuda::check(cudaDriverGetVersion(&driver), "driver");
  std::printf(
      "{\"name\": \"machine\", \"gpu\": \"%s\", \"capability\": \"%d.%d\", \"driver\": %d}\n",
      properties.name, properties.major, properties.minor, driver);
  Problem p;
  p.device = Device::kCuda;
  p.dtype = DType::kBF16;
  p.batch = options.shape[0];
  p.num_heads = p.num_kv_heads = options.shape[1];
  p.q_tokens = p.k_tokens = options.shape[2];
  p.head_dim = p.value_dim = options.shape[3];
  p.config.keep = options.keep;
  p.config.precision = options.precisions.front();
  validate(p);
  Tensors tensors(p);
  Clock clock;
  for (const Precision precision : options.precisions) {
    tensors.problem.config.precision = precision;
    bench_forward(options, tensors, clock);
  }
  if (options.with_backward) bench_backward(options, tensors, clock);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cuda_bench: %s\n", error.what());
    return 1;
  }
}
