// The persistent expert's products of one tile of rows with a block's units of weights, how the warps' sums meet, and
// the norms' sums.
#pragma once

#include "expert_stream.cuh"

namespace flashrt {
namespace expert {

// Activations lie in global memory as the tensor cores want them: tile by tile of 16 rows, pieces of 64 bytes of k, row
// by row. What a warp asks for at once is contiguous; reading rows one by one costs more than twice the time. With
// `Wide` a thread has 32 bytes of a k block, the second half of them in a piece of its own.
constexpr int kPieceBytes = kTileRows * kBlockBytes;

template <bool Wide>
__device__ __forceinline__ int piece_offset(int row, int row_bytes, int byte) {
  const int start = row / kTileRows * kTileRows * row_bytes + row % kTileRows * kBlockBytes;
  if constexpr (Wide)
    return start + (byte / (2 * kBlockBytes) * 2 + byte / 16 % 2) * kPieceBytes + byte % (2 * kBlockBytes) / 32 * 16 +
           byte % 16;
  return start + byte / kBlockBytes * kPieceBytes + byte % kBlockBytes;
}

// Byte `byte` of row `row` among the activations of product P.
template <bool Fp8, int P>
__device__ __forceinline__ int activation_offset(int row, int byte) {
  return piece_offset<Shape<Fp8, P>::Wide>(row, Shape<Fp8, P>::RowBytes, byte);
}

// A thread's part of one tile of activations: 16 bytes of rows `lane / 4` and `lane / 4 + 8` of each piece that is its
// warp's. A block of k is read by one warp only: 16 warps read each activation once.
template <bool Fp8, int P>
struct Activations {
  using S = Shape<Fp8, P>;
  uint4 low[S::Pieces], high[S::Pieces];
  const unsigned char* from;  // this thread's first piece
  bool has_low, has_high;

  static __device__ __forceinline__ constexpr int offset(int piece) {
    const int vector = piece % S::Vectors, own = piece / S::Vectors % S::Own, chunk = piece / S::Vectors / S::Own;
    return ((chunk * S::Blocks + own) * S::Vectors + vector) * kPieceBytes;
  }
  static constexpr int kHigh = 8 * kBlockBytes;

  // Ask for the pieces of tile `tile` of `x`; they may not have come yet.
  __device__ __forceinline__ void ask(const unsigned char* x, int tile, int rows, int batch = 0) {
    const int warp = thread_id() / kWarpSize, lane = thread_id() % kWarpSize, first = tile * kTileRows + lane / 4;
    from = x + tile * kTileRows * S::RowBytes + batch * (S::RowBytes / S::Batches) * kTileRows +
           warp * S::Own * S::Vectors * kPieceBytes + lane * 16;
    has_low = first < rows, has_high = first + 8 < rows;
#pragma unroll
    for (int i = 0; i < S::Pieces; ++i) {
      low[i] = has_low ? look(from + offset(i)) : make_uint4(0, 0, 0, 0);
      high[i] = has_high ? look(from + offset(i) + kHigh) : make_uint4(0, 0, 0, 0);
    }
  }
  // Until all have.
  __device__ __forceinline__ void settle() {
    for (int polls = 0;; count_poll(polls)) {
      bool missing = false;
#pragma unroll
      for (int i = 0; i < S::Pieces; ++i) missing |= absent(low[i]) | absent(high[i]);
      if (!__any_sync(0xffffffffu, missing)) break;
#pragma unroll
      for (int i = 0; i < S::Pieces; ++i) {
        if (absent(low[i])) low[i] = look(from + offset(i));
        if (absent(high[i])) high[i] = look(from + offset(i) + kHigh);
      }
    }
  }
};

// One unit's product: this warp's k of every chunk of it (of a batch, where activations come in batches), which have
// come. Two chains of sums a tile.
template <bool Fp8, int P>
__device__ __forceinline__ void multiply_unit(const Activations<Fp8, P>& a, const Ring& ring, Cursor& cursor,
                                              float (&sum)[Shape<Fp8, P>::Tiles][4]) {
  using S = Shape<Fp8, P>;
  const int warp = thread_id() / kWarpSize, lane = thread_id() % kWarpSize;
  float odd[S::Tiles][4] = {};
#pragma unroll
  for (int chunk = 0; chunk < S::Chunks / S::Batches; ++chunk) {
    const unsigned char* weights = ring.chunk(cursor) + warp * S::Own * kTileBytes + lane * 16;
    cursor.advance(ring.slots);
#pragma unroll
    for (int o = 0; o < S::Own; ++o) {
      const int piece = (chunk * S::Own + o) * S::Vectors;
#pragma unroll
      for (int t = 0; t < S::Tiles; ++t) {
        const uint4 packed = *reinterpret_cast<const uint4*>(weights + (t * S::Blocks + o) * kTileBytes);
        if constexpr (S::Wide) {
          uint32_t b[8];
          widen(packed, b);
          const uint4 &low0 = a.low[piece], &low1 = a.low[piece + 1];
          const uint4 &high0 = a.high[piece], &high1 = a.high[piece + 1];
          mma_f16(sum[t], low0.x, high0.x, low0.y, high0.y, b[0], b[1]);
          mma_f16(odd[t], low0.z, high0.z, low0.w, high0.w, b[2], b[3]);
          mma_f16(sum[t], low1.x, high1.x, low1.y, high1.y, b[4], b[5]);
          mma_f16(odd[t], low1.z, high1.z, low1.w, high1.w, b[6], b[7]);
        } else {
          multiply<S::E4m3>((chunk * S::Own + o) % 2 == 0 ? sum[t] : odd[t], a.low[piece], a.high[piece], packed);
        }
      }
    }
  }
  if constexpr (S::Wide || S::Chunks * S::Own > 1) {
#pragma unroll
    for (int t = 0; t < S::Tiles; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[t][i] += odd[t][i];
  }
}

constexpr int kTileElements = kTileRows * kTileFeatures;

constexpr int kTileStride = kTileElements + 4;  // floats: four tiles side by side fall into different banks

// A warp's part of the sums of tile `index` of `count` into shared memory: [warp][tile][row][feature]; `rows` count.
__device__ __forceinline__ void spread(float* sums, int count, int index, const float (&sum)[4], int rows) {
  const int warp = thread_id() / kWarpSize, lane = thread_id() % kWarpSize;
  float* target = sums + (warp * count + index) * kTileStride + lane / 4 * kTileFeatures + lane % 4 * 2;
  *reinterpret_cast<float2*>(target) = make_float2(sum[0], sum[1]);
  if (lane / 4 + 8 < rows) *reinterpret_cast<float2*>(target + 8 * kTileFeatures) = make_float2(sum[2], sum[3]);
}

__device__ __forceinline__ float gather(const float* sums, int count, int index, int element) {
  float part[4] = {};  // independent chains
#pragma unroll
  for (int w = 0; w < kWarps; ++w) part[w % 4] += sums[(w * count + index) * kTileStride + element];
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// 1 / x to an ulp, without the branch that exact division takes; x is a scale, far from 0 and infinity.
__device__ __forceinline__ float inverse_of(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y * (2.0f - x * y);
}

__device__ __forceinline__ uint32_t pack_bf16(float first, float second) {
  return static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(first))) |
         static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(second))) << 16;
}
__device__ __forceinline__ uint32_t pack_f16(float first, float second) {
  return static_cast<uint32_t>(__half_as_ushort(__float2half_rn(first))) |
         static_cast<uint32_t>(__half_as_ushort(__float2half_rn(second))) << 16;
}
__device__ __forceinline__ float2 unpack_f16(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
__device__ __forceinline__ float round_bf16(float value) { return to_float(from_float<__nv_bfloat16>(value)); }
__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// The blocks' parts of the sums of squares of a tile's rows: asked for with the activations, added up behind the
// product. A block's sixteen rows are neighbours, so that no two blocks write into one sector.
__device__ __forceinline__ int square_offset(int row) {
  return (row / kTileRows * kBlocks * kTileRows + row % kTileRows) * 4;
}
struct Squares {
  uint4 part;  // of four rows and one block
  const unsigned char* from;
  int rows;  // how many of the four there are

  __device__ __forceinline__ void ask(const unsigned char* squares, int tile, int all_rows) {
    from = squares + square_offset(tile * kTileRows) + thread_id() * 16;
    rows = all_rows - tile * kTileRows - static_cast<int>(thread_id() % 4) * 4;
    part = rows > 0 ? look(from) : make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ bool missing() const {
    return (rows > 0 && part.x == kAbsent) || (rows > 1 && part.y == kAbsent) || (rows > 2 && part.z == kAbsent) ||
           (rows > 3 && part.w == kAbsent);
  }
  // This warp's sums, four rows each in its first four lanes.
  __device__ __forceinline__ float4 settle() {
    for (int polls = 0; __any_sync(0xffffffffu, missing()); count_poll(polls))
      if (missing()) part = look(from);
    float4 sum =
        make_float4(__uint_as_float(part.x), __uint_as_float(part.y), __uint_as_float(part.z), __uint_as_float(part.w));
#pragma unroll
    for (int offset = 4; offset < kWarpSize; offset *= 2) {
      sum.x += __shfl_xor_sync(0xffffffffu, sum.x, offset);
      sum.y += __shfl_xor_sync(0xffffffffu, sum.y, offset);
      sum.z += __shfl_xor_sync(0xffffffffu, sum.z, offset);
      sum.w += __shfl_xor_sync(0xffffffffu, sum.w, offset);
    }
    return sum;
  }
};

}  // namespace expert
}  // namespace flashrt
