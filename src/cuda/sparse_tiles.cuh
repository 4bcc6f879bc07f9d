// What step 2 reads and keeps: the layout of a block's shared memory, its rows and running state,
// the list of routed blocks, and tiles of their keys and values on the way from global memory.
#pragma once

#include "cuda/rows.cuh"

namespace sla2::SLA2_CUDA_ROOM {

inline constexpr int kAttendThreads = 256;
inline constexpr std::int32_t kMagicBits = 0x4b400000;
inline constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
inline constexpr float kLog2Of448 = 8.807354922057604f;
inline constexpr std::size_t kTilesAt = 64;  // shared memory in front: Queries
#if defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
inline constexpr bool kLargeSharedMemory = false;  // 100 KiB a multiprocessor
#else
inline constexpr bool kLargeSharedMemory = true;  // 164 KiB or more
#endif
inline constexpr float kLowest = -3.0e38f;  // a running maximum before the first key

template <Format F, int D>
struct Sparse {
  static constexpr bool kLowBit = F == Format::kInt8 || F == Format::kFp8;
  static constexpr int kBytes = kLowBit ? 1 : 2;  // of a number
  static constexpr int kPlanes = F == Format::kFp32 ? 3 : 1;
  static constexpr int kTileKeys = F == Format::kFp32 ? 16 : !kLowBit && D > 64 ? 32 : 64;
  static constexpr int kPartKeys = kTileKeys < 32 ? kTileKeys : 32;
  static constexpr int kParts = kTileKeys / kPartKeys;
  static constexpr int kScores = kTileKeys / 8;  // fragments of 8 keys
  static constexpr int kStages = F == Format::kFp32 && D == 256 ? 1 : 2;
  // Bytes of a row in shared memory: 16-byte units odd, so ldmatrix meets no bank conflict.
  static constexpr int kKeyStride = D * kBytes + 16;
  static constexpr int kValueStride = kLowBit ? kTileKeys + 16 : D * 2 + 16;
  static constexpr int kKeyPlane = kTileKeys * kKeyStride;
  static constexpr int kValuePlane = (kLowBit ? D : kTileKeys) * kValueStride;
  static constexpr int kStageBytes = kPlanes * (kKeyPlane + kValuePlane);
  static constexpr int kSteps = D * kBytes / 32;  // products of one fragment of scores
  // Where q's fragments lie: shared memory, registers, or they are read again for every tile.
  static constexpr bool kSharedQ = F != Format::kFp32 && D <= 128;
  static constexpr bool kKeptQ = kLowBit && !kSharedQ;
  static constexpr std::size_t kEntriesAt = kTilesAt + std::size_t{kStages} * kStageBytes;
  static constexpr std::size_t kQueriesAt = kEntriesAt + 64 * 16;
  static constexpr int kQueryStride = kSharedQ ? D * kBytes + 16 : 0;
  static constexpr int kQueryScale = D * kBytes;  // low-bit, kSharedQ: the row's scale, behind it
  // Two blocks a multiprocessor hide each other's waits where its shared memory has room for them;
  // 128 registers a thread.
  static constexpr int kBlocks = kSharedQ && (kLargeSharedMemory || (kLowBit && D <= 64)) ? 2 : 1;
  // The last fragments of o lie in shared memory between tiles: 128 registers hold no more.
  static constexpr int kParked = D != 128 ? 0 : F == Format::kInt8 ? 1 : F == Format::kFp8 ? 7 : 0;
  static constexpr int kHeld = D / 8 - kParked;
  SLA2_HOST_DEVICE static std::size_t parked_at(int rows) {
    return kQueriesAt + static_cast<std::size_t>(rows) * std::size_t{kQueryStride};
  }
  static constexpr float kLimit = F == Format::kInt8 ? 255.0f : F == Format::kFp8 ? 448.0f : 1.0f;
};

/// What a block works on. It lies in shared memory: registers are what the loops are short of.
struct Queries {
  int head, key_head;  // b * H + h, b * Hkv + kv
  int i;               // query block
  int first;           // rows of this block of threads: [first, end)
  int length, blocks;  // keys and key blocks that exist

  [[nodiscard]] SLA2_DEVICE std::int64_t block_row(const Call& c) const {
    return std::int64_t{head} * c.M + i;
  }
  /// This thread's rows, r = 0 and 1; loads stay inside [first, end).
  [[nodiscard]] SLA2_DEVICE int thread_row(int r) const {
    return first + warp_index() * 16 + lane_index() / 4 + 8 * r;
  }
  [[nodiscard]] SLA2_DEVICE int end(const Call& c) const { return min_int(c.Nq, (i + 1) * c.bq); }
  [[nodiscard]] SLA2_DEVICE bool valid(const Call& c, int r) const {
    return thread_row(r) < end(c);
  }
  [[nodiscard]] SLA2_DEVICE std::int64_t line(const Call& c, int r) const {
    return std::int64_t{head} * c.Nq + (valid(c, r) ? thread_row(r) : first);
  }
};

/// The running state of a thread's two rows.
template <int D>
struct Running {
  float o[D / 8][4];  // rows 0, 0, 1, 1 of fragment n: channels n * 8 + 2t, + 1
  float max[2];       // of the scores in units of ln 2
  float sum[2];       // low-bit: of the row; else of this thread's keys
};

/// Shared memory of the fragments that lie there.
template <Format F, int D>
SLA2_HOST_DEVICE std::size_t parked_bytes(int rows) {
  return static_cast<std::size_t>(Sparse<F, D>::kParked * rows * 2) * sizeof(Words4);
}
/// Fragment n >= kHeld of o, to and from shared memory at `base`.
template <Format F, int D>
SLA2_DEVICE void park(const Running<D>& run, int n, std::size_t base) {
  Words4 words;
  SLA2_UNROLL for (int e = 0; e < 4; ++e) words.x[e] = float_to_bits(run.o[n][e]);
  const int place = (D / 8 - 1 - n) * block_threads() + thread_index();
  store_16(shared_memory<Words4>(base) + place, words);
}
template <Format F, int D>
SLA2_DEVICE void fetch(Running<D>& run, int n, std::size_t base) {
  const int place = (D / 8 - 1 - n) * block_threads() + thread_index();
  const Words4 words = load_16(shared_memory<Words4>(base) + place);
  SLA2_UNROLL for (int e = 0; e < 4; ++e) run.o[n][e] = bits_to_float(words.x[e]);
}

// ---- Routed blocks ---------------------------------------------------------------------------

/// A routed block, in shared memory: 32 are read at once, so that no tile waits for the table.
struct alignas(16) Entry {
  std::int64_t row;  // of its first key in k_low and v_low; -1: none
  int keys;          // from its first to the last that exists
  float value;       // low-bit: the scale of the block's keys; else log2 m (0 with hard routing)
};
inline constexpr int kEntries = 64;  // two halves of 32: one read, one filled

template <Format F, int D>
SLA2_DEVICE Entry* entry_of(int index) {
  return shared_memory<Entry>(Sparse<F, D>::kEntriesAt) + index % kEntries;
}
SLA2_DEVICE const std::int32_t* routed_list(const Call& c, const Queries& q) {
  return (c.given_blocks != nullptr ? c.given_blocks : c.blocks) + q.block_row(c) * c.L;
}
SLA2_DEVICE int routed_count(const Call& c, const Queries& q) {
  if (c.soft) return q.blocks;
  const std::int32_t* list = routed_list(c, q);
  int count = 0;
  for (int first = 0; first < c.L; first += 32) {
    const int l = first + lane_index();
    count += count_bits(ballot(l < c.L && list[l] >= 0));
  }
  return count;
}
/// Entries [first, first + 32), by the first warp; to be read behind a barrier.
template <Format F, int D>
SLA2_DEVICE void fill_entries(const Call& c, const Queries& q, int first) {
  if (warp_index() != 0) return;
  const int at = first + lane_index();
  Entry entry{-1, 0, 0.0f};
  const bool soft = !Sparse<F, D>::kLowBit && c.soft;  // soft routing is never quantised
  const int block = soft ? at : at < c.L ? routed_list(c, q)[at] : -1;
  if (block >= 0 && block < q.blocks) {  // a given table is not trusted
    entry.row = (std::int64_t{q.key_head} * c.T + block) * c.bk;
    entry.keys = q.length - block * c.bk;
    if constexpr (Sparse<F, D>::kLowBit) {
      entry.value = c.k_scale[std::int64_t{q.key_head} * c.T + block];
    } else if (soft) {
      const float* logits = c.given_logits != nullptr ? c.given_logits : c.logits;
      const float x = logits[q.block_row(c) * c.T + block];  // log m = -softplus(-x)
      entry.value = kLog2E * (x >= 0 ? -exact_log1p(exact_exp(-x)) : x - exact_log1p(exact_exp(x)));
      if (x == -kInfinity) entry.value = -kInfinity;
    }
  }
  *entry_of<F, D>(at) = entry;
}

/// A part of a tile: keys of one block.
struct Part {
  int valid;    // keys that exist
  float value;  // as in Entry
};
/// log2 of the parts of a block; both are powers of two.
template <Format F, int D>
SLA2_DEVICE int part_bits(const Call& c) {
  return count_bits(static_cast<std::uint32_t>(c.bk / Sparse<F, D>::kPartKeys - 1));
}
template <Format F, int D>
SLA2_DEVICE int part_offset(const Call& c, int index) {
  return index * Sparse<F, D>::kPartKeys & (c.bk - 1);
}
template <Format F, int D>
SLA2_DEVICE Part part_of(const Call& c, int index) {
  const Entry& entry = *entry_of<F, D>(index >> part_bits<F, D>(c));
  const int left = entry.keys - part_offset<F, D>(c, index);
  return {min_int(max_int(left, 0), Sparse<F, D>::kPartKeys), entry.value};
}

/// body(0) to body(kCount - 1), spread over the block's threads.
template <int kCount, typename Body>
SLA2_DEVICE void spread(const Body& body) {
  const int thread = fresh_thread_index();
  if (block_threads() == kAttendThreads) {
    SLA2_UNROLL for (int first = 0; first < kCount; first += kAttendThreads) {
      const int at = first + thread;
      if (kCount % kAttendThreads == 0 || at < kCount) body(at);
    }
  } else {
    SLA2_NO_UNROLL for (int at = thread; at < kCount; at += block_threads()) body(at);
  }
}

/// Starts the copies of one tile.
template <Format F, int D>
SLA2_DEVICE void load_tile(const Call& c, int tile, int stage) {
  using S = Sparse<F, D>;
  unsigned char* keys =
      shared_memory<unsigned char>(kTilesAt + static_cast<std::size_t>(stage) * S::kStageBytes);
  unsigned char* values = keys + S::kPlanes * S::kKeyPlane;
  const auto* k_low = static_cast<const unsigned char*>(c.k_low);
  const auto* v_low = static_cast<const unsigned char*>(c.v_low);
  SLA2_UNROLL for (int p = 0; p < S::kParts; ++p) {
    const int index = tile * S::kParts + p;
    const std::int64_t first = entry_of<F, D>(index >> part_bits<F, D>(c))->row;
    const bool valid = first >= 0;
    const std::int64_t row = valid ? first + part_offset<F, D>(c, index) : std::int64_t{0};
    // A part's keys, and its values, lie together in global memory.
    constexpr int kUnits = D * S::kBytes / 16;
    SLA2_UNROLL for (int plane = 0; plane < S::kPlanes; ++plane) {
      const unsigned char* k_from = k_low + (plane * c.k_plane + row * D) * S::kBytes;
      const unsigned char* v_from = v_low + (plane * c.v_plane + row * D) * S::kBytes;
      unsigned char* k_to = keys + plane * S::kKeyPlane + p * S::kPartKeys * S::kKeyStride;
      unsigned char* v_to =
          values +
          (S::kLowBit ? p * kKeyStep : plane * S::kValuePlane + p * S::kPartKeys * S::kValueStride);
      spread<S::kPartKeys * kUnits>([&](int at) {
        const int to = at / kUnits * S::kKeyStride + at % kUnits * 16;
        copy_async_16(k_to + to, k_from + at * 16, valid);
        constexpr int kRowUnits = S::kLowBit ? kKeyStep / 16 : kUnits;
        const int v_at = at / kRowUnits * S::kValueStride + at % kRowUnits * 16;
        copy_async_16(v_to + v_at, v_from + at * 16, valid);
      });
    }
  }
}

}  // namespace sla2::SLA2_CUDA_ROOM
