// The one rule that joins --precision and --device.
#pragma once

#include <string>

#include "cli/command.h"

namespace sla2::cli {

/// Throws UsageError for fp8 on a CPU, where only the reference computes it, hundreds of times more
/// slowly.
inline void check_precision(const std::string& precision, const Session& session) {
  if (precision == "fp8" && session.run.device.is_cpu()) {
    throw UsageError(
        "--precision fp8 needs a GPU, got --device cpu: processors have no fp8 products; take "
        "int8, bf16 or fp32");
  }
}

}  // namespace sla2::cli
