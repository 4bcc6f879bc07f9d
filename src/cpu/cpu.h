// The CPU backend: one set of stages, compiled for three instruction sets.
#pragma once

#include "sla2/implementation.h"

namespace sla2::cpu {

extern const Implementation kAvx512;    // "cpu_avx512": AVX-512 F, BW, DQ, VL, VNNI
extern const Implementation kAvx2;      // "cpu_avx2": AVX2, FMA, F16C
extern const Implementation kBaseline;  // "cpu_baseline": any x86-64

}  // namespace sla2::cpu
