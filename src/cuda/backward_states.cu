// Products of the linear branch, in bf16 terms.
// Outer products: h_j = phi(Ks_j)^T V_j, z_j = column sums of phi(Ks_j), and in the same way dH_i =
// phi(Q_i)^T dTop_i, dZ_i = phi(Q_i)^T dBottom_i: one block for 64 x 64 of a state.
// Sums over blocks: H = rest h, dh = rest^T dH (over the heads of a group), see states.cu.
// Every element is summed by one thread in a fixed order.
#include "cuda/backward_rows.cuh"
#include "cuda/stages.h"

namespace sla2::SLA2_CUDA_ROOM {
namespace {

constexpr int kOuterTile = 64;
constexpr int kOuterRows = 32;
constexpr int kOuterPitch = kOuterTile + 8;

struct Outer {
  Backward back;
  Terms left, right;    // [blocks of all heads, rows, D]
  const float* weight;  // [blocks of all heads, rows] of a row in z; null: 1
  Terms out;            // [blocks of all heads, C]
  int rows;             // of a block
  int blocks;           // of a head
  int heads;
};

template <int kTerms>
SLA2_DEVICE void outer_product(const Outer& o, int head, int block, int a0, int c0) {
  constexpr int kPlane = kOuterRows * kOuterPitch;
  constexpr int kStage = 2 * kTerms * kPlane;
  const int D = o.back.call.D;
  const std::int64_t index = static_cast<std::int64_t>(head) * o.blocks + block;
  const std::int64_t first = index * o.rows * D;
  Bf16* shared = shared_memory<Bf16>(0);
  const int steps = o.rows / kOuterRows;
  const auto copy = [&](int step) {
    if (step < steps) {
      Bf16* stage = shared + step % 2 * kStage;
      const std::int64_t at = first + static_cast<std::int64_t>(step) * kOuterRows * D;
      copy_tile<kTerms>(stage, kOuterPitch, kPlane, o.left, at + a0, D, kOuterRows, kOuterTile,
                        kOuterRows, kOuterTile);
      copy_tile<kTerms>(stage + kTerms * kPlane, kOuterPitch, kPlane, o.right, at + c0, D,
                        kOuterRows, kOuterTile, kOuterRows, kOuterTile);
    }
    copy_async_commit();
  };
  float acc[8][4] = {};
  float z = 0.0f;
  copy(0);
  for (int step = 0; step < steps; ++step) {
    copy(step + 1);
    copy_async_wait<1>();
    block_barrier();
    const Bf16* left = shared + step % 2 * kStage;
    const Bf16* right = left + kTerms * kPlane;
    SLA2_UNROLL for (int k = 0; k < kOuterRows; k += 16) {
      Fragment<kTerms> a;
      load_left_transposed(a, left + k * kOuterPitch + warp_index() * 16, kOuterPitch, kPlane);
      SLA2_UNROLL for (int n = 0; n < 4; ++n) {
        Fragment<kTerms> b;
        load_right_transposed(b, right + k * kOuterPitch + n * 16, kOuterPitch, kPlane);
        multiply_add(acc[2 * n], a, b, 0);
        multiply_add(acc[2 * n + 1], a, b, 1);
      }
    }
    if (c0 == 0 && thread_index() < kOuterTile) {
      for (int r = 0; r < kOuterRows; ++r) {
        float phi = 0.0f;
        SLA2_UNROLL for (int p = kTerms - 1; p >= 0; --p) {
          phi += to_float(left[p * kPlane + r * kOuterPitch + thread_index()]);
        }
        const float weight =
            o.weight == nullptr ? 1.0f : o.weight[index * o.rows + step * kOuterRows + r];
        z += phi * weight;
      }
    }
    block_barrier();
  }
  copy_async_wait<0>();

  const std::int64_t out = index * o.back.C;
  const int a = a0 + warp_index() * 16 + lane_index() / 4;
  SLA2_UNROLL for (int n = 0; n < 8; ++n) {
    const std::int64_t at =
        out + static_cast<std::int64_t>(a) * D + c0 + n * 8 + lane_index() % 4 * 2;
    store_terms<kTerms>(o.out, at, acc[n][0], acc[n][1]);
    store_terms<kTerms>(o.out, at + 8 * D, acc[n][2], acc[n][3]);
  }
  if (c0 == 0 && warp_index() < kOuterTile / 32) {
    const float next = shuffle_xor(z, 1);
    if (thread_index() % 2 == 0) {
      const std::int64_t at = out + static_cast<std::int64_t>(D) * D + a0 + thread_index();
      store_terms<kTerms>(o.out, at, z, next);
    }
  }
}

/// x W of one pooled row, or x itself.
SLA2_DEVICE void project_row(const Call& c, const float* x, const float* w, int h, float* y) {
  const float* matrix = w == nullptr
                            ? nullptr
                            : w + static_cast<std::int64_t>(c.num_routers == 1 ? 0 : h) * c.d * c.d;
  for (int a = thread_index(); a < c.D; a += kBackThreads) {
    float sum = 0.0f;
    if (matrix == nullptr) {
      sum = x[a];
    } else if (a < c.d) {
      for (int r = 0; r < c.d; ++r) sum += x[r] * matrix[r * c.d + a];
    }
    y[a] = sum;
  }
}

SLA2_DEVICE void project_pooled(const Backward& back, int head, int block) {
  const Call& c = back.call;
  const int h = head % c.H;
  if (block < c.M) {
    const std::int64_t at = (static_cast<std::int64_t>(head) * c.M + block) * c.D;
    project_row(c, back.pooled_q + at, c.proj_q, h, back.routed_q + at);
  }
  if (block < c.T) {
    const std::int64_t kv = static_cast<std::int64_t>(head / c.H) * c.Hkv + h / c.group;
    project_row(c, back.pooled_k + (kv * c.T + block) * c.D, c.proj_k, h,
                back.routed_k + (static_cast<std::int64_t>(head) * c.T + block) * c.D);
  }
}

template <int kTerms>
SLA2_KERNEL(kBackThreads, 2)
void outer_kernel(Outer o) {
  const int tiles = o.back.call.D / kOuterTile;
  if (block_z() == 1) {
    project_pooled(o.back, block_y(), block_x());
    return;
  }
  const int block = block_x() / (tiles * tiles);
  const int tile = block_x() % (tiles * tiles);
  if (block >= o.blocks || block_y() >= o.heads) return;
  outer_product<kTerms>(o, block_y(), block, tile / tiles * kOuterTile, tile % tiles * kOuterTile);
}

void launch_outer(const Outer& outer, bool projects, void* stream) {
  const Call& c = outer.back.call;
  const std::int64_t tiles = c.D / kOuterTile;
  const std::int64_t x = tiles * tiles * outer.blocks;
  const std::int64_t longest = c.M > c.T ? c.M : c.T;
  const Grid grid =
      projects ? Grid{x > longest ? x : longest, c.B * c.H, 2} : Grid{x, outer.heads, 1};
  const std::size_t shared =
      sizeof(Bf16) * 2 * 2 * kOuterRows * kOuterPitch * static_cast<std::size_t>(outer.left.count);
  switch (outer.left.count) {
    case 1:
      return launch(stream, outer_kernel<1>, grid, kBackThreads, shared, outer);
    case 2:
      return launch(stream, outer_kernel<2>, grid, kBackThreads, shared, outer);
    default:
      return launch(stream, outer_kernel<3>, grid, kBackThreads, shared, outer);
  }
}

}  // namespace

void back_key_states(const Backward& back, void* stream) {
  const Call& c = back.call;
  launch_outer({back, back.phi_k, back.v, nullptr, back.h, c.bk, c.T, c.B * c.Hkv},
               back.learns_router, stream);
}

void back_query_gradients(const Backward& back, void* stream) {
  const Call& c = back.call;
  launch_outer({back, back.phi_q, back.d_top, back.d_bottom, back.d_sums, c.bq, c.M, c.B * c.H},
               false, stream);
}

void back_query_states(const Backward& back, void* stream) {
  const Call& c = back.call;
  sum_blocks({.a = back.rest,
              .b = back.h,
              .c = back.sums,
              .a_pitch = c.Tp,
              .n = back.C,
              .heads = std::int64_t{c.B} * c.H,
              .m = c.M,
              .k = c.T,
              .group = c.group},
             stream);
}

void back_key_gradients(const Backward& back, void* stream) {
  const Call& c = back.call;
  sum_blocks({.a = back.rest,
              .b = back.d_sums,
              .c = back.d_h,
              .a_pitch = c.Tp,
              .n = back.C,
              .heads = std::int64_t{c.B} * c.Hkv,
              .m = c.T,
              .k = c.group * c.M,  // the heads of a group lie one behind the other: one long sum
              .by_k = true},
             stream);
}

}  // namespace sla2::SLA2_CUDA_ROOM
