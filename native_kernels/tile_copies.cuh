// What the attention kernels on Hopper's matrix unit share: asynchronous copies into swizzled panels, and reductions
// over the four threads that hold a row of an accumulator.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace flashrt {

// 16 bytes, or zeros where `copy` is false.
__device__ __forceinline__ void copy_or_zero(uint32_t shared, const void* global, bool copy) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(copy ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Pending` of this thread's committed groups are on their way.
template <int Pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

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
