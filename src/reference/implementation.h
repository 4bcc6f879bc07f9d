// The reference as a member of the implementation list.
#pragma once

#include "sla2/implementation.h"

namespace sla2::reference {

/// Computes in double, supports every problem on the CPU. Allocates what it needs itself.
extern const Implementation kReference;

}  // namespace sla2::reference
