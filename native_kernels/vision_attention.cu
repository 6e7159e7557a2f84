// Attention within each camera view, as SigLIP has it, optionally quantised to e4m3 of value / *scale:
//   out[view, :, h] = softmax(q_h k_h^T / sqrt(72)) v_h
//
// Shapes: qkv (views, 256, 3 * heads * 72) bf16 holding q, k, v; out (views, 256, heads * 72) bf16 or e4m3; contiguous.
//
// Bytes moved: qkv and out once: 2 views are 4.1 MB with e4m3 out, 1 us at 4.3 TB/s; 0.6 GFLOP, 0.8 us at 790 TFLOP/s.
// What bounds it is latency: one block loads, multiplies, exponentiates 256 scores a row and multiplies again.
//
// A block is a head of a view and 64 query rows a warpgroup, one or two of them: the fewest that the chip holds at
// once. Blocks in pairs have one head and copy half of its keys and values each into both. All 256 keys are in shared
// memory together, so the softmax is that of the definition, in one pass, fp32 and base 2; probabilities are rounded to
// bf16 for the product. 72 columns are a panel of 64 and one of 8, zeros behind them.
#include "dependent_launch.h"
#include "device_limits.h"
#include "prefix.h"
#include "quantise.cuh"
#include "tensor_copy.cuh"
#include "tensor_map.h"
#include "tile_copies.cuh"
#include "wgmma.cuh"

#pragma nv_diag_suppress 177  // elsewhere than on sm_90a the kernel is empty and leaves everything here unused

namespace flashrt {
namespace {

constexpr int kDim = 72, kPieces = kDim / 8, kTokens = 256;
constexpr int kGroupRows = 64, kGroupThreads = 128, kMaxGroups = 2;
constexpr int kCluster = 2;  // blocks that share a head
constexpr int kQueryPanel = kGroupRows * 128, kKeyPanel = kTokens * 128;
constexpr int kShared = 4 * kKeyPanel + 1024;  // K and V; alignment; q of each warpgroup comes on top

struct Problem {
  CUtensorMap queries, keys;  // boxes of 64 and of 128 rows of a head; of keys and values the latter
  const float* scale;
  void* out;
  int heads;
};

struct Barriers {
  uint64_t scores, values;  // q and K have come; V
};

// q k^T of 64 queries and all keys; the fifth step of the reduction is the second panel.
__device__ __forceinline__ void scores(float (&score)[128], uint32_t q, uint32_t k, Barriers& come) {
  barrier_wait(&come.scores, 0);
  wgmma::fence();
#pragma unroll
  for (int d = 0; d < 5; ++d) {
    const uint32_t q_at = q + (d < 4 ? d * 32 : kQueryPanel), k_at = k + (d < 4 ? d * 32 : kKeyPanel);
    wgmma::multiply_64x256(score, wgmma::descriptor(q_at, 16), wgmma::descriptor(k_at, 16), d > 0);
  }
  wgmma::commit();
  wgmma::wait();
  wgmma::settle(score);
}

// Scores become probabilities times their sum, which is returned for this thread's two rows.
__device__ __forceinline__ float2 exponentiate(float (&score)[128]) {
  constexpr float kFactor = 0.11785113019775792f * 1.4426950408889634f;  // 1 / sqrt(72), to base 2
  float sum[2] = {};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < 32; ++i) largest = fmaxf(largest, fmaxf(score[4 * i + 2 * r], score[4 * i + 2 * r + 1]));
    const float offset = quad_max(largest) * kFactor;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int at = 4 * i + 2 * r + j;
        score[at] = power_of_two(fmaf(score[at], kFactor, -offset));
        sum[r] += score[at];
      }
    }
    sum[r] = quad_sum(sum[r]);
  }
  return make_float2(sum[0], sum[1]);
}

// A warp's 16 rows through shared memory, so that whole rows are stored.
template <typename Out>
__device__ __forceinline__ void store(const float (&value)[36], float2 sum, Out* staged, Out* out, int64_t stride,
                                      float inverse_scale) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float inverse = 1.0f / (r == 0 ? sum.x : sum.y);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const float pair[2] = {value[4 * i + 2 * r] * inverse, value[4 * i + 2 * r + 1] * inverse};
      *reinterpret_cast<Vector<Out, 2>*>(staged + (lane / 4 + r * 8) * kDim + i * 8 + lane % 4 * 2) =
          store_all<Out>(pair, inverse_scale);
    }
  }
  __syncwarp();
  for (int i = lane; i < 16 * kPieces; i += kWarpSize) {
    const int row = i / kPieces, piece = i % kPieces;
    *reinterpret_cast<Vector<Out, 8>*>(out + row * stride + piece * 8) =
        *reinterpret_cast<const Vector<Out, 8>*>(staged + row * kDim + piece * 8);
  }
}

template <typename Out>
__global__ void __launch_bounds__(kMaxGroups* kGroupThreads, 1)
    vision_attention_kernel(const __grid_constant__ Problem p) {
#if FLASHRT_DEVICE_HAS_WGMMA
  extern __shared__ unsigned char raw[];
  __shared__ Barriers come;
  unsigned char* base = raw + (1024 - shared_address(raw) % 1024) % 1024;
  const uint32_t k = shared_address(base), v = k + 2 * kKeyPanel, queries = v + 2 * kKeyPanel;
  const int group = threadIdx.x / kGroupThreads, groups = blockDim.x / kGroupThreads;
  const int blocks = kTokens / (groups * kGroupRows), width = p.heads * kDim;
  const int first = blockIdx.x % blocks * groups * kGroupRows, head = blockIdx.x / blocks % p.heads;
  const int token = blockIdx.x / blocks / p.heads * kTokens;
  if (threadIdx.x == 0) {
    prefetch_map(&p.queries);
    prefetch_map(&p.keys);
    barrier_init(&come.scores, 1);
    barrier_init(&come.values, 1);
    barrier_init_fence();
  }
  __syncthreads();
  cluster_arrive();  // this block's barriers may be counted on
  cluster_wait();
  dependency_wait();
  dependency_release();

  if (threadIdx.x == 0) {
    const int rank = blockIdx.x % kCluster, share = rank * kKeyPanel / kCluster;
    const int share_token = token + rank * kTokens / kCluster;
    barrier_expect(&come.scores, 2 * (groups * kQueryPanel + kKeyPanel));
#pragma unroll
    for (int panel = 0; panel < 2; ++panel) {
      for (int g = 0; g < groups; ++g)
        tensor_copy(queries + (2 * g + panel) * kQueryPanel, &p.queries, panel * 128, head,
                    token + first + g * kGroupRows, &come.scores);
      tensor_copy_to_all<kCluster>(k + panel * kKeyPanel + share, &p.keys, panel * 128, p.heads + head, share_token,
                                   &come.scores);
    }
    barrier_expect(&come.values, 2 * kKeyPanel);
#pragma unroll
    for (int panel = 0; panel < 2; ++panel)
      tensor_copy_to_all<kCluster>(v + panel * kKeyPanel + share, &p.keys, panel * 128, 2 * p.heads + head, share_token,
                                   &come.values);
  }
  const float inverse_scale = inverse_scale_of<Out>(p.scale);
  const uint32_t q = queries + group * 2 * kQueryPanel;
  float score[128], value[36];
  scores(score, q, k, come);
  const float2 sum = exponentiate(score);
  uint32_t probability[kTokens / 16][4];
#pragma unroll
  for (int step = 0; step < kTokens / 16; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) probability[step][i] = pack_bf16(score[8 * step + 2 * i], score[8 * step + 2 * i + 1]);
  barrier_wait(&come.values, 0);
  wgmma::fence();
#pragma unroll
  for (int step = 0; step < kTokens / 16; ++step)
    wgmma::multiply_64x72(value, probability[step], wgmma::descriptor(v + step * 16 * 128, kKeyPanel), step > 0);
  wgmma::commit();
  wgmma::wait();
  wgmma::settle(value);

  const int warp = threadIdx.x % kGroupThreads / kWarpSize;
  // a quarter of this warpgroup's q: read, as its products are over for all four warps once P V has begun
  Out* staged = reinterpret_cast<Out*>(base + (q - k) + warp * 16 * 128 * 2);
  Out* out = static_cast<Out*>(p.out) + int64_t(token + first + group * kGroupRows + warp * 16) * width + head * kDim;
  store<Out>(value, sum, staged, out, width, inverse_scale);
#endif
}

template <typename Out>
cudaError_t launch(const Problem& problem, int views, int multiprocessors, cudaStream_t stream) {
  const int tiles = views * problem.heads * (kTokens / kGroupRows);
  const int groups = tiles <= multiprocessors ? 1 : kMaxGroups;
  const int bytes = kShared + groups * 2 * kQueryPanel;
  const auto kernel = vision_attention_kernel<Out>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  return launch_dependent_clusters(kernel, kCluster, tiles / groups, groups * kGroupThreads, bytes, stream, problem);
}

}  // namespace

cudaError_t vision_attention(const void* qkv, const float* scale, void* out, int64_t views, int64_t heads,
                             cudaStream_t stream) {
  if (views < 0 || heads < 1 || views * heads > INT32_MAX / kTokens) return cudaErrorInvalidValue;
  if (views == 0) return cudaSuccess;
  if (!aligned_to_16_bytes(qkv) || !aligned_to_16_bytes(out)) return cudaErrorInvalidValue;
  int multiprocessors = 0;
  cudaError_t status = hopper_multiprocessors(&multiprocessors);
  if (status != cudaSuccess) return status;
  Problem problem = {{}, {}, scale, out, static_cast<int>(heads)};
  const int count = static_cast<int>(views), slices = 3 * problem.heads, bytes = kDim * 2;
  status = describe_slices(problem.queries, qkv, views * kTokens, slices, bytes, kGroupRows);
  if (status == cudaSuccess)
    status = describe_slices(problem.keys, qkv, views * kTokens, slices, bytes, kTokens / kCluster);
  if (status != cudaSuccess) return status;
  return scale == nullptr ? launch<__nv_bfloat16>(problem, count, multiprocessors, stream)
                          : launch<E4M3>(problem, count, multiprocessors, stream);
}

}  // namespace flashrt
