#include "sla2/self_test.h"

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "core/float16.h"
#include "core/message.h"
#include "reference/implementation.h"

namespace sla2 {
namespace {

namespace fs = std::filesystem;

/// Relative L2 errors that no right kernel comes near; a wrong one is off by tens of percent.
struct Bounds {
  double forward, backward;
};

struct Case {
  const char* name;
  Precision precision;
  DType dtype;
  RoutingMode routing;
  std::int64_t head_dim;
  Bounds bounds;
};
constexpr std::array kCases = {
    Case{"int8, bf16, head size 128",
         Precision::kInt8,
         DType::kBF16,
         RoutingMode::kHard,
         128,
         {0.03, 0.03}},
    Case{"int8, fp16, head size 64",
         Precision::kInt8,
         DType::kF16,
         RoutingMode::kHard,
         64,
         {0.03, 0.03}},
    Case{"fp8, bf16, head size 128",
         Precision::kFp8,
         DType::kBF16,
         RoutingMode::kHard,
         128,
         {0.06, 0.03}},
    Case{"bf16, head size 128",
         Precision::kBf16,
         DType::kBF16,
         RoutingMode::kHard,
         128,
         {0.03, 0.03}},
    Case{"bf16, soft routing, head size 64",
         Precision::kBf16,
         DType::kBF16,
         RoutingMode::kSoft,
         64,
         {0.03, 0.03}},
    Case{"int8, bf16, head size 256",
         Precision::kInt8,
         DType::kBF16,
         RoutingMode::kHard,
         256,
         {0.03, 0.03}},
    Case{"fp32, head size 64", Precision::kFp32, DType::kF32, RoutingMode::kHard, 64, {1e-4, 1e-3}},
};

Problem problem_of(const Case& test) {
  Problem p;
  p.num_heads = p.num_kv_heads = 2;
  p.q_tokens = 150;
  p.k_tokens = 300;
  p.head_dim = p.value_dim = test.head_dim;
  p.dtype = test.dtype;
  p.config.block_q = 64;
  p.config.block_k = 32;
  p.config.keep = 0.3;
  p.config.precision = test.precision;
  p.config.routing = test.routing;
  return p;
}

/// Bytes on the host and, once asked for, a copy on the machine.
class Buffer {
 public:
  Buffer(const Machine& machine, std::size_t bytes) : machine_(machine), host_(bytes) {}
  ~Buffer() {
    if (device_ != nullptr) machine_.release(device_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <typename T>
  [[nodiscard]] T* host() {
    return reinterpret_cast<T*>(host_.data());
  }
  template <typename T>
  [[nodiscard]] T* device() {
    if (device_ == nullptr) {
      device_ = machine_.allocate(host_.size());
      machine_.upload(device_, host_.data(), host_.size());
    }
    return static_cast<T*>(device_);
  }
  /// Makes the copy on the machine NaN: what is not written shows.
  void poison() {
    const std::vector<std::byte> ones(host_.size(), std::byte{0xFF});
    machine_.upload(device<std::byte>(), ones.data(), ones.size());
  }
  void download(std::vector<std::byte>& to) const {
    to.resize(host_.size());
    machine_.download(to.data(), device_, to.size());
  }
  [[nodiscard]] const std::vector<std::byte>& bytes() const { return host_; }

 private:
  const Machine& machine_;
  std::vector<std::byte> host_;
  void* device_ = nullptr;
};

double number_at(const std::vector<std::byte>& bytes, DType dtype, std::size_t at) {
  if (dtype == DType::kF32) {
    return static_cast<double>(reinterpret_cast<const float*>(bytes.data())[at]);
  }
  const std::uint16_t bits = reinterpret_cast<const std::uint16_t*>(bytes.data())[at];
  return static_cast<double>(dtype == DType::kBF16 ? from_bf16(bits) : from_fp16(bits));
}

/// One case: its arrays, the reference's results in them, the machine's compared with those.
class Comparison {
 public:
  Comparison(const Implementation& implementation, const Case& test)
      : implementation_(implementation),
        machine_(*implementation.machine),
        test_(test),
        problem_(problem_of(test)) {
    fill(q_, 1.0);
    fill(k_, 1.0);
    fill(v_, 1.0);
    fill(d_out_, 1.0);
    reference::kReference.forward(problem_, inputs(false), outputs(false), context(nullptr, 0));
    reference::kReference.backward(problem_, inputs(false), saved(false), view(d_out_, false),
                                   gradients(false), context(nullptr, 0));
  }

  /// How many passes ran.
  int run() {
    Problem on_device = problem_;
    on_device.device = implementation_.device;
    for (Buffer* const result : {&out_, &d_q_, &d_k_, &d_v_}) result->poison();
    int passes = 0;
    for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
      if (!implementation_.refusal(on_device, pass).empty()) continue;
      const std::size_t bytes = implementation_.workspace_bytes(on_device, pass, 1);
      Buffer scratch(machine_, bytes + 1);
      const Context here = context(scratch.device<std::byte>(), bytes);
      if (pass == Pass::kForward) {
        Inputs in = inputs(true);
        in.routing = saved(true).routing;  // the reference's: near ties are not wrong
        Outputs out = outputs(true);
        out.routing = {};
        implementation_.forward(on_device, in, out, here);
        compare("forward", "out", out_, test_.bounds.forward);
      } else {
        implementation_.backward(on_device, inputs(true), saved(true), view(d_out_, true),
                                 gradients(true), here);
        compare("backward", "d_q", d_q_, test_.bounds.backward);
        compare("backward", "d_k", d_k_, test_.bounds.backward);
        compare("backward", "d_v", d_v_, test_.bounds.backward);
      }
      ++passes;
    }
    return passes;
  }

 private:
  [[nodiscard]] std::size_t elements(std::int64_t tokens) const {
    return static_cast<std::size_t>(problem_.num_heads * tokens * problem_.head_dim);
  }
  [[nodiscard]] std::size_t tensor_bytes(std::int64_t tokens) const {
    return elements(tokens) * static_cast<std::size_t>(bytes_of(problem_.dtype));
  }
  [[nodiscard]] std::size_t rows(std::int64_t width) const {
    return static_cast<std::size_t>(problem_.num_heads * width) * 4;
  }

  void fill(Buffer& buffer, double deviation) {
    std::normal_distribution<float> normal(0.0F, static_cast<float>(deviation));
    const std::size_t count =
        buffer.bytes().size() / static_cast<std::size_t>(bytes_of(problem_.dtype));
    for (std::size_t i = 0; i < count; ++i) {
      const float x = normal(generator_);
      if (problem_.dtype == DType::kF32) {
        buffer.host<float>()[i] = x;
      } else {
        buffer.host<std::uint16_t>()[i] = problem_.dtype == DType::kBF16 ? to_bf16(x) : to_fp16(x);
      }
    }
  }

  [[nodiscard]] View mutable_view(Buffer& buffer, bool device) const {
    void* const data = device ? buffer.device<void>() : buffer.host<void>();
    const std::int64_t tokens = buffer.bytes().size() == tensor_bytes(problem_.q_tokens)
                                    ? problem_.q_tokens
                                    : problem_.k_tokens;
    return dense_view(data, problem_.dtype, {1, problem_.num_heads, tokens, problem_.head_dim});
  }
  [[nodiscard]] ConstView view(Buffer& buffer, bool device) const {
    return as_const(mutable_view(buffer, device));
  }
  template <typename T>
  [[nodiscard]] static T* place(Buffer& buffer, bool device) {
    return device ? buffer.device<T>() : buffer.host<T>();
  }

  [[nodiscard]] Inputs inputs(bool device) {
    Inputs in;
    in.q = view(q_, device);
    in.k = view(k_, device);
    in.v = view(v_, device);
    return in;
  }
  [[nodiscard]] Outputs outputs(bool device) {
    const bool soft = test_.routing == RoutingMode::kSoft;
    return {mutable_view(out_, device),
            mutable_view(out_sparse_, device),
            mutable_view(out_linear_, device),
            place<float>(lse_, device),
            place<float>(k_mean_, device),
            {place<std::int32_t>(blocks_, device), soft ? place<float>(logits_, device) : nullptr}};
  }
  [[nodiscard]] Saved saved(bool device) {
    const Outputs out = outputs(device);
    return {as_const(out.out_sparse),
            as_const(out.out_linear),
            out.lse,
            out.k_mean,
            {out.routing.blocks, out.routing.logits}};
  }
  [[nodiscard]] Gradients gradients(bool device) {
    Gradients result;
    result.d_q = mutable_view(d_q_, device);
    result.d_k = mutable_view(d_k_, device);
    result.d_v = mutable_view(d_v_, device);
    return result;
  }
  [[nodiscard]] Context context(std::byte* workspace, std::size_t bytes) {
    return {serial_, {workspace, bytes}, nullptr};
  }

  void compare(const char* pass, const char* what, const Buffer& buffer, double bound) const {
    std::vector<std::byte> got;
    buffer.download(got);
    const std::size_t count = got.size() / static_cast<std::size_t>(bytes_of(problem_.dtype));
    double difference = 0;
    double norm = 0;
    for (std::size_t i = 0; i < count; ++i) {
      const double wanted = number_at(buffer.bytes(), problem_.dtype, i);
      const double error = number_at(got, problem_.dtype, i) - wanted;
      difference += error * error;
      norm += wanted * wanted;
    }
    const double error = std::sqrt(difference / norm);
    if (error <= bound) return;  // false for NaN
    throw Error(
        ErrorKind::kRuntime,
        message("self-test: ", implementation_.name, " ", pass, " (", test_.name,
                ") gives a wrong ", what, " on ", machine_.name(), ", driver ", machine_.driver(),
                ": relative error must be at most ", bound, ", got ", error));
  }

  const Implementation& implementation_;
  const Machine& machine_;
  const Case& test_;
  Problem problem_;
  std::mt19937_64 generator_{1};
  SerialExecutor serial_;
  Buffer q_{machine_, tensor_bytes(problem_.q_tokens)};
  Buffer k_{machine_, tensor_bytes(problem_.k_tokens)};
  Buffer v_{machine_, tensor_bytes(problem_.k_tokens)};
  Buffer d_out_{machine_, tensor_bytes(problem_.q_tokens)};
  Buffer out_{machine_, tensor_bytes(problem_.q_tokens)};
  Buffer out_sparse_{machine_, tensor_bytes(problem_.q_tokens)};
  Buffer out_linear_{machine_, tensor_bytes(problem_.q_tokens)};
  Buffer lse_{machine_, rows(problem_.q_tokens)};
  Buffer k_mean_{machine_, rows(problem_.head_dim)};
  Buffer blocks_{machine_, rows(num_q_blocks(problem_) * max_routed_blocks(problem_))};
  Buffer logits_{machine_,
                 rows(num_q_blocks(problem_) * num_k_blocks(problem_, problem_.k_tokens))};
  Buffer d_q_{machine_, tensor_bytes(problem_.q_tokens)};
  Buffer d_k_{machine_, tensor_bytes(problem_.k_tokens)};
  Buffer d_v_{machine_, tensor_bytes(problem_.k_tokens)};
};

// ---- Cache -------------------------------------------------------------------------------------

/// The file that says "passed"; empty where the user has no cache folder.
fs::path cache_file(const SelfTest& test) {
  const char* cache = std::getenv("XDG_CACHE_HOME");
  const char* home = std::getenv("HOME");
  fs::path folder;
  if (cache != nullptr && *cache != '\0') {
    folder = cache;
  } else if (home != nullptr && *home != '\0') {
    folder = fs::path(home) / ".cache";
  } else {
    return {};
  }
  std::string name = message("self-test-", test.implementation, "-", test.machine, "-", test.driver,
                             "-", SLA2_VERSION);
  for (char& c : name) {
    const bool plain = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                       c == '.' || c == '-';
    if (!plain) c = '_';
  }
  return folder / "sla2" / name;
}

/// A folder that cannot be written means that the next program tests again.
void remember(const fs::path& file) {
  if (file.empty()) return;
  std::error_code error;
  fs::create_directories(file.parent_path(), error);
  if (!error) std::ofstream(file) << "passed\n";
}

}  // namespace

SelfTest self_test(const Implementation& implementation, bool use_cache) {
  require(implementation.machine != nullptr, "implementation must be one with a machine, got ",
          implementation.name);
  SelfTest result{implementation.name, implementation.machine->name(),
                  implementation.machine->driver()};
  const fs::path file = cache_file(result);
  std::error_code error;
  if (use_cache && !file.empty() && fs::exists(file, error)) {
    result.cached = true;
    return result;
  }
  for (const Case& test : kCases) result.checks += Comparison(implementation, test).run();
  remember(file);
  return result;
}

std::vector<SelfTest> self_test(bool use_cache) {
  std::vector<SelfTest> results;
  Problem problem;
  problem.q_tokens = problem.k_tokens = 64;
  for (const Implementation* const one : implementations()) {
    if (one->machine == nullptr) continue;
    problem.device = one->device;
    // bf16 runs wherever the kernels do.
    problem.config.precision = Precision::kBf16;
    if (!one->refusal(problem, Pass::kForward).empty()) continue;
    results.push_back(self_test(*one, use_cache));
  }
  return results;
}

}  // namespace sla2
