// The seam between two denoise steps, one block a row of the chunk, all float32:
//   v = norm(hidden) W_out^T + b_out;   x += dt * v;   next = W_in x + b_in   (pi0: silu of it)
// Either half may be left out: the first step has no hidden, the last no next. With a guide v is corrected first, as
// guide_velocity.cu does it.
//
// Bytes moved: 2 * 128 KB of weights (32 x 1024 float32 each way), read by every row from L2, into which the blocks
// call them together before they wait for the kernel in front; 10 rows are 2.6 MB of L2 reads, about 2 us with the
// launch. The floor is the launch.
#include "dependent_launch.h"
#include "expert.h"
#include "hopper.cuh"
#include "vector.cuh"

namespace flashrt {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMaxWidth = 2048;
constexpr int kMaxActionDim = 64;
constexpr int kWarpActions = kMaxActionDim / kWarps;

// Calls this block's share of a weight into L2.
__device__ __forceinline__ void prefetch_share(const float* weight, int floats) {
  constexpr int kLine = 32;
  for (int line = blockIdx.x * kThreads + threadIdx.x; line * kLine < floats; line += gridDim.x * kThreads)
    prefetch_l2(weight + line * kLine);
}

__device__ void project_out(const ActionStep& p, int row, float* normed, float* x, float* scratch) {
  const __nv_bfloat16* hidden = static_cast<const __nv_bfloat16*>(p.hidden) + int64_t(row) * p.width;
  float squares = 0.0f;
  for (int i = threadIdx.x; i < p.width; i += kThreads) {
    const float value = to_float(hidden[i]);
    squares += value * value;
  }
  const float inverse = rsqrtf(block_sum(squares, scratch) / p.width + p.eps);
  for (int i = threadIdx.x; i < p.width; i += kThreads) {
    float value = to_float(hidden[i]) * inverse * (1.0f + p.norm_scale[i]);
    if (p.norm_shift != nullptr) value += p.norm_shift[i];
    normed[i] = to_float(from_float<__nv_bfloat16>(value));
  }
  __syncthreads();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  float sums[kWarpActions] = {};  // of all its actions at once: their loads do not wait for each other
#pragma unroll 4
  for (int i = lane; i < p.width / 4; i += kWarpSize) {
    const float4 n = reinterpret_cast<const float4*>(normed)[i];
#pragma unroll
    for (int a = 0; a < kWarpActions; ++a) {
      const int action = warp + a * kWarps;
      if (action >= p.action_dim) break;
      const float4 w = reinterpret_cast<const float4*>(p.out_weight + int64_t(action) * p.width)[i];
      sums[a] += w.x * n.x + w.y * n.y + w.z * n.z + w.w * n.w;
    }
  }
#pragma unroll
  for (int a = 0; a < kWarpActions; ++a) {
    const int action = warp + a * kWarps;
    const float sum = warp_sum(sums[a]);
    if (lane == 0 && action < p.action_dim) {
      const int64_t index = int64_t(row) * p.action_dim + action;
      float velocity = sum + p.out_bias[action];
      const float weight = p.guide_weight != nullptr ? p.guide_weight[row] : 0.0f;
      if (weight != 0.0f)
        velocity -= *p.guide_gain * ((p.guide_target[index] - (p.x[index] - p.time * velocity)) * weight);
      x[action] = p.x[index] + p.dt * velocity;
      p.x[index] = x[action];
    }
  }
}

__global__ void __launch_bounds__(kThreads) action_step_kernel(const ActionStep p) {
  __shared__ __align__(16) float normed[kMaxWidth];
  __shared__ __align__(16) float x[kMaxActionDim];
  __shared__ float scratch[kMaxWarpsPerBlock];
  const int row = blockIdx.x;
  if (p.hidden != nullptr) prefetch_share(p.out_weight, p.action_dim * p.width);
  if (p.in_weight != nullptr) prefetch_share(p.in_weight, p.action_dim * p.width);
  dependency_wait();
  dependency_release();
  if (p.hidden != nullptr) {
    project_out(p, row, normed, x, scratch);
  } else {
    for (int i = threadIdx.x; i < p.action_dim; i += kThreads) x[i] = p.x[int64_t(row) * p.action_dim + i];
  }
  if (p.in_weight == nullptr) return;
  __syncthreads();
  __nv_bfloat16* next = static_cast<__nv_bfloat16*>(p.next) + int64_t(row) * p.width;
  for (int i = threadIdx.x; i < p.width; i += kThreads) {
    const float4* weight = reinterpret_cast<const float4*>(p.in_weight + int64_t(i) * p.action_dim);
    float sum = p.in_bias[i];
#pragma unroll 8
    for (int j = 0; j < p.action_dim / 4; ++j) {
      const float4 w = weight[j];
      const float4 a = reinterpret_cast<const float4*>(x)[j];
      sum += w.x * a.x + w.y * a.y + w.z * a.z + w.w * a.w;
    }
    if (p.silu) sum = sum / (1.0f + __expf(-sum));
    next[i] = from_float<__nv_bfloat16>(sum);
  }
}

}  // namespace

cudaError_t action_step(const ActionStep& p, cudaStream_t stream) {
  if (p.rows < 1 || p.width < 1 || p.width > kMaxWidth || p.width % 4 != 0 || p.action_dim < 1 ||
      p.action_dim > kMaxActionDim || p.action_dim % 4 != 0)
    return cudaErrorInvalidValue;
  if (!aligned_to_16_bytes(p.out_weight) || !aligned_to_16_bytes(p.in_weight)) return cudaErrorInvalidValue;
  return launch_dependent(action_step_kernel, dim3(p.rows), dim3(kThreads), 0, stream, p);
}

}  // namespace flashrt
