// The loops are assembly: a compiler spills accumulators or folds the loop away. Every instruction
// has an accumulator of its own, at least twice as many as an instruction takes cycles.
#include "peaks.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "sla2/sla2.h"

namespace sla2::bench {
namespace {

// 12 instructions of one form on registers 0 to 11.
#define SLA2_TWELVE(form, width, a, b)                                                             \
  form " %%" width a ", %%" width b ", %%" width "0\n" form " %%" width a ", %%" width b           \
       ", %%" width "1\n" form " %%" width a ", %%" width b ", %%" width "2\n" form " %%" width a  \
       ", %%" width b ", %%" width "3\n" form " %%" width a ", %%" width b ", %%" width "4\n" form \
       " %%" width a ", %%" width b ", %%" width "5\n" form " %%" width a ", %%" width b           \
       ", %%" width "6\n" form " %%" width a ", %%" width b ", %%" width "7\n" form " %%" width a  \
       ", %%" width b ", %%" width "8\n" form " %%" width a ", %%" width b ", %%" width "9\n" form \
       " %%" width a ", %%" width b ", %%" width "10\n" form " %%" width a ", %%" width b          \
       ", %%" width "11\n"

#define SLA2_LOOP(name, prologue, body)                                                            \
  void name(std::int64_t rounds) {                                                                 \
    asm volatile(prologue "1:\n" body "dec %0\njnz 1b\nvzeroupper\n"                               \
                 : "+r"(rounds)                                                                    \
                 :                                                                                 \
                 : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
                   "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "cc", "memory");          \
  }

#define SLA2_ZERO_YMM "vpxor %%xmm14, %%xmm14, %%xmm14\nvpxor %%xmm15, %%xmm15, %%xmm15\n"

SLA2_LOOP(fma_512, SLA2_ZERO_YMM, SLA2_TWELVE("vfmadd231ps", "zmm", "14", "15"))
SLA2_LOOP(bf16_512, SLA2_ZERO_YMM, SLA2_TWELVE("vdpbf16ps", "zmm", "14", "15"))
SLA2_LOOP(vnni_512, SLA2_ZERO_YMM, SLA2_TWELVE("vpdpbusd", "zmm", "14", "15"))
SLA2_LOOP(fma_256, SLA2_ZERO_YMM, SLA2_TWELVE("vfmadd231ps", "ymm", "14", "15"))
SLA2_LOOP(vnni_256, SLA2_ZERO_YMM, SLA2_TWELVE("%{vex%} vpdpbusd", "ymm", "14", "15"))

// Without VNNI: products of 16 bits in pairs (8 bits would saturate), then a sum.
#define SLA2_MADD(width, product, sum)                                                   \
  "vpmaddwd %%" width "14, %%" width "15, %%" width product "\n vpaddd %%" width product \
  ", %%" width sum ", %%" width sum "\n"
#define SLA2_SIX_MADDS(width) \
  SLA2_MADD(width, "0", "6")  \
  SLA2_MADD(width, "1", "7")  \
  SLA2_MADD(width, "2", "8")  \
  SLA2_MADD(width, "3", "9") SLA2_MADD(width, "4", "10") SLA2_MADD(width, "5", "11")
SLA2_LOOP(madd_512, SLA2_ZERO_YMM, SLA2_SIX_MADDS("zmm"))
SLA2_LOOP(madd_256, SLA2_ZERO_YMM, SLA2_SIX_MADDS("ymm"))

// Four accumulator tiles, two of each operand, as a product of 32 x 32 uses them.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
#define SLA2_TILES(form)                                                 \
  form " %%tmm6, %%tmm4, %%tmm0\n" form " %%tmm7, %%tmm4, %%tmm1\n" form \
       " %%tmm6, %%tmm5, %%tmm2\n" form " %%tmm7, %%tmm5, %%tmm3\n"
#define SLA2_TILE_LOOP(name, form)                                                         \
  void name(std::int64_t rounds) {                                                         \
    const TileConfig config;                                                               \
    asm volatile(                                                                          \
        "ldtilecfg %1\n tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero "   \
        "%%tmm3\n tilezero %%tmm4\n tilezero %%tmm5\n tilezero %%tmm6\n tilezero %%tmm7\n" \
        "1:\n" SLA2_TILES(form) "dec %0\njnz 1b\ntilerelease\n"                            \
        : "+r"(rounds)                                                                     \
        : "m"(config)                                                                      \
        : "cc", "memory");                                                                 \
  }
SLA2_TILE_LOOP(tiles_int8, "tdpbusd")
SLA2_TILE_LOOP(tiles_bf16, "tdpbf16ps")

void fma_128(std::int64_t rounds) {
  asm volatile(
      "xorps %%xmm15, %%xmm15\n1:\n"
      "mulps %%xmm15, %%xmm0\naddps %%xmm15, %%xmm1\nmulps %%xmm15, %%xmm2\naddps %%xmm15, %%xmm3\n"
      "mulps %%xmm15, %%xmm4\naddps %%xmm15, %%xmm5\nmulps %%xmm15, %%xmm6\naddps %%xmm15, %%xmm7\n"
      "mulps %%xmm15, %%xmm8\naddps %%xmm15, %%xmm9\nmulps %%xmm15, %%xmm10\naddps %%xmm15, "
      "%%xmm11\ndec %0\njnz 1b\n"
      : "+r"(rounds)
      :
      : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
        "xmm11", "xmm15", "cc", "memory");
}
void madd_128(std::int64_t rounds) {
  asm volatile(
      "pxor %%xmm15, %%xmm15\n1:\n"
      "pmaddwd %%xmm15, %%xmm0\npaddd %%xmm15, %%xmm1\npmaddwd %%xmm15, %%xmm2\npaddd %%xmm15, "
      "%%xmm3\npmaddwd %%xmm15, %%xmm4\npaddd %%xmm15, %%xmm5\npmaddwd %%xmm15, %%xmm6\npaddd "
      "%%xmm15, %%xmm7\npmaddwd %%xmm15, %%xmm8\npaddd %%xmm15, %%xmm9\npmaddwd %%xmm15, "
      "%%xmm10\npaddd %%xmm15, %%xmm11\ndec %0\njnz 1b\n"
      : "+r"(rounds)
      :
      : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
        "xmm11", "xmm15", "cc", "memory");
}

using Loop = void (*)(std::int64_t rounds);
struct Form {
  Loop loop;             // null: none
  double multiply_adds;  // a round
};
struct Set {
  const char* name;
  Form int8, bf16, fp32;
};
constexpr Set kSets[] = {
    {"amx", {tiles_int8, 4.0 * 16 * 16 * 64}, {tiles_bf16, 4.0 * 16 * 16 * 32}, {nullptr, 0}},
    {"avx512_vnni", {vnni_512, 12.0 * 64}, {bf16_512, 12.0 * 32}, {nullptr, 0}},
    {"avx512", {madd_512, 6.0 * 32}, {nullptr, 0}, {fma_512, 12.0 * 16}},
    {"avx2_vnni", {vnni_256, 12.0 * 32}, {nullptr, 0}, {nullptr, 0}},
    {"avx2", {madd_256, 6.0 * 16}, {nullptr, 0}, {fma_256, 12.0 * 8}},
    {"baseline", {madd_128, 6.0 * 8}, {nullptr, 0}, {fma_128, 6.0 * 4}},
};

double seconds_of(const std::function<void()>& run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Units of work a second, when every thread does `rounds` rounds of `units` each.
double rate(Executor& executor, const Form& form) {
  if (form.loop == nullptr) return 0;
  std::int64_t rounds = 1000;
  const std::int64_t threads = executor.num_threads();
  const auto all = [&] {
    executor.parallel_for(threads, [&](std::int64_t, std::int64_t) { form.loop(rounds); });
  };
  double best = 0;
  while (best < 0.004) {  // a single run may be longer for another reason
    rounds *= 2;
    best = 1e30;
    for (int i = 0; i < 4; ++i) best = std::min(best, seconds_of(all));
  }
  return static_cast<double>(threads * rounds) * form.multiply_adds / best;
}

constexpr std::size_t kWords = std::size_t{1} << 25;  // 256 MB a thread

using Sums = std::array<std::uint64_t, 16>;

/// kWords of memory for each thread, filled by the thread that reads them.
using Blocks = std::vector<std::vector<std::uint64_t>>;
Blocks make_blocks(Executor& executor) {
  Blocks blocks(static_cast<std::size_t>(executor.num_threads()));
  executor.parallel_for(executor.num_threads(), [&](std::int64_t i, std::int64_t) {
    blocks[static_cast<std::size_t>(i)].assign(kWords, 1);
  });
  return blocks;
}

/// Bytes a second, when every thread reads words of its own: read(words, sum) adds them to `sum`
/// and returns how many. Memory is read, not written: no write-allocate to reckon with.
template <typename Read>
double read_rate(Executor& executor, const Blocks& blocks, const Read& read) {
  const std::int64_t threads = executor.num_threads();
  std::vector<std::uint64_t> sums(static_cast<std::size_t>(threads));
  std::size_t words = 0;
  const auto all = [&] {
    executor.parallel_for(threads, [&](std::int64_t i, std::int64_t) {
      Sums sum{};
      const std::size_t n = read(blocks[static_cast<std::size_t>(i)].data(), sum);
      for (const std::uint64_t x : sum) sums[static_cast<std::size_t>(i)] += x;
      if (i == 0) words = n;
    });
  };
  double best = 1e30;
  for (int i = 0; i < 5; ++i) best = std::min(best, seconds_of(all));
  const auto bytes = static_cast<double>(threads) * static_cast<double>(words * 8);
  return sums[0] == 0 ? 0 : bytes / best;
}

std::size_t read_all(const std::uint64_t* words, Sums& sum) {
  for (std::size_t w = 0; w < kWords; w += 16) {
    for (std::size_t lane = 0; lane < 16; ++lane) sum[lane] += words[w + lane];
  }
  return kWords;
}

bool runs_here(const char* set) {
  Problem p;
  p.q_tokens = p.k_tokens = 32;
  for (const Implementation* one : implementations()) {
    if (std::string_view(one->name) == std::string("cpu_") + set) {
      return one->refusal(p, Pass::kForward).empty();
    }
  }
  return false;
}

}  // namespace

Peaks measure_peaks(Executor& executor) {
  Peaks peaks;
  peaks.threads = executor.num_threads();
  for (const Set& set : kSets) {
    if (!runs_here(set.name)) continue;
    peaks.sets.push_back(
        {set.name, rate(executor, set.int8), rate(executor, set.bf16), rate(executor, set.fp32)});
  }
  peaks.bytes = read_rate(executor, make_blocks(executor), read_all);
  return peaks;
}

double measure_row_rate(Executor& executor, std::int64_t row, std::int64_t stride) {
  const auto width = static_cast<std::size_t>(row / 8), step = static_cast<std::size_t>(stride / 8);
  const std::size_t rows = kWords / step;
  const Blocks blocks = make_blocks(executor);
  // Asked for ahead or left to the processor, whichever is faster.
  const auto rate_with = [&](std::size_t ahead) {
    return read_rate(executor, blocks, [&](const std::uint64_t* words, Sums& sum) {
      for (std::size_t head = 0; head + width <= step; head += width) {
        for (std::size_t r = 0; r < rows; ++r) {
          const std::uint64_t* at = words + r * step + head;
          for (std::size_t w = 0; ahead > 0 && w < width && r + ahead < rows; w += 8) {
            __builtin_prefetch(at + ahead * step + w);
          }
          for (std::size_t w = 0; w < width; w += 4) {
            for (std::size_t lane = 0; lane < 4; ++lane) sum[lane] += at[w + lane];
          }
        }
      }
      return step / width * width * rows;
    });
  };
  return std::max(rate_with(0), rate_with(8));
}

Peaks larger_of(const Peaks& a, const Peaks& b) {
  Peaks larger = a;
  larger.bytes = std::max(a.bytes, b.bytes);
  larger.row_bytes = std::max(a.row_bytes, b.row_bytes);
  for (std::size_t i = 0; i < larger.sets.size(); ++i) {
    InstructionPeaks& set = larger.sets[i];
    set.int8 = std::max(set.int8, b.sets.at(i).int8);
    set.bf16 = std::max(set.bf16, b.sets.at(i).bf16);
    set.fp32 = std::max(set.fp32, b.sets.at(i).fp32);
  }
  return larger;
}

InstructionPeaks peaks_of(const Peaks& peaks, const std::string& implementation) {
  InstructionPeaks best;
  best.name = implementation;
  bool includes = false;  // the list goes from the widest set to the narrowest
  for (const InstructionPeaks& set : peaks.sets) {
    includes = includes || implementation == "cpu_" + set.name;
    if (!includes) continue;
    best.int8 = std::max(best.int8, set.int8);
    best.bf16 = std::max(best.bf16, set.bf16);
    best.fp32 = std::max(best.fp32, set.fp32);
  }
  best.bf16 = std::max(best.bf16, best.fp32);  // bf16 numbers by fp32 products
  best.int8 = std::max(best.int8, best.fp32);
  return best;
}

}  // namespace sla2::bench
