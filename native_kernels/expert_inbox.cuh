// The second half of the persistent expert's attention: a block's part of P V, of which it sends 16 columns to each
// block of the head, and the merge of its own 16 columns of what the others send.
#pragma once

#include "expert_attend.cuh"

namespace flashrt {
namespace expert {

// What the blocks of a head send each other: by receiving block its 16 columns (row, sender) as fp16, normalised by the
// sender's own sum, and once for all the logarithm of that sum (row, sender). A row is contiguous: a warp reads it at
// once.
template <bool One>
struct Inbox {
  unsigned char *values, *sums;  // of this head
  int64_t other;
  int rows, rank;  // rows: padded

  __device__ __forceinline__ unsigned char* values_of(int receiver, int row, int sender) const {
    return values + ((receiver * (One ? kTileRows : rows) + row) * kSplits + sender) * kSplitColumns * 2;
  }
  __device__ __forceinline__ unsigned char* sums_of(int row, int sender) const {
    return sums + (row * kSplits + sender) * 4;
  }
};

// Sixteen keys of P V.
__device__ __forceinline__ void add_values(float (&values)[2][4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  mma_bf16(values[0], a[0], a[1], a[2], a[3], b[0], b[1]);
  mma_bf16(values[1], a[0], a[1], a[2], a[3], b[2], b[3]);
}

// A tile's 16 columns of a receiver. An even lane sends four columns of the first half, its odd neighbour four of the
// second.
template <bool One>
__device__ __forceinline__ void send_columns(const float (&values)[2][4], const float (&factor)[2],
                                             const Inbox<One>& inbox, int receiver, int first, int rows) {
  const int lane = thread_id() % kWarpSize;
  const bool odd = lane % 2 != 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + lane / 4 + half * 8;
    const uint32_t low = pack_f16(values[0][half * 2] * factor[half], values[0][half * 2 + 1] * factor[half]);
    const uint32_t high = pack_f16(values[1][half * 2] * factor[half], values[1][half * 2 + 1] * factor[half]);
    const uint32_t theirs = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
    if (row < rows)
      publish(inbox.values_of(receiver, row, inbox.rank) + odd * 16 + lane % 4 / 2 * 8, inbox.other,
              odd ? make_uint2(theirs, high) : make_uint2(low, theirs));
  }
}

// P V of this warp's tile, the columns of its part: 16 columns each are sent to the block that merges them. The sums of
// a row's probabilities are one more product, with ones.
template <bool One>
__device__ __forceinline__ void send_values(unsigned char* shared, const Layout& layout, const Share& share,
                                            const Inbox<One>& inbox, const Team<One>& team, int rows) {
  constexpr int kSteps = 4;  // of 16 keys, at once
  constexpr uint32_t kOnes = 0x3f803f80;
  const int lane = thread_id() % kWarpSize, padded_keys = share.padded_keys, first = team.tile * kTileRows;
  if (!One && first >= rows) return;
  const unsigned char* p_row =
      shared + layout.probability + (first + lane % 16) * layout.probability_stride() * 2 + lane / 16 * 16;
  uint32_t a[kSteps][4];
  float sums[4] = {};
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    load_matrix(a[i], p_row + i * 32);
#pragma unroll
    for (int j = 0; j < 4; ++j) a[i][j] = i * 16 < padded_keys ? a[i][j] : 0;  // times the first keys
    mma_bf16(sums, a[i][0], a[i][1], a[i][2], a[i][3], kOnes, kOnes);
  }
#pragma unroll 1
  for (int key = kSteps * 16; key < padded_keys; key += 16) {
    uint32_t more[4];
    load_matrix(more, p_row + key * 2);
    mma_bf16(sums, more[0], more[1], more[2], more[3], kOnes, kOnes);
  }
  const float factor[2] = {inverse_of(sums[0]), inverse_of(sums[2])};
  if (team.part == team.parts() - 1 && lane % 4 == 0) {
    const float* maximum = reinterpret_cast<const float*>(shared + layout.row_maximum);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + lane / 4 + half * 8;
      if (row < rows)
        publish(inbox.sums_of(row, inbox.rank), inbox.other, __float_as_uint(maximum[row] + __logf(sums[half * 2])));
    }
  }
  const int receivers = kSplits >> team.shift;
#pragma unroll(One ? 1 : 2)
  for (int i = 0; i < receivers; ++i) {
    const int receiver = team.part * receivers + i;
    const unsigned char* v_row =
        shared + layout.v + lane % 16 * kValueStride + (receiver * kSplitColumns + lane / 16 * 8) * 2;
    float values[2][4] = {};
    uint32_t b[kSteps][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      load_matrix_transposed(b[step], v_row + (step * 16 < padded_keys ? step * 16 : 0) * kValueStride);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) add_values(values, a[step], b[step]);
#pragma unroll 1
    for (int key = kSteps * 16; key < padded_keys; key += 16) {
      uint32_t more[4];
      load_matrix_transposed(b[0], v_row + key * kValueStride);
      load_matrix(more, p_row + key * 2);
      add_values(values, more, b[0]);
    }
    send_columns(values, factor, inbox, receiver, first, rows);
  }
}

// What a lane merges of a row: four columns from the senders `lane / 4` and eight further.
struct Parts {
  uint2 part[2];
  uint32_t sum[2];

  template <bool One>
  static __device__ __forceinline__ const unsigned char* values(const Inbox<One>& inbox, int row, int i) {
    const int lane = thread_id() % kWarpSize;
    return inbox.values_of(inbox.rank, row, lane / 4 + 8 * i) + lane % 4 * 8;
  }
  template <bool One>
  static __device__ __forceinline__ const unsigned char* sums(const Inbox<One>& inbox, int row, int i) {
    return inbox.sums_of(row, thread_id() % kWarpSize / 4 + 8 * i);
  }
  template <bool One>
  __device__ __forceinline__ void ask(const Inbox<One>& inbox, int active, int row) {
    const int sender = thread_id() % kWarpSize / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool has = sender + 8 * i < active;
      part[i] = has ? look_pair(values(inbox, row, i)) : make_uint2(0, 0);
      sum[i] = has ? look_word(sums(inbox, row, i)) : 0xff800000u;  // -infinity
    }
  }
  template <bool One>
  __device__ __forceinline__ void settle(const Inbox<One>& inbox, int row) {
    for (int polls = 0;; count_poll(polls)) {
      bool missing = false;
#pragma unroll
      for (int i = 0; i < 2; ++i) missing |= absent(part[i]) | absent(sum[i]);
      if (!__any_sync(0xffffffffu, missing)) break;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (absent(part[i])) part[i] = look_pair(values(inbox, row, i));
        if (absent(sum[i])) sum[i] = look_word(sums(inbox, row, i));
      }
    }
  }
};

// A row of this block's 16 columns from what the blocks of the head sent.
template <bool Fp8, bool One>
__device__ __forceinline__ void merge(const Parts& parts, const Inbox<One>& inbox, int head, int row,
                                      unsigned char* out, int64_t other, float scale) {
  const int lane = thread_id() % kWarpSize, split = lane / 4;
  const uint2(&part)[2] = parts.part;
  const uint32_t (&sum)[2] = parts.sum;
  float maximum = fmaxf(__uint_as_float(sum[0]), __uint_as_float(sum[1]));
#pragma unroll
  for (int offset = 4; offset < kWarpSize; offset *= 2)
    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, offset));
  float value[4] = {}, total = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float weight = __expf(__uint_as_float(sum[i]) - maximum);
    const float2 first = unpack_f16(part[i].x), second = unpack_f16(part[i].y);
    total += weight;
    value[0] += weight * first.x;
    value[1] += weight * first.y;
    value[2] += weight * second.x;
    value[3] += weight * second.y;
  }
#pragma unroll
  for (int offset = 4; offset < kWarpSize; offset *= 2) {
    total += __shfl_xor_sync(0xffffffffu, total, offset);
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] += __shfl_xor_sync(0xffffffffu, value[i], offset);
  }
  if (split != 0) return;
  const float inverse = inverse_of(total);
#pragma unroll
  for (int i = 0; i < 4; ++i) value[i] = round_bf16(value[i] * inverse);
  const int column = head * kHeadDim + inbox.rank * kSplitColumns + lane * 4;
  unsigned char* target = out + activation_offset<Fp8, kOut>(row, column * (Fp8 ? 1 : 2));
  if constexpr (Fp8) {
    const float inverse_scale = inverse_of(scale);
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) word |= static_cast<uint32_t>(to_e4m3(value[i] * inverse_scale)) << (8 * i);
    publish(target, other, word);
  } else {
    publish(target, other, pack_bf16(value[0], value[1]));
    publish(out + activation_offset<Fp8, kOut>(row, (column + 2) * 2), other, pack_bf16(value[2], value[3]));
  }
}

}  // namespace expert
}  // namespace flashrt
