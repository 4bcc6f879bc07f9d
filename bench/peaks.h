// What this machine can do at most, measured by small loops: multiply-adds a second from registers
// in each format and instruction set, and bytes a second from memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sla2/executor.h"

namespace sla2::bench {

/// Of one instruction set on all threads of an executor; 0: it has no such products.
struct InstructionPeaks {
  std::string name;  // "amx", "avx512_vnni", "avx512", "avx2_vnni", "avx2", "baseline"
  double int8 = 0, bf16 = 0, fp32 = 0;  // multiply-adds a second
};

struct Peaks {
  std::int64_t threads = 1;
  std::vector<InstructionPeaks> sets;  // those of this machine
  double bytes = 0;                    // a second, read from memory in order
  double row_bytes = 0;                // by measure_row_rate, where it was asked for
};

/// About a second. Each figure is the best of several runs: a peak, not a mean.
[[nodiscard]] Peaks measure_peaks(Executor& executor);

/// Bytes a second that all threads read from memory of rows of `row` bytes, `stride` bytes apart,
/// as those of a head of [B, N, H, D] lie, one head after the other. `row` is a multiple of 32.
[[nodiscard]] double measure_row_rate(Executor& executor, std::int64_t row, std::int64_t stride);

/// The larger of each figure: of two measurements on the same threads of the same machine. Another
/// program's moment can only make one of them smaller.
[[nodiscard]] Peaks larger_of(const Peaks& a, const Peaks& b);

/// The best of what an implementation may use: its own instruction set (cpu_{name}) and those that
/// it includes.
[[nodiscard]] InstructionPeaks peaks_of(const Peaks& peaks, const std::string& implementation);

}  // namespace sla2::bench
