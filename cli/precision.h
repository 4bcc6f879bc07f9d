// The one rule that joins --precision and --device.
#pragma once

#include <cstdlib>
#include <string>

#include "cli/command.h"

namespace sla2::cli {

/// Throws UsageError for fp8 on a CPU, where only the reference computes it, hundreds of times more
/// slowly. SLA2_IMPLEMENTATION=reference asks for just that.
inline void check_precision(const std::string& precision, const Session& session) {
  const char* const wanted = std::getenv("SLA2_IMPLEMENTATION");
  const bool asked_for = wanted != nullptr && std::string(wanted) == "reference";
  if (precision == "fp8" && session.run.device.is_cpu() && !asked_for) {
    throw UsageError(
        "--precision fp8 needs a GPU, got --device cpu: processors have no fp8 products; take "
        "int8, "
        "bf16 or fp32");
  }
}

}  // namespace sla2::cli
