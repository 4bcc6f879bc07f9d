// Steps 2 to 4 for the rows of one query block: sparse branch (sparse.cuh), then the linear branch
// o_l = phi(q) H_i / (phi(q) . Z_i) by slices of 32 channels, then the mix o = alpha o_s +
// (1 - alpha) o_l. A block of threads owns up to 128 rows of one query block, a warp 16 of them;
// every output element has one writer, so the bits never depend on scheduling.
#include "cuda/lines.cuh"
#include "cuda/sparse.cuh"
#include "cuda/stages.h"

namespace sla2::SLA2_CUDA_ROOM {
namespace {

constexpr int kSlice = 32;                                  // channels of H_i multiplied together
constexpr int kSliceStride = kSlice + 8;                    // bf16
constexpr int kStagingStride = kSlice + 8;                  // floats: no bank conflicts
constexpr float kTinyDenominator = 5.421010862427522e-20f;  // 2^-64

SLA2_HOST_DEVICE std::size_t slice_bytes(int D, int terms) {
  return static_cast<std::size_t>(D) * kSliceStride * 2 * static_cast<std::size_t>(terms);
}
/// Slices staged together.
SLA2_HOST_DEVICE int slices_at_once(int D, int terms) {
  constexpr std::size_t kRoom = 20480;
  const auto fit = static_cast<int>(kRoom / slice_bytes(D, terms));
  return fit < 1 ? 1 : fit > D / kSlice ? D / kSlice : fit;
}

/// Shared memory of the linear branch: phi(q) of the block's rows, if it is computed here (bf16
/// inputs, head size at most 128); slices of H_i; outputs on their way; parked fragments of o_s.
struct LinearLayout {
  std::size_t slices, staging, parked, total;  // offsets
};
template <Format F, int D>
SLA2_HOST_DEVICE LinearLayout linear_layout(const Call& c, int rows) {
  LinearLayout l;
  l.slices = kTilesAt;
  if (phi_in_attend(c)) l.slices += static_cast<std::size_t>(rows) * (D + 8) * sizeof(Bf16);
  l.staging =
      l.slices + static_cast<std::size_t>(slices_at_once(D, c.terms)) * slice_bytes(D, c.terms);
  l.parked = l.staging + static_cast<std::size_t>(rows) * kStagingStride * sizeof(float);
  l.total = l.parked + parked_bytes<F, D>(rows);
  return l;
}

/// phi(q), not normalised, of the warp's 16 rows to shared memory, and 1 / (phi(q) . Z_i).
template <int D>
SLA2_DEVICE void prepare_phi(const Call& c, const Queries& q, float* staging, float (&inverse)[2]) {
  constexpr int kLanes = D / kLine;
  constexpr int kRows = 32 / kLanes;  // of the warp at once
  constexpr int kBatch = 4;
  const int channel = lane_index() % kLanes * kLine;
  const bool inside = channel < c.d;
  const int own = warp_index() * 16 + lane_index() / kLanes;
  const Row base = row_of(c.q, q.head / c.H, q.head % c.H, q.first);
  const Bf16* from = static_cast<const Bf16*>(base.data) + base.at + channel;
  float z[kLine] = {};
  RawLine<Bf16> raw_z = load_raw(
      c.sums.data + q.block_row(c) * c.S + std::int64_t{c.d} * c.dv + channel, true, inside);
  unpack_line(raw_z, z);
  Bf16* phi = shared_memory<Bf16>(kTilesAt) + own * (D + 8) + channel;
  float* bottoms = staging + warp_index() * 16 * kStagingStride;  // of the warp's rows
  SLA2_NO_UNROLL for (int first = 0; first < 16; first += kRows * kBatch) {
    RawLine<Bf16> raw[kBatch];
    SLA2_UNROLL for (int s = 0; s < kBatch; ++s) {
      const int r = first + s * kRows + own;
      raw[s] = load_raw(from + r * c.q.token, c.q.vectors, inside && q.first + r < q.end(c));
    }
    SLA2_UNROLL for (int s = 0; s < kBatch; ++s) {
      float x[kLine];
      unpack_line(raw[s], x);
      const float sum = apply_phi_raw<kLanes, true>(c.feature_map, inside, x);
      RawLine<Bf16> rounded;
      SLA2_UNROLL for (int i = 0; i < kLine; i += 2) {
        rounded.words[0].x[i / 2] = pack_bf16(x[i], x[i + 1]);
      }
      store_16(phi + (first + s * kRows) * (D + 8), rounded.words[0]);
      unpack_line(rounded, x);
      float bottom = 0;
      SLA2_UNROLL for (int i = 0; i < kLine; ++i) bottom = fused(x[i], z[i], bottom);
      bottom = sum_over_row<kLanes>(bottom);
      if (lane_index() % kLanes == 0) {
        bottoms[first + s * kRows + lane_index() / kLanes] =
            bottom < kTinyDenominator * sum ? 0.0f : 1 / bottom;
      }
    }
  }
  warp_barrier();
  SLA2_UNROLL for (int r = 0; r < 2; ++r) inverse[r] = bottoms[lane_index() / 4 + 8 * r];
}

/// 1 / (phi(q) . Z_i) of both rows, 0 where it is tiny.
template <int D>
SLA2_DEVICE void inverse_denominators(const Call& c, const Queries& q, float (&inverse)[2]) {
  const Bf16* z = c.sums.data + q.block_row(c) * c.S + std::int64_t{c.d} * c.dv;
  float bottom[2] = {};
  SLA2_NO_UNROLL for (int channel = lane_index() % 4 * 2; channel < c.d; channel += 8) {
    float weight[2] = {};
    float phi[2][2] = {};
    SLA2_NO_UNROLL for (int term = c.terms - 1; term >= 0; --term) {
      const std::uint32_t word = load_4(z + term * c.sums.plane + channel);
      weight[0] += bits_to_float(word << 16);
      weight[1] += bits_to_float(word & 0xffff0000u);
      SLA2_UNROLL for (int r = 0; r < 2; ++r) {
        const std::uint32_t pair =
            load_4(c.phi_q.data + term * c.phi_q.plane + q.line(c, r) * D + channel);
        phi[r][0] += bits_to_float(pair << 16);
        phi[r][1] += bits_to_float(pair & 0xffff0000u);
      }
    }
    SLA2_UNROLL for (int r = 0; r < 2; ++r) {
      bottom[r] += phi[r][0] * weight[0] + phi[r][1] * weight[1];
    }
  }
  SLA2_UNROLL for (int r = 0; r < 2; ++r) {
    bottom[r] += shuffle_xor(bottom[r], 1);
    bottom[r] += shuffle_xor(bottom[r], 2);
    inverse[r] = bottom[r] < kTinyDenominator ? 0.0f : 1 / bottom[r];
  }
}

/// Starts the copy of slices [slice, slice + count) of H_i.
template <int D>
SLA2_DEVICE void load_slices(const Call& c, const Queries& q, Bf16* to, int slice, int count) {
  constexpr int kUnits = kSlice / 8;
  const Bf16* from = c.sums.data + q.block_row(c) * c.S;
  const int total = count * c.terms * D * kUnits;
  for (int at = fresh_thread_index(); at < total; at += block_threads()) {
    const int unit = at % kUnits * 8;
    const int a = at / kUnits % D;
    const int plane = at / (kUnits * D);  // of slice, term
    const int channel = (slice + plane / c.terms) * kSlice + unit;
    const bool valid = a < c.d && channel < c.dv;
    const std::int64_t source =
        valid ? plane % c.terms * c.sums.plane + std::int64_t{a} * c.dv + channel : std::int64_t{0};
    copy_async_16(to + (plane * D + a) * kSliceStride + unit, from + source, valid);
  }
  copy_async_commit();
}

/// acc += a times 16 rows of a slice. kExact: rounded to nearest between products; tensor cores
/// truncate.
template <bool kExact>
SLA2_DEVICE void multiply_rows(const Bf16* rows, const std::uint32_t (&a)[4],
                               float (&acc)[kSlice / 8][4]) {
  const int lane = fresh_thread_index() % 32;
  SLA2_UNROLL for (int n = 0; n < kSlice / 8; n += 2) {
    std::uint32_t b[4];
    ldmatrix_x4_transposed(b, rows + lane % 16 * kSliceStride + n * 8 + lane / 16 * 8);
    SLA2_UNROLL for (int half = 0; half < 2; ++half) {
      if constexpr (kExact) {
        float product[4] = {};
        mma_bf16(product, a, b[2 * half], b[2 * half + 1]);
        SLA2_UNROLL for (int e = 0; e < 4; ++e) acc[n + half][e] += product[e];
      } else {
        mma_bf16(acc[n + half], a, b[2 * half], b[2 * half + 1]);
      }
    }
  }
}

/// phi(q) H_i for one staged slice.
template <int D>
SLA2_DEVICE void multiply_slice(const Call& c, const Queries& q, const Bf16* staged,
                                float (&acc)[kSlice / 8][4]) {
  if (phi_in_attend(c)) {
    const int thread = fresh_thread_index();
    const Bf16* phi = shared_memory<Bf16>(kTilesAt) + (thread / 32 * 16 + thread % 16) * (D + 8) +
                      thread % 32 / 16 * 8;
    SLA2_UNROLL for (int step = 0; step < D / 16; ++step) {
      std::uint32_t a[4];
      ldmatrix_x4(a, phi + step * 16);
      multiply_rows<false>(staged + step * 16 * kSliceStride, a, acc);
    }
    return;
  }
  for (int order = c.terms - 1; order >= 0; --order) {  // small products first
    for (int term = 0; term <= order; ++term) {
      const Bf16* plane = staged + (order - term) * D * kSliceStride;
      SLA2_NO_UNROLL for (int step = 0; step < (c.d + 15) / 16; ++step) {
        std::uint32_t a[4];
        row_fragment(c.phi_q.data + term * c.phi_q.plane, c, q, D * 2, step, a);
        multiply_rows<true>(plane + step * 16 * kSliceStride, a, acc);
      }
    }
  }
}

/// Writes a slice of the warp's 16 rows: value(n, e) is element e of fragment n. Through shared
/// memory, so that the code is small and neighbouring lanes write neighbouring channels.
template <typename Value>
SLA2_DEVICE void write_slice(const Call& c, const Queries& q, const Rows& to, int slice,
                             float* staging, Value value) {
  if (to.data == nullptr) return;
  const int thread = fresh_thread_index();
  const int lane = thread % 32;
  const int warp = thread / 32;
  float* const own = staging + warp * 16 * kStagingStride;
  warp_barrier();
  SLA2_UNROLL for (int n = 0; n < kSlice / 8; ++n) {
    SLA2_UNROLL for (int r = 0; r < 2; ++r) {
      store_8(own + (lane / 4 + 8 * r) * kStagingStride + n * 8 + lane % 4 * 2,
              {{float_to_bits(value(n, 2 * r)), float_to_bits(value(n, 2 * r + 1))}});
    }
  }
  warp_barrier();
  const int channel = slice * kSlice + lane % 8 * 4;
  if (channel >= c.dv) return;
  SLA2_NO_UNROLL for (int r = lane / 8; r < 16; r += 4) {
    const int row = q.first + warp * 16 + r;
    if (row >= q.end(c)) break;
    const Words4 words = load_16(own + r * kStagingStride + lane % 8 * 4);
    float x[4];
    SLA2_UNROLL for (int e = 0; e < 4; ++e) {
      x[e] = held_in_range(to.dtype, bits_to_float(words.x[e]));
    }
    store_four(row_of(to, q.head / c.H, q.head % c.H, row), channel, x);
  }
}

/// Rows [B, H, Nq, dv] in fp32 of the workspace.
SLA2_DEVICE Rows workspace_rows(const Call& c, float* data) {
  const std::int64_t head = std::int64_t{c.Nq} * c.dv;
  return {data, c.H * head, head, c.dv, DType::kF32, true};
}

/// The scales of 8-bit v for a slice of o_s.
template <int D>
SLA2_DEVICE void scale_values(const Call& c, const Queries& q, int slice, Running<D>& run) {
  constexpr int kCount = kSlice / 8;
  const float* scales =
      c.v_scale + std::int64_t{q.key_head} * c.dv + slice * kSlice + fresh_thread_index() % 4 * 2;
  SLA2_UNROLL for (int n = 0; n < kCount; ++n) {
    Words2 scale{};
    if ((slice * kCount + n) * 8 < c.dv) scale = load_8(scales + n * 8);
    SLA2_UNROLL for (int e = 0; e < 4; ++e) {
      run.o[slice * kCount + n][e] *= bits_to_float(scale.x[e % 2]);
    }
  }
}

/// Linear branch and mix.
template <Format F, int D>
SLA2_DEVICE void finish(const Call& c, const Queries& q, Running<D>& run) {
  const bool mixed = c.complement_empty[q.block_row(c)] == 0;
  const LinearLayout layout = linear_layout<F, D>(c, block_threads() / 2);
  const int at_once = slices_at_once(D, c.terms);
  Bf16* slices = shared_memory<Bf16>(layout.slices);
  float* staging = shared_memory<float>(layout.staging);
  float inverse[2] = {};
  float alpha = 0.5f;
  block_barrier();  // the tiles of the sparse branch have been read
  constexpr int kHeld = Sparse<F, D>::kHeld;
  SLA2_UNROLL for (int n = kHeld; n < D / 8; ++n) park<F, D>(run, n, layout.parked);
  if (mixed) {
    load_slices<D>(c, q, slices, 0, at_once);
    if (phi_in_attend(c)) {
      if constexpr (D <= 128) prepare_phi<D>(c, q, staging, inverse);
    } else {
      inverse_denominators<D>(c, q, inverse);
    }
    if (c.alpha_logit != nullptr) {
      const int column = c.alpha_blocks == 1 ? 0 : q.i;
      alpha = 1 / (1 + exact_exp(-c.alpha_logit[q.head % c.H * c.alpha_blocks + column]));
    }
  }
  SLA2_UNROLL for (int slice = 0; slice < D / kSlice; ++slice) {
    constexpr int kOfSlice = kSlice / 8;
    SLA2_UNROLL for (int n = slice * kOfSlice; n < (slice + 1) * kOfSlice; ++n) {
      if (n >= kHeld) fetch<F, D>(run, n, layout.parked);
    }
    if constexpr (Sparse<F, D>::kLowBit) scale_values(c, q, slice, run);
    float acc[kSlice / 8][4] = {};
    if (mixed) {
      if (slice % at_once == 0) {
        if (slice > 0) {
          block_barrier();
          load_slices<D>(c, q, slices, slice, min_int(at_once, D / kSlice - slice));
        }
        copy_async_wait<0>();
        block_barrier();
      }
      multiply_slice<D>(c, q, slices + slice % at_once * D * kSliceStride * c.terms, acc);
    }
    SLA2_UNROLL for (int n = 0; n < kSlice / 8; ++n) {
      SLA2_UNROLL for (int e = 0; e < 4; ++e) {
        acc[n][e] = inverse[e / 2] == 0 ? 0.0f : acc[n][e] * inverse[e / 2];
      }
    }
    const auto sparse = [&](int n, int e) { return run.o[slice * (kSlice / 8) + n][e]; };
    const auto linear = [&](int n, int e) { return acc[n][e]; };
    write_slice(c, q, c.out_sparse, slice, staging, sparse);
    write_slice(c, q, c.out_linear, slice, staging, linear);
    if (c.is_sla) {
      write_slice(c, q, workspace_rows(c, c.sparse_rows), slice, staging, sparse);
      write_slice(c, q, workspace_rows(c, c.linear_rows), slice, staging, linear);
    } else {
      write_slice(c, q, c.out, slice, staging, [&](int n, int e) {
        return mixed ? alpha * sparse(n, e) + (1 - alpha) * linear(n, e) : sparse(n, e);
      });
    }
  }
}

template <Format F, int D>
SLA2_KERNEL(kAttendThreads, (Sparse<F, D>::kBlocks))
void attend_kernel(Call c) {
  const int rows = block_threads() / 2;
  const int tiles = c.bq / rows;  // of a query block
  const int index = block_x() % (c.M * tiles);
  Queries own;
  own.head = block_x() / (c.M * tiles);
  own.i = index / tiles;
  own.first = own.i * c.bq + index % tiles * rows;
  if (own.first >= own.end(c)) return;
  const int b = own.head / c.H;
  own.key_head = b * c.Hkv + own.head % c.H / c.group;
  own.length = key_length(c, b);
  own.blocks = blocks_of(c, own.length);
  Queries& q = *shared_memory<Queries>(0);
  if (thread_index() == 0) q = own;
  block_barrier();
  Running<D> run;
  float lse[2];
  sparse_branch<F, D>(c, q, run, lse);
  if (c.lse != nullptr && lane_index() % 4 == 0) {
    SLA2_UNROLL for (int r = 0; r < 2; ++r) {
      if (q.valid(c, r)) c.lse[q.line(c, r)] = lse[r];
    }
  }
  finish<F, D>(c, q, run);
}

template <Format F, int D>
void launch_attend(const Call& c, void* stream) {
  using S = Sparse<F, D>;
  const int rows = c.bq < 128 ? c.bq : 128;
  const std::size_t sparse = S::parked_at(rows) + parked_bytes<F, D>(rows);
  const std::size_t linear = linear_layout<F, D>(c, rows).total;
  launch(stream, attend_kernel<F, D>, {std::int64_t{c.B} * c.H * c.M * (c.bq / rows)}, rows * 2,
         sparse < linear ? linear : sparse, c);
}

template <Format F>
void dispatch(const Call& c, void* stream) {
  if (c.D == 64) {
    launch_attend<F, 64>(c, stream);
  } else if (c.D == 128) {
    launch_attend<F, 128>(c, stream);
  } else {
    launch_attend<F, 256>(c, stream);
  }
}

/// out = o_s + o_l proj_out, a row per warp at a time.
SLA2_KERNEL(kAttendThreads, 2) void project_out_kernel(Call c) {
  const std::int64_t rows = std::int64_t{c.B} * c.H * c.Nq;
  const std::int64_t row = std::int64_t{block_x()} * (kAttendThreads / 32) + warp_index();
  if (row >= rows) return;
  const int n = static_cast<int>(row % c.Nq);
  const std::int64_t head = row / c.Nq;
  const bool mixed = c.complement_empty[head * c.M + n / c.bq] == 0 && c.proj_out != nullptr;
  const float* o_s = c.sparse_rows + row * c.dv;
  const float* o_l = c.linear_rows + row * c.dv;
  const Row out = row_of(c.out, static_cast<int>(head / c.H), static_cast<int>(head % c.H), n);
  for (int channel = lane_index() * 2; channel < c.dv; channel += 64) {
    float o[2] = {held_in_range(out.dtype, o_s[channel]),
                  held_in_range(out.dtype, o_s[channel + 1])};
    if (mixed) {
      for (int a = 0; a < c.dv; ++a) {
        const float* w = c.proj_out + a * c.dv + channel;
        const float linear = held_in_range(out.dtype, o_l[a]);
        o[0] += linear * w[0];
        o[1] += linear * w[1];
      }
    }
    store_pair(out, channel, o[0], o[1]);
  }
}

}  // namespace

void attend(const Call& c, void* stream) {
  switch (c.format) {
    case Format::kInt8:
      return dispatch<Format::kInt8>(c, stream);
    case Format::kFp8:
      return dispatch<Format::kFp8>(c, stream);
    case Format::kBf16:
      return dispatch<Format::kBf16>(c, stream);
    case Format::kF16:
      return dispatch<Format::kF16>(c, stream);
    case Format::kFp32:
      return dispatch<Format::kFp32>(c, stream);
  }
}

void project_out(const Call& c, void* stream) {
  const std::int64_t rows = std::int64_t{c.B} * c.H * c.Nq;
  launch(stream, project_out_kernel, {ceil_div(rows, kAttendThreads / 32)}, kAttendThreads, 0, c);
}

}  // namespace sla2::SLA2_CUDA_ROOM
