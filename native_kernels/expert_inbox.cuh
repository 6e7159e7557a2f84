// What the blocks of a head send each other where there is one tile of rows, and the merge of it.
#pragma once

#include "expert_attend.cuh"

namespace flashrt {
namespace expert {

// By receiving block its 16 columns (row, sender) as fp16, normalised by the sender's own sum, and once for all the
// logarithm of that sum (row, sender). A row is contiguous: a warp reads it at once.
struct Inbox {
  unsigned char *values, *sums;  // of this head
  int64_t other;
  int rank;

  __device__ __forceinline__ unsigned char* values_of(int receiver, int row, int sender) const {
    return values + ((receiver * kTileRows + row) * kSplits + sender) * kSplitColumns * 2;
  }
  __device__ __forceinline__ unsigned char* sums_of(int row, int sender) const {
    return sums + (row * kSplits + sender) * 4;
  }

  // The row that is row `slot` of P V.
  static __device__ __forceinline__ int row(int slot) { return slot; }
  // 16 columns of a receiver. An even lane sends four columns of the first half, its odd neighbour four of the second.
  __device__ __forceinline__ void send(const float (&values)[2][4], const float (&factor)[2], int receiver, int,
                                       int rows) const {
    const int lane = thread_id() % kWarpSize;
    const bool odd = lane % 2 != 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + half * 8;
      const uint32_t low = pack_f16(values[0][half * 2] * factor[half], values[0][half * 2 + 1] * factor[half]);
      const uint32_t high = pack_f16(values[1][half * 2] * factor[half], values[1][half * 2 + 1] * factor[half]);
      const uint32_t theirs = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
      if (row < rows)
        publish(values_of(receiver, row, rank) + odd * 16 + lane % 4 / 2 * 8, other,
                odd ? make_uint2(theirs, high) : make_uint2(low, theirs));
    }
  }
  __device__ __forceinline__ void send_sum(int row, float value) const {
    publish(sums_of(row, rank), other, __float_as_uint(value));
  }
};

// What a lane merges of a row: four columns from the senders `lane / 4` and eight further.
struct Parts {
  uint2 part[2];
  uint32_t sum[2];

  static __device__ __forceinline__ const unsigned char* values(const Inbox& inbox, int row, int i) {
    const int lane = thread_id() % kWarpSize;
    return inbox.values_of(inbox.rank, row, lane / 4 + 8 * i) + lane % 4 * 8;
  }
  static __device__ __forceinline__ const unsigned char* sums(const Inbox& inbox, int row, int i) {
    return inbox.sums_of(row, thread_id() % kWarpSize / 4 + 8 * i);
  }
  __device__ __forceinline__ void ask(const Inbox& inbox, int active, int row) {
    const int sender = thread_id() % kWarpSize / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool has = sender + 8 * i < active;
      part[i] = has ? look_pair(values(inbox, row, i)) : make_uint2(0, 0);
      sum[i] = has ? look_word(sums(inbox, row, i)) : 0xff800000u;  // -infinity
    }
  }
  __device__ __forceinline__ void settle(const Inbox& inbox, int row) {
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
template <bool Fp8>
__device__ __forceinline__ void merge(const Parts& parts, const Inbox& inbox, int head, int row, unsigned char* out,
                                      int64_t other, float scale) {
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
