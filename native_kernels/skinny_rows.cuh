// The skinny GEMM's activations: how a block's shared memory is laid out, and the norm in front of the product.
#pragma once

#include "expert.h"
#include "product_tiles.cuh"

namespace flashrt {
namespace skinny {

enum class Input { kPlain, kNorm, kWide };  // see skinny_gemm.cu

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMaxNormWidth = 1024;
constexpr int kNormVectors = kMaxNormWidth / (kWarpSize * 8);

struct Layout {
  int k_bytes;  // bytes of one weight row
  int units;    // independent groups of tiles over the whole product
  int units_per_block;
  int x_stride;                              // bytes of one normed row in shared memory
  int x_offset, sum_offset, barrier_offset;  // in dynamic shared memory; the weights come first
};

using Eight = Vector<__nv_bfloat16, 8>;

// This lane's part of the norm's scale and shift; constant over the steps, so it is read ahead of the wait.
struct NormStyle {
  float scale[kNormVectors][8], shift[kNormVectors][8];
};

__device__ __forceinline__ void load_style(const SkinnyGemm& p, NormStyle& style) {
#pragma unroll
  for (int v = 0; v < kNormVectors; ++v) {
    const int column = (v * kWarpSize + threadIdx.x % kWarpSize) * 8;
    if (column >= p.k) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 scale = *reinterpret_cast<const float4*>(p.norm_scale + column + half * 4);
      const float4 shift = p.norm_shift == nullptr ? make_float4(0, 0, 0, 0)
                                                   : *reinterpret_cast<const float4*>(p.norm_shift + column + half * 4);
      const float scales[4] = {scale.x, scale.y, scale.z, scale.w}, shifts[4] = {shift.x, shift.y, shift.z, shift.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        style.scale[v][half * 4 + i] = 1.0f + scales[i];
        style.shift[v][half * 4 + i] = shifts[i];
      }
    }
  }
}

__device__ __forceinline__ void load_row(const SkinnyGemm& p, int row, Eight (&values)[kNormVectors]) {
  const Eight* source = reinterpret_cast<const Eight*>(static_cast<const __nv_bfloat16*>(p.x) + int64_t(row) * p.k);
#pragma unroll
  for (int v = 0; v < kNormVectors; ++v) {
    if ((v * kWarpSize + threadIdx.x % kWarpSize) * 8 >= p.k) break;
    values[v] = source[v * kWarpSize + threadIdx.x % kWarpSize];
  }
}

// Normalise x's rows into shared memory as bf16, or fp16 for e4m3 weights, one warp a row; the next row is on its way
// meanwhile.
template <bool Fp8>
__device__ void norm_rows(const SkinnyGemm& p, const NormStyle& style, unsigned char* x_shared, int row_stride) {
  const int lane = threadIdx.x % kWarpSize;
  int row = threadIdx.x / kWarpSize;
  Eight values[kNormVectors];
  if (row < p.rows) load_row(p, row, values);
  for (; row < p.rows; row += kWarps) {
    Eight following[kNormVectors];
    if (row + kWarps < p.rows) load_row(p, row + kWarps, following);
    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < kNormVectors; ++v) {
      if ((v * kWarpSize + lane) * 8 >= p.k) break;
#pragma unroll
      for (int i = 0; i < 8; ++i) squares += to_float(values[v].element[i]) * to_float(values[v].element[i]);
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    const float inverse = rsqrtf(squares / p.k + p.eps);
#pragma unroll
    for (int v = 0; v < kNormVectors; ++v) {
      const int column = (v * kWarpSize + lane) * 8;
      if (column >= p.k) break;
      Eight normed;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        normed.element[i] =
            from_float<__nv_bfloat16>(to_float(values[v].element[i]) * inverse * style.scale[v][i] + style.shift[v][i]);
      }
      if constexpr (Fp8) {
        Vector<__half, 8> half;
#pragma unroll
        for (int i = 0; i < 8; ++i) half.element[i] = from_float<__half>(to_float(normed.element[i]));
        *reinterpret_cast<Vector<__half, 8>*>(x_shared + row * row_stride + column * 2) = half;
      } else {
        *reinterpret_cast<Eight*>(x_shared + row * row_stride + column * 2) = normed;
      }
    }
#pragma unroll
    for (int v = 0; v < kNormVectors; ++v) values[v] = following[v];
  }
}

}  // namespace skinny
}  // namespace flashrt
