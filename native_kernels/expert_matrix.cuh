// The persistent expert's products with e4m3 weights on Hopper's matrix unit, where there are more than two tiles of
// rows: a warpgroup takes a quarter of a block's k of all tiles, a warp a tile. It multiplies e4m3 as it is; the
// instruction for one warp widens both operands.
//
// The normed rows, which all other kernels multiply in 16 bits, are e4m3 here too: with so many rows what bounds their
// products is the way of the activations from L2 and the unit's rate, and both are half.
//
// Out and down are shared by pairs of blocks: a block takes half of k for the units of both blocks, so that it reads
// half of the activations. Of each tile's rows it finishes half, for both blocks' columns, and sends the other the sums
// of the other half through distributed shared memory.
#pragma once

#include "expert_products.cuh"
#include "wgmma.cuh"

namespace flashrt {
namespace expert {

constexpr bool kHasMatrixUnit = FLASHRT_DEVICE_HAS_WGMMA;

// Products that the matrix unit takes.
template <bool Fp8, int P, bool Paired>
constexpr bool kOnMatrixUnit = kHasMatrixUnit && Paired && Shape<Fp8, P>::E4m3;

// Products that may be a pair's. In the kernel of 17 to 32 rows none is, but without the branch the compiler's code for
// that kernel measured 4 % slower.
template <bool Fp8, int P, bool One>
constexpr bool kMayPair = kHasMatrixUnit && !One && Shape<Fp8, P>::E4m3 && !Shape<Fp8, P>::Wide;

// Byte `byte` of row `row` of the activations: an operand is 32 bytes of k, of which a lane has the four from 4 i on
// and those 16 further.
__device__ __forceinline__ int matrix_offset(int row, int row_bytes, int byte) {
  return row / kTileRows * kTileRows * row_bytes + byte / 32 * kOperandBytes +
         (row % kTileRows / 2 * 4 + byte % 16 / 4) * 16 + byte % 32 / 16 * 8 + row % 2 * 4 + byte % 4;
}

// Of tiles of 8 rows of 64 bytes of k in the 64-byte swizzle, `Stride` bytes apart.
template <int Stride>
__device__ __forceinline__ uint64_t tiles_descriptor(const unsigned char* first) {
  return uint64_t(2) << 62 | uint64_t(Stride >> 4) << 32 | (shared_address(first) & 0x3ffff) >> 4;
}

// This warp's tile and quarter of k.
__device__ __forceinline__ Team<false> matrix_team() {
  const int warp = thread_id() / kWarpSize;
  return {2, warp % 4, warp / 4};
}

// To the compiler a new value, made here by all threads: it would wait for each product of registers that were written
// where threads go different ways, as in a loop that polls.
__device__ __forceinline__ void renew(uint4& v) { asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)); }

// Two groups of k blocks of `Parts` times so many tiles of weights; the operands may be overwritten behind it. The unit
// takes as long for 8 columns as for 16, so a part should be as many tiles as lie `Stride` bytes apart.
template <int Stride, int Parts, int Sums>
__device__ __forceinline__ void multiply_groups(float (&sum)[Parts][Sums], uint4 (&operand)[2][kGroupOperands],
                                                const unsigned char* (&weights)[Parts]) {
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 2 * kGroupOperands; ++i) renew(operand[i / 4][i % 4]);
#pragma unroll
  for (int part = 0; part < Parts; ++part) wgmma::settle(sum[part]);
  wgmma::fence();
#pragma unroll
  for (int i = 0; i < 2 * kGroupOperands; ++i)
#pragma unroll
    for (int part = 0; part < Parts; ++part)
      wgmma::multiply_e4m3(sum[part], operand[i / 4][i % 4],
                           tiles_descriptor<Stride>(weights[part]) + ((i / 2 * kTileBytes + i % 2 * 32) >> 4));
  wgmma::commit();
  wgmma::wait();
#pragma unroll
  for (int part = 0; part < Parts; ++part) wgmma::settle(sum[part]);
}

// `weights`: this warp's part of k of both units. By whole warpgroups, whether their tiles have rows or not.
template <bool Fp8, int P, int Parts, int Sums>
__device__ __forceinline__ void multiply_64(float (&sum)[Parts][Sums], Activations<Fp8, P, false>& a,
                                            const unsigned char* (&weights)[Parts]) {
  constexpr int kStep = 2 * Shape<Fp8, P>::GroupBlocks * kTileBytes;
  const bool any = a.rows > 0;
#pragma unroll 1
  for (int group = 0; group < a.groups; group += 2) {
    if (any) a.settle(a.operand[0], group), a.settle(a.operand[1], group + 1);
    multiply_groups<kChunkBytes / 2>(sum, a.operand, weights);
    if (any && group + 2 < a.groups) a.ask(a.operand[0], group + 2), a.ask(a.operand[1], group + 3);
#pragma unroll
    for (int part = 0; part < Parts; ++part) weights[part] += kStep;
  }
}

// A warp's sums of half of its tile's rows and a pair's 16 columns: 32 bytes of 16 lanes each.
constexpr int kSentBytes = kWarpSize * 16;
constexpr int kPairedBigBytes = 3 * kWarps * 2 * kSentBytes;  // sums of gate-up that meet

// Where of it lie the sums of eight columns of lane `lane` of the sixteen; in turn, so that a row's fall into different
// banks.
__device__ __forceinline__ int sent_offset(int eight, int lane) {
  return eight * (kSentBytes / 2) + (lane ^ eight * 4) * 16;
}

// This thread's element of a pair's 16 columns, of the parts of `sums`.
__device__ __forceinline__ float gather_pair_row(const unsigned char* sums, int tile) {
  const int column = thread_id() % (2 * kTileFeatures), row = thread_id() % kTileElements / (2 * kTileFeatures);
  const unsigned char* from = sums + tile * 4 * kSentBytes +
                              sent_offset(column / kTileFeatures, row / 2 * 4 + column % kTileFeatures / 2) +
                              row % 2 * 8 + column % 2 * 4;
  float part[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) part[i] = *reinterpret_cast<const float*>(from + i * kSentBytes);
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// The threads of a warpgroup; the barriers 2 to 5.
__device__ __forceinline__ void warpgroup_sync() {
  asm volatile("bar.sync %0, 128;" ::"r"(2 + thread_id() / (4 * kWarpSize)) : "memory");
}

}  // namespace expert
}  // namespace flashrt
