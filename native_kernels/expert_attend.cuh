// The persistent expert's attention: 16 blocks a head, each with its share of the keys. A block takes the scores of its
// keys, their softmax and its part of P V, sends 16 columns of that to each block of the head, and merges its own 16
// columns of what the others send.
#pragma once

#include "expert_products.cuh"

namespace flashrt {
namespace expert {

constexpr int kHeadRowBytes = kHeadDim * 2;
constexpr int kHeadVectors = kHeadRowBytes / 16;
constexpr int kRowStride = kHeadRowBytes + 16;  // bytes; ldmatrix rows fall into different banks
constexpr int kMaxTiles = kExpertMaxRows / kTileRows;
constexpr int kLaneKeys = 4;  // keys of a block a lane of the softmax holds: at most 128 in all
static_assert(kWarps == kTileRows && kHeadVectors == kWarpSize);

// Where a block's operands lie in dynamic shared memory, in bytes. All but K and V lie where the products add up: every
// phase that writes there is behind a barrier behind the last read.
struct Layout {
  int block_keys;  // a multiple of 16
  int tiles;       // of 16 queries
  int parts;       // of a dot product, for different warps: few queries leave warps idle
  int k, v, q, score, probability, row_scale;

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

// Start copying the prefix's keys or values to `target`; async_copy_wait() ends it. `from`: the layer's slots.
__device__ __forceinline__ void load_prefix(unsigned char* target, const Share& share, const __nv_bfloat16* from) {
  const int vector = thread_id() % kHeadVectors;
  for (int row = thread_id() / kHeadVectors; row < share.prefix_keys; row += kWarps)
    async_copy16(target + row * kRowStride + vector * 16, from + (share.first + row) * kHeadDim + vector * 8);
}

// Rows of V past the last key: 0 * garbage must stay 0. They are alike in all layers.
__device__ __forceinline__ void blank_values(unsigned char* shared, const Layout& layout, const Share& share) {
  for (int row = share.keys + thread_id() / kHeadVectors; row < share.padded_keys; row += kWarps)
    *reinterpret_cast<uint4*>(shared + layout.v + row * kRowStride + thread_id() % kHeadVectors * 16) =
        make_uint4(0, 0, 0, 0);
}

// The queries, a row of each tile a warp.
__device__ __forceinline__ void load_queries(unsigned char* shared, const Layout& layout, const unsigned char* q,
                                             int rows) {
  const int vector = thread_id() % kHeadVectors, warp = thread_id() / kWarpSize;
  const auto address = [&](int tile) { return q + (tile * kTileRows + warp) * kAttended * 2 + vector * 16; };
  uint4 value[kMaxTiles];
#pragma unroll
  for (int tile = 0; tile < kMaxTiles; ++tile)
    value[tile] = tile * kTileRows + warp < rows ? look(address(tile)) : make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int tile = 0; tile < kMaxTiles; ++tile) {
    if (tile >= layout.tiles) break;
    for (int polls = 0; absent(value[tile]); count_poll(polls)) value[tile] = look(address(tile));
    *reinterpret_cast<uint4*>(shared + layout.q + (tile * kTileRows + warp) * kRowStride + vector * 16) = value[tile];
  }
}

// The keys and values of the actions themselves, as far as they are this block's.
__device__ __forceinline__ void load_suffix(unsigned char* shared, const Layout& layout, const Share& share,
                                            const unsigned char* kv) {
  const int vector = thread_id() % kHeadVectors;
  for (int row = share.prefix_keys + thread_id() / kHeadVectors; row < share.keys; row += kWarps) {
    const unsigned char* from = kv + (share.first + row - share.prefix) * 2 * kHeadRowBytes + vector * 16;
    uint4 k = look(from), v = look(from + kHeadRowBytes);
    for (int polls = 0; absent(k); count_poll(polls)) k = look(from);
    for (int polls = 0; absent(v); count_poll(polls)) v = look(from + kHeadRowBytes);
    *reinterpret_cast<uint4*>(shared + layout.k + row * kRowStride + vector * 16) = k;
    *reinterpret_cast<uint4*>(shared + layout.v + row * kRowStride + vector * 16) = v;
  }
}

// Parts of q k^T: a warp takes a tile of queries, 8 keys and one part of the dot product at a time.
__device__ __forceinline__ void scores(unsigned char* shared, const Layout& layout, int keys) {
  const int warp = thread_id() / kWarpSize, lane = thread_id() % kWarpSize, stride = layout.score_stride();
  const int groups = (keys + 7) / 8, jobs = groups * layout.parts * layout.tiles;
  const int part_bytes = kHeadRowBytes / layout.parts;
  for (int job = warp; job < jobs; job += kWarps) {
    const int slice = job / groups, n = (job - slice * groups) * 8;  // slice: of parts and, where those are one, tiles
    const int part = layout.parts == 1 ? 0 : slice, tile = layout.parts == 1 ? slice : 0;
    const unsigned char* q_row =
        shared + layout.q + (tile * kTileRows + lane % 16) * kRowStride + part * part_bytes + lane / 16 * 16;
    const unsigned char* k_row = shared + layout.k + (n + lane % 8) * kRowStride + part * part_bytes + lane / 8 * 16;
    float sum[4][4] = {};  // independent chains
#pragma unroll 2
    for (int d = 0; d < part_bytes; d += 128) {
      uint32_t a[4][4], b[2][4];
      load_matrix(b[0], k_row + d);
      load_matrix(b[1], k_row + d + 64);
#pragma unroll
      for (int i = 0; i < 4; ++i) load_matrix(a[i], q_row + d + i * 32);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        mma_bf16(sum[i], a[i][0], a[i][1], a[i][2], a[i][3], b[i / 2][i % 2 * 2], b[i / 2][i % 2 * 2 + 1]);
    }
    float* target =
        reinterpret_cast<float*>(shared + layout.score) + (slice * kTileRows + lane / 4) * stride + n + lane % 4 * 2;
    *reinterpret_cast<float2*>(target) = make_float2((sum[0][0] + sum[1][0]) + (sum[2][0] + sum[3][0]),
                                                     (sum[0][1] + sum[1][1]) + (sum[2][1] + sum[3][1]));
    *reinterpret_cast<float2*>(target + 8 * stride) = make_float2((sum[0][2] + sum[1][2]) + (sum[2][2] + sum[3][2]),
                                                                  (sum[0][3] + sum[1][3]) + (sum[2][3] + sum[3][3]));
  }
}

// What the blocks of a head send each other: by receiving block its 16 columns (row, sender) as fp16, normalised by the
// sender's own sum, and once for all the logarithm of that sum (row, sender). A row is contiguous: a warp reads it at
// once.
struct Inbox {
  unsigned char *values, *sums;  // of this head
  int64_t other;
  int padded_rows, rank;

  __device__ __forceinline__ unsigned char* values_of(int receiver, int row, int sender) const {
    return values + ((receiver * padded_rows + row) * kSplits + sender) * kSplitColumns * 2;
  }
  __device__ __forceinline__ unsigned char* sums_of(int row, int sender) const {
    return sums + (row * kSplits + sender) * 4;
  }
};

// exp(score - maximum) of this warp's row of a tile as bf16, zeros past the last key, and 1 / their sum; the logarithm
// of the sum goes to the blocks of the head.
__device__ __forceinline__ void softmax(unsigned char* shared, const Layout& layout, const Share& share,
                                        const Inbox& inbox, int tile, int rows) {
  const int slot = tile * kTileRows + thread_id() / kWarpSize, lane = thread_id() % kWarpSize;  // slot: the row
  const int stride = layout.score_stride();
  constexpr float kScale = 0.0625f;  // 1 / sqrt(256)
  if (slot >= rows) return;          // its probabilities are garbage that stays in its row
  const float* score = reinterpret_cast<const float*>(shared + layout.score) + slot * stride;
  float value[kLaneKeys], maximum = -INFINITY;
#pragma unroll
  for (int i = 0; i < kLaneKeys; ++i) {
    const int key = i * kWarpSize + lane;
    value[i] = -INFINITY;
    if (key < share.keys) {
      value[i] = score[key];
      if (layout.parts == 2) value[i] += score[kTileRows * stride + key];
      value[i] *= kScale;
    }
    maximum = fmaxf(maximum, value[i]);
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, offset));
  __nv_bfloat16* probability =
      reinterpret_cast<__nv_bfloat16*>(shared + layout.probability) + slot * layout.probability_stride();
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kLaneKeys; ++i) {
    const int key = i * kWarpSize + lane;
    if (key >= share.padded_keys) break;
    const float weight = __expf(value[i] - maximum);
    sum += weight;
    probability[key] = from_float<__nv_bfloat16>(weight);
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (lane == 0) {
    reinterpret_cast<float*>(shared + layout.row_scale)[slot] = inverse_of(sum);
    publish(inbox.sums_of(slot, inbox.rank), inbox.other, __float_as_uint(maximum + __logf(sum)));
  }
}

// P V for this warp's 16 columns and all tiles, sent to the block that merges them.
__device__ __forceinline__ void send_values(unsigned char* shared, const Layout& layout, const Share& share,
                                            const Inbox& inbox, int rows) {
  const int warp = thread_id() / kWarpSize, lane = thread_id() % kWarpSize;
  const int probability_bytes = layout.probability_stride() * 2;
  const unsigned char* v_row = shared + layout.v + lane % 16 * kRowStride + (warp * kSplitColumns + lane / 16 * 8) * 2;
  const unsigned char* p_row = shared + layout.probability + lane % 16 * probability_bytes + lane / 16 * 16;
  float sum[kMaxTiles][2][4] = {};
  for (int key = 0; key < share.padded_keys; key += 16) {
    uint32_t b[4];
    load_matrix_transposed(b, v_row + key * kRowStride);
#pragma unroll
    for (int tile = 0; tile < kMaxTiles; ++tile) {
      if (tile >= layout.tiles) break;
      uint32_t a[4];
      load_matrix(a, p_row + tile * kTileRows * probability_bytes + key * 2);
      mma_bf16(sum[tile][0], a[0], a[1], a[2], a[3], b[0], b[1]);
      mma_bf16(sum[tile][1], a[0], a[1], a[2], a[3], b[2], b[3]);
    }
  }
  // An even lane sends four columns of the first half, its odd neighbour four of the second.
  const float* scale = reinterpret_cast<const float*>(shared + layout.row_scale) + lane / 4;
  const bool odd = lane % 2 != 0;
#pragma unroll
  for (int tile = 0; tile < kMaxTiles; ++tile) {
    if (tile >= layout.tiles) break;
    const float (&values)[2][4] = sum[tile];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile * kTileRows + lane / 4 + half * 8;
      const float factor = scale[tile * kTileRows + half * 8];
      const uint32_t first = pack_f16(values[0][half * 2] * factor, values[0][half * 2 + 1] * factor);
      const uint32_t second = pack_f16(values[1][half * 2] * factor, values[1][half * 2 + 1] * factor);
      const uint32_t theirs = __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
      if (row < rows)
        publish(inbox.values_of(warp, row, inbox.rank) + odd * 16 + lane % 4 / 2 * 8, inbox.other,
                odd ? make_uint2(theirs, second) : make_uint2(first, theirs));
    }
  }
}

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
    publish(target + 4, other, pack_bf16(value[2], value[3]));
  }
}

}  // namespace expert
}  // namespace flashrt
