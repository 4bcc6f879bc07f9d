// Two plain products of the linear branch, in bf16 terms.
// Outer products: h_j = phi(Ks_j)^T V_j, z_j = column sums of phi(Ks_j), and in the same way dH_i =
// phi(Q_i)^T dTop_i, dZ_i = phi(Q_i)^T dBottom_i: one block for 64 x 64 of a state.
// Sums over blocks: H = rest h, dh = rest^T dH (over the heads of a group) and <dH_i, h_j>: one
// block for 128 x 64 of the result, 32 at a time of what is summed over, copied one step ahead.
// Every element is summed by one thread in a fixed order.
#include "cuda/backward_rows.cuh"

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

/// c [m, n] = sum over k; batch after batch of each.
struct Product {
  Terms a, b;
  std::int64_t a_pitch, b_pitch;
  std::int64_t a_batch, b_batch, c_batch;  // elements from one batch to the next
  int b_group;                             // batches that share one b
  int m, n, k;
  int batches;
  bool a_by_k;    // a is [k, m], not [m, k]
  bool b_by_n;    // b is [n, k], not [k, n]
  Terms c;        // [m, c_pitch], or null
  float* values;  // [m, c_pitch], or null
  std::int64_t c_pitch;
};

constexpr int kProductM = 128;
constexpr int kProductN = 64;
constexpr int kProductK = 32;

template <int kTerms, bool kAByK, bool kBByN>
SLA2_DEVICE void product_tile(const Product& x, int batch, int m0, int n0) {
  constexpr int kPitchA = (kAByK ? kProductM : kProductK) + 8;
  constexpr int kPitchB = (kBByN ? kProductK : kProductN) + 8;
  constexpr int kPlaneA = (kAByK ? kProductK : kProductM) * kPitchA;
  constexpr int kPlaneB = (kBByN ? kProductN : kProductK) * kPitchB;
  constexpr int kStage = kTerms * (kPlaneA + kPlaneB);
  Bf16* shared = shared_memory<Bf16>(0);
  const std::int64_t a_at = batch * x.a_batch;
  const std::int64_t b_at = batch / x.b_group * x.b_batch;
  const int steps = (x.k + kProductK - 1) / kProductK;
  const auto copy = [&](int step) {
    if (step < steps) {
      Bf16* a = shared + step % 2 * kStage;
      Bf16* b = a + kTerms * kPlaneA;
      const int k0 = step * kProductK;
      if constexpr (kAByK) {
        copy_tile<kTerms>(a, kPitchA, kPlaneA, x.a, a_at + k0 * x.a_pitch + m0, x.a_pitch,
                          kProductK, kProductM, x.k - k0, x.m - m0);
      } else {
        copy_tile<kTerms>(a, kPitchA, kPlaneA, x.a, a_at + m0 * x.a_pitch + k0, x.a_pitch,
                          kProductM, kProductK, x.m - m0, x.k - k0);
      }
      if constexpr (kBByN) {
        copy_tile<kTerms>(b, kPitchB, kPlaneB, x.b, b_at + n0 * x.b_pitch + k0, x.b_pitch,
                          kProductN, kProductK, x.n - n0, x.k - k0);
      } else {
        copy_tile<kTerms>(b, kPitchB, kPlaneB, x.b, b_at + k0 * x.b_pitch + n0, x.b_pitch,
                          kProductK, kProductN, x.k - k0, x.n - n0);
      }
    }
    copy_async_commit();
  };
  const int row0 = warp_index() * 32;
  const bool active = m0 + row0 < x.m;
  float acc[2][8][4] = {};
  copy(0);
  for (int step = 0; step < steps; ++step) {
    copy(step + 1);
    copy_async_wait<1>();
    block_barrier();
    const Bf16* a = shared + step % 2 * kStage;
    const Bf16* b = a + kTerms * kPlaneA;
    if (active) {
      SLA2_UNROLL for (int k = 0; k < kProductK; k += 16) {
        Fragment<kTerms> left[2];
        SLA2_UNROLL for (int i = 0; i < 2; ++i) {
          const int row = row0 + 16 * i;
          if constexpr (kAByK) {
            load_left_transposed(left[i], a + k * kPitchA + row, kPitchA, kPlaneA);
          } else {
            load_left(left[i], a + row * kPitchA + k, kPitchA, kPlaneA);
          }
        }
        SLA2_UNROLL for (int n = 0; n < 4; ++n) {
          Fragment<kTerms> right;
          if constexpr (kBByN) {
            load_right(right, b + n * 16 * kPitchB + k, kPitchB, kPlaneB);
          } else {
            load_right_transposed(right, b + k * kPitchB + n * 16, kPitchB, kPlaneB);
          }
          SLA2_UNROLL for (int i = 0; i < 2; ++i) {
            multiply_add(acc[i][2 * n], left[i], right, 0);
            multiply_add(acc[i][2 * n + 1], left[i], right, 1);
          }
        }
      }
    }
    block_barrier();
  }
  copy_async_wait<0>();

  SLA2_UNROLL for (int i = 0; i < 2; ++i) {
    SLA2_UNROLL for (int n = 0; n < 8; ++n) {
      SLA2_UNROLL for (int half = 0; half < 2; ++half) {
        const int row = m0 + row0 + 16 * i + 8 * half + lane_index() / 4;
        const int column = n0 + n * 8 + lane_index() % 4 * 2;
        if (row >= x.m || column >= x.c_pitch) continue;
        const std::int64_t at = batch * x.c_batch + row * x.c_pitch + column;
        const float* value = acc[i][n] + 2 * half;
        if (x.values != nullptr) {
          store_8(x.values + at, {{float_to_bits(value[0]), float_to_bits(value[1])}});
        } else {
          store_terms<kTerms>(x.c, at, value[0], value[1]);
        }
      }
    }
  }
}

struct Products {
  Product of[2];  // the second one may have no batches
};

template <int kTerms>
SLA2_KERNEL(kBackThreads, 2)
void product_kernel(Products products) {
  const Product& x = products.of[block_z()];
  const int m_tiles = (x.m + kProductM - 1) / kProductM;
  // Blocks of one column of tiles are neighbours: they read the same part of b.
  const int m0 = block_x() % m_tiles * kProductM;
  const int n0 = block_x() / m_tiles * kProductN;
  if (block_y() >= x.batches || n0 >= x.n) return;
  if (x.b_by_n) {
    product_tile<kTerms, false, true>(x, block_y(), m0, n0);
  } else if (x.a_by_k) {
    product_tile<kTerms, true, false>(x, block_y(), m0, n0);
  } else {
    product_tile<kTerms, false, false>(x, block_y(), m0, n0);
  }
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

void launch_products(const Products& products, void* stream) {
  Grid grid{0, 0, products.of[1].batches > 0 ? 2 : 1};
  for (int i = 0; i < grid.z; ++i) {
    const Product& x = products.of[i];
    const std::int64_t blocks = ceil_div(x.m, kProductM) * ceil_div(x.n, kProductN);
    grid.x = blocks > grid.x ? blocks : grid.x;
    grid.y = x.batches > grid.y ? x.batches : grid.y;
  }
  constexpr int kTileA = kProductM * (kProductK + 8);
  constexpr int kTileB = kProductN * (kProductK + 8);
  static_assert(kTileA >= kProductK * (kProductM + 8) && kTileB >= kProductK * (kProductN + 8));
  const int terms = products.of[0].a.count;
  const std::size_t shared = sizeof(Bf16) * 2 * (kTileA + kTileB) * static_cast<std::size_t>(terms);
  switch (terms) {
    case 1:
      return launch(stream, product_kernel<1>, grid, kBackThreads, shared, products);
    case 2:
      return launch(stream, product_kernel<2>, grid, kBackThreads, shared, products);
    default:
      return launch(stream, product_kernel<3>, grid, kBackThreads, shared, products);
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
  const std::int64_t weights = static_cast<std::int64_t>(c.M) * c.Tp;
  const std::int64_t C = back.C;
  launch_products({{{back.rest, back.h, c.Tp, C, weights, c.T * C, c.M * C, c.group, c.M, back.C,
                     c.T, c.B * c.H, false, false, back.sums, nullptr, C},
                    {}}},
                  stream);
}

void back_key_gradients(const Backward& back, void* stream) {
  const Call& c = back.call;
  const std::int64_t weights = static_cast<std::int64_t>(c.M) * c.Tp;
  const std::int64_t C = back.C;
  // The heads of a group lie one behind the other: one long sum.
  const int rows = c.group * c.M;
  Products products{{{back.rest, back.d_sums, c.Tp, C, c.group * weights, rows * C, c.T * C, 1, c.T,
                      back.C, rows, c.B * c.Hkv, true, false, back.d_h, nullptr, C},
                     {}}};
  if (back.learns_router && !c.scope_all) {
    products.of[1] = {back.d_sums, back.h,        C,   C,      c.M * C,   c.T * C, weights,
                      c.group,     c.M,           c.T, back.C, c.B * c.H, false,   true,
                      {},          back.d_scores, c.Tp};
  }
  launch_products(products, stream);
}

}  // namespace sla2::SLA2_CUDA_ROOM
