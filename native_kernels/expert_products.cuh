// The persistent expert's products of a few rows with a block's units of weights, and how the warps' sums meet.
#pragma once

#include "expert_stream.cuh"

namespace flashrt {
namespace expert {

// Of h: another block may have written it since this multiprocessor's L1 saw it.
__device__ __forceinline__ float load_fresh(const __nv_bfloat16* address) {
  return to_float(__ushort_as_bfloat16(__ldcg(reinterpret_cast<const unsigned short*>(address))));
}

__device__ __forceinline__ uint4 global_row(const ExpertSteps& p, const void* x, int row, int k_bytes, int byte) {
  if (row >= p.rows) return make_uint4(0, 0, 0, 0);
  return __ldcg(reinterpret_cast<const uint4*>(static_cast<const unsigned char*>(x) + int64_t(row) * k_bytes + byte));
}

// Products 1 and 4: Group units at once on rows of 16-bit values; a warp reads its own k of every chunk, once.
template <bool Fp8, int RowTiles, int P, int Group>
__device__ __forceinline__ void multiply_scaled(const ExpertSteps& p, const Ring& ring, int index, int units,
                                                float (&sum)[Group][RowTiles][Shape<Fp8, P>::Tiles][4]) {
  using S = Shape<Fp8, P>;
  constexpr int Own = S::Blocks / kWarps, Vectors = Fp8 ? 2 : 1;  // 16-byte pieces of a k block in 16-bit values
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, row = lane / 4;
#pragma unroll
  for (int chunk = 0; chunk < S::Chunks; ++chunk) {
    uint4 low[Own][RowTiles][Vectors], high[Own][RowTiles][Vectors];
#pragma unroll
    for (int o = 0; o < Own; ++o) {
      const int byte = ((chunk * S::Blocks + warp * Own + o) * kBlockBytes + lane % 4 * 16) * Vectors;
#pragma unroll
      for (int r = 0; r < RowTiles; ++r) {
#pragma unroll
        for (int i = 0; i < Vectors; ++i) {
          low[o][r][i] = global_row(p, p.scaled, r * 16 + row, kWidth * 2, byte + i * 16);
          high[o][r][i] = global_row(p, p.scaled, r * 16 + row + 8, kWidth * 2, byte + i * 16);
        }
      }
    }
#pragma unroll
    for (int g = 0; g < Group; ++g) {
      if (g >= units) break;
      const unsigned char* weights = ring.wait(index + g * S::Chunks + chunk) + warp * Own * kTileBytes + lane * 16;
#pragma unroll
      for (int o = 0; o < Own; ++o) {
#pragma unroll
        for (int t = 0; t < S::Tiles; ++t) {
          const uint4 packed = *reinterpret_cast<const uint4*>(weights + (t * S::Blocks + o) * kTileBytes);
          if constexpr (Fp8) {
            uint32_t b[8];
            widen(packed, b);
#pragma unroll
            for (int r = 0; r < RowTiles; ++r) multiply_f16(sum[g][r][t], low[o][r], high[o][r], b);
          } else {
#pragma unroll
            for (int r = 0; r < RowTiles; ++r) multiply<false>(sum[g][r][t], low[o][r][0], high[o][r][0], packed);
          }
        }
      }
    }
  }
  ring.release(index, units * S::Chunks);
}

// Products 3 and 5: one unit on rows of the weights' type.
template <bool Fp8, int RowTiles, int P>
__device__ __forceinline__ void multiply_plain(const ExpertSteps& p, const Ring& ring, int index, const void* x,
                                               float (&sum)[1][RowTiles][1][4]) {
  using S = Shape<Fp8, P>;
  constexpr int Own = S::Blocks / kWarps;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, row = lane / 4;
  uint4 low[2][Own][RowTiles], high[2][Own][RowTiles];
  const auto load = [&](int chunk) {
#pragma unroll
    for (int o = 0; o < Own; ++o) {
      const int byte = (chunk * S::Blocks + warp * Own + o) * kBlockBytes + lane % 4 * 16;
#pragma unroll
      for (int r = 0; r < RowTiles; ++r) {
        low[chunk % 2][o][r] = global_row(p, x, r * 16 + row, S::kBytes, byte);
        high[chunk % 2][o][r] = global_row(p, x, r * 16 + row + 8, S::kBytes, byte);
      }
    }
  };
  load(0);
  float odd[RowTiles][4] = {};  // a second chain of sums
#pragma unroll
  for (int chunk = 0; chunk < S::Chunks; ++chunk) {
    if (chunk + 1 < S::Chunks) load(chunk + 1);
    const unsigned char* weights = ring.wait(index + chunk) + warp * Own * kTileBytes + lane * 16;
#pragma unroll
    for (int o = 0; o < Own; ++o) {
      const uint4 packed = *reinterpret_cast<const uint4*>(weights + o * kTileBytes);
#pragma unroll
      for (int r = 0; r < RowTiles; ++r)
        multiply<Fp8>(o % 2 == 0 ? sum[0][r][0] : odd[r], low[chunk % 2][o][r], high[chunk % 2][o][r], packed);
    }
  }
  ring.release(index, S::Chunks);
#pragma unroll
  for (int r = 0; r < RowTiles; ++r)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[0][r][0][i] += odd[r][i];
}

// Every warp's part of the sums of Group units into shared memory: [warp][unit][tile][row][feature].
template <int RowTiles, int Tiles, int Group>
__device__ __forceinline__ void spread(float* sums, const float (&sum)[Group][RowTiles][Tiles][4]) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  constexpr int TileElements = 16 * RowTiles * kTileFeatures;
#pragma unroll
  for (int g = 0; g < Group; ++g) {
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
#pragma unroll
      for (int r = 0; r < RowTiles; ++r) {
        float* target =
            sums + ((warp * Group + g) * Tiles + t) * TileElements + (r * 16 + lane / 4) * kTileFeatures + lane % 4 * 2;
        *reinterpret_cast<float2*>(target) = make_float2(sum[g][r][t][0], sum[g][r][t][1]);
        *reinterpret_cast<float2*>(target + 8 * kTileFeatures) = make_float2(sum[g][r][t][2], sum[g][r][t][3]);
      }
    }
  }
}

template <int RowTiles, int Tiles, int Group>
__device__ __forceinline__ float gather(const float* sums, int unit, int tile, int element) {
  constexpr int TileElements = 16 * RowTiles * kTileFeatures;
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += sums[((w * Group + unit) * Tiles + tile) * TileElements + element];
  return total;
}

template <bool Fp8>
__device__ __forceinline__ void store_quantised(void* out, int64_t index, float value, float inverse_scale) {
  const __nv_bfloat16 rounded = from_float<__nv_bfloat16>(value);
  if constexpr (Fp8) {
    static_cast<uint8_t*>(out)[index] = to_e4m3(to_float(rounded) * inverse_scale);
  } else {
    static_cast<__nv_bfloat16*>(out)[index] = rounded;
  }
}

template <bool Fp8>
__device__ __forceinline__ void store_scaled(void* out, int64_t index, float value) {
  if constexpr (Fp8) {
    static_cast<__half*>(out)[index] = from_float<__half>(value * kHeadroom);
  } else {
    static_cast<__nv_bfloat16*>(out)[index] = from_float<__nv_bfloat16>(value * kHeadroom);
  }
}

}  // namespace expert
}  // namespace flashrt
