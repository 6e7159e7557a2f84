// Attention of many queries over one K/V head, as Gemma's prefix has it, optionally quantised to e4m3 of value /
// *scale:
//   out = softmax(q k^T / 16) v over the keys [0, *valid), or all of them without `valid`
//
// Shapes: q, out (rows, 256) with rows = tokens * heads, k and v (keys, 256), bf16 (out also e4m3), contiguous. Queries
// of different heads see the same keys, so a head is nothing but more rows.
//
// Bytes moved: q, k, v, out once: 560 tokens x 8 heads are 4.1 MB with e4m3 out, 1 us at 4.3 TB/s; 2.6 GFLOP, 3.3 us at
// 790 TFLOP/s. What bounds it is K and V from L2 into every block: 573 KB for 128 rows.
//
// A cluster of up to 8 blocks has 128 rows and shares the tiles of 64 keys out in turn; a block is two warpgroups of 64
// rows on the same tiles, the next of which is copied meanwhile. In the end each block merges its part of the rows from
// the others' shared memory. fp32 softmax in base 2; probabilities are rounded to bf16 for the product.
#include <cooperative_groups.h>

#include "dependent_launch.h"
#include "prefix.h"
#include "quantise.cuh"
#include "tile_copies.cuh"
#include "wgmma.cuh"

#pragma nv_diag_suppress 177  // elsewhere than on sm_90a the kernel is empty and leaves everything here unused

namespace flashrt {
namespace {

namespace cg = cooperative_groups;

constexpr int kDim = 256, kRows = 128, kKeys = 64, kMaxSplits = 8;
constexpr int kGroupThreads = 128, kThreads = 2 * kGroupThreads, kGroupRows = kRows / 2;
constexpr int kRowVectors = kDim * 2 / 16;   // 16-byte pieces of a row
constexpr int kPanelBytes = 64 * 128;        // 64 rows x 64 columns
constexpr int kTileBytes = 4 * kPanelBytes;  // 64 x 256
constexpr int kPartStride = kDim + 8;        // floats of a row of partial results
constexpr int kStages = 2;
constexpr int kTiles = 2 + 2 * kStages;                   // q of both warpgroups, then K and V of each stage
constexpr int kSharedBytes = kTiles * kTileBytes + 1024;  // alignment
static_assert(kRows * kPartStride * sizeof(float) <= kTiles * kTileBytes);
constexpr float kFactor = 0.0625f * 1.4426950408889634f;  // 1 / sqrt(256), to base 2

struct Problem {
  const __nv_bfloat16* q;
  const __nv_bfloat16* k;
  const __nv_bfloat16* v;
  const int* valid;
  const float* scale;
  void* out;
  int rows, keys;
};

// Start the copy of rows [first, first + 64) into swizzled panels; rows from `end` on become zero.
__device__ __forceinline__ void load_tile(uint32_t shared, const __nv_bfloat16* rows, int first, int end) {
#pragma unroll
  for (int i = threadIdx.x; i < 64 * kRowVectors; i += kThreads) {
    const int row = i / kRowVectors, piece = i % kRowVectors;
    const bool inside = first + row < end;
    copy_or_zero(swizzled(shared, row, piece, kPanelBytes),
                 rows + (inside ? int64_t(first + row) * kDim : 0) + piece * 8, inside);
  }
}

// One warpgroup's running softmax: a thread has rows lane / 4 and 8 further of its warp's 16. `sum` is of this thread's
// columns only until the end.
struct State {
  float low[64] = {}, high[64] = {};  // columns 0-127 and 128-255
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};

  // Scores of 64 keys, of which those from `left` on do not count, become probabilities.
  __device__ __forceinline__ void absorb(float (&score)[32], int left, uint32_t (&probability)[4][4]) {
    const int column = threadIdx.x % 4 * 2;
    if (left < kKeys) {
#pragma unroll
      for (int i = 0; i < 32; ++i)
        if (i / 4 * 8 + column + i % 2 >= left) score[i] = -INFINITY;
    }
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = maximum[r];
#pragma unroll
      for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fmaxf(score[4 * i + 2 * r], score[4 * i + 2 * r + 1]));
      largest = quad_max(largest);  // finite: the first key of a tile counts
      factor[r] = exp2f((maximum[r] - largest) * kFactor);
      maximum[r] = largest;
      sum[r] *= factor[r];
      const float offset = largest * kFactor;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int at = 4 * i + 2 * r + j;
          score[at] = exp2f(fmaf(score[at], kFactor, -offset));
          sum[r] += score[at];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) low[i] *= factor[i / 2 % 2], high[i] *= factor[i / 2 % 2];
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) probability[k][i] = pack_bf16(score[8 * k + 2 * i], score[8 * k + 2 * i + 1]);
  }
};

// One tile: K and V of this stage are in shared memory.
__device__ __forceinline__ void attend(uint32_t q, uint32_t k, uint32_t v, int left, State& state) {
  float score[32];
  wgmma::fence();
#pragma unroll
  for (int d = 0; d < kDim / 16; ++d) {
    const uint32_t at = d / 4 * kPanelBytes + d % 4 * 32;
    wgmma::multiply_64x64(score, wgmma::descriptor(q + at, 16), wgmma::descriptor(k + at, 16), d > 0);
  }
  wgmma::commit();
  wgmma::wait();
  uint32_t probability[4][4];
  state.absorb(score, left, probability);
  wgmma::fence();
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step) {
    const uint32_t at = v + step * 16 * 128;
    wgmma::multiply_64x128(state.low, probability[step], wgmma::descriptor(at, kPanelBytes));
    wgmma::multiply_64x128(state.high, probability[step], wgmma::descriptor(at + 2 * kPanelBytes, kPanelBytes));
  }
  wgmma::commit();
  wgmma::wait();
}

// A warpgroup's results so far, unnormalised, into rows of kPartStride floats.
__device__ __forceinline__ void leave(const State& state, float* part, float2* softmax) {
  const int thread = threadIdx.x % kGroupThreads, lane = thread % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = threadIdx.x / kGroupThreads * kGroupRows + thread / 32 * 16 + lane / 4 + r * 8;
    const float sum = quad_sum(state.sum[r]);
    if (lane % 4 == 0) softmax[row] = make_float2(state.maximum[r], sum);
    float* target = part + row * kPartStride + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int at = 4 * i + 2 * r;
      *reinterpret_cast<float2*>(target + i * 8) = make_float2(state.low[at], state.low[at + 1]);
      *reinterpret_cast<float2*>(target + 128 + i * 8) = make_float2(state.high[at], state.high[at + 1]);
    }
  }
}

// This block's share of the rows from every block's results; a thread has 16 columns of a row.
template <typename Out, typename Cluster>
__device__ __forceinline__ void merge(const Cluster& cluster, float* part, float2* softmax, const Problem& p,
                                      int first_row) {
  const int splits = cluster.num_blocks(), rank = cluster.block_rank();
  const int begin = kRows * rank / splits, end = kRows * (rank + 1) / splits;
  const float inverse_scale = inverse_scale_of<Out>(p.scale);
  for (int i = begin * 16 + static_cast<int>(threadIdx.x); i < end * 16; i += kThreads) {
    const int row = i / 16, column = i % 16 * 16;
    if (first_row + row >= p.rows) break;
    float largest = -INFINITY, total = 0.0f, values[16] = {};
    for (int s = 0; s < splits; ++s) largest = fmaxf(largest, cluster.map_shared_rank(softmax, s)[row].x);
    for (int s = 0; s < splits; ++s) {
      const float2 of_split = cluster.map_shared_rank(softmax, s)[row];
      const float factor = of_split.y > 0.0f ? exp2f((of_split.x - largest) * kFactor) : 0.0f;
      total += of_split.y * factor;
      const float4* source =
          reinterpret_cast<const float4*>(cluster.map_shared_rank(part, s) + row * kPartStride + column);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float4 four = source[j];
        values[4 * j] += four.x * factor, values[4 * j + 1] += four.y * factor;
        values[4 * j + 2] += four.z * factor, values[4 * j + 3] += four.w * factor;
      }
    }
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
    for (int j = 0; j < 16; ++j) values[j] *= inverse;
    *reinterpret_cast<Vector<Out, 16>*>(static_cast<Out*>(p.out) + int64_t(first_row + row) * kDim + column) =
        store_all<Out>(values, inverse_scale);
  }
}

template <typename Out>
__global__ void __launch_bounds__(kThreads, 1) prefix_attention_kernel(const Problem p) {
#if FLASHRT_DEVICE_HAS_WGMMA
  extern __shared__ unsigned char raw[];
  __shared__ float2 softmax[kRows];
  const cg::cluster_group cluster = cg::this_cluster();
  const int splits = cluster.num_blocks(), rank = cluster.block_rank();
  unsigned char* tiles = raw + (1024 - shared_address(raw) % 1024) % 1024;
  const uint32_t q = shared_address(tiles), stages = q + 2 * kTileBytes;
  const int first_row = blockIdx.x / splits * kRows;
  dependency_wait();
  dependency_release();
  const int keys = p.valid == nullptr ? p.keys : max(0, min(p.keys, *p.valid));

  load_tile(q, p.q, first_row, p.rows);
  load_tile(q + kTileBytes, p.q, first_row + kGroupRows, p.rows);
  int first = rank * kKeys, stage = 0;
  if (first < keys) {
    load_tile(stages, p.k, first, keys);
    load_tile(stages + kTileBytes, p.v, first, keys);
  }
  commit_copies();
  State state;
  for (; first < keys; first += splits * kKeys, stage ^= 1) {
    wait_copies<0>();
    wgmma::operand_fence();
    __syncthreads();  // this stage is there, and both warpgroups are done with the other
    const int next = first + splits * kKeys;
    const uint32_t k = stages + stage * 2 * kTileBytes, other = stages + (stage ^ 1) * 2 * kTileBytes;
    if (next < keys) {
      load_tile(other, p.k, next, keys);
      load_tile(other + kTileBytes, p.v, next, keys);
      commit_copies();
    }
    attend(q + threadIdx.x / kGroupThreads * kTileBytes, k, k + kTileBytes, keys - first, state);
  }
  wait_copies<0>();
  __syncthreads();  // the operands make room
  float* part = reinterpret_cast<float*>(tiles);
  leave(state, part, softmax);
  cluster.sync();
  merge<Out>(cluster, part, softmax, p, first_row);
  cluster.sync();  // nobody leaves while others read
#endif
}

// Blocks that share 128 rows: as many as the multiprocessors and the tiles of keys allow.
int splits_of(int blocks, int keys) {
  int device = 0, multiprocessors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  const int tiles = (keys + kKeys - 1) / kKeys;
  int splits = multiprocessors / blocks < tiles ? multiprocessors / blocks : tiles;
  if (splits > kMaxSplits) splits = kMaxSplits;
  return splits < 1 ? 1 : splits;
}

template <typename Out>
cudaError_t launch(const Problem& problem, cudaStream_t stream) {
  const auto kernel = prefix_attention_kernel<Out>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  const int blocks = (problem.rows + kRows - 1) / kRows, splits = splits_of(blocks, problem.keys);
  return launch_dependent_clusters(kernel, blocks * splits, splits, kThreads, kSharedBytes, stream, problem);
}

}  // namespace

cudaError_t prefix_attention(const void* q, const void* k, const void* v, const int* valid, const float* scale,
                             void* out, int64_t rows, int64_t keys, cudaStream_t stream) {
  if (rows < 0 || keys < 1 || rows > INT32_MAX || keys > INT32_MAX) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  if (!aligned_to_16_bytes(q) || !aligned_to_16_bytes(k) || !aligned_to_16_bytes(v) || !aligned_to_16_bytes(out))
    return cudaErrorMisalignedAddress;
  using Bf16 = const __nv_bfloat16*;
  const Problem problem = {static_cast<Bf16>(q),   static_cast<Bf16>(k),  static_cast<Bf16>(v), valid, scale, out,
                           static_cast<int>(rows), static_cast<int>(keys)};
  return scale == nullptr ? launch<__nv_bfloat16>(problem, stream) : launch<E4M3>(problem, stream);
}

}  // namespace flashrt
