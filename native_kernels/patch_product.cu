// Patches to the vision tower's rows, of pixels that are whole numbers, as fp16 holds them exactly:
//   out = bf16(x (w_high + w_low)^T * factor + table[row % tokens])
//
// Shapes: x (rows, depth) fp16; w (2 * width, depth) fp16, the rows of w_high before those of w_low, which together are
// the fp32 weights to 22 bits; table (tokens, width) fp32: positions, bias, and what the pixels' zero adds; out (rows,
// width) bf16; contiguous; depth a multiple of 8 (what is behind the patch holds zeros), width of 16. fp32 sums.
//
// Bytes moved at 2 views (512 rows, 1152 x 592): 2.7 MB of weights, 1.2 of the table, 0.6 of x, 1.2 of out, 1.9 us at
// 3.0 TB/s; 1.4 GFLOP, 2.2 us at 660 TFLOP/s; 32 MB from L2, 5.3 us.
//
// The tile is as in linear_product.cu; both parts of the weights lie side by side in a stage and add to the same sums.
#include "dependent_launch.h"
#include "device_limits.h"
#include "prefix.h"
#include "product_ring.cuh"
#include "product_store.cuh"
#include "tensor_map.h"

#pragma nv_diag_suppress 177  // elsewhere than on sm_90a the kernel is empty and leaves everything here unused

namespace flashrt {
namespace {

constexpr int kColumns = 80;

struct Problem {
  CUtensorMap x, w;
  const float* table;
  __nv_bfloat16* out;
  float factor;
  int width, tokens;
  ProductShape shape;
};

struct Step {
  using Sums = float[1][kColumns / 2];

  __device__ __forceinline__ static void issue(Sums& sum, uint32_t a, uint32_t b, bool more) {
#pragma unroll
    for (int k = 0; k < 128; k += 32)
#pragma unroll
      for (int part = 0; part < 2; ++part)
        wgmma::multiply_f16(sum[0], wgmma::descriptor(a + k, 16), wgmma::descriptor(b + part * kColumns * 128 + k, 16),
                            more || k > 0 || part > 0);
  }
};

template <int Groups>
using Ring = ProductRing<Groups, Groups * 64, 2 * kColumns, Groups == 1 ? 8 : 6, Step>;

template <int Groups>
__global__ void __launch_bounds__(Ring<Groups>::kThreads, 1) patch_product_kernel(const __grid_constant__ Problem p) {
#if FLASHRT_DEVICE_HAS_WGMMA
  using R = Ring<Groups>;
  extern __shared__ unsigned char raw[];
  const auto copy_w = [&](const R& ring, const typename R::Position& at, int step, int tile) {
    const int k = step * R::kStepBytes, column = tile * kColumns;
    tensor_copy(ring.b(at.stage), &p.w, k, column, ring.full + at.stage);
    tensor_copy(ring.b(at.stage) + kColumns * R::kStepBytes, &p.w, k, p.width + column, ring.full + at.stage);
  };
  const auto copy_x = [&](const R& ring, const typename R::Position& at, int step, int first_row) {
    tensor_copy(ring.a(at.stage), &p.x, step * R::kStepBytes, first_row, ring.full + at.stage);
  };
  run_product<R, 0>(raw, p.shape, copy_w, copy_x, [&] {
    return [&p](int first_row, int tile, const auto& multiply) {
      const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x % R::kGroupThreads / kWarpSize;
      const int column = tile * kColumns, columns = p.width - column, row = first_row + warp * 16 + lane / 4;
      float2 added[2][kColumns / 8];  // read ahead of the product
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < kColumns / 8; ++i) {
          const int at = i * 8 + lane % 4 * 2;
          const float* source = p.table + int64_t((row + r * 8) % p.tokens) * p.width + column + at;
          added[r][i] = at < columns ? *reinterpret_cast<const float2*>(source) : float2{};
        }
      typename R::Sums sums;
      multiply(sums);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float value[kColumns / 4];
#pragma unroll
        for (int i = 0; i < kColumns / 4; ++i)
          value[i] =
              fmaf(sums[0][i / 2 * 4 + r * 2 + i % 2], p.factor, i % 2 == 0 ? added[r][i / 2].x : added[r][i / 2].y);
        store_row(value, p.out + int64_t(row + r * 8) * p.width + column, row + r * 8 < p.shape.rows ? columns : 0,
                  1.0f);
      }
    };
  });
#endif
}

template <int Groups>
cudaError_t launch(Problem p, const void* x, const void* w, int64_t rows, int64_t depth, int multiprocessors,
                   cudaStream_t stream) {
  using R = Ring<Groups>;
  p.shape = ProductShape(rows, Groups * 64, 64, p.width, kColumns, depth * 2);
  cudaError_t status = describe_matrix(p.x, x, rows, depth * 2, Groups * 64);
  if (status == cudaSuccess) status = describe_matrix(p.w, w, 2 * int64_t(p.width), depth * 2, kColumns);
  const auto kernel = patch_product_kernel<Groups>;
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, R::kSharedBytes);
  if (status != cudaSuccess) return status;
  const int blocks = p.shape.tiles < multiprocessors ? p.shape.tiles : multiprocessors;
  return launch_dependent(kernel, blocks, R::kThreads, R::kSharedBytes, stream, p);
}

}  // namespace

cudaError_t patch_product(const void* x, const void* w, const float* table, float factor, void* out, int64_t rows,
                          int64_t width, int64_t depth, int64_t tokens, cudaStream_t stream) {
  if (rows < 0 || width < 16 || depth < 8 || tokens < 1 || width % 16 != 0 || depth % 8 != 0)
    return cudaErrorInvalidValue;
  if (rows > INT32_MAX / 2 || width > INT32_MAX / 4 || depth > INT32_MAX / 4 || tokens > INT32_MAX)
    return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  if (!aligned_to_16_bytes(x) || !aligned_to_16_bytes(w) || !aligned_to_16_bytes(out) || !aligned_to_16_bytes(table))
    return cudaErrorInvalidValue;
  int multiprocessors = 0;
  const cudaError_t status = hopper_multiprocessors(&multiprocessors);
  if (status != cudaSuccess) return status;
  const Problem p = {
      {}, {}, table, static_cast<__nv_bfloat16*>(out), factor, static_cast<int>(width), static_cast<int>(tokens), {}};
  const int64_t tiles = (rows + 63) / 64 * ((width + kColumns - 1) / kColumns);
  return tiles <= multiprocessors ? launch<1>(p, x, w, rows, depth, multiprocessors, stream)
                                  : launch<2>(p, x, w, rows, depth, multiprocessors, stream);
}

}  // namespace flashrt
