// The CPU backend: one set of stages, compiled for six instruction sets.
#pragma once

#include "sla2/implementation.h"

namespace sla2::cpu {

extern const Implementation kAmx;         // "cpu_amx": AMX INT8 and BF16 on kAvx512Vnni
extern const Implementation kAvx512Vnni;  // "cpu_avx512_vnni": kAvx512 with VNNI and BF16
extern const Implementation kAvx512;      // "cpu_avx512": AVX-512 F, BW, DQ, VL
extern const Implementation kAvx2Vnni;    // "cpu_avx2_vnni": kAvx2 with AVX-VNNI
extern const Implementation kAvx2;        // "cpu_avx2": AVX2, FMA, F16C
extern const Implementation kBaseline;    // "cpu_baseline": any x86-64

}  // namespace sla2::cpu
