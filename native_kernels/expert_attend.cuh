// The persistent expert's attention: 16 blocks a head, each with its share of the keys. A block takes the scores of its
// keys, their softmax and its part of P V, sends 16 columns of that to each block of the head, and merges its own 16
// columns of what the others send.
#pragma once

#include "expert_products.cuh"

namespace flashrt {
namespace expert {

constexpr int kHeadVectors = kHeadRowBytes / 16;
constexpr int kSlices = kHeadRowBytes / kBlockBytes;  // of a dot product, for different warps
constexpr int kLaneKeys = 4;                          // keys of a block a lane of the softmax holds: at most 128 in all
static_assert(kWarps == kTileRows && kWarps == 2 * kSlices && kHeadVectors == kWarpSize);

// Where a block's operands lie in dynamic shared memory, in bytes. All but K and V lie where the products add up: every
// phase that writes there is behind a barrier behind the last read.
struct Layout {
  int block_keys;  // a multiple of 16
  int k, v, score, probability, row_maximum;

  __host__ static int keys_of_block(int capacity) { return ((capacity + kSplits - 1) / kSplits + 15) / 16 * 16; }
  __host__ __device__ int score_stride() const { return block_keys + 4; }        // floats
  __host__ __device__ int probability_stride() const { return block_keys + 8; }  // bf16
};

// The keys [first, first + keys) of this block, of which the first `prefix_keys` belong to the prefix; the first
// `active` blocks of a head have keys.
struct Share {
  int prefix, first, keys, padded_keys, prefix_keys, active;

  Share() = default;
  __device__ Share(int rank, int prefix_length, int rows) {
    prefix = prefix_length;
    const int total = prefix + rows, share = ((total + kSplits - 1) / kSplits + 15) / 16 * 16;
    active = (total + share - 1) / share;
    first = rank * share;
    keys = max(0, min(share, total - first));
    padded_keys = (keys + 15) / 16 * 16;
    prefix_keys = max(0, min(keys, prefix - first));
  }
};

// Rows of V past the last key: 0 * garbage must stay 0. They are alike in all layers.
__device__ __forceinline__ void blank_values(unsigned char* shared, const Layout& layout, const Share& share) {
  for (int row = share.keys + thread_id() / kHeadVectors; row < share.padded_keys; row += kWarps)
    *reinterpret_cast<uint4*>(shared + layout.v + row * kValueStride + thread_id() % kHeadVectors * 16) =
        make_uint4(0, 0, 0, 0);
}

// The values of the actions themselves, as far as they are this block's: a warp a row.
struct SuffixValues {
  const unsigned char* from;
  uint4 value;  // of the first row, asked for ahead
  int row, keys;

  __device__ __forceinline__ void ask(const Share& share, const unsigned char* kv) {
    row = share.prefix_keys + thread_id() / kHeadVectors, keys = share.keys;
    from = kv + ((share.first + row - share.prefix) * 2 + 1) * kHeadRowBytes + thread_id() % kHeadVectors * 16;
    value = row < keys ? look(from) : make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ void settle(unsigned char* values) {
    for (; row < keys; row += kWarps, from += kWarps * 2 * kHeadRowBytes) {
      for (int polls = 0; absent(value); count_poll(polls)) value = look(from);
      *reinterpret_cast<uint4*>(values + row * kValueStride + thread_id() % kHeadVectors * 16) = value;
      if (row + kWarps < keys) value = look(from + kWarps * 2 * kHeadRowBytes);
    }
  }
};

// Parts of q k^T of one tile of queries: a warp takes 64 bytes of the dot product and every other group of 8 keys. Its
// queries (`q`: of this head and tile) come as the tensor cores read them, and so do the actions' own keys.
__device__ __forceinline__ void scores(unsigned char* shared, const Layout& layout, const Share& share,
                                       const unsigned char* q, const unsigned char* kv, int rows) {
  const int slice = thread_id() / kWarpSize % kSlices, lane = thread_id() % kWarpSize;
  const int stride = layout.score_stride(), lane_bytes = slice * kBlockBytes + lane % 4 * 16;
  const int keys = share.keys, prefix_keys = share.prefix_keys;
  const unsigned char* from = q + slice * 2 * kOperandBytes + lane * 16;
  const bool has = lane / 4 * 2 < rows;
  const uint32_t second = lane / 4 * 2 + 1 < rows ? kAbsent : 0;
  uint4 a[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) a[i] = has ? look(from + i * kOperandBytes) : make_uint4(0, 0, 0, 0);
  const unsigned char* k_row = shared + layout.k + lane_bytes;
  const unsigned char* suffix = kv + (share.first - share.prefix) * 2 * kHeadRowBytes + lane_bytes;
  float* target =
      reinterpret_cast<float*>(shared + layout.score) + (slice * kTileRows + lane / 4 * 2) * stride + lane % 4 * 2;
  constexpr int kGroups = 3;  // at once
  for (int first = thread_id() / (kSlices * kWarpSize) * 8; first < keys; first += kGroups * 16) {
    uint4 b[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int key = first + i * 16 + lane / 4;
      b[i] = make_uint4(0, 0, 0, 0);
      if (key < prefix_keys) {
        b[i] = *reinterpret_cast<const uint4*>(k_row + key * kKeyStride);
      } else if (key < keys) {
        b[i] = look(suffix + key * 2 * kHeadRowBytes);
      }
    }
    __syncwarp();
    for (int polls = 0; __any_sync(0xffffffffu, absent(a[0], second) || absent(a[1], second)); count_poll(polls)) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (absent(a[i], second)) a[i] = look(from + i * kOperandBytes);
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int key = first + i * 16 + lane / 4;
      if (key < prefix_keys || key >= keys) continue;
      for (int polls = 0; absent(b[i]); count_poll(polls)) b[i] = look(suffix + key * 2 * kHeadRowBytes);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      float sum[4] = {}, odd[4] = {};
      mma_bf16(sum, a[0].x, a[0].y, a[0].z, a[0].w, b[i].x, b[i].y);
      mma_bf16(odd, a[1].x, a[1].y, a[1].z, a[1].w, b[i].z, b[i].w);
      const int key = first + i * 16;
      if (key >= keys) break;
      *reinterpret_cast<float2*>(target + key) = make_float2(sum[0] + odd[0], sum[1] + odd[1]);
      *reinterpret_cast<float2*>(target + stride + key) = make_float2(sum[2] + odd[2], sum[3] + odd[3]);
    }
  }
}

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

// The same order as of floats; NaN is more than anything or less.
__device__ __forceinline__ int ordered(float value) {
  const int bits = __float_as_int(value);
  return bits ^ (bits >> 31 & 0x7fffffff);
}

// exp(score - maximum) of this warp's row of a tile as bf16, zeros past the last key, and the maximum.
__device__ __forceinline__ void softmax(unsigned char* shared, const Layout& layout, const Share& share, int tile,
                                        int rows) {
  const int warp = thread_id() / kWarpSize, lane = thread_id() % kWarpSize, row = tile * kTileRows + warp;
  const int stride = layout.score_stride();
  constexpr float kScale = 0.0625f;  // 1 / sqrt(256)
  if (row >= rows) return;           // its probabilities are garbage that stays in its row
  const float* score = reinterpret_cast<const float*>(shared + layout.score) + warp * stride + lane;
  const int keys = share.keys, padded_keys = share.padded_keys;
  float value[kLaneKeys] = {}, maximum = -INFINITY;
#pragma unroll
  for (int i = 0; i < kLaneKeys; ++i) {
    if (i * kWarpSize >= keys) break;
    float part[kSlices];
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) part[slice] = score[slice * kTileRows * stride + i * kWarpSize];
    const float sum =
        ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));  // NaN past the keys
    value[i] = i * kWarpSize + lane < keys ? sum * kScale : -INFINITY;
    maximum = fmaxf(maximum, value[i]);
  }
  const int highest = __reduce_max_sync(0xffffffffu, ordered(maximum));
  maximum = __int_as_float(highest ^ (highest >> 31 & 0x7fffffff));
  __nv_bfloat16* probability =
      reinterpret_cast<__nv_bfloat16*>(shared + layout.probability) + row * layout.probability_stride() + lane;
#pragma unroll
  for (int i = 0; i < kLaneKeys; ++i) {
    if (i * kWarpSize >= keys) break;
    if (i * kWarpSize + lane < padded_keys)
      probability[i * kWarpSize] = from_float<__nv_bfloat16>(__expf(value[i] - maximum));
  }
  if (lane == 0) reinterpret_cast<float*>(shared + layout.row_maximum)[row] = maximum;
}

// Sixteen keys of P V, and of P times ones.
__device__ __forceinline__ void add_values(float (&values)[2][4], float (&sums)[4], const uint32_t (&a)[4],
                                           const uint32_t (&b)[4]) {
  constexpr uint32_t kOnes = 0x3f803f80;
  mma_bf16(values[0], a[0], a[1], a[2], a[3], b[0], b[1]);
  mma_bf16(values[1], a[0], a[1], a[2], a[3], b[2], b[3]);
  mma_bf16(sums, a[0], a[1], a[2], a[3], kOnes, kOnes);
}

// P V for this warp's 16 columns and all tiles, sent to the block that merges them. The sums of a row's probabilities
// are one more product, with ones.
template <bool One>
__device__ __forceinline__ void send_values(unsigned char* shared, const Layout& layout, const Share& share,
                                            const Inbox<One>& inbox, int rows) {
  constexpr int kSteps = 3;  // of 16 keys, at once
  const int warp = thread_id() / kWarpSize, lane = thread_id() % kWarpSize;
  const int probability_bytes = layout.probability_stride() * 2, padded_keys = share.padded_keys;
  const unsigned char* v_row =
      shared + layout.v + lane % 16 * kValueStride + (warp * kSplitColumns + lane / 16 * 8) * 2;
  const unsigned char* p_row = shared + layout.probability + lane % 16 * probability_bytes + lane / 16 * 16;
  const bool odd = lane % 2 != 0;
  unsigned char* target = inbox.values_of(warp, lane / 4, inbox.rank) + odd * 16 + lane % 4 / 2 * 8;
  const float* maximum = reinterpret_cast<const float*>(shared + layout.row_maximum) + lane / 4;
  for (int first = 0; first < rows; first += kTileRows) {
    float values[2][4] = {}, sums[4] = {};
    uint32_t a[kSteps][4], b[kSteps][4];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const bool has = i * 16 < padded_keys;  // else zeros times the first keys
      load_matrix_transposed(b[i], v_row + (has ? i * 16 : 0) * kValueStride);
      load_matrix(a[i], p_row + first * probability_bytes + i * 32);
#pragma unroll
      for (int j = 0; j < 4; ++j) a[i][j] = has ? a[i][j] : 0;
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) add_values(values, sums, a[i], b[i]);
#pragma unroll 1
    for (int key = kSteps * 16; key < padded_keys; key += 16) {
      load_matrix_transposed(b[0], v_row + key * kValueStride);
      load_matrix(a[0], p_row + first * probability_bytes + key * 2);
      add_values(values, sums, a[0], b[0]);
    }
    // An even lane sends four columns of the first half, its odd neighbour four of the second.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + lane / 4 + half * 8;
      const float factor = inverse_of(sums[half * 2]);
      const uint32_t low = pack_f16(values[0][half * 2] * factor, values[0][half * 2 + 1] * factor);
      const uint32_t high = pack_f16(values[1][half * 2] * factor, values[1][half * 2 + 1] * factor);
      const uint32_t theirs = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
      if (row < rows)
        publish(target + (first + half * 8) * kSplits * kSplitColumns * 2, inbox.other,
                odd ? make_uint2(theirs, high) : make_uint2(low, theirs));
    }
    if (warp == kWarps - 1 && lane % 4 == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first + lane / 4 + half * 8;
        if (row < rows)
          publish(inbox.sums_of(row, inbox.rank), inbox.other,
                  __float_as_uint(maximum[first + half * 8] + __logf(sums[half * 2])));
      }
    }
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
