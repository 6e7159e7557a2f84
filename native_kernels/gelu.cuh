// GELU in its tanh form, as the elementwise kernels and the products' epilogues compute it.
#pragma once

#include <cuda_runtime.h>

namespace flashrt {

// x / (1 + exp(-2u)): the tanh form without its cancellation for negative x; a few units in the last place of float.
// Neither instruction needs care for its range: what overflows or is flushed is added to 1 or divides into 0.
__device__ __forceinline__ float gelu(float x) {
  constexpr float kLog2e = 1.4426950408889634f;
  float exponential, inverse;
  const float exponent = x * (-1.5957691216057308f * kLog2e - 0.07135481627f * kLog2e * x * x);
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(exponential) : "f"(exponent));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + exponential));
  return x * inverse;
}

}  // namespace flashrt
