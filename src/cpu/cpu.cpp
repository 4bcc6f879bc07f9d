#include "cpu/cpu.h"

#include <cstddef>
#include <string>

#include "cpu/plan.h"

namespace sla2::cpu {
namespace {

struct Avx512 {
  static const Kernels& kernels() { return avx512::kKernels; }
  static const char* missing() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma")
               ? nullptr
               : "this processor lacks AVX-512 with BW, DQ, VL and VNNI";
  }
};
struct Avx2 {
  static const Kernels& kernels() { return avx2::kKernels; }
  static const char* missing() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
               ? nullptr
               : "this processor lacks AVX2 with FMA";
  }
};
struct Baseline {
  static const Kernels& kernels() { return baseline::kKernels; }
  static const char* missing() { return nullptr; }
};

template <typename Isa>
std::string refusal(const Problem& problem, Pass pass) {
  if (problem.device != Device::kCpu) return "it runs on the CPU only";
  if (const char* missing = Isa::missing()) return missing;
  if (pass == Pass::kForward && problem.config.precision == Precision::kFp8 &&
      problem.config.routing == RoutingMode::kHard) {
    return "processors have no fp8 products; take int8, bf16 or fp32";
  }
  return {};
}

template <typename Isa>
std::size_t workspace_bytes(const Problem& problem, Pass pass, std::int64_t num_threads) {
  Arena arena(nullptr);
  Job job;
  DriverBuffers own;
  lay_out(problem, pass, num_threads, Isa::kernels().int_bytes, arena, job, own);
  return arena.used();
}

template <typename Isa>
constexpr Implementation implementation(const char* name) {
  return {
      name,
      Device::kCpu,
      refusal<Isa>,
      workspace_bytes<Isa>,
      [](const Problem& problem, const Inputs& inputs, const Routing& routing,
         const Context& context) { route(problem, inputs, routing, context, Isa::kernels()); },
      [](const Problem& problem, const Inputs& inputs, const Outputs& outputs,
         const Context& context) { forward(problem, inputs, outputs, context, Isa::kernels()); },
      [](const Problem& problem, const Inputs& inputs, const Saved& saved, ConstView d_out,
         const Gradients& gradients, const Context& context) {
        backward(problem, inputs, saved, d_out, gradients, context, Isa::kernels());
      }};
}

}  // namespace

const Implementation kAvx512 = implementation<Avx512>("cpu_avx512");
const Implementation kAvx2 = implementation<Avx2>("cpu_avx2");
const Implementation kBaseline = implementation<Baseline>("cpu_baseline");

}  // namespace sla2::cpu
