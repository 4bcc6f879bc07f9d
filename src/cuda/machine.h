#pragma once

#include "cuda/device.cuh"
#include "sla2/implementation.h"

namespace sla2::SLA2_CUDA_ROOM {
extern const Machine kMachine;
}
