// The persistent expert's products of one tile of rows with a block's units of weights, how the warps' sums meet, and
// the norms' sums.
#pragma once

#include "expert_mover.cuh"

namespace flashrt {
namespace expert {

// Activations lie in global memory as the tensor cores want them: tile by tile of 16 rows, k block by k block. Rows
// 2 i and 2 i + 1 are rows i and i + 8 of an operand, and their words lie in turn, so that 16 bytes as loaded are an
// operand: a k block is its operands one after the other, of each the row pairs, four lanes each. What a warp asks for
// at once is contiguous; reading rows one by one costs more than twice the time.
constexpr int kOperandBytes = kTileRows * 32;  // of all lanes

// The row of a tile that is row `slot` of an operand and of the sums.
__device__ __forceinline__ int row_of_slot(int slot) { return slot % 8 * 2 + slot / 8; }

// `Operands` of a k block: a lane has 8 bytes of a row in each.
template <int Operands>
__device__ __forceinline__ int operand_offset(int row, int row_bytes, int byte) {
  constexpr int LaneBytes = Operands * 8;
  const int block = byte / (4 * LaneBytes), lane = byte / LaneBytes % 4, operand = byte % LaneBytes / 8;
  return row / kTileRows * kTileRows * row_bytes + (block * Operands + operand) * kOperandBytes +
         (row % kTileRows / 2 * 4 + lane) * 16 + byte % 8 / 4 * 8 + row % 2 * 4 + byte % 4;
}

// Byte `byte` of row `row` among the activations of product P.
template <bool Fp8, int P>
__device__ __forceinline__ int activation_offset(int row, int byte) {
  return operand_offset<Shape<Fp8, P>::Operands>(row, Shape<Fp8, P>::RowBytes, byte);
}

// 16 bytes of which the words of the second row do not count where there is none: what comes of them stays in that row.
__device__ __forceinline__ bool absent(const uint4& v, uint32_t second) {
  return max(max(v.x, v.z), max(v.y, v.w) & second) == kAbsent;
}

// The same of several, in fewer instructions than one by one.
template <int Count>
__device__ __forceinline__ bool any_absent(const uint4 (&v)[Count], uint32_t second) {
  uint32_t upper = 0, lower = 0;
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    upper = max(max(upper, v[i].x), v[i].z);
    lower = max(max(lower, v[i].y), v[i].w);
  }
  return max(upper, lower & second) == kAbsent;
}

// What a warp multiplies: a tile of rows is that of all 16 warps, or of 8 or 4 where there are more tiles; each takes a
// part of k.
template <bool One>
struct Team {
  int shift, tile, part;  // 1 << shift parts

  __device__ __forceinline__ explicit Team(int rows)
      : shift(One                     ? 4
              : rows <= 2 * kTileRows ? 3
                                      : 2),
        tile(One ? 0 : thread_id() / kWarpSize >> shift),
        part(One ? thread_id() / kWarpSize : thread_id() / kWarpSize & (parts() - 1)) {}
  __device__ __forceinline__ Team(int shift, int tile, int part) : shift(shift), tile(tile), part(part) {}
  __device__ __forceinline__ int parts() const { return 1 << shift; }
};

// A thread's operands of the activations: those of the k blocks that are its warp's, of which it holds two groups. A
// block of k is read by one warp of a team only: each activation is read once. Where there are more tiles, lanes of
// rows past the end read the last pair again, which takes fewer instructions than zeros: what comes of it stays in its
// rows.
template <bool Fp8, int P, bool One, bool Narrow = false>
struct Activations {
  using S = Shape<Fp8, P, Narrow>;
  static constexpr int kGroupBytes = kGroupOperands * kOperandBytes;
  uint4 operand[2][kGroupOperands];
  const unsigned char* from;  // this thread's first
  int rows, groups;           // rows: of the tile
  uint32_t second;

  // Of quarter `quarter` of k, where a block reads a quarter only.
  __device__ __forceinline__ Activations(const unsigned char* x, const Team<One>& team, int all_rows, int quarters = 1,
                                         int quarter = 0) {
    groups = S::Groups / quarters >> team.shift;
    rows = all_rows - team.tile * kTileRows;
    const int lane = thread_id() % kWarpSize, tile = One || rows > 0 ? team.tile : 0;
    const int pair = One ? lane / 4 : max(0, min(lane / 4, (rows - 1) / 2));
    from = x + (tile * quarters + quarter) * (kTileRows * S::RowBytes / quarters) + team.part * groups * kGroupBytes +
           (pair * 4 + lane % 4) * 16;
    second = pair * 2 + 1 < rows ? kAbsent : 0;
  }
  __device__ __forceinline__ bool has() const {
    return !One || static_cast<int>(thread_id()) % kWarpSize / 4 * 2 < rows;
  }
  // Until one operand has come: while the others have not either, looks at all of them would take L2's bandwidth.
  __device__ __forceinline__ void await_one() const {
    for (int polls = 0; __any_sync(0xffffffffu, absent(look(from), second)); count_poll(polls)) {
    }
  }
  // Ask for a group; it may not have come yet.
  __device__ __forceinline__ void ask(uint4 (&to)[kGroupOperands], int group) const {
    const unsigned char* first = from + group * kGroupBytes;
#pragma unroll
    for (int i = 0; i < kGroupOperands; ++i) to[i] = has() ? look(first + i * kOperandBytes) : make_uint4(0, 0, 0, 0);
  }
  // The first two.
  __device__ __forceinline__ void ask() {
    ask(operand[0], 0);
    if (!One || (S::Groups >> 4) > 1) ask(operand[1], 1);
  }
  // Until a group has come.
  __device__ __forceinline__ void settle(uint4 (&to)[kGroupOperands], int group) const {
    const unsigned char* first = from + group * kGroupBytes;
    for (int polls = 0;; count_poll(polls)) {
      bool missing = false;
      if constexpr (One) {
#pragma unroll
        for (int i = 0; i < kGroupOperands; ++i) missing |= absent(to[i], second);
      } else {
        missing = any_absent(to, second);
      }
      if (!__any_sync(0xffffffffu, missing)) break;
#pragma unroll
      for (int i = 0; i < kGroupOperands; ++i)
        if (absent(to[i], second)) to[i] = look(first + i * kOperandBytes);
    }
  }
};

// A warp's sums of some units; more than one chain each where there are few, and registers enough.
template <bool Fp8, int P, int Units, bool One>
struct Sums {
  static constexpr int Tiles = Shape<Fp8, P>::Tiles, Chains = Units * Tiles < (One ? 8 : 4) ? 2 : 1;
  float chain[Units][Tiles][Chains][4] = {};

  // Of a unit, the chains added up.
  __device__ __forceinline__ void total(float (&sum)[Tiles][4], int unit) const {
#pragma unroll
    for (int t = 0; t < Tiles; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sum[t][i] = chain[unit][t][0][i] + (Chains > 1 ? chain[unit][t][Chains - 1][i] : 0.0f);
  }
};

// One group of k blocks of one unit; `weights`: this lane's 16 bytes of the first.
template <bool Fp8, int P, int Units, bool One>
__device__ __forceinline__ void multiply_group(Sums<Fp8, P, Units, One>& sums, int unit,
                                               const uint4 (&operand)[kGroupOperands], const unsigned char* weights) {
  using S = Shape<Fp8, P>;
  constexpr int Last = Sums<Fp8, P, Units, One>::Chains - 1;
#pragma unroll
  for (int block = 0; block < S::GroupBlocks; ++block) {
    const uint4* x = operand + block * S::Operands;
#pragma unroll
    for (int t = 0; t < S::Tiles; ++t) {
      const uint4 packed = *reinterpret_cast<const uint4*>(weights + t * S::TileStride + block * kTileBytes);
      float (&even)[4] = sums.chain[unit][t][0];
      float (&odd)[4] = sums.chain[unit][t][Last];
      if constexpr (S::Wide) {
        uint32_t b[8];
        widen(packed, b);
        mma_f16(even, x[0].x, x[0].y, x[0].z, x[0].w, b[0], b[1]);
        mma_f16(odd, x[1].x, x[1].y, x[1].z, x[1].w, b[2], b[3]);
        mma_f16(even, x[2].x, x[2].y, x[2].z, x[2].w, b[4], b[5]);
        mma_f16(odd, x[3].x, x[3].y, x[3].z, x[3].w, b[6], b[7]);
      } else if constexpr (S::E4m3) {
        mma_e4m3(even, x[0].x, x[0].y, x[0].z, x[0].w, packed.x, packed.y);
        mma_e4m3(odd, x[1].x, x[1].y, x[1].z, x[1].w, packed.z, packed.w);
      } else {
        mma_bf16(even, x[0].x, x[0].y, x[0].z, x[0].w, packed.x, packed.y);
        mma_bf16(odd, x[1].x, x[1].y, x[1].z, x[1].w, packed.z, packed.w);
      }
    }
  }
}

// The 16 bytes of a tile and k block that are this lane's. Those of e4m3 lie in the 64-byte swizzle of Hopper's matrix
// unit.
template <bool Fp8, int P>
__device__ __forceinline__ int weight_lane() {
  const int lane = thread_id() % kWarpSize;
  return Shape<Fp8, P>::E4m3 ? lane ^ lane / 8 : lane;
}

constexpr int kTileElements = kTileRows * kTileFeatures;

// A warp's part of the sums of a unit of one tile into shared memory: [part][slot][feature]; `rows` count.
__device__ __forceinline__ void spread(float* sums, int part, const float (&sum)[4], int rows) {
  const int lane = thread_id() % kWarpSize;
  float* target = sums + part * kTileElements + lane * 2;
  if (lane / 4 * 2 < rows) *reinterpret_cast<float2*>(target) = make_float2(sum[0], sum[1]);
  if (lane / 4 * 2 + 1 < rows) *reinterpret_cast<float2*>(target + kTileElements / 2) = make_float2(sum[2], sum[3]);
}

// The whole of an element, of the parts of `tile`'s team.
template <bool One>
__device__ __forceinline__ float gather(const float* sums, const Team<One>& team, int tile, int element) {
  const float* from = sums + (tile << team.shift) * kTileElements + element;
  float part[4] = {};  // independent chains
#pragma unroll
  for (int w = 0; w < (One ? kWarps : kWarps / 2); ++w) {
    if (!One && w == kWarps / 4 && w == team.parts()) break;
    part[w % 4] += from[w * kTileElements];
  }
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// The same of unit `unit` of `units` of two tiles, whose features are met in pairs: [warp][unit][slot][feature][tile].
// Odd units have neighbouring slots exchanged, so that those of two units fall into different banks.
constexpr int kPairElements = 2 * kTileElements;

__device__ __forceinline__ void spread_pairs(float* sums, int units, int unit, const float (&sum)[2][4], int rows) {
  const int warp = thread_id() / kWarpSize, lane = thread_id() % kWarpSize;
  float* target = sums + (warp * units + unit) * kPairElements + ((lane * 4) ^ (unit % 2 * 2 * kTileFeatures));
  if (lane / 4 * 2 < rows) *reinterpret_cast<float4*>(target) = make_float4(sum[0][0], sum[1][0], sum[0][1], sum[1][1]);
  if (lane / 4 * 2 + 1 < rows)
    *reinterpret_cast<float4*>(target + kPairElements / 2) = make_float4(sum[0][2], sum[1][2], sum[0][3], sum[1][3]);
}

// The parts of a tile are neighbours, or (`across`) of every fourth warp.
template <bool One>
__device__ __forceinline__ float2 gather_pair(const float* sums, const Team<One>& team, int tile, int units, int unit,
                                              int element, bool across = false) {
  const int first = across ? tile : tile << team.shift, step = (across ? kWarps / 4 : 1) * units * kPairElements;
  const float* from = sums + (first * units + unit) * kPairElements + ((element * 2) ^ (unit % 2 * 2 * kTileFeatures));
  float2 part[2] = {};  // independent chains
#pragma unroll
  for (int w = 0; w < (One ? kWarps : kWarps / 2); ++w) {
    if (!One && w == kWarps / 4 && w == team.parts()) break;
    const float2 value = *reinterpret_cast<const float2*>(from + w * step);
    part[w % 2].x += value.x, part[w % 2].y += value.y;
  }
  return make_float2(part[0].x + part[1].x, part[0].y + part[1].y);
}

// Two or four neighbouring features of a unit of as many, of several tiles. Of four, half of the lanes take the last
// two first: eight lanes, of four units, then fall into different banks.
template <int Units>
__device__ __forceinline__ void gather_columns(float2 (&sum)[Units], const float* sums, const Team<false>& team,
                                               int tile, int unit, int element) {
  const int first = tile << team.shift, step = Units * kPairElements;
  const float* from = sums + (first * Units + unit) * kPairElements + ((element * 2) ^ (unit % 2 * 2 * kTileFeatures));
  const int swap = Units == 4 ? unit / 2 * 4 : 0;
  float4 part[Units / 2] = {};
#pragma unroll
  for (int w = 0; w < kWarps / 2; ++w) {
    if (w == kWarps / 4 && w == team.parts()) break;
#pragma unroll
    for (int i = 0; i < Units / 2; ++i) {
      const float4 value = *reinterpret_cast<const float4*>(from + w * step + (i * 4 ^ swap));
      part[i].x += value.x, part[i].y += value.y, part[i].z += value.z, part[i].w += value.w;
    }
  }
#pragma unroll
  for (int i = 0; i < Units / 2; ++i) {
    const float4 value = swap != 0 ? part[Units / 2 - 1 - i] : part[i];
    sum[i * 2] = make_float2(value.x, value.y), sum[i * 2 + 1] = make_float2(value.z, value.w);
  }
}

// 1 / x to an ulp, without the branch that exact division takes; x is a scale, far from 0 and infinity.
__device__ __forceinline__ float inverse_of(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y * (2.0f - x * y);
}

// gelu_tanh without the branch of exact division
__device__ __forceinline__ float gelu(float x) {
  const float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return x * (1.0f - __fdividef(1.0f, 1.0f + __expf(2.0f * inner)));
}

__device__ __forceinline__ uint32_t pack_bf16(float first, float second) {
  return static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(first))) |
         static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(second))) << 16;
}
__device__ __forceinline__ uint32_t pack_f16(float first, float second) {
  return static_cast<uint32_t>(__half_as_ushort(__float2half_rn(first))) |
         static_cast<uint32_t>(__half_as_ushort(__float2half_rn(second))) << 16;
}
__device__ __forceinline__ uint32_t pack_e4m3(float first, float second) {
  return __nv_cvt_float2_to_fp8x2(make_float2(first, second), __NV_SATFINITE, __NV_E4M3);
}
__device__ __forceinline__ float2 unpack_f16(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
__device__ __forceinline__ float round_bf16(float value) { return to_float(from_float<__nv_bfloat16>(value)); }
__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// The blocks' parts of the sums of squares of a tile's rows: asked for with the activations, added up behind the
// product. A block's rows are neighbours, so that no two blocks write into one sector. `Paired`: a part is a pair's, of
// whose blocks each has half of a tile's rows.
template <bool One, bool Paired>
struct Squares {
  static constexpr int Parts = Paired ? kBlocks / 2 : kBlocks, Most = One ? 1 : Parts * kTileRows / (4 * 128);
  uint4 piece[Most];  // of four rows and one part each
  const unsigned char* from;
  int rows, parts;  // rows: how many of the four there are; parts: of the team

  static __device__ __forceinline__ int offset_of(int row) {
    return (row / kTileRows * Parts * kTileRows + row % kTileRows) * 4;
  }
  static __device__ __forceinline__ unsigned part() { return block_id() / (kBlocks / Parts); }

  // By the warps of a tile's team.
  __device__ __forceinline__ void ask(const unsigned char* squares, const Team<One>& team, int all_rows) {
    const int index = (team.part * kWarpSize) + thread_id() % kWarpSize;
    parts = team.parts();
    from = squares + team.tile * (Parts * kTileRows * 4) + index * 16;
    rows = all_rows - team.tile * kTileRows - index % 4 * 4;
#pragma unroll
    for (int i = 0; i < Most; ++i)
      piece[i] = rows > 0 && (Paired || i * parts < kWarps) ? look(from + offset(i)) : make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ int offset(int i) const { return i * parts * kWarpSize * 16; }
  __device__ __forceinline__ bool missing(const uint4& part) const {
    return (rows > 0 && part.x == kAbsent) || (rows > 1 && part.y == kAbsent) || (rows > 2 && part.z == kAbsent) ||
           (rows > 3 && part.w == kAbsent);
  }
  // Ask again for what has not come; whether anything had not.
  __device__ __forceinline__ bool refresh() {
    bool any = false;
#pragma unroll
    for (int i = 0; i < Most; ++i) {
      if (!missing(piece[i])) continue;
      any = true;
      piece[i] = look(from + offset(i));
    }
    return any;
  }
  // This warp's sum of row settled_row(); four lanes have the same.
  __device__ __forceinline__ float settle() {
    for (int polls = 0; __any_sync(0xffffffffu, refresh()); count_poll(polls)) {
    }
    const bool upper = thread_id() & 16, odd = thread_id() & 8;
    float x = 0.0f, y = 0.0f, z = 0.0f, w = 0.0f;
#pragma unroll
    for (int i = 0; i < Most; ++i) {
      x += __uint_as_float(piece[i].x), y += __uint_as_float(piece[i].y);
      z += __uint_as_float(piece[i].z), w += __uint_as_float(piece[i].w);
    }
    const float first = (upper ? z : x) + __shfl_xor_sync(0xffffffffu, upper ? x : z, 16);
    const float second = (upper ? w : y) + __shfl_xor_sync(0xffffffffu, upper ? y : w, 16);
    const float sum = (odd ? second : first) + __shfl_xor_sync(0xffffffffu, odd ? first : second, 8);
    return sum + __shfl_xor_sync(0xffffffffu, sum, 4);
  }
  static __device__ __forceinline__ int settled_row() {
    const int lane = thread_id() % kWarpSize;
    return lane % 4 * 4 + lane / 16 * 2 + lane / 8 % 2;
  }
};

}  // namespace expert
}  // namespace flashrt
