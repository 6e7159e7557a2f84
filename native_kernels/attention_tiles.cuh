// Pieces of the expert's attention, with clusters and without: several blocks a head, each with its share of the keys
// in shared memory, partial results sent to the block that merges them.
#pragma once

#include <cooperative_groups.h>

#include "hopper.cuh"
#include "vector.cuh"

namespace flashrt {
namespace attention {

namespace cg = cooperative_groups;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kHeadDim = 256;
constexpr int kRowBytes = kHeadDim * 2;
constexpr int kRowVectors = kRowBytes / 16;
constexpr int kRowStride = kRowBytes + 16;       // bytes; ldmatrix rows fall into different banks
constexpr int kWarpColumns = kHeadDim / kWarps;  // a warp's share of P V

// Among the 256 threads that compute; a block may hold another warp that only moves data.
__device__ __forceinline__ void team_barrier() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

__host__ __device__ inline int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Where a block's operands lie in shared memory, in bytes from `base`; `splits` blocks share a head.
struct Layout {
  int block_keys;  // keys a block takes at most, a multiple of 16
  int q, k, v, score, probability, inbox;

  __host__ Layout(int padded_rows, int capacity, int splits) {
    block_keys = round_up((capacity + splits - 1) / splits, 16);
    q = 0;
    k = padded_rows * kRowStride;
    v = k + block_keys * kRowStride;
    score = v + block_keys * kRowStride;
    probability = score + padded_rows * score_stride() * static_cast<int>(sizeof(float));
    inbox = round_up(probability + padded_rows * probability_stride() * 2, 16);
  }
  __host__ __device__ int score_stride() const { return block_keys + 4; }
  __host__ __device__ int probability_stride() const { return block_keys + 8; }
};

// One block's inbox: partial values (rank, row, column), then (maximum, sum) by rank and row.
__host__ __device__ constexpr int inbox_floats(int splits, int padded_rows) {
  return splits * padded_rows * (kHeadDim / splits + 2);
}

// The keys [first, first + keys) of block `split`, of which the first `prefix_keys` belong to the prefix.
struct Share {
  int first, keys, padded_keys, prefix_keys;
  int active;  // blocks that have keys, the first ones

  // Shared memory is laid out for `capacity` keys: of more, an error beats what they would overwrite.
  __device__ Share(int split, int splits, int prefix, int rows, int capacity) {
    if (prefix < 0 || prefix > capacity - rows) __trap();
    const int total = prefix + rows, share = round_up((total + splits - 1) / splits, 16);
    active = (total + share - 1) / share;
    first = split * share;
    keys = max(0, min(share, total - first));
    padded_keys = round_up(keys, 16);
    prefix_keys = max(0, min(keys, prefix - first));
  }
};

// Start copying the prefix's keys and values (async_copy_wait() ends it), and zero the rows of V past the last key:
// 0 * garbage must stay 0. `k`, `v`: this head's rows, `row_elements` apart.
__device__ inline void load_prefix(unsigned char* k_shared, unsigned char* v_shared, const __nv_bfloat16* k,
                                   const __nv_bfloat16* v, int64_t row_elements, const Share& share) {
  for (int i = threadIdx.x; i < share.prefix_keys * kRowVectors; i += kThreads) {
    const int row = i / kRowVectors, vector = i % kRowVectors;
    const int64_t offset = (share.first + row) * row_elements + vector * 8;
    async_copy16(k_shared + row * kRowStride + vector * 16, k + offset);
    async_copy16(v_shared + row * kRowStride + vector * 16, v + offset);
  }
  for (int i = threadIdx.x; i < (share.padded_keys - share.keys) * kRowVectors; i += kThreads)
    *reinterpret_cast<uint4*>(v_shared + (share.keys + i / kRowVectors) * kRowStride + i % kRowVectors * 16) =
        make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ uint4 load_vector(const __nv_bfloat16* row, int vector) {
  return __ldcg(reinterpret_cast<const uint4*>(row) + vector);  // L2: another block wrote it a moment ago
}

// The suffix's keys and values and this head's queries, after they have been written.
template <int RowTiles>
__device__ void load_suffix(unsigned char* shared, const Layout& layout, const __nv_bfloat16* q, int rows,
                            int64_t q_row_elements, const __nv_bfloat16* k, const __nv_bfloat16* v,
                            int64_t row_elements, const Share& share) {
  for (int i = threadIdx.x; i < 16 * RowTiles * kRowVectors; i += kThreads) {
    const int row = i / kRowVectors, vector = i % kRowVectors;
    *reinterpret_cast<uint4*>(shared + layout.q + row * kRowStride + vector * 16) =
        row < rows ? load_vector(q + row * q_row_elements, vector) : make_uint4(0, 0, 0, 0);
  }
  for (int i = threadIdx.x; i < (share.keys - share.prefix_keys) * kRowVectors; i += kThreads) {
    const int row = share.prefix_keys + i / kRowVectors, vector = i % kRowVectors;
    const int64_t offset = (share.first + row) * row_elements;
    *reinterpret_cast<uint4*>(shared + layout.k + row * kRowStride + vector * 16) = load_vector(k + offset, vector);
    *reinterpret_cast<uint4*>(shared + layout.v + row * kRowStride + vector * 16) = load_vector(v + offset, vector);
  }
}

// q k^T / 16 for 8 keys a warp at a time.
template <int RowTiles>
__device__ void scores(const unsigned char* q, const unsigned char* k, float* out, int keys, int stride) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int n = warp * 8; n < keys; n += kWarps * 8) {
    float sum[2][RowTiles][4] = {};  // even and odd steps: two independent chains
    const unsigned char* k_row = k + (n + lane % 8) * kRowStride + lane / 8 * 16;
    const unsigned char* q_row = q + lane % 16 * kRowStride + lane / 16 * 16;
#pragma unroll
    for (int d = 0; d < kRowBytes; d += 64) {
      uint32_t b[4];
      load_matrix(b, k_row + d);
#pragma unroll
      for (int r = 0; r < RowTiles; ++r) {
        uint32_t a[2][4];
        load_matrix(a[0], q_row + r * 16 * kRowStride + d);
        load_matrix(a[1], q_row + r * 16 * kRowStride + d + 32);
        mma_bf16(sum[0][r], a[0][0], a[0][1], a[0][2], a[0][3], b[0], b[1]);
        mma_bf16(sum[1][r], a[1][0], a[1][1], a[1][2], a[1][3], b[2], b[3]);
      }
    }
    constexpr float kScale = 0.0625f;  // 1 / sqrt(256)
#pragma unroll
    for (int r = 0; r < RowTiles; ++r) {
      float* target = out + (r * 16 + lane / 4) * stride + n + lane % 4 * 2;
      target[0] = (sum[0][r][0] + sum[1][r][0]) * kScale;
      target[1] = (sum[0][r][1] + sum[1][r][1]) * kScale;
      target[8 * stride] = (sum[0][r][2] + sum[1][r][2]) * kScale;
      target[8 * stride + 1] = (sum[0][r][3] + sum[1][r][3]) * kScale;
    }
  }
}

// How the blocks of a head pass partial results on: through the shared memory of a cluster.
struct ClusterExchange {
  int rank;
  float* own;  // inbox in shared memory

  __device__ float* inbox(int block) const {
#if FLASHRT_DEVICE_HAS_BULK
    return cg::this_cluster().map_shared_rank(own, block);
#else
    return own;
#endif
  }
  __device__ void sync() {
#if FLASHRT_DEVICE_HAS_BULK
    cg::this_cluster().sync();
#endif
  }
};

// exp(score - row maximum) as bf16 with zeros past `keys`, half a warp a row; the row's maximum and sum go to every
// block's inbox.
template <int Splits, int PaddedRows, typename Exchange>
__device__ void send_softmax(const float* score, __nv_bfloat16* probability, const Exchange& exchange, int rows,
                             int keys, int padded_keys, int score_stride, int probability_stride) {
  constexpr int Lanes = kWarpSize / 2;
  const int lane = threadIdx.x % Lanes;
#pragma unroll
  for (int first = 0; first < PaddedRows; first += kThreads / Lanes) {
    const int row = first + threadIdx.x / Lanes;  // rows past the end carry zeros: their queries are zero
    float maximum = -INFINITY;
    for (int key = lane; key < keys; key += Lanes) maximum = fmaxf(maximum, score[row * score_stride + key]);
#pragma unroll
    for (int offset = Lanes / 2; offset > 0; offset /= 2)
      maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, offset));
    float sum = 0.0f;
    for (int key = lane; key < padded_keys; key += Lanes) {
      const float value = key < keys ? __expf(score[row * score_stride + key] - maximum) : 0.0f;
      sum += value;
      probability[row * probability_stride + key] = from_float<__nv_bfloat16>(value);
    }
#pragma unroll
    for (int offset = Lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (row < rows && lane < Splits) {
      float2* stats = reinterpret_cast<float2*>(exchange.inbox(lane) + PaddedRows * kHeadDim);
      stats[exchange.rank * PaddedRows + row] = make_float2(maximum, sum);
    }
  }
}

// P V for this warp's 32 columns, sent to the blocks that merge them.
template <int Splits, int RowTiles, typename Exchange>
__device__ void send_values(const unsigned char* probability, const unsigned char* v, const Exchange& exchange,
                            int padded_keys, int probability_row_bytes) {
  constexpr int Columns = kHeadDim / Splits;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  float sum[RowTiles][4][4] = {};
  const unsigned char* v_row =
      v + (lane % 8 + lane / 8 % 2 * 8) * kRowStride + (warp * kWarpColumns + lane / 16 * 8) * 2;
  const unsigned char* p_row = probability + lane % 16 * probability_row_bytes + lane / 16 * 16;
  for (int key = 0; key < padded_keys; key += 16) {
    uint32_t b[2][4];
    load_matrix_transposed(b[0], v_row + key * kRowStride);
    load_matrix_transposed(b[1], v_row + key * kRowStride + 32);
#pragma unroll
    for (int r = 0; r < RowTiles; ++r) {
      uint32_t a[4];
      load_matrix(a, p_row + r * 16 * probability_row_bytes + key * 2);
#pragma unroll
      for (int t = 0; t < 4; ++t)
        mma_bf16(sum[r][t], a[0], a[1], a[2], a[3], b[t / 2][t % 2 * 2], b[t / 2][t % 2 * 2 + 1]);
    }
  }
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const int column = warp * kWarpColumns + t * 8;
    float* inbox = exchange.inbox(column / Columns) + exchange.rank * 16 * RowTiles * Columns + column % Columns;
#pragma unroll
    for (int r = 0; r < RowTiles; ++r) {
      float* target = inbox + (r * 16 + lane / 4) * Columns + lane % 4 * 2;
      *reinterpret_cast<float2*>(target) = make_float2(sum[r][t][0], sum[r][t][1]);
      *reinterpret_cast<float2*>(target + 8 * Columns) = make_float2(sum[r][t][2], sum[r][t][3]);
    }
  }
}

__device__ __forceinline__ float2 load_volatile(const float2* address) {
  float2 value;
  asm volatile("ld.volatile.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "l"(address));
  return value;
}

__device__ __forceinline__ float4 load_volatile(const float4* address) {
  float4 value;
  asm volatile("ld.volatile.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "l"(address));
  return value;
}

// Four columns of a row: sums of weighted values over the sum of the weights.
__device__ __forceinline__ void store_four(void* out, int64_t index, const float (&value)[4], float total, bool fp8_out,
                                           float inverse_scale) {
  Vector<__nv_bfloat16, 4> rounded;
#pragma unroll
  for (int i = 0; i < 4; ++i) rounded.element[i] = from_float<__nv_bfloat16>(value[i] / total);
  if (fp8_out) {
    Vector<uint8_t, 4> packed;
#pragma unroll
    for (int i = 0; i < 4; ++i) packed.element[i] = to_e4m3(to_float(rounded.element[i]) * inverse_scale);
    *reinterpret_cast<Vector<uint8_t, 4>*>(static_cast<uint8_t*>(out) + index) = packed;
  } else {
    *reinterpret_cast<Vector<__nv_bfloat16, 4>*>(static_cast<__nv_bfloat16*>(out) + index) = rounded;
  }
}

// Merge the partial results that lie in this block's inbox and write its columns, rows `out_row_elements` apart.
template <int Splits, int RowTiles>
__device__ void merge(const float* inbox, int rows, void* out, int64_t out_row_elements, bool fp8_out,
                      float inverse_scale) {
  constexpr int PaddedRows = 16 * RowTiles, Columns = kHeadDim / Splits, Threads = Columns / 4;
  const float2* stats = reinterpret_cast<const float2*>(inbox + PaddedRows * kHeadDim);
  const int column = threadIdx.x % Threads * 4;
  for (int row = threadIdx.x / Threads; row < min(PaddedRows, rows); row += kThreads / Threads) {
    float2 stat[Splits];
    float4 parts[Splits];
#pragma unroll
    for (int s = 0; s < Splits; ++s) {  // past L1, which may hold what an earlier layer left there
      stat[s] = load_volatile(stats + s * PaddedRows + row);
      parts[s] = load_volatile(reinterpret_cast<const float4*>(inbox + (s * PaddedRows + row) * Columns + column));
    }
    float maximum = -INFINITY;
#pragma unroll
    for (int s = 0; s < Splits; ++s) maximum = fmaxf(maximum, stat[s].x);
    float total = 0.0f, value[4] = {};
#pragma unroll
    for (int s = 0; s < Splits; ++s) {
      const float weight = __expf(stat[s].x - maximum);
      total += weight * stat[s].y;
      value[0] += weight * parts[s].x;
      value[1] += weight * parts[s].y;
      value[2] += weight * parts[s].z;
      value[3] += weight * parts[s].w;
    }
    store_four(out, row * out_row_elements + column, value, total, fp8_out, inverse_scale);
  }
}

// Where a block without a cluster leaves its partial results: all columns of its tile, in memory.
struct OwnInbox {
  static constexpr int rank = 0;
  float* own;
  __device__ float* inbox(int) const { return own; }
};

// Merge a tile's partial results, `parts` inboxes behind each other in memory, in the order of their keys; `weight`:
// shared memory for parts * 16 floats. From L2 throughout: other blocks wrote them a moment ago.
__device__ inline void merge_parts(const float* inboxes, int parts, int rows, float* weight, void* out, bool fp8_out,
                                   float inverse_scale) {
  constexpr int Rows = 16, Floats = inbox_floats(1, Rows), Threads = kHeadDim / 4, Each = Rows * Threads / kThreads;
  constexpr int Stride = kThreads / Threads;  // from one of a thread's rows to the next
  __shared__ float totals[Rows];
  // 16 lanes a row, a part each: more parts than lanes are taken in turns
  const int lane = threadIdx.x % Rows, own = threadIdx.x / Rows;
  const auto stat_of = [&](int part) {
    return __ldcg(reinterpret_cast<const float2*>(inboxes + int64_t(part) * Floats + Rows * kHeadDim) + own);
  };
  float maximum = -INFINITY, total = 0.0f;
  for (int part = lane; part < parts; part += Rows) maximum = fmaxf(maximum, stat_of(part).x);
#pragma unroll
  for (int offset = Rows / 2; offset > 0; offset /= 2)
    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, offset));
  for (int part = lane; part < parts; part += Rows) {
    const float2 stat = stat_of(part);
    weight[part * Rows + own] = __expf(stat.x - maximum);
    total += weight[part * Rows + own] * stat.y;
  }
#pragma unroll
  for (int offset = Rows / 2; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
  if (lane == 0) totals[own] = total;
  __syncthreads();
  const int column = threadIdx.x % Threads * 4, first = threadIdx.x / Threads;
  float value[Each][4] = {};
#pragma unroll 4
  for (int part = 0; part < parts; ++part) {
    const float* from = inboxes + int64_t(part) * Floats + column;
#pragma unroll
    for (int i = 0; i < Each; ++i) {
      const int row = first + i * Stride;
      const float4 its = __ldcg(reinterpret_cast<const float4*>(from + row * kHeadDim));
      const float factor = weight[part * Rows + row];
      value[i][0] += factor * its.x;
      value[i][1] += factor * its.y;
      value[i][2] += factor * its.z;
      value[i][3] += factor * its.w;
    }
  }
#pragma unroll
  for (int i = 0; i < Each; ++i) {
    const int row = first + i * Stride;
    if (row < rows) store_four(out, int64_t(row) * kHeadDim + column, value[i], totals[row], fp8_out, inverse_scale);
  }
}

// Scores, softmax and P V of the operands in shared memory, sent where the exchange says.
template <int Splits, int RowTiles, typename Exchange>
__device__ void attend(unsigned char* shared, const Layout& layout, const Share& share, const Exchange& exchange,
                       int rows) {
  constexpr int PaddedRows = 16 * RowTiles;
  float* score = reinterpret_cast<float*>(shared + layout.score);
  __nv_bfloat16* probability = reinterpret_cast<__nv_bfloat16*>(shared + layout.probability);
  scores<RowTiles>(shared + layout.q, shared + layout.k, score, share.padded_keys, layout.score_stride());
  team_barrier();
  send_softmax<Splits, PaddedRows>(score, probability, exchange, rows, share.keys, share.padded_keys,
                                   layout.score_stride(), layout.probability_stride());
  team_barrier();
  send_values<Splits, RowTiles>(shared + layout.probability, shared + layout.v, exchange, share.padded_keys,
                                layout.probability_stride() * 2);
}

}  // namespace attention
}  // namespace flashrt
