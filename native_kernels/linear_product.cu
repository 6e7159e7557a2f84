// out = x w^T * (*x_scale * *w_scale) + bias of e4m3 operands for a few hundred rows and not much depth; or with the
// GELU that follows in the same kernel, out = e4m3(gelu(...) / *scale).
//
// Shapes: x (rows, depth) and w (width, depth) e4m3; bias (width,) bf16 or null; out (rows, width) bf16, or e4m3 where
// a scale is given; contiguous; depth and width multiples of 16. fp32 from the sums to the one rounding of the result.
//
// Bytes moved, vision tower at 2 views (512 rows): fc1 4304 x 1152 is 5.0 MB of weights, 0.6 of x and 2.2 of out, 2.6
// us at 3.0 TB/s; 5.1 GFLOP, 4.3 us at 1176 TFLOP/s; 38 MB from L2, 6.3 us. out 1152 x 1152 is 3.1 MB and 1.4
// GFLOP, 1.2 us.
//
// A tile or hardly more a block, in one round over the multiprocessors: the tile's size follows the shape. All or most
// of the weights' stages are asked for ahead of the wait for the kernel in front.
#include "dependent_launch.h"
#include "gelu.cuh"
#include "prefix.h"
#include "product_ring.cuh"
#include "product_store.cuh"
#include "tensor_map.h"

#pragma nv_diag_suppress 177  // elsewhere than on sm_90a the kernel is empty and leaves everything here unused

namespace flashrt {
namespace {

struct Problem {
  CUtensorMap x, w;
  const float *x_scale, *w_scale, *scale;
  const __nv_bfloat16* bias;
  void* out;
  int width;
  ProductShape shape;
};

// As many stages as shared memory holds, nine at most: that is all of the vision tower's depth.
constexpr int stages(int rows, int columns) {
  const int fit = 225 * 1024 / ((rows + columns) * 128);
  return fit < 9 ? fit : 9;
}

constexpr int64_t kDeep = 9 * 128;  // what is deeper goes through the ring more than once

template <int Groups, int Columns>
using Ring = ProductRing<Groups, Columns, stages(Groups * 64, Columns)>;

template <int Groups, int Columns, bool Gelu>
__global__ void __launch_bounds__(Ring<Groups, Columns>::kThreads, 1)
    linear_product_kernel(const __grid_constant__ Problem p) {
#if FLASHRT_DEVICE_HAS_WGMMA
  using R = Ring<Groups, Columns>;
  using Out = std::conditional_t<Gelu, uint8_t, __nv_bfloat16>;
  constexpr int Registers = Columns > 144 ? 216 : 0;
  extern __shared__ unsigned char raw[];
  const auto copy_w = [&](const R& ring, const typename R::Position& at, int step, int column_tile) {
    tensor_copy(ring.b(at.stage), &p.w, step * R::kStepBytes, column_tile * Columns, ring.full + at.stage);
  };
  run_product<R, Registers>(raw, p.shape, &p.x, copy_w, [&] {
    const float factor = *p.x_scale * *p.w_scale, inverse_scale = Gelu ? 1.0f / *p.scale : 1.0f;
    return [&p, factor, inverse_scale](int first_row, int column_tile, const auto& multiply) {
      const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x % R::kGroupThreads / kWarpSize;
      const int column = column_tile * Columns, columns = p.width - column;
      __nv_bfloat162 bias[Columns / 8];  // read ahead of the product
#pragma unroll
      for (int i = 0; i < Columns / 8; ++i) {
        const int at = i * 8 + lane % 4 * 2;
        bias[i] = p.bias != nullptr && at < columns ? *reinterpret_cast<const __nv_bfloat162*>(p.bias + column + at)
                                                    : __nv_bfloat162{};
      }
      typename R::Sums sums;
      multiply(sums);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = first_row + warp * 16 + lane / 4 + r * 8;
        float value[Columns / 4];
#pragma unroll
        for (int i = 0; i < Columns / 4; ++i) {
          const float added = to_float(i % 2 == 0 ? bias[i / 2].x : bias[i / 2].y);
          const float linear = fmaf(sums[0][i / 2 * 4 + r * 2 + i % 2], factor, added);
          value[i] = Gelu ? gelu(linear) : linear;
        }
        store_row(value, static_cast<Out*>(p.out) + int64_t(row) * p.width + column, row < p.shape.rows ? columns : 0,
                  inverse_scale);
      }
    };
  });
#endif
}

template <int Groups, int Columns, bool Gelu>
cudaError_t launch(Problem p, const void* x, const void* w, int64_t rows, int64_t depth, int multiprocessors,
                   cudaStream_t stream) {
  using R = Ring<Groups, Columns>;
  p.shape = ProductShape::of<R>(rows, p.width, Columns, depth);
  cudaError_t status = describe_matrix(p.x, x, rows, depth, R::kRows);
  if (status == cudaSuccess) status = describe_matrix(p.w, w, p.width, depth, Columns);
  const auto kernel = linear_product_kernel<Groups, Columns, Gelu>;
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, R::kSharedBytes);
  if (status != cudaSuccess) return status;
  const int blocks = p.shape.tiles < multiprocessors ? p.shape.tiles : multiprocessors;
  return launch_dependent(kernel, blocks, R::kThreads, R::kSharedBytes, stream, p);
}

}  // namespace

cudaError_t linear_product(const void* x, const void* w, const void* bias, const float* x_scale, const float* w_scale,
                           const float* scale, void* out, int64_t rows, int64_t width, int64_t depth,
                           cudaStream_t stream) {
  if (rows < 0 || width < 16 || depth < 16 || width % 16 != 0 || depth % 16 != 0) return cudaErrorInvalidValue;
  if (rows > INT32_MAX / 2 || width > INT32_MAX / 4 || depth > INT32_MAX / 2) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  if (!aligned_to_16_bytes(x) || !aligned_to_16_bytes(w) || !aligned_to_16_bytes(out) || !aligned_to_16_bytes(bias))
    return cudaErrorInvalidValue;
  int device = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  const Problem p = {
      {}, {}, x_scale, w_scale, scale, static_cast<const __nv_bfloat16*>(bias), out, static_cast<int>(width), {}};
  const auto tiles = [&](int tile_rows, int tile_columns) {
    return (rows + tile_rows - 1) / tile_rows * ((width + tile_columns - 1) / tile_columns);
  };
  if (scale == nullptr && depth > kDeep) {  // large tiles: what comes from L2 counts
    return tiles(128, 80) <= multiprocessors / 2 ? launch<2, 80, false>(p, x, w, rows, depth, multiprocessors, stream)
                                                 : launch<2, 144, false>(p, x, w, rows, depth, multiprocessors, stream);
  }
  if (scale == nullptr) {  // narrow tiles only where wide ones leave more than half of the multiprocessors idle
    return tiles(64, 80) <= multiprocessors / 2 ? launch<1, 80, false>(p, x, w, rows, depth, multiprocessors, stream)
                                                : launch<1, 144, false>(p, x, w, rows, depth, multiprocessors, stream);
  }
  // the narrowest tiles that take one round
  if (tiles(128, 80) <= multiprocessors) return launch<2, 80, true>(p, x, w, rows, depth, multiprocessors, stream);
  if (tiles(128, 144) <= multiprocessors) return launch<2, 144, true>(p, x, w, rows, depth, multiprocessors, stream);
  return launch<2, 208, true>(p, x, w, rows, depth, multiprocessors, stream);
}

}  // namespace flashrt
