// The persistent expert's attention: 16 blocks a head, each with its share of the keys. A block takes the scores of its
// keys, their softmax and its part of P V; expert_inbox.cuh and the letters have the rest.
#pragma once

#include "expert_matrix.cuh"

namespace flashrt {
namespace expert {

constexpr int kHeadVectors = kHeadRowBytes / 16;
constexpr int kSlices = kHeadRowBytes / kBlockBytes;  // of a dot product, for different warps
constexpr int kOwnRows = kExpertMaxRows / kSplits;    // of the actions' keys, at most a block's
constexpr int kLaneKeys = 4;                          // keys of a block a lane of the softmax holds: at most 128 in all
static_assert(kWarps == kTileRows && kWarps == 2 * kSlices && kHeadVectors == kWarpSize);

// Where a block's operands lie in dynamic shared memory, in bytes. All but K and V lie where the products add up: every
// phase that writes there is behind a barrier behind the last read.
struct Layout {
  int block_keys;     // a multiple of 16
  int tiles_at_once;  // of rows, whose scores lie there
  int k, v, score, probability, row_maximum;

  // The most that a block can have.
  __host__ static int keys_of_block(int capacity) { return (share_of(capacity) + 15) / 16 * 16; }
  __host__ __device__ static int share_of(int keys) { return (keys + kSplits - 1) / kSplits; }
  __host__ __device__ int score_stride() const { return block_keys + 4; }        // floats
  __host__ __device__ int probability_stride() const { return block_keys + 8; }  // bf16
};

// The keys of this block: `prefix_keys` of the prefix from `first` on, behind them some of the actions' own. With one
// tile of rows they are the keys [first, first + keys) of all, and the first `active` blocks of a head have any. With
// more, where a block waits longer for each of the actions' keys that is its, every block has every 16th of them, and
// so many less of the prefix.
struct Share {
  int prefix, first, keys, padded_keys, prefix_keys, active;

  Share() = default;
  template <bool One>
  static __device__ Share of(int rank, int prefix, int rows) {
    const int total = prefix + rows, most = One ? (Layout::share_of(total) + 15) / 16 * 16 : Layout::share_of(total);
    const int own = One ? 0 : (rows - rank + kSplits - 1) / kSplits;
    const int own_ahead = One ? 0 : rank * (rows / kSplits) + min(rank, rows % kSplits);  // of the blocks before
    Share s;
    s.prefix = prefix;
    s.active = One ? (total + most - 1) / most : kSplits;
    s.first = rank * most - own_ahead;
    s.prefix_keys = max(0, min(most - own, prefix - s.first));
    s.keys = One ? max(0, min(most, total - s.first)) : s.prefix_keys + own;
    s.padded_keys = (s.keys + 15) / 16 * 16;
    return s;
  }
};

// Rows of V past the last key: 0 * garbage must stay 0. They are alike in all layers.
__device__ __forceinline__ void blank_values(unsigned char* shared, const Layout& layout, const Share& share) {
  for (int row = share.keys + thread_id() / kHeadVectors; row < share.padded_keys; row += kWarps)
    *reinterpret_cast<uint4*>(shared + layout.v + row * kValueStride + thread_id() % kHeadVectors * 16) =
        make_uint4(0, 0, 0, 0);
}

// The values of the actions themselves, as far as they are this block's, of one tile: a warp a row.
struct SuffixValues {
  uint4 value;
  const unsigned char* from;
  int row, keys;

  __device__ __forceinline__ void ask(const Share& share, const unsigned char* kv) {
    row = share.prefix_keys + thread_id() / kHeadVectors, keys = share.keys;
    from = kv + ((share.first + row - share.prefix) * 2 + 1) * kHeadRowBytes + thread_id() % kHeadVectors * 16;
    value = row < keys ? look(from) : make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ void settle(unsigned char* target) {
    if (row >= keys) return;
    for (int polls = 0; absent(value); count_poll(polls)) value = look(from);
    *reinterpret_cast<uint4*>(target + row * kValueStride + thread_id() % kHeadVectors * 16) = value;
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
  constexpr int kGroups = 4;  // at once
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

// The same order as of floats; NaN is more than anything or less.
__device__ __forceinline__ int ordered(float value) {
  const int bits = __float_as_int(value);
  return bits ^ (bits >> 31 & 0x7fffffff);
}

constexpr float kScoreScale = 0.0625f;  // 1 / sqrt(256)

__device__ __forceinline__ float unordered(int bits) { return __int_as_float(bits ^ (bits >> 31 & 0x7fffffff)); }

// exp(score - maximum) of this warp's row of the one tile as bf16, zeros past the last key, and the maximum.
__device__ __forceinline__ void softmax(unsigned char* shared, const Layout& layout, const Share& share, int rows) {
  const int row = thread_id() / kWarpSize, lane = thread_id() % kWarpSize, stride = layout.score_stride();
  if (row >= rows) return;  // its probabilities are garbage that stays in its row
  const float* score = reinterpret_cast<const float*>(shared + layout.score) + row * stride + lane;
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
    value[i] = i * kWarpSize + lane < keys ? sum * kScoreScale : -INFINITY;
    maximum = fmaxf(maximum, value[i]);
  }
  maximum = unordered(__reduce_max_sync(0xffffffffu, ordered(maximum)));
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

// Sixteen keys of P V.
__device__ __forceinline__ void add_values(float (&values)[2][4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  mma_bf16(values[0], a[0], a[1], a[2], a[3], b[0], b[1]);
  mma_bf16(values[1], a[0], a[1], a[2], a[3], b[2], b[3]);
}

// Adds P V of 16 columns. `a`: the probabilities of the first keys, zeros past the last; further ones from `p_row` on.
template <bool One, int Steps>
__device__ __forceinline__ void multiply_values(float (&values)[2][4], const uint32_t (&a)[Steps][4],
                                                const unsigned char* v_row, const unsigned char* p_row,
                                                int padded_keys) {
  uint32_t b[Steps][4] = {};
#pragma unroll
  for (int step = 0; step < Steps; ++step) {
    if (!One && step > 1 && step * 16 >= padded_keys) break;
    load_matrix_transposed(b[step], v_row + (step * 16 < padded_keys ? step * 16 : 0) * kValueStride);
  }
#pragma unroll
  for (int step = 0; step < Steps; ++step) {
    if (!One && step > 1 && step * 16 >= padded_keys) break;
    add_values(values, a[step], b[step]);
  }
#pragma unroll 1
  for (int key = Steps * 16; key < padded_keys; key += 16) {
    uint32_t more[4];
    load_matrix_transposed(b[0], v_row + key * kValueStride);
    load_matrix(more, p_row + key * 2);
    add_values(values, more, b[0]);
  }
}

// P V of this warp's tile, the columns of its part. The sums of a row's probabilities are one more product, with ones.
// `Post` sends them, those of `AtOnce` receivers behind each other.
template <int AtOnce, typename Post, bool One>
__device__ __forceinline__ void send_values(unsigned char* shared, const Layout& layout, const Share& share,
                                            const Post& post, const Team<One>& team, int all_rows) {
  constexpr int kSteps = 4;  // of 16 keys, at once
  constexpr uint32_t kOnes = 0x3f803f80;
  const int lane = thread_id() % kWarpSize, padded_keys = share.padded_keys, first = team.tile * kTileRows;
  const int rows = all_rows - first;
  if (!One && rows <= 0) return;
  const unsigned char* p_row =
      shared + layout.probability + (first + Post::row(lane % 16)) * layout.probability_stride() * 2 + lane / 16 * 16;
  uint32_t a[kSteps][4] = {};
  float sums[4] = {};
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    if (!One && i > 1 && i * 16 >= padded_keys) break;
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
    const float* maximum = reinterpret_cast<const float*>(shared + layout.row_maximum) + first;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = Post::row(lane / 4 + half * 8);
      if (row < rows) post.send_sum(first + row, maximum[row] + __logf(sums[half * 2]));
    }
  }
  const int receivers = kSplits >> team.shift;
#pragma unroll(AtOnce)
  for (int i = 0; i < receivers; ++i) {
    const int receiver = team.part * receivers + i;
    const unsigned char* v_row =
        shared + layout.v + lane % 16 * kValueStride + (receiver * kSplitColumns + lane / 16 * 8) * 2;
    float values[2][4] = {};
    multiply_values<One>(values, a, v_row, p_row, padded_keys);
    post.send(values, factor, receiver, team.tile, rows);
  }
}

}  // namespace expert
}  // namespace flashrt
