// Pieces of the expert's attention shared by the kernel of one layer and the persistent one: 8 blocks a head, each with
// an eighth of the keys in shared memory, partial results sent to the block that merges them.
#pragma once

#include <cooperative_groups.h>

#include "hopper.cuh"
#include "vector.cuh"

namespace flashrt {
namespace attention {

namespace cg = cooperative_groups;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kSplits = 8;
constexpr int kHeadDim = 256;
constexpr int kRowBytes = kHeadDim * 2;
constexpr int kRowVectors = kRowBytes / 16;
constexpr int kRowStride = kRowBytes + 16;    // bytes; ldmatrix rows fall into different banks
constexpr int kColumns = kHeadDim / kSplits;  // a block's share of the output, and a warp's share of P V
static_assert(kSplits == kWarps, "send_values maps a warp's columns to one block");

__host__ __device__ inline int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// Where a block's operands lie in shared memory, in bytes from `base`.
struct Layout {
  int block_keys;  // keys a block takes at most, a multiple of 16
  int q, k, v, score, probability, inbox, bytes;

  __host__ Layout(int padded_rows, int capacity) {
    block_keys = round_up((capacity + kSplits - 1) / kSplits, 16);
    q = 0;
    k = padded_rows * kRowStride;
    v = k + block_keys * kRowStride;
    score = v + block_keys * kRowStride;
    probability = score + padded_rows * score_stride() * static_cast<int>(sizeof(float));
    inbox = round_up(probability + padded_rows * probability_stride() * 2, 16);
    bytes = inbox + kSplits * padded_rows * static_cast<int>(kColumns * sizeof(float) + sizeof(float2));
  }
  __host__ int bytes_without_inbox() const { return inbox; }
  __host__ __device__ int score_stride() const { return block_keys + 4; }
  __host__ __device__ int probability_stride() const { return block_keys + 8; }
};

// The keys [first, first + keys) of block `split`, of which the first `prefix_keys` belong to the prefix.
struct Share {
  int first, keys, padded_keys, prefix_keys;

  __device__ Share(int split, int prefix, int rows) {
    const int total = prefix + rows, share = round_up((total + kSplits - 1) / kSplits, 16);
    first = split * share;
    keys = max(0, min(share, total - first));
    padded_keys = round_up(keys, 16);
    prefix_keys = max(0, min(keys, prefix - first));
  }
};

// Copy the prefix's keys and values through the copy engine (completes on `barrier`, which thread 0 arms), and zero the
// rows of V past the last key: 0 * garbage must stay 0. `k`, `v`: this head's rows, `row_elements` apart.
__device__ inline void load_prefix(unsigned char* k_shared, unsigned char* v_shared, const __nv_bfloat16* k,
                                   const __nv_bfloat16* v, int64_t row_elements, const Share& share,
                                   uint64_t* barrier) {
  if (threadIdx.x == 0) barrier_expect(barrier, 2 * share.prefix_keys * kRowBytes);
  __syncthreads();
  for (int row = threadIdx.x; row < share.prefix_keys; row += kThreads) {
    bulk_copy(k_shared + row * kRowStride, k + (share.first + row) * row_elements, kRowBytes, barrier);
    bulk_copy(v_shared + row * kRowStride, v + (share.first + row) * row_elements, kRowBytes, barrier);
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

template <int RowTiles>
__device__ void scores(const unsigned char* q, const unsigned char* k, float* out, int keys, int stride) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int n = warp * 16; n < keys; n += kWarps * 16) {
    float sum[RowTiles][2][4] = {};
    const unsigned char* k_row = k + (n + lane % 8 + lane / 16 * 8) * kRowStride + lane / 8 % 2 * 16;
    const unsigned char* q_row = q + lane % 16 * kRowStride + lane / 16 * 16;
#pragma unroll 4
    for (int d = 0; d < kRowBytes; d += 32) {
      uint32_t b[4];
      load_matrix(b, k_row + d);
#pragma unroll
      for (int r = 0; r < RowTiles; ++r) {
        uint32_t a[4];
        load_matrix(a, q_row + r * 16 * kRowStride + d);
        mma_bf16(sum[r][0], a[0], a[1], a[2], a[3], b[0], b[1]);
        mma_bf16(sum[r][1], a[0], a[1], a[2], a[3], b[2], b[3]);
      }
    }
    constexpr float kScale = 0.0625f;  // 1 / sqrt(256)
#pragma unroll
    for (int r = 0; r < RowTiles; ++r) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        float* target = out + (r * 16 + lane / 4) * stride + n + t * 8 + lane % 4 * 2;
        target[0] = sum[r][t][0] * kScale;
        target[1] = sum[r][t][1] * kScale;
        target[8 * stride] = sum[r][t][2] * kScale;
        target[8 * stride + 1] = sum[r][t][3] * kScale;
      }
    }
  }
}

// How the eight blocks of a head pass partial results on: through the shared memory of a cluster ...
struct ClusterExchange {
  int rank;
  float* own;  // inbox in shared memory: values of every rank, then statistics
  int padded_rows;

  __device__ float* values(int block) const {
#if FLASHRT_DEVICE_HAS_BULK
    return cg::this_cluster().map_shared_rank(own, block);
#else
    return own;
#endif
  }
  __device__ float2* stats(int block) const {
    return reinterpret_cast<float2*>(values(block) + kSplits * padded_rows * kColumns);
  }
  __device__ void sync() {
#if FLASHRT_DEVICE_HAS_BULK
    cg::this_cluster().sync();
#endif
  }
};

// ... or through L2, for blocks that are on the device together but in no cluster. `counter` only grows.
struct GlobalExchange {
  int rank;
  float* inboxes;
  unsigned* counter;
  unsigned target;
  int padded_rows;

  __host__ __device__ static constexpr int inbox_floats(int padded_rows) {
    return kSplits * padded_rows * (kColumns + 2);
  }
  __device__ float* values(int block) const { return inboxes + block * inbox_floats(padded_rows); }
  __device__ float2* stats(int block) const {
    return reinterpret_cast<float2*>(values(block) + kSplits * padded_rows * kColumns);
  }
  __device__ void sync() {
    __syncthreads();
    if (threadIdx.x == 0) {
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
      unsigned seen;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
      } while (seen < target);
    }
    __syncthreads();
  }
};

// exp(score - row maximum) as bf16 with zeros past `keys`; the row's maximum and sum go to every block's inbox.
template <int PaddedRows, typename Exchange>
__device__ void send_softmax(const float* score, __nv_bfloat16* probability, const Exchange& exchange, int rows, int keys,
                             int padded_keys, int score_stride, int probability_stride) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int row = warp; row < min(rows, PaddedRows); row += kWarps) {
    float maximum = -INFINITY;
    for (int key = lane; key < keys; key += kWarpSize) maximum = fmaxf(maximum, score[row * score_stride + key]);
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
      maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, offset));
    float sum = 0.0f;
    for (int key = lane; key < padded_keys; key += kWarpSize) {
      const float value = key < keys ? __expf(score[row * score_stride + key] - maximum) : 0.0f;
      sum += value;
      probability[row * probability_stride + key] = from_float<__nv_bfloat16>(value);
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane < kSplits) exchange.stats(lane)[exchange.rank * PaddedRows + row] = make_float2(maximum, sum);
  }
}

// P V for this warp's 32 columns, sent to the block that merges them: column group w belongs to block w of the cluster.
template <int RowTiles, typename Exchange>
__device__ void send_values(const unsigned char* probability, const unsigned char* v, const Exchange& exchange, int padded_keys,
                            int probability_row_bytes) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  float sum[RowTiles][4][4] = {};
  const unsigned char* v_row = v + (lane % 8 + lane / 8 % 2 * 8) * kRowStride + (warp * kColumns + lane / 16 * 8) * 2;
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
  float* remote = exchange.values(warp) + exchange.rank * 16 * RowTiles * kColumns;
#pragma unroll
  for (int r = 0; r < RowTiles; ++r) {
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      float* target = remote + (r * 16 + lane / 4) * kColumns + t * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(target) = make_float2(sum[r][t][0], sum[r][t][1]);
      *reinterpret_cast<float2*>(target + 8 * kColumns) = make_float2(sum[r][t][2], sum[r][t][3]);
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

// Merge the eight partial results that lie in this block's inbox and write its 32 columns, rows `out_row_elements` apart.
template <int RowTiles>
__device__ void merge(const float* inbox, const float2* inbox_stats, int rows, void* out, int64_t out_row_elements,
                      bool fp8_out, float inverse_scale) {
  constexpr int PaddedRows = 16 * RowTiles;
  const int column = threadIdx.x % (kColumns / 4) * 4;
  for (int row = threadIdx.x / (kColumns / 4); row < min(PaddedRows, rows);
       row += kThreads / (kColumns / 4)) {
    float maximum = -INFINITY;
    float2 stat[kSplits];
    float4 parts[kSplits];
#pragma unroll
    for (int s = 0; s < kSplits; ++s) {  // past L1, which may hold what an earlier layer left there
      stat[s] = load_volatile(inbox_stats + s * PaddedRows + row);
      parts[s] = load_volatile(reinterpret_cast<const float4*>(inbox + (s * PaddedRows + row) * kColumns + column));
    }
#pragma unroll
    for (int s = 0; s < kSplits; ++s) maximum = fmaxf(maximum, stat[s].x);
    float total = 0.0f, value[4] = {};
#pragma unroll
    for (int s = 0; s < kSplits; ++s) {
      const float2 stats = stat[s];
      const float weight = __expf(stats.x - maximum);
      total += weight * stats.y;
      const float4 part = parts[s];
      value[0] += weight * part.x;
      value[1] += weight * part.y;
      value[2] += weight * part.z;
      value[3] += weight * part.w;
    }
    const int64_t index = row * out_row_elements + column;
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
}

// Scores, softmax and P V of the operands in shared memory, the exchange, and this block's columns of the result.
template <int RowTiles, typename Exchange>
__device__ void attend(unsigned char* shared, const Layout& layout, const Share& share, Exchange& exchange, int rows,
                       void* out, int64_t out_row_elements, bool fp8_out, float inverse_scale) {
  constexpr int PaddedRows = 16 * RowTiles;
  float* score = reinterpret_cast<float*>(shared + layout.score);
  __nv_bfloat16* probability = reinterpret_cast<__nv_bfloat16*>(shared + layout.probability);
  scores<RowTiles>(shared + layout.q, shared + layout.k, score, share.padded_keys, layout.score_stride());
  __syncthreads();
  send_softmax<PaddedRows>(score, probability, exchange, rows, share.keys, share.padded_keys, layout.score_stride(),
                           layout.probability_stride());
  __syncthreads();
  send_values<RowTiles>(shared + layout.probability, shared + layout.v, exchange, share.padded_keys,
                        layout.probability_stride() * 2);
  exchange.sync();
  merge<RowTiles>(exchange.values(exchange.rank), exchange.stats(exchange.rank), rows, out, out_row_elements, fp8_out,
                  inverse_scale);
}

}  // namespace attention
}  // namespace flashrt
