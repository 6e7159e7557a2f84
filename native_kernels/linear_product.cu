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
// fc2 at 2 views, 1152 x 4304: 8.3 MB, 2.8 us; 5.1 GFLOP, 4.3 us; 54 MB from L2, 9 us.
//
// A tile or hardly more a block, in one round over the multiprocessors: the tile's size follows the shape. All or most
// of the weights' stages are asked for ahead of the wait for the kernel in front. Where k is long and the tiles are few
// (fc2, the prefix's out), a cluster of 2 or 4 blocks takes a tile, each with its share of k, and sends the others the
// sums of the rows that they store: 128 x 80 fp32 are 20 or 30 KB into a block, by stores that need no fence.
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

struct Problem {
  CUtensorMap x, w;
  const float *x_scale, *w_scale, *scale;
  const __nv_bfloat16* bias;
  void* out;
  int width;
  ProductShape shape;
};

constexpr int kWarps = 8;  // that multiply, in a block of a cluster

// Bytes that the blocks of a cluster send to each of them: sums of 16 rows a warp.
template <int Splits, int Columns>
constexpr int kInboxBytes = (Splits - 1) * kWarps / Splits * 16 * Columns * 4;

// As many stages as shared memory holds, nine at most: that is all of the vision tower's depth.
constexpr int stages(int rows, int columns, int inbox_bytes) {
  const int fit = (225 * 1024 - inbox_bytes) / ((rows + columns) * 128);
  return fit < 9 ? fit : 9;
}

constexpr int64_t kDeep = 9 * 128;  // what is deeper goes through the ring more than once

template <int Groups, int Columns, int Splits>
using Ring = ProductRing<Groups, Groups * 64, Columns, stages(Groups * 64, Columns, kInboxBytes<Splits, Columns>),
                         PlainStep<Columns>>;

// The sums of a tile of which `Splits` blocks of a cluster have a share of k each. Every block stores the rows of some
// of the warps, and has an inbox for what the others found of those.
template <int Splits, int Columns>
struct SplitSums {
  static constexpr int kVectors = Columns / 8;  // of a thread's sums
  uint4* inbox;                                 // by sender, warp, vector, lane
  uint64_t* come;
  int rank;

  // By all threads of the block, before anything else.
  __device__ __forceinline__ SplitSums(unsigned char* inbox, uint64_t* come)
      : inbox(reinterpret_cast<uint4*>(inbox)), come(come), rank(blockIdx.x % Splits) {
    if (threadIdx.x == 0) {
      barrier_init(come, 1);
      barrier_init_fence();
      barrier_expect(come, kInboxBytes<Splits, Columns>);
    }
    __syncthreads();
    cluster_arrive();
  }

  __device__ __forceinline__ uint4* from(int sender, int owner, int warp) const {
    const int index = (sender - owner - 1 + Splits) % Splits;
    return inbox + (index * (kWarps / Splits) + warp % (kWarps / Splits)) * kVectors * kWarpSize +
           threadIdx.x % kWarpSize;
  }

  // By a warp that multiplied: whether it has the rows' whole sums now; else it has sent its own.
  __device__ __forceinline__ bool complete(float (&sum)[Columns / 2], int warp) const {
    const int owner = warp / (kWarps / Splits);
    if (owner != rank) {
      cluster_wait();
      uint4* target = from(rank, owner, warp);
      const uint32_t barrier = address_in(shared_address(come), owner);
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        give(address_in(shared_address(target + i * kWarpSize), owner),
             make_uint4(__float_as_uint(sum[4 * i]), __float_as_uint(sum[4 * i + 1]), __float_as_uint(sum[4 * i + 2]),
                        __float_as_uint(sum[4 * i + 3])),
             barrier);
      return false;
    }
    barrier_wait(come, 0);
#pragma unroll
    for (int other = 1; other < Splits; ++other) {
      const uint4* source = from((rank + other) % Splits, rank, warp);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const uint4 words = source[i * kWarpSize];
        sum[4 * i] += __uint_as_float(words.x), sum[4 * i + 1] += __uint_as_float(words.y);
        sum[4 * i + 2] += __uint_as_float(words.z), sum[4 * i + 3] += __uint_as_float(words.w);
      }
    }
    return true;
  }
};

// Those of a block that has all of k.
struct WholeSums {
  static constexpr int rank = 0;

  __device__ __forceinline__ WholeSums(unsigned char*, uint64_t*) {}
  template <int N>
  __device__ __forceinline__ bool complete(float (&)[N], int) const {
    return true;
  }
};

template <int Groups, int Columns, bool Gelu, int Splits>
__global__ void __launch_bounds__(Ring<Groups, Columns, Splits>::kThreads, 1)
    linear_product_kernel(const __grid_constant__ Problem p) {
#if FLASHRT_DEVICE_HAS_WGMMA
  using R = Ring<Groups, Columns, Splits>;
  static_assert(Splits == 1 || Groups * 4 == kWarps);
  using Out = std::conditional_t<Gelu, uint8_t, __nv_bfloat16>;
  constexpr int Registers = Columns > 144 || (Columns == 144 && Splits > 1) ? 216 : 0;
  extern __shared__ unsigned char raw[];
  __shared__ uint64_t come;
  std::conditional_t<(Splits > 1), SplitSums<Splits, Columns>, WholeSums> split(raw + R::kSharedBytes, &come);
  const int first_step = split.rank * p.shape.steps;
  const auto copy_w = [&](const R& ring, const typename R::Position& at, int step, int column_tile) {
    tensor_copy(ring.b(at.stage), &p.w, (first_step + step) * R::kStepBytes, column_tile * Columns,
                ring.full + at.stage);
  };
  const auto copy_x = [&](const R& ring, const typename R::Position& at, int step, int first_row) {
    tensor_copy(ring.a(at.stage), &p.x, (first_step + step) * R::kStepBytes, first_row, ring.full + at.stage);
  };
  run_product<R, Registers>(raw, p.shape, copy_w, copy_x, [&] {
    const float factor = *p.x_scale * *p.w_scale, inverse_scale = Gelu ? 1.0f / *p.scale : 1.0f;
    return [&p, &split, factor, inverse_scale](int first_row, int column_tile, const auto& multiply) {
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
      if (!split.complete(sums[0], threadIdx.x / kWarpSize)) return;
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

template <int Groups, int Columns, bool Gelu, int Splits = 1>
cudaError_t launch(Problem p, const void* x, const void* w, int64_t rows, int64_t depth, int multiprocessors,
                   cudaStream_t stream) {
  using R = Ring<Groups, Columns, Splits>;
  constexpr int Bytes = R::kSharedBytes + kInboxBytes<Splits, Columns>;
  static_assert(Bytes + 8 <= 227 * 1024, "a block has no more shared memory");
  p.shape = ProductShape(rows, Groups * 64, 64, p.width, Columns, depth, Splits);
  cudaError_t status = describe_matrix(p.x, x, rows, depth, Groups * 64);
  if (status == cudaSuccess) status = describe_matrix(p.w, w, p.width, depth, Columns);
  const auto kernel = linear_product_kernel<Groups, Columns, Gelu, Splits>;
  if (status == cudaSuccess) status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Bytes);
  if (status != cudaSuccess) return status;
  // a cluster sums one tile
  const int blocks = Splits == 1 && p.shape.tiles > multiprocessors ? multiprocessors : p.shape.tiles * Splits;
  return launch_dependent_clusters(kernel, Splits, blocks, R::kThreads, Bytes, stream, p);
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
  int multiprocessors = 0;
  const cudaError_t status = hopper_multiprocessors(&multiprocessors);
  if (status != cudaSuccess) return status;
  const Problem p = {
      {}, {}, x_scale, w_scale, scale, static_cast<const __nv_bfloat16*>(bias), out, static_cast<int>(width), {}};
  const auto tiles = [&](int tile_rows, int tile_columns) {
    return (rows + tile_rows - 1) / tile_rows * ((width + tile_columns - 1) / tile_columns);
  };
  if (scale == nullptr && depth > kDeep) {
    if (tiles(128, 80) * 4 <= multiprocessors)
      return launch<2, 80, false, 4>(p, x, w, rows, depth, multiprocessors, stream);
    if (tiles(128, 80) * 2 <= multiprocessors)
      return launch<2, 80, false, 2>(p, x, w, rows, depth, multiprocessors, stream);
    if (tiles(128, 144) * 2 <= multiprocessors)
      return launch<2, 144, false, 2>(p, x, w, rows, depth, multiprocessors, stream);
    return launch<2, 144, false>(p, x, w, rows, depth, multiprocessors, stream);
  }
  if (scale == nullptr) {  // narrow tiles only where wide ones leave more than half of the multiprocessors idle
    if (tiles(64, 80) <= multiprocessors / 2)
      return launch<1, 80, false>(p, x, w, rows, depth, multiprocessors, stream);
    if (tiles(64, 144) <= multiprocessors) return launch<1, 144, false>(p, x, w, rows, depth, multiprocessors, stream);
    if (tiles(128, 144) <= multiprocessors) return launch<2, 144, false>(p, x, w, rows, depth, multiprocessors, stream);
    return launch<2, 208, false>(p, x, w, rows, depth, multiprocessors, stream);
  }
  // the narrowest tiles that take one round
  if (tiles(128, 80) <= multiprocessors) return launch<2, 80, true>(p, x, w, rows, depth, multiprocessors, stream);
  if (tiles(128, 144) <= multiprocessors) return launch<2, 144, true>(p, x, w, rows, depth, multiprocessors, stream);
  return launch<2, 208, true>(p, x, w, rows, depth, multiprocessors, stream);
}

}  // namespace flashrt
