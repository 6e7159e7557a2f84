// gate | up = x w^T of e4m3 operands and what a feed-forward makes of them, in one kernel:
//   out = e4m3(gelu(gate) * up / *scale), gate and up scaled by *x_scale * *w_scale
//
// Shapes: x (rows, depth) e4m3; w (2 * width, depth) e4m3, rows of gate before those of up; out (rows, width) e4m3;
// contiguous; depth and width multiples of 16. fp32 from the sums to the one rounding of the result.
//
// Bytes moved: 67 MB of weights, 1.1 of x, 9.2 of out for 560 x 2 * 16384 x 2048, 26 us at 3.0 TB/s; 75 GFLOP, 64 us at
// the 1176 TFLOP/s that the library reaches on large squares. Without the epilogue 46 MB more are written and read.
//
// A tile is up to 192 rows and 128 columns of the result: 128 rows of gate and as many of up lie side by side, so that
// a thread's sums hold both halves of a value. 560 rows are 9 times 64, and no warpgroup idles. Blocks stay for tile
// after tile: the ring of 4 stages of 56 KB is filled ahead while the epilogue runs.
#include "dependent_launch.h"
#include "gelu.cuh"
#include "prefix.h"
#include "product_ring.cuh"
#include "product_store.cuh"
#include "tensor_map.h"

#pragma nv_diag_suppress 177  // elsewhere than on sm_90a the kernel is empty and leaves everything here unused

namespace flashrt {
namespace {

constexpr int kWidth = 128;  // columns of the result a tile

using Ring = ProductRing<3, 2 * kWidth, 4, 2>;

struct Problem {
  CUtensorMap x, w;
  const float *x_scale, *w_scale, *scale;
  uint8_t* out;
  int width;
  ProductShape shape;
};

using Half = float[kWidth / 2];  // a thread's sums of gate, or of up

// A warpgroup's 64 rows of the result.
__device__ __forceinline__ void store(const Half& gate, const Half& up, const Problem& p, int first_row, int column,
                                      float factor, float out_factor) {
  const int warp = threadIdx.x % 128 / kWarpSize;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + warp * 16 + threadIdx.x % kWarpSize / 4 + r * 8;
    float value[kWidth / 4];
#pragma unroll
    for (int i = 0; i < kWidth / 4; ++i) {
      const int at = i / 2 * 4 + r * 2 + i % 2;
      value[i] = gelu(gate[at] * factor) * (up[at] * out_factor);
    }
    store_row(value, p.out + int64_t(row) * p.width + column, row < p.shape.rows ? p.width - column : 0, 1.0f);
  }
}

__global__ void __launch_bounds__(Ring::kThreads, 1) geglu_product_kernel(const __grid_constant__ Problem p) {
#if FLASHRT_DEVICE_HAS_WGMMA
  extern __shared__ unsigned char raw[];
  const auto copy_w = [&](const Ring& ring, const Ring::Position& at, int step, int column_tile) {
    const int k = step * Ring::kStepBytes, column = column_tile * kWidth;
    tensor_copy(ring.b(at.stage), &p.w, k, column, ring.full + at.stage);
    tensor_copy(ring.b(at.stage) + kWidth * Ring::kStepBytes, &p.w, k, p.width + column, ring.full + at.stage);
  };
  // 65536 registers: 384 threads that multiply take 160, 128 keep 32
  run_product<Ring, 160>(raw, p.shape, &p.x, copy_w, [&] {
    const float factor = *p.x_scale * *p.w_scale, out_factor = factor / *p.scale;
    return [&p, factor, out_factor](int row, int column_tile, const auto& multiply) {
      Ring::Sums sums;
      multiply(sums);
      store(sums[0], sums[1], p, row, column_tile * kWidth, factor, out_factor);
    };
  });
#endif
}

}  // namespace

cudaError_t geglu_product(const void* x, const void* w, const float* x_scale, const float* w_scale, const float* scale,
                          void* out, int64_t rows, int64_t width, int64_t depth, cudaStream_t stream) {
  if (rows < 0 || width < 16 || depth < 16 || width % 16 != 0 || depth % 16 != 0) return cudaErrorInvalidValue;
  if (rows > INT32_MAX / 2 || width > INT32_MAX / 4 || depth > INT32_MAX / 2) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  if (!aligned_to_16_bytes(x) || !aligned_to_16_bytes(w) || !aligned_to_16_bytes(out)) return cudaErrorInvalidValue;
  Problem p = {{},
               {},
               x_scale,
               w_scale,
               scale,
               static_cast<uint8_t*>(out),
               static_cast<int>(width),
               ProductShape::of<Ring>(rows, width, kWidth, depth)};
  int device = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess) status = describe_matrix(p.x, x, rows, depth, Ring::kRows);
  if (status == cudaSuccess) status = describe_matrix(p.w, w, 2 * width, depth, kWidth);
  if (status == cudaSuccess)
    status =
        cudaFuncSetAttribute(geglu_product_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Ring::kSharedBytes);
  if (status != cudaSuccess) return status;
  const int blocks = p.shape.tiles < multiprocessors ? p.shape.tiles : multiprocessors;
  return launch_dependent(geglu_product_kernel, blocks, Ring::kThreads, Ring::kSharedBytes, stream, p);
}

}  // namespace flashrt
