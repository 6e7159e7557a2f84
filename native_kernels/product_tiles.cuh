// Tensor-core steps of products with few rows, shared by the skinny GEMM and the persistent expert: activations are A
// (16 rows), 8 features of the weights are B, packed so that a thread's 16 bytes are one load.
#pragma once

#include "hopper.cuh"
#include "vector.cuh"

namespace flashrt {

constexpr int kTileFeatures = 8;
constexpr int kBlockBytes = 64;                          // bytes of k per step
constexpr int kTileBytes = kTileFeatures * kBlockBytes;  // one tile, one k block
constexpr int kRowPadFp16 = 16, kRowPadBf16 = 64;        // keep 16-byte row reads free of bank conflicts

// Products of one 64-byte k block. The bytes a thread holds are k-permuted alike in A and B, which a sum over k does
// not notice.
template <bool Fp8>
__device__ __forceinline__ void multiply(float (&d)[4], uint4 low, uint4 high, uint4 b) {
  if constexpr (Fp8) {
    mma_e4m3(d, low.x, high.x, low.y, high.y, b.x, b.y);
    mma_e4m3(d, low.z, high.z, low.w, high.w, b.z, b.w);
  } else {
    mma_bf16(d, low.x, high.x, low.y, high.y, b.x, b.y);
    mma_bf16(d, low.z, high.z, low.w, high.w, b.z, b.w);
  }
}

// The same with e4m3 weights already widened to fp16 (b) and fp16 activations: 32 bytes of two rows.
__device__ __forceinline__ void multiply_f16(float (&d)[4], const uint4 (&low)[2], const uint4 (&high)[2],
                                             const uint32_t (&b)[8]) {
  mma_f16(d, low[0].x, high[0].x, low[0].y, high[0].y, b[0], b[1]);
  mma_f16(d, low[0].z, high[0].z, low[0].w, high[0].w, b[2], b[3]);
  mma_f16(d, low[1].x, high[1].x, low[1].y, high[1].y, b[4], b[5]);
  mma_f16(d, low[1].z, high[1].z, low[1].w, high[1].w, b[6], b[7]);
}

// e4m3 weights of one k block, widened.
__device__ __forceinline__ void widen(uint4 packed, uint32_t (&b)[8]) {
  e4m3_to_f16(packed.x, b[0], b[1]);
  e4m3_to_f16(packed.y, b[2], b[3]);
  e4m3_to_f16(packed.z, b[4], b[5]);
  e4m3_to_f16(packed.w, b[6], b[7]);
}

}  // namespace flashrt
