// The CUDA backend, for core's implementation list; needs no CUDA header. `emulated` is the same
// kernels on emulated threads, for tests: its pointers are host memory.
#pragma once

#include "sla2/implementation.h"

namespace sla2::cuda {
extern const Implementation kImplementation;
}
namespace sla2::emulated {
extern const Implementation kImplementation;
}
