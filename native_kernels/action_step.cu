// The seam between two denoise steps, one block a row of the chunk, all float32:
//   v = norm(hidden) W_out^T + b_out;   x += dt * v;   next = W_in x + b_in   (pi0: silu of it)
// Either half may be left out: the first step has no hidden, the last no next.
//
// Bytes moved: 2 * 128 KB of weights (32 x 1024 float32 each way), read by every row from L2; 10 rows are 2.6 MB of L2
// reads, about 2 us with the launch. The floor is the launch.
#include "expert.h"
#include "hopper.cuh"
#include "vector.cuh"

namespace flashrt {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMaxWidth = 2048;
constexpr int kMaxActionDim = 64;

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
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
  for (int action = warp; action < p.action_dim; action += kWarps) {
    const float4* weight = reinterpret_cast<const float4*>(p.out_weight + int64_t(action) * p.width);
    float sum = 0.0f;
    for (int i = lane; i < p.width / 4; i += kWarpSize) {
      const float4 w = weight[i];
      const float4 n = reinterpret_cast<const float4*>(normed)[i];
      sum += w.x * n.x + w.y * n.y + w.z * n.z + w.w * n.w;
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      const int64_t index = int64_t(row) * p.action_dim + action;
      x[action] = p.x[index] + p.dt * (sum + p.out_bias[action]);
      p.x[index] = x[action];
    }
  }
}

__global__ void __launch_bounds__(kThreads) action_step_kernel(const ActionStep p) {
  __shared__ __align__(16) float normed[kMaxWidth];
  __shared__ __align__(16) float x[kMaxActionDim];
  __shared__ float scratch[kMaxWarpsPerBlock];
  const int row = blockIdx.x;
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
  int device = 0, major = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(p.rows);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, action_step_kernel, p);
}

}  // namespace flashrt
