// What only a GPU can show: capture in a graph, and tensors of more than 2^31 elements.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cuda_runtime_api.h>
#include <memory>
#include <vector>

#include <gtest/gtest.h>

#include "cuda/device_call.h"
#include "cuda/judge.h"

namespace sla2::test {
namespace {

#define SLA2_CUDA_OK(call) ASSERT_EQ(call, cudaSuccess)

/// What `work` puts on `stream`, captured.
class Graph {
 public:
  template <typename Work>
  Graph(cudaStream_t stream, const Work& work) : stream_(stream) {
    EXPECT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    work();
    EXPECT_EQ(cudaStreamEndCapture(stream, &graph_), cudaSuccess);
    EXPECT_EQ(cudaGraphInstantiate(&runnable_, graph_, 0), cudaSuccess);
  }
  ~Graph() {
    cudaGraphExecDestroy(runnable_);
    cudaGraphDestroy(graph_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  [[nodiscard]] std::size_t nodes() const {
    std::size_t nodes = 0;
    EXPECT_EQ(cudaGraphGetNodes(graph_, nullptr, &nodes), cudaSuccess);
    return nodes;
  }
  void run() const { EXPECT_EQ(cudaGraphLaunch(runnable_, stream_), cudaSuccess); }

 private:
  cudaStream_t stream_;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t runnable_ = nullptr;
};

struct Captured {
  const char* name;
  Method method;
  RoutingMode routing;
  DType dtype;
  Precision precision;
};

/// A graph of each pass: at most 8 and 12 nodes, launches and nothing else, and the same bits.
TEST(CudaGpu, CallsAreCapturedInAGraph) {
  SLA2_SKIP_WITHOUT_MACHINE();
  cudaStream_t stream = nullptr;
  SLA2_CUDA_OK(cudaStreamCreate(&stream));
  for (const Captured& what : {
           Captured{"int8", Method::kSla2, RoutingMode::kHard, DType::kBF16, Precision::kInt8},
           Captured{"soft", Method::kSla2, RoutingMode::kSoft, DType::kBF16, Precision::kInt8},
           Captured{"fp32", Method::kSla2, RoutingMode::kSoft, DType::kF32, Precision::kFp32},
           Captured{"fp16", Method::kSla2, RoutingMode::kHard, DType::kF16, Precision::kBf16},
           Captured{"sla", Method::kSla, RoutingMode::kHard, DType::kBF16, Precision::kInt8},
       }) {
    SCOPED_TRACE(what.name);
    Problem p = small_problem(150, 300, 64, 64);
    p.device = Device::kCuda;
    p.dtype = what.dtype;
    p.config.precision = what.precision;
    p.config.method = what.method;
    p.config.routing = what.routing;
    Call direct(p, 3);
    DeviceCall on_device(direct);
    on_device.forward();
    on_device.backward();

    Call call(p, 3);
    DeviceCall captured(call);
    const Implementation& implementation = backend().implementation;
    const Inputs in = captured.inputs();
    const Outputs out = captured.outputs();
    const Saved saved = captured.saved();
    const ConstView d_out = captured.d_out();
    const Gradients gradients = captured.gradients();
    const Scratch forward_scratch(backend().memory,
                                  implementation.workspace_bytes(p, Pass::kForward, 1));
    const Scratch backward_scratch(backend().memory,
                                   implementation.workspace_bytes(p, Pass::kBackward, 1));
    SerialExecutor serial;
    const Graph forward(stream, [&] {
      implementation.forward(p, in, out, {serial, forward_scratch.span(), stream});
    });
    const Graph backward(stream, [&] {
      implementation.backward(p, in, saved, d_out, gradients,
                              {serial, backward_scratch.span(), stream});
    });
    EXPECT_GE(forward.nodes(), 5U);
    EXPECT_LE(forward.nodes(), 8U);
    EXPECT_GE(backward.nodes(), 8U);
    EXPECT_LE(backward.nodes(), 12U);
    for (int run = 0; run < 2; ++run) {
      forward.run();
      backward.run();
    }
    SLA2_CUDA_OK(cudaStreamSynchronize(stream));
    captured.mirror().download();
    EXPECT_EQ(call.out.values(), direct.out.values());
    EXPECT_EQ(call.d_q.values(), direct.d_q.values());
    EXPECT_EQ(call.d_k.values(), direct.d_k.values());
    EXPECT_EQ(call.d_v.values(), direct.d_v.values());
  }
  SLA2_CUDA_OK(cudaStreamDestroy(stream));
}

/// `heads` query heads with the same queries and gradients, one key/value head.
struct EqualHeads {
  static constexpr std::int64_t kTokens = 65536;
  static constexpr std::int64_t kDim = 128;
  static constexpr std::size_t kHeadBytes = kTokens * kDim * 2;

  explicit EqualHeads(std::int64_t heads) : heads_(heads) {
    problem.num_heads = heads;
    problem.q_tokens = problem.k_tokens = kTokens;
    problem.head_dim = problem.value_dim = kDim;
    problem.dtype = DType::kBF16;
    problem.device = Device::kCuda;
    problem.config.keep = 0.02;
  }
  [[nodiscard]] std::byte* take(std::size_t bytes) {
    blocks_.emplace_back(static_cast<std::byte*>(backend().memory.take(bytes)),
                         [](std::byte* block) { backend().memory.give_back(block); });
    return blocks_.back().get();
  }
  /// [1, copies, tokens, dim], each head the same numbers.
  [[nodiscard]] View tensor(std::int64_t copies, std::uint32_t seed) {
    std::byte* data = take(kHeadBytes * static_cast<std::size_t>(copies));
    if (seed != 0) {
      std::vector<std::uint16_t> values(kTokens * kDim);
      for (std::uint16_t& x : values) {
        seed = seed * 1664525U + 1013904223U;
        x = to_bf16(static_cast<float>(seed >> 8) * 0x1p-23F - 1.0F);
      }
      for (std::int64_t h = 0; h < copies; ++h) {
        backend().memory.upload(data + kHeadBytes * static_cast<std::size_t>(h), values.data(),
                                kHeadBytes);
      }
    }
    return dense_view<void*>(data, DType::kBF16, {1, copies, kTokens, kDim});
  }
  /// The last head's out and d_q, both passes.
  std::vector<std::uint16_t> run() {
    const View q = tensor(heads_, 1);
    const View k = tensor(1, 2);
    const View v = tensor(1, 3);
    const View d_out = tensor(heads_, 4);
    Outputs out{tensor(heads_, 0), tensor(heads_, 0), tensor(heads_, 0), nullptr, nullptr, {}};
    out.lse = reinterpret_cast<float*>(take(static_cast<std::size_t>(heads_ * kTokens) * 4));
    out.k_mean = reinterpret_cast<float*>(take(kDim * 4));
    out.routing.blocks = reinterpret_cast<std::int32_t*>(take(
        static_cast<std::size_t>(heads_ * num_q_blocks(problem) * max_routed_blocks(problem)) * 4));
    Inputs in;
    in.q = as_const(q);
    in.k = as_const(k);
    in.v = as_const(v);
    Gradients gradients;
    gradients.d_q = tensor(heads_, 0);
    gradients.d_k = tensor(1, 0);
    const Saved saved{as_const(out.out_sparse),
                      as_const(out.out_linear),
                      out.lse,
                      out.k_mean,
                      {out.routing.blocks, nullptr}};
    SerialExecutor serial;
    const Implementation& implementation = backend().implementation;
    const auto with_workspace = [&](Pass pass, auto body) {
      const std::size_t bytes = implementation.workspace_bytes(problem, pass, 1);
      auto* workspace = static_cast<std::byte*>(backend().memory.take(bytes));
      body(Context{serial, {workspace, bytes}, nullptr});
      static_cast<void>(cudaDeviceSynchronize());
      backend().memory.give_back(workspace);
    };
    with_workspace(Pass::kForward, [&](const Context& context) {
      implementation.forward(problem, in, out, context);
    });
    with_workspace(Pass::kBackward, [&](const Context& context) {
      implementation.backward(problem, in, saved, as_const(d_out), gradients, context);
    });
    std::vector<std::uint16_t> result(2 * kTokens * kDim);
    const std::size_t last = kHeadBytes * static_cast<std::size_t>(heads_ - 1);
    backend().memory.download(result.data(), static_cast<std::byte*>(out.out.data) + last,
                              kHeadBytes);
    backend().memory.download(result.data() + kTokens * kDim,
                              static_cast<std::byte*>(gradients.d_q.data) + last, kHeadBytes);
    return result;
  }

  Problem problem;

 private:
  std::int64_t heads_;
  std::vector<std::unique_ptr<std::byte, void (*)(std::byte*)>> blocks_;
};

TEST(CudaGpu, MoreThanTwoToThe31Elements) {
  SLA2_SKIP_WITHOUT_MACHINE();
  constexpr std::int64_t kHeads = 264;
  static_assert(kHeads * EqualHeads::kTokens * EqualHeads::kDim > std::int64_t{1} << 31);
  std::size_t free = 0;
  std::size_t total = 0;
  SLA2_CUDA_OK(cudaMemGetInfo(&free, &total));
  EqualHeads many(kHeads);
  // Eight tensors of all heads beside the larger workspace.
  const std::size_t needed =
      backend().implementation.workspace_bytes(many.problem, Pass::kBackward, 1) +
      8 * EqualHeads::kHeadBytes * kHeads;
  if (free < needed) GTEST_SKIP() << "needs " << needed << " bytes of GPU memory, got " << free;
  const std::vector<std::uint16_t> of_many = many.run();
  const std::vector<std::uint16_t> of_one = EqualHeads(1).run();
  EXPECT_EQ(of_many, of_one);  // every head is computed alike
  EXPECT_TRUE(std::any_of(of_one.begin(), of_one.end(), [](std::uint16_t x) { return x != 0; }));
}

}  // namespace
}  // namespace sla2::test
