// The skinny GEMM's products: a warp's k blocks of one unit of tiles, with the weights in shared memory or streamed.
#pragma once

#include "skinny_rows.cuh"

namespace flashrt {
namespace skinny {

// 16 bytes of a row of x from global memory, zero past the last row.
__device__ __forceinline__ uint4 global_row(const SkinnyGemm& p, int row, int byte, int k_bytes) {
  if (row >= p.rows) return make_uint4(0, 0, 0, 0);
  return *reinterpret_cast<const uint4*>(static_cast<const unsigned char*>(p.x) + int64_t(row) * k_bytes + byte);
}

// This warp's k blocks [begin, end) of one unit: x from shared memory when it was normed here, else from L2.
template <bool Fp8, int RowTiles, int Tiles, Input I>
__device__ __forceinline__ void accumulate(const SkinnyGemm& p, const Layout& layout, const unsigned char* x_shared,
                                           const unsigned char* tile, [[maybe_unused]] uint64_t* barrier, int begin,
                                           int end, float (&accumulator)[RowTiles][Tiles][4]) {
  const int lane = threadIdx.x % kWarpSize, row = lane / 4, byte_in_block = lane % 4 * 16;
  const int k_blocks = layout.k_bytes / kBlockBytes;
  constexpr bool Norm = I == Input::kNorm;
  if constexpr (Norm) barrier_wait(barrier, 0);
#pragma unroll 8
  for (int block = begin; block < end; ++block) {
    const int byte = block * kBlockBytes + byte_in_block;
    if constexpr (Fp8 && I != Input::kPlain) {
      uint4 low[RowTiles][2], high[RowTiles][2];
#pragma unroll
      for (int r = 0; r < RowTiles; ++r) {
        if constexpr (!Norm) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            low[r][half] = global_row(p, r * 16 + row, byte * 2 + half * 16, layout.k_bytes * 2);
            high[r][half] = global_row(p, r * 16 + row + 8, byte * 2 + half * 16, layout.k_bytes * 2);
          }
          continue;
        }
        const uint4* rows = reinterpret_cast<const uint4*>(x_shared + (r * 16 + row) * layout.x_stride + byte * 2);
        const uint4* eighth =
            reinterpret_cast<const uint4*>(x_shared + (r * 16 + row + 8) * layout.x_stride + byte * 2);
        low[r][0] = rows[0], low[r][1] = rows[1], high[r][0] = eighth[0], high[r][1] = eighth[1];
      }
      if constexpr (!Norm) barrier_wait(barrier, 0);
#pragma unroll
      for (int t = 0; t < Tiles; ++t) {
        const uint4 packed = *reinterpret_cast<const uint4*>(tile + (t * k_blocks + block) * kTileBytes);
        uint32_t b[8];
        widen(packed, b);
#pragma unroll
        for (int r = 0; r < RowTiles; ++r) multiply_f16(accumulator[r][t], low[r], high[r], b);
      }
    } else {
      uint4 low[RowTiles], high[RowTiles];
#pragma unroll
      for (int r = 0; r < RowTiles; ++r) {
        if constexpr (Norm) {
          low[r] = *reinterpret_cast<const uint4*>(x_shared + (r * 16 + row) * layout.x_stride + byte);
          high[r] = *reinterpret_cast<const uint4*>(x_shared + (r * 16 + row + 8) * layout.x_stride + byte);
        } else {
          low[r] = global_row(p, r * 16 + row, byte, layout.k_bytes);
          high[r] = global_row(p, r * 16 + row + 8, byte, layout.k_bytes);
        }
      }
      if constexpr (!Norm) barrier_wait(barrier, 0);
#pragma unroll
      for (int t = 0; t < Tiles; ++t) {
        const uint4 b = *reinterpret_cast<const uint4*>(tile + (t * k_blocks + block) * kTileBytes);
#pragma unroll
        for (int r = 0; r < RowTiles; ++r) multiply<Fp8>(accumulator[r][t], low[r], high[r], b);
      }
    }
  }
}

// The same with weights from global memory, a batch of k blocks in flight at once: for products of several waves, where
// the pauses of blocks that first load and then add up would be a third of the time.
template <bool Fp8, int RowTiles, int Tiles>
__device__ __forceinline__ void accumulate_streamed(const SkinnyGemm& p, const Layout& layout,
                                                    const unsigned char* tile, int begin, int end,
                                                    float (&accumulator)[RowTiles][Tiles][4]) {
  constexpr int kBatch = 8 / Tiles;
  const int lane = threadIdx.x % kWarpSize, row = lane / 4, byte_in_block = lane % 4 * 16;
  const int k_blocks = layout.k_bytes / kBlockBytes;
  for (int first = begin; first < end; first += kBatch) {
    uint4 b[kBatch][Tiles];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int t = 0; t < Tiles; ++t) {
        const unsigned char* source = tile + (int64_t(t) * k_blocks + first + i) * kTileBytes;
        b[i][t] = first + i < end ? __ldcs(reinterpret_cast<const uint4*>(source)) : make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i >= end) break;
      const int byte = (first + i) * kBlockBytes + byte_in_block;
#pragma unroll
      for (int r = 0; r < RowTiles; ++r) {
        const uint4 low = global_row(p, r * 16 + row, byte, layout.k_bytes);
        const uint4 high = global_row(p, r * 16 + row + 8, byte, layout.k_bytes);
#pragma unroll
        for (int t = 0; t < Tiles; ++t) multiply<Fp8>(accumulator[r][t], low, high, b[i][t]);
      }
    }
  }
}

// Asks for a warp's first weights of a streamed product, which then come while the kernel in front ends. They stay in
// L2: 64 KB of every block are a third of it.
template <int Tiles>
__device__ __forceinline__ void prefetch_streamed(const Layout& layout, const unsigned char* tile, int begin, int end) {
  constexpr int kAheadBytes = 8192 / Tiles, kLine = 128;
  const int lane = threadIdx.x % kWarpSize, bytes = min((end - begin) * kTileBytes, kAheadBytes);
#pragma unroll
  for (int t = 0; t < Tiles; ++t) {
    const unsigned char* first = tile + (int64_t(t) * (layout.k_bytes / kBlockBytes) + begin) * kTileBytes;
    for (int byte = lane * kLine; byte < bytes; byte += kWarpSize * kLine) prefetch_l2(first + byte);
  }
}

}  // namespace skinny
}  // namespace flashrt
