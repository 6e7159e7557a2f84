// What the attention kernels on Hopper's matrix unit share: places in swizzled panels, reductions over the four threads
// that hold a row of an accumulator, powers of two.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace flashrt {

// Where 16-byte piece `piece` of a row lies in the 128-byte swizzle; `panel_bytes` from one 8 pieces to the next.
__device__ __forceinline__ uint32_t swizzled(uint32_t base, int row, int piece, uint32_t panel_bytes) {
  return base + piece / 8 * panel_bytes + row * 128 + ((piece % 8) ^ (row % 8)) * 16;
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

}  // namespace flashrt
