#include "cpu/cpu.h"

#include <cpuid.h>
#include <cstddef>
#include <string>
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu/plan.h"

namespace sla2::cpu {
namespace {

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};
Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

/// The tile state is off in a process until it asks the kernel for it, once for all its threads.
bool has_tile_state() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

struct Avx512 {
  static const Kernels& kernels() { return avx512::kKernels; }
  static const char* missing() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("fma")
               ? nullptr
               : "this processor lacks AVX-512 with BW, DQ and VL";
  }
};
struct Avx512Vnni {
  static const Kernels& kernels() { return avx512_vnni::kKernels; }
  static const char* missing() {
    if (const char* reason = Avx512::missing()) return reason;
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16")
               ? nullptr
               : "this processor lacks AVX-512 with VNNI and BF16";
  }
};
struct Amx {
  static const Kernels& kernels() { return amx::kKernels; }
  static const char* missing() {
    if (const char* reason = Avx512Vnni::missing()) return reason;
    constexpr unsigned kBf16 = 1U << 22, kTile = 1U << 24, kInt8 = 1U << 25;
    constexpr unsigned kAll = kBf16 | kTile | kInt8;
    if ((cpuid(7, 0).edx & kAll) != kAll) return "this processor lacks AMX with INT8 and BF16";
    return has_tile_state() ? nullptr : "the kernel does not grant the state of AMX tiles";
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
struct Avx2Vnni {
  static const Kernels& kernels() { return avx2_vnni::kKernels; }
  static const char* missing() {
    if (const char* reason = Avx2::missing()) return reason;
    constexpr unsigned kAvxVnni = 1U << 4;
    return (cpuid(7, 1).eax & kAvxVnni) != 0 ? nullptr : "this processor lacks AVX-VNNI";
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
  Back back;
  DriverBuffers own;
  lay_out(problem, pass, num_threads, Isa::kernels(), arena, job, back, own);
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

const Implementation kAmx = implementation<Amx>("cpu_amx");
const Implementation kAvx512Vnni = implementation<Avx512Vnni>("cpu_avx512_vnni");
const Implementation kAvx512 = implementation<Avx512>("cpu_avx512");
const Implementation kAvx2Vnni = implementation<Avx2Vnni>("cpu_avx2_vnni");
const Implementation kAvx2 = implementation<Avx2>("cpu_avx2");
const Implementation kBaseline = implementation<Baseline>("cpu_baseline");

}  // namespace sla2::cpu
