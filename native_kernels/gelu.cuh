// GELU in its tanh form, as the elementwise kernels and the products' epilogues compute it.
#pragma once

#include <cuda_runtime.h>

namespace flashrt {

// x / (1 + exp(-2u)): the tanh form without its cancellation for negative x; a few units in the last place of float.
__device__ __forceinline__ float gelu(float x) {
  const float twice_inner = x * (1.5957691216057308f + 0.07135481627f * x * x);
  return __fdividef(x, 1.0f + __expf(-twice_inner));
}

}  // namespace flashrt
