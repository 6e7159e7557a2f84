// gate | up = x w^T of e4m3 operands and what a feed-forward makes of them, in one kernel:
//   out = e4m3(gelu(gate) * up / *scale), gate and up scaled by *x_scale * *w_scale
//
// Shapes: x (rows, depth) e4m3; w (2 * width, depth) e4m3, rows of gate before those of up; out (rows, width) e4m3;
// contiguous; depth and width multiples of 16. fp32 from the sums to the one rounding of the result.
//
// Bytes moved: 67 MB of weights, 1.1 of x, 9.2 of out for 560 x 2 * 16384 x 2048, 26 us at 3.0 TB/s; 75 GFLOP, 64 us at
// the 1176 TFLOP/s that the library reaches on large squares. Without the epilogue 46 MB more are written and read.
//
// A tile is 128 columns of the result, whose 128 rows of gate and as many of up lie side by side, so that a thread's
// sums hold both halves of a value. Blocks stay for tile after tile: the ring of 3 or 4 stages of up to 59 KB is filled
// ahead while the epilogue runs. Of the rows of x either 192 are a tile, 64 a warpgroup: 3 tiles of 560. Or, where that
// leaves a tile nearly empty, the weights are the rows of the matrix unit, 64 of gate and of up a warpgroup, and x its
// columns, as many as the fewest tiles need: 2 of 152 for 304 rows, 4 of 208 for 816.
#include "dependent_launch.h"
#include "device_limits.h"
#include "gelu.cuh"
#include "prefix.h"
#include "product_ring.cuh"
#include "product_store.cuh"
#include "tensor_map.h"

#pragma nv_diag_suppress 177  // elsewhere than on sm_90a the kernel is empty and leaves everything here unused

namespace flashrt {
namespace {

constexpr int kWidth = 128;  // columns of the result a tile

struct Problem {
  CUtensorMap x, w;
  const float *x_scale, *w_scale, *scale;
  uint8_t* out;
  int width;
  ProductShape shape;
};

// 192 rows of x: gate and up are columns of the matrix unit. One instruction of all 256 takes more registers than four
// warpgroups have.
struct Wide {
  using Sums = float[2][kWidth / 2];
  static constexpr int kRows = 192, kGroups = 3, kRegisters = 160;  // 384 threads multiply, 128 keep 24

  __device__ __forceinline__ static void issue(Sums& sum, uint32_t a, uint32_t b, bool more) {
#pragma unroll
    for (int k = 0; k < 128; k += 32)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        wgmma::multiply_e4m3(sum[half], wgmma::descriptor(a + k, 16),
                             wgmma::descriptor(b + half * kWidth * 128 + k, 16), more || k > 0);
  }
  using Ring = ProductRing<kGroups, kRows, 2 * kWidth, 4, Wide>;

  __device__ __forceinline__ static uint32_t x(const Ring& ring, int stage) { return ring.a(stage); }
  __device__ __forceinline__ static uint32_t w(const Ring& ring, int stage) { return ring.b(stage); }

  // A warpgroup's 64 rows of the result.
  __device__ __forceinline__ static void store(const Sums& sum, const Problem& p, int first_row, int column,
                                               float factor, float out_factor) {
    const int warp = threadIdx.x % 128 / kWarpSize;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + warp * 16 + threadIdx.x % kWarpSize / 4 + r * 8;
      float value[kWidth / 4];
#pragma unroll
      for (int i = 0; i < kWidth / 4; ++i) {
        const int at = i / 2 * 4 + r * 2 + i % 2;
        value[i] = gelu(sum[0][at] * factor) * (sum[1][at] * out_factor);
      }
      store_row(value, p.out + int64_t(row) * p.width + column, row < p.shape.rows ? p.width - column : 0, 1.0f);
    }
  }
};

// `Rows` rows of x as columns of the matrix unit.
template <int Rows>
struct Tall {
  using Sums = float[2][Rows / 2];
  // 384 threads are launched with 168 registers each: 256 that multiply take 240, 128 keep 24
  static constexpr int kRows = Rows, kGroups = 2, kRegisters = 240;

  __device__ __forceinline__ static void issue(Sums& sum, uint32_t a, uint32_t b, bool more) {
#pragma unroll
    for (int k = 0; k < 128; k += 32)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        wgmma::multiply_e4m3(sum[half], wgmma::descriptor(a + half * kWidth * 128 + k, 16),
                             wgmma::descriptor(b + k, 16), more || k > 0);
  }
  using Ring = ProductRing<kGroups, 2 * kWidth, Rows, (2 * kWidth + Rows) * 128 * 4 <= 225 * 1024 ? 4 : 3, Tall>;

  __device__ __forceinline__ static uint32_t x(const Ring& ring, int stage) { return ring.b(stage); }
  __device__ __forceinline__ static uint32_t w(const Ring& ring, int stage) { return ring.a(stage); }

  // All of the tile's rows at a warpgroup's 64 columns of the result.
  __device__ __forceinline__ static void store(const Sums& sum, const Problem& p, int first_row, int column,
                                               float factor, float out_factor) {
    const auto value = [&](int group) {
      Vector<float, 4> four;
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // sums: two rows of the result at one column, then at the other
        const int at = 4 * group + i % 2 * 2 + i / 2;
        four.element[i] = gelu(sum[0][at] * factor) * (sum[1][at] * out_factor);
      }
      return four;
    };
    column += threadIdx.x / kWarpSize * 16;
    store_columns<Rows / 8>(value, p.out + int64_t(first_row) * p.width + column, p.width, p.shape.rows - first_row,
                            column < p.width);
  }
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::Ring::kThreads, 1) geglu_product_kernel(const __grid_constant__ Problem p) {
#if FLASHRT_DEVICE_HAS_WGMMA
  using R = typename Tile::Ring;
  extern __shared__ unsigned char raw[];
  const auto copy_w = [&](const R& ring, const typename R::Position& at, int step, int tile) {
    const int k = step * R::kStepBytes, column = tile * kWidth;
    tensor_copy(Tile::w(ring, at.stage), &p.w, k, column, ring.full + at.stage);
    tensor_copy(Tile::w(ring, at.stage) + kWidth * R::kStepBytes, &p.w, k, p.width + column, ring.full + at.stage);
  };
  const auto copy_x = [&](const R& ring, const typename R::Position& at, int step, int first_row) {
    tensor_copy(Tile::x(ring, at.stage), &p.x, step * R::kStepBytes, first_row, ring.full + at.stage);
  };
  run_product<R, Tile::kRegisters>(raw, p.shape, copy_w, copy_x, [&] {
    const float factor = *p.x_scale * *p.w_scale, out_factor = factor / *p.scale;
    return [&p, factor, out_factor](int first_row, int tile, const auto& multiply) {
      typename R::Sums sums;
      multiply(sums);
      Tile::store(sums, p, first_row, tile * kWidth, factor, out_factor);
    };
  });
#endif
}

template <typename Tile>
cudaError_t launch(Problem p, const void* x, const void* w, int64_t rows, int64_t depth, int multiprocessors,
                   cudaStream_t stream) {
  using R = typename Tile::Ring;
  const int group_rows = std::is_same_v<Tile, Wide> ? R::kGroupRows : 0;
  p.shape = ProductShape(rows, Tile::kRows, group_rows, p.width, kWidth, depth);
  cudaError_t status = describe_matrix(p.x, x, rows, depth, Tile::kRows);
  if (status == cudaSuccess) status = describe_matrix(p.w, w, 2 * int64_t(p.width), depth, kWidth);
  const auto kernel = geglu_product_kernel<Tile>;
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, R::kSharedBytes);
  if (status != cudaSuccess) return status;
  const int blocks = p.shape.tiles < multiprocessors ? p.shape.tiles : multiprocessors;
  return launch_dependent(kernel, blocks, R::kThreads, R::kSharedBytes, stream, p);
}

}  // namespace

cudaError_t geglu_product(const void* x, const void* w, const float* x_scale, const float* w_scale, const float* scale,
                          void* out, int64_t rows, int64_t width, int64_t depth, cudaStream_t stream) {
  if (rows < 0 || width < 16 || depth < 16 || width % 16 != 0 || depth % 16 != 0) return cudaErrorInvalidValue;
  if (rows > INT32_MAX / 2 || width > INT32_MAX / 4 || depth > INT32_MAX / 2) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  if (!aligned_to_16_bytes(x) || !aligned_to_16_bytes(w) || !aligned_to_16_bytes(out)) return cudaErrorInvalidValue;
  const Problem p = {{}, {}, x_scale, w_scale, scale, static_cast<uint8_t*>(out), static_cast<int>(width), {}};
  int multiprocessors = 0;
  const cudaError_t status = hopper_multiprocessors(&multiprocessors);
  if (status != cudaSuccess) return status;
  const int64_t tiles = (rows + 207) / 208, least = (rows + tiles - 1) / tiles;  // rows of the fewest tiles
  if (least <= 152) return launch<Tall<152>>(p, x, w, rows, depth, multiprocessors, stream);
  if (least <= 176) return launch<Tall<176>>(p, x, w, rows, depth, multiprocessors, stream);
  if (least <= 192) return launch<Wide>(p, x, w, rows, depth, multiprocessors, stream);
  return launch<Tall<208>>(p, x, w, rows, depth, multiprocessors, stream);
}

}  // namespace flashrt
