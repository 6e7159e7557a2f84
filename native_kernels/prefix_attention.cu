// Attention of many queries over one K/V head, as Gemma's prefix has it, optionally quantised to e4m3 of value /
// *scale:
//   out = softmax(q k^T / 16) v over the keys [0, *valid), or all of them without `valid`
//
// Shapes: q, out (rows, 256) with rows = tokens * heads, k and v (keys, 256), bf16 (out also e4m3), contiguous. Queries
// of different heads see the same keys, so a head is nothing but more rows.
//
// Bytes moved: q, k, v, out once: 560 tokens x 8 heads are 4.1 MB with e4m3 out, 1 us at 4.3 TB/s; 2.6 GFLOP, 3.3 us at
// 790 TFLOP/s. What bounds it is K and V from L2 into every multiprocessor that works: 573 KB, 5 us at 64 B a clock.
//
// A block is 64 rows and two warpgroups that take the tiles of 64 keys in turn, each with its own softmax; one
// multiplies while the other exponentiates. The next K is copied while P V runs, the next V while q k^T runs. In the
// end each warpgroup merges half of the columns. fp32 softmax in base 2; probabilities are rounded to bf16 for the
// product.
#include "dependent_launch.h"
#include "prefix.h"
#include "quantise.cuh"
#include "tile_copies.cuh"
#include "wgmma.cuh"

#pragma nv_diag_suppress 177  // elsewhere than on sm_90a the kernel is empty and leaves everything here unused

namespace flashrt {
namespace {

constexpr int kDim = 256, kRows = 64, kKeys = 64, kGroups = 2;
constexpr int kGroupThreads = 128, kThreads = kGroups * kGroupThreads;
constexpr int kRowVectors = kDim * 2 / 16;                           // 16-byte pieces of a row
constexpr int kPanelBytes = 64 * 128, kTileBytes = 4 * kPanelBytes;  // 64 rows x 64 columns; 64 x 256
constexpr int kSharedBytes = kTileBytes * (1 + 2 * kGroups) + 1024;  // q, then K and V of each group; alignment
constexpr int kHalf = 64;                                            // of the columns' accumulators of a thread

struct Problem {
  const __nv_bfloat16* q;
  const __nv_bfloat16* k;
  const __nv_bfloat16* v;
  const int* valid;
  const float* scale;
  void* out;
  int rows, keys;
};

__device__ __forceinline__ void group_barrier(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

// Start the copy of rows [first, first + 64) into swizzled panels; rows from `end` on become zero.
template <int Threads>
__device__ __forceinline__ void load_tile(uint32_t shared, const __nv_bfloat16* rows, int first, int end, int thread) {
#pragma unroll 4
  for (int i = thread; i < 64 * kRowVectors; i += Threads) {
    const int row = i / kRowVectors, piece = i % kRowVectors;
    const bool inside = first + row < end;
    copy_or_zero(swizzled(shared, row, piece, kPanelBytes),
                 rows + (inside ? int64_t(first + row) * kDim : 0) + piece * 8, inside);
  }
}

// One warpgroup's running softmax: a thread has rows lane / 4 and 8 further of its warp's 16. `sum` is of this thread's
// columns only until the end.
struct State {
  float low[kHalf] = {}, high[kHalf] = {};  // columns 0-127 and 128-255
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};

  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) low[i] *= factor[i / 2 % 2], high[i] *= factor[i / 2 % 2];
  }

  // Scores of 64 keys, of which those from `left` on do not count, become probabilities.
  __device__ __forceinline__ void absorb(float (&score)[32], int left, uint32_t (&probability)[4][4]) {
    constexpr float kFactor = 0.0625f * 1.4426950408889634f;  // 1 / sqrt(256), to base 2
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
    rescale(factor);
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) probability[k][i] = pack_bf16(score[8 * k + 2 * i], score[8 * k + 2 * i + 1]);
  }
};

// This group's tiles: 64 * group, then every second one.
__device__ __forceinline__ void attend(const Problem& p, int keys, int group, uint32_t q, uint32_t k, uint32_t v,
                                       State& state) {
  const int thread = threadIdx.x % kGroupThreads;
  for (int first = group * kKeys; first < keys; first += kGroups * kKeys) {
    const int next = first + kGroups * kKeys;
    wait_copies<1>();  // K, and q before it; V may be on its way
    wgmma::operand_fence();
    group_barrier(group);
    float score[32];
    wgmma::fence();
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      const uint32_t at = d / 4 * kPanelBytes + d % 4 * 32;
      wgmma::multiply_64x64(score, wgmma::descriptor(q + at, 16), wgmma::descriptor(k + at, 16), d > 0);
    }
    wgmma::commit();
    wgmma::wait();
    group_barrier(group);  // every warp is done with K
    if (next < keys) load_tile<kGroupThreads>(k, p.k, next, keys, thread);
    commit_copies();
    uint32_t probability[4][4];
    state.absorb(score, keys - first, probability);
    wait_copies<1>();  // V; the next K may be on its way
    wgmma::operand_fence();
    group_barrier(group);
    wgmma::fence();
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      const uint32_t at = v + step * 16 * 128;
      wgmma::multiply_64x128(state.low, probability[step], wgmma::descriptor(at, kPanelBytes));
      wgmma::multiply_64x128(state.high, probability[step], wgmma::descriptor(at + 2 * kPanelBytes, kPanelBytes));
    }
    wgmma::commit();
    wgmma::wait();
    group_barrier(group);
    if (next < keys) load_tile<kGroupThreads>(v, p.v, next, keys, thread);
    commit_copies();
  }
}

// A group's half of the columns from both groups' states, as `Out` into rows of 256 in shared memory.
template <typename Out>
__device__ __forceinline__ void merge(const float (&own)[kHalf], const float* other, const float2* mine,
                                      const float2* theirs, int group, float inverse_scale, Out* staged) {
  const int thread = threadIdx.x % kGroupThreads, warp = thread / 32, lane = thread % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = warp * 16 + lane / 4 + r * 8;
    const float2 a = mine[row], b = theirs[row];  // maximum and sum
    const float largest = fmaxf(a.x, b.x);
    constexpr float kFactor = 0.0625f * 1.4426950408889634f;
    const float of_a = a.y > 0.0f ? exp2f((a.x - largest) * kFactor) : 0.0f;
    const float of_b = b.y > 0.0f ? exp2f((b.x - largest) * kFactor) : 0.0f;
    const float total = a.y * of_a + b.y * of_b, inverse = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
    for (int i = 0; i < kHalf / 4; ++i) {
      float pair[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int at = 4 * i + 2 * r + j;
        pair[j] = (own[at] * of_a + other[at * kGroupThreads + thread] * of_b) * inverse;
      }
      *reinterpret_cast<Vector<Out, 2>*>(staged + row * kDim + group * 128 + i * 8 + lane % 4 * 2) =
          store_all<Out>(pair, inverse_scale);
    }
  }
}

template <typename Out>
__global__ void __launch_bounds__(kThreads, 1) prefix_attention_kernel(const Problem p) {
#if FLASHRT_DEVICE_HAS_WGMMA
  extern __shared__ unsigned char raw[];
  __shared__ float2 softmax[kGroups][kRows];
  unsigned char* tiles = raw + (1024 - shared_address(raw) % 1024) % 1024;
  const int group = threadIdx.x / kGroupThreads, thread = threadIdx.x % kGroupThreads;
  const uint32_t q = shared_address(tiles), k = q + kTileBytes * (1 + 2 * group), v = k + kTileBytes;
  const int first_row = blockIdx.x * kRows;
  dependency_wait();
  const int keys = p.valid == nullptr ? p.keys : max(0, min(p.keys, *p.valid));

  load_tile<kThreads>(q, p.q, first_row, p.rows, threadIdx.x);
  load_tile<kGroupThreads>(k, p.k, group * kKeys, keys, thread);
  commit_copies();
  load_tile<kGroupThreads>(v, p.v, group * kKeys, keys, thread);
  commit_copies();
  wait_copies<1>();
  wgmma::operand_fence();
  __syncthreads();  // q was copied by both groups
  State state;
  attend(p, keys, group, q, k, v, state);
  wait_copies<0>();
  dependency_release();

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = quad_sum(state.sum[r]);
    if (thread % 4 == 0)
      softmax[group][thread / 32 * 16 + thread % 32 / 4 + r * 8] = make_float2(state.maximum[r], sum);
  }
  // each group hands over the half that it does not merge, in its own K
  float* given = reinterpret_cast<float*>(tiles + kTileBytes * (1 + 2 * group));
  const float* taken = reinterpret_cast<const float*>(tiles + kTileBytes * (1 + 2 * (1 - group)));
#pragma unroll
  for (int i = 0; i < kHalf; ++i) given[i * kGroupThreads + thread] = group == 0 ? state.high[i] : state.low[i];
  __syncthreads();
  Out* staged = reinterpret_cast<Out*>(tiles);  // q has been read
  const float inverse_scale = inverse_scale_of<Out>(p.scale);
  if (group == 0) {
    merge<Out>(state.low, taken, softmax[0], softmax[1], 0, inverse_scale, staged);
  } else {
    merge<Out>(state.high, taken, softmax[1], softmax[0], 1, inverse_scale, staged);
  }
  __syncthreads();
  constexpr int Vectors = kDim * sizeof(Out) / 16;
  for (int i = threadIdx.x; i < kRows * Vectors && first_row + i / Vectors < p.rows; i += kThreads)
    reinterpret_cast<uint4*>(p.out)[int64_t(first_row) * Vectors + i] = reinterpret_cast<const uint4*>(staged)[i];
#endif
}

template <typename Out>
cudaError_t launch(const Problem& problem, cudaStream_t stream) {
  const cudaError_t status =
      cudaFuncSetAttribute(prefix_attention_kernel<Out>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  const dim3 grid(static_cast<unsigned>((problem.rows + kRows - 1) / kRows));
  return launch_dependent(prefix_attention_kernel<Out>, grid, kThreads, kSharedBytes, stream, problem);
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
