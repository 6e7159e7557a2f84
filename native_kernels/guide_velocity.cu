// Real-time chunking (arXiv:2506.07339): a velocity of the flow, corrected towards what is already being played.
//   out[r, c] = v - gain * w[r] * (target - (x - time * v))      where w[r] != 0
//   out[r, c] = v                                                where w[r] == 0, bit for bit
//
// Shapes: velocity, x, target and out (rows, width) float32; weight (rows,) float32 and gain, one float32, are read
// from the device, so that a captured graph follows them.
//
// Bytes moved: 4 * rows * width * 4: 50 x 32 is 26 KB; the launch (2 us) is all there is.
#include "expert.h"

namespace flashrt {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    guide_velocity_kernel(const float* velocity, const float* x, const float* target, const float* weight,
                          const float* gain, float time, float* out, int64_t count, int width) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const float v = velocity[i];
  const float w = weight[i / width];
  float result = v;
  if (w != 0.0f) result = v - *gain * ((target[i] - (x[i] - time * v)) * w);
  out[i] = result;
}

}  // namespace

cudaError_t guide_velocity(const float* velocity, const float* x, const float* target, const float* weight,
                           const float* gain, float time, float* out, int rows, int width, cudaStream_t stream) {
  if (rows < 0 || width < 1) return cudaErrorInvalidValue;
  const int64_t count = static_cast<int64_t>(rows) * width;
  if (count == 0) return cudaSuccess;
  const unsigned blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  guide_velocity_kernel<<<blocks, kThreads, 0, stream>>>(velocity, x, target, weight, gain, time, out, count, width);
  return cudaGetLastError();
}

}  // namespace flashrt
