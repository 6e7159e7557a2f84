// The persistent expert's attention where there are more than two tiles of rows and the parts of it are sent as e4m3: a
// team of four warps has a tile.
#pragma once

#include "expert_narrow_letters.cuh"

namespace flashrt {
namespace expert {

constexpr float kBinaryScale = kScoreScale * 1.4426950408889634f;  // exp(score) = 2^(q k^T kBinaryScale)

// The actions' keys and values that are this block's: the last warps put one row each behind those of the prefix, for
// all.
__device__ __forceinline__ void fetch_own_rows(const unsigned char* kv, const Share& share, unsigned char* keys,
                                               unsigned char* values, uint64_t* come) {
  const int index = static_cast<int>(thread_id()) / kWarpSize - (kWarps - kOwnRows), lane = thread_id() % kWarpSize;
  if (index < 0) return;
  if (index < share.keys - share.prefix_keys) {
    const unsigned char* from = kv + own_row(index) * 2 * kHeadRowBytes + lane * 16;
    uint4 key = look(from), value = look(from + kHeadRowBytes);
    for (int polls = 0;; count_poll(polls)) {
      const bool no_key = absent(key), no_value = absent(value);
      if (!__any_sync(0xffffffffu, no_key || no_value)) break;
      if (no_key) key = look(from);
      if (no_value) value = look(from + kHeadRowBytes);
    }
    const int row = share.prefix_keys + index;
    *reinterpret_cast<uint4*>(keys + row * kKeyStride + lane * 16) = key;
    *reinterpret_cast<uint4*>(values + row * kValueStride + lane * 16) = value;
    __syncwarp();
  }
  if (lane == 0) barrier_arrive(come);
}

// What a warp reads of the queries of its tile: its part of the dot product, as the tensor cores read them. Eight bytes
// are two columns of a row and of the next, sent as a whole with a mark.
struct MarkedQueries {
  static constexpr int Operands = 4;
  uint4 operand[Operands];
  const unsigned char* from;

  // q: of this head. Lanes of rows past the end read the last pair again, warps without rows nothing.
  __device__ __forceinline__ void ask(const unsigned char* q, const Team<false>& team, int rows) {
    const int lane = thread_id() % kWarpSize, pair = min(lane / 4, (rows - 1) / 2);
    from =
        q + team.tile * kTileRows * kHeadRowBytes + team.part * Operands * kOperandBytes + (pair * 4 + lane % 4) * 16;
#pragma unroll
    for (int i = 0; i < Operands; ++i)
      operand[i] = rows > 0 ? look_twice(from + i * kOperandBytes) : make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ void settle(uint32_t mark) {
    for (int polls = 0;; count_poll(polls)) {
      uint32_t wrong = 0;
#pragma unroll
      for (int i = 0; i < Operands; ++i) wrong |= unmarked(operand[i], mark);
      if (!__any_sync(0xffffffffu, (wrong & 1) != 0)) break;
#pragma unroll
      for (int i = 0; i < Operands; ++i)
        if ((unmarked(operand[i], mark) & 1) != 0) operand[i] = look_twice(from + i * kOperandBytes);
    }
  }
};

// Parts of q k^T of a tile. `place`: of the tile among those whose scores are taken at once. Scores past the keys are
// not looked at.
__device__ __forceinline__ void scores(unsigned char* shared, const Layout& layout, const Share& share,
                                       const MarkedQueries& queries, const Team<false>& team, int place) {
  const int lane = thread_id() % kWarpSize, stride = layout.score_stride(), keys = share.keys;
  const unsigned char* k_row = shared + layout.k + team.part * 2 * kBlockBytes + lane / 4 * kKeyStride + lane % 4 * 16;
  float* target = reinterpret_cast<float*>(shared + layout.score) +
                  ((place * 4 + team.part) * kTileRows + lane / 4 * 2) * stride + lane % 4 * 2;
  // of 8 keys, at once; the last are read up to 16 rows past a block's keys, where its values lie
  constexpr int kGroups = 3;
#pragma unroll 1
  for (int first = 0; first < keys; first += kGroups * 8) {
    uint4 b[kGroups][2];
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
#pragma unroll
      for (int block = 0; block < 2; ++block)
        b[i][block] = *reinterpret_cast<const uint4*>(k_row + (first + i * 8) * kKeyStride + block * kBlockBytes);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      float sum[4] = {};
      multiply_keys(sum, queries.operand, b[i]);
      const int key = first + i * 8;
      if (key >= keys) break;
      *reinterpret_cast<float2*>(target + key) = make_float2(sum[0], sum[1]);
      *reinterpret_cast<float2*>(target + stride + key) = make_float2(sum[2], sum[3]);
    }
  }
}

// The probabilities of a team's tile as bf16 by the inverse of the scale of letters, zeros past the last key; and the
// logarithms of their sums, which go to all. `place`: as of scores. A warp has four rows, eight
// lanes each, four keys a lane at once.
__device__ __forceinline__ void softmax(unsigned char* shared, const Layout& layout, const Share& share,
                                        const Team<false>& team, const NarrowLetters& letters, int place, int rows) {
  constexpr int kLanes = kScoreLanes, kSteps = kKeySteps;
  const int lane = thread_id() % kWarpSize, slot = team.part * 4 + lane / kLanes, own = lane % kLanes * 4;
  const int row = team.tile * kTileRows + slot, stride = layout.score_stride(), keys = share.keys;
  const float* score =
      reinterpret_cast<const float*>(shared + layout.score) + (place * 4 * kTileRows + slot) * stride + own;
  float value[kSteps][4], maximum = -INFINITY;
  read_scores<4>(value, maximum, score, own, stride, keys, team, 1.0f);
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2)
    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, offset));
  const float highest = maximum * kBinaryScale;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    if (i * kStepKeys >= keys) break;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      value[i][j] = power_of_two(fmaf(value[i][j], kBinaryScale, -highest));
      total += value[i][j];
    }
  }
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
  if (own == 0 && row < rows) letters.send_sum(row, highest + binary_logarithm(total));
  const float factor = inverse_of(total) * inverse_of(letters.scale());
  unsigned char* probability = shared + layout.probability + (row * layout.probability_stride() + own) * 2;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    if (i * kStepKeys + own >= share.padded_keys) break;
    *reinterpret_cast<uint2*>(probability + i * kStepKeys * 2) = make_uint2(
        pack_bf16(value[i][0] * factor, value[i][1] * factor), pack_bf16(value[i][2] * factor, value[i][3] * factor));
  }
}

// P V of this warp's tile, the columns of its part, which it sends.
__device__ __forceinline__ void send_values(unsigned char* shared, const Layout& layout, const Share& share,
                                            const NarrowLetters& letters, const Team<false>& team, int rows) {
  constexpr int kSteps = 3, kReceivers = kSplits / 4;  // steps of 16 keys, at once
  const int lane = thread_id() % kWarpSize, padded_keys = share.padded_keys;
  const unsigned char* p_row = shared + layout.probability +
                               (team.tile * kTileRows + Letters::row(lane % 16)) * layout.probability_stride() * 2 +
                               lane / 16 * 16;
  uint32_t a[kSteps][4] = {};
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    if (i > 1 && i * 16 >= padded_keys) break;
    load_matrix(a[i], p_row + i * 32);
#pragma unroll
    for (int j = 0; j < 4; ++j) a[i][j] = i * 16 < padded_keys ? a[i][j] : 0;  // times the first keys
  }
#pragma unroll
  for (int i = 0; i < kReceivers; ++i) {
    const int receiver = team.part * kReceivers + i;
    const unsigned char* v_row =
        shared + layout.v + lane % 16 * kValueStride + (receiver * kSplitColumns + lane / 16 * 8) * 2;
    float values[2][4] = {};
    multiply_values<false>(values, a, v_row, p_row, padded_keys);
    letters.send(values, receiver, team.tile, rows);
  }
}

}  // namespace expert
}  // namespace flashrt
