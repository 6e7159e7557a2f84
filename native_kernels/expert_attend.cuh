// The persistent expert's attention: 16 blocks a head, each with its share of the keys. A block takes the scores of its
// keys, their softmax and its part of P V; expert_inbox.cuh and expert_letters.cuh have the rest.
#pragma once

#include "expert_matrix.cuh"

namespace flashrt {
namespace expert {

constexpr int kHeadVectors = kHeadRowBytes / 16;
constexpr int kSlices = kHeadRowBytes / kBlockBytes;  // of a dot product, for different warps
constexpr int kLaneKeys = 4;                          // keys of a block a lane of the softmax holds: at most 128 in all
static_assert(kWarps == kTileRows && kWarps == 2 * kSlices && kHeadVectors == kWarpSize);

// Where a block's operands lie in dynamic shared memory, in bytes. All but K and V lie where the products add up: every
// phase that writes there is behind a barrier behind the last read.
struct Layout {
  int block_keys;     // a multiple of 16
  int tiles_at_once;  // of rows, whose scores lie there
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

// The keys (`kind` 0) or values (1) of the actions themselves, as far as they are this block's: a warp a row.
template <bool One>
struct SuffixRows {
  static constexpr int Most = One ? 1 : kExpertMaxRows / kWarps;  // of a warp
  uint4 value[Most];
  const unsigned char* from;
  int row, keys;

  __device__ __forceinline__ void ask(const Share& share, const unsigned char* kv, int kind) {
    row = share.prefix_keys + thread_id() / kHeadVectors, keys = share.keys;
    from = kv + ((share.first + row - share.prefix) * 2 + kind) * kHeadRowBytes + thread_id() % kHeadVectors * 16;
#pragma unroll
    for (int i = 0; i < Most; ++i) value[i] = row + i * kWarps < keys ? look(from + offset(i)) : make_uint4(0, 0, 0, 0);
  }
  static __device__ __forceinline__ int offset(int i) { return i * kWarps * 2 * kHeadRowBytes; }
  __device__ __forceinline__ void settle(unsigned char* target, int stride) {
#pragma unroll
    for (int i = 0; i < Most; ++i) {
      if (row + i * kWarps >= keys) break;
      for (int polls = 0; absent(value[i]); count_poll(polls)) value[i] = look(from + offset(i));
      *reinterpret_cast<uint4*>(target + (row + i * kWarps) * stride + thread_id() % kHeadVectors * 16) = value[i];
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

// The queries of a warp of a team: its tile's, of its part of the dot product.
struct Queries {
  static constexpr int Most = 4;  // operands
  uint4 operand[Most];
  const unsigned char* from;
  int count, rows;
  uint32_t second;

  // q: of this head.
  __device__ __forceinline__ void ask(const unsigned char* q, const Team<false>& team, int all_rows) {
    const int lane = thread_id() % kWarpSize;
    count = 2 * kSlices >> team.shift;
    rows = all_rows - team.tile * kTileRows;
    const int pair = max(0, min(lane / 4, (rows - 1) / 2)), tile = rows > 0 ? team.tile : 0;  // as of activations
    from = q + tile * kTileRows * kHeadRowBytes + team.part * count * kOperandBytes + (pair * 4 + lane % 4) * 16;
    second = pair * 2 + 1 < rows ? kAbsent : 0;
#pragma unroll
    for (int i = 0; i < Most; ++i) operand[i] = i < count ? look(from + i * kOperandBytes) : make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ void settle() {
    for (int polls = 0;; count_poll(polls)) {
      if (!__any_sync(0xffffffffu, any_absent(operand, second))) break;
#pragma unroll
      for (int i = 0; i < Most; ++i)
        if (absent(operand[i], second)) operand[i] = look(from + i * kOperandBytes);
    }
  }
};

// The same where there are more tiles, of all keys, which lie in shared memory. `place`: of the tile among those whose
// scores are taken at once.
__device__ __forceinline__ void scores(unsigned char* shared, const Layout& layout, const Share& share,
                                       const Queries& queries, const Team<false>& team, int place) {
  const int lane = thread_id() % kWarpSize, stride = layout.score_stride(), keys = share.keys;
  const bool two = queries.count == 4;  // blocks of 64 bytes
  const uint4(&a)[Queries::Most] = queries.operand;
  const unsigned char* k_row = shared + layout.k + team.part * (queries.count / 2) * kBlockBytes + lane % 4 * 16;
  float* target = reinterpret_cast<float*>(shared + layout.score) +
                  (((place << team.shift) + team.part) * kTileRows + lane / 4 * 2) * stride + lane % 4 * 2;
  constexpr int kGroups = 2;  // of 8 keys, at once
#pragma unroll 1
  for (int first = 0; first < keys; first += kGroups * 8) {
    uint4 b[kGroups][2];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int key = first + i * 8 + lane / 4;
#pragma unroll
      for (int block = 0; block < 2; ++block)
        b[i][block] = key < keys && (block == 0 || two)
                          ? *reinterpret_cast<const uint4*>(k_row + key * kKeyStride + block * kBlockBytes)
                          : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      float sum[4] = {}, odd[4] = {};
      mma_bf16(sum, a[0].x, a[0].y, a[0].z, a[0].w, b[i][0].x, b[i][0].y);
      mma_bf16(odd, a[1].x, a[1].y, a[1].z, a[1].w, b[i][0].z, b[i][0].w);
      mma_bf16(sum, a[2].x, a[2].y, a[2].z, a[2].w, b[i][1].x, b[i][1].y);
      mma_bf16(odd, a[3].x, a[3].y, a[3].z, a[3].w, b[i][1].z, b[i][1].w);
      const int key = first + i * 8;  // scores past the keys are not looked at
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

// The same where there are more tiles, of those from `first` on whose scores are taken at once: a warp has four rows,
// eight lanes each.
__device__ __forceinline__ void softmax(unsigned char* shared, const Layout& layout, const Share& share,
                                        const Team<false>& team, int first, int rows) {
  constexpr int kLanes = 8, kSteps = kLaneKeys * kWarpSize / (2 * kLanes);
  const int warp = thread_id() / kWarpSize, lane = thread_id() % kWarpSize, tile = warp / 4, place = tile - first;
  if (place < 0 || place >= layout.tiles_at_once || tile * kTileRows >= rows) return;
  const int slot = warp % 4 * 4 + lane / kLanes, own = lane % kLanes * 2, keys = share.keys;
  const int row = tile * kTileRows + slot, stride = layout.score_stride();
  const float* score =
      reinterpret_cast<const float*>(shared + layout.score) + ((place << team.shift) * kTileRows + slot) * stride + own;
  float2 value[kSteps];
  float maximum = -INFINITY;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    value[i] = make_float2(-INFINITY, -INFINITY);
    const int key = i * 2 * kLanes + own;
    if (i * 2 * kLanes >= keys) continue;
    float2 sum[2] = {};
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      if (slice == kSlices / 2 && slice == team.parts()) break;
      const float2 part = *reinterpret_cast<const float2*>(score + slice * kTileRows * stride + i * 2 * kLanes);
      sum[slice % 2].x += part.x, sum[slice % 2].y += part.y;
    }
    if (key < keys) value[i].x = (sum[0].x + sum[1].x) * kScoreScale;  // NaN past the keys
    if (key + 1 < keys) value[i].y = (sum[0].y + sum[1].y) * kScoreScale;
    maximum = fmaxf(maximum, fmaxf(value[i].x, value[i].y));
  }
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2)
    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, offset));
  unsigned char* probability = shared + layout.probability + (row * layout.probability_stride() + own) * 2;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    if (i * 2 * kLanes >= keys) break;
    *reinterpret_cast<uint32_t*>(probability + i * 4 * kLanes) =
        pack_bf16(__expf(value[i].x - maximum), __expf(value[i].y - maximum));
  }
  if (own == 0) reinterpret_cast<float*>(shared + layout.row_maximum)[row] = maximum;
}

// Sixteen keys of P V.
__device__ __forceinline__ void add_values(float (&values)[2][4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  mma_bf16(values[0], a[0], a[1], a[2], a[3], b[0], b[1]);
  mma_bf16(values[1], a[0], a[1], a[2], a[3], b[2], b[3]);
}

// P V of this warp's tile, the columns of its part. The sums of a row's probabilities are one more product, with ones.
// `Post` sends them.
template <typename Post, bool One>
__device__ __forceinline__ void send_values(unsigned char* shared, const Layout& layout, const Share& share,
                                            const Post& post, const Team<One>& team, int all_rows) {
  constexpr int kSteps = 4;  // of 16 keys, at once
  constexpr uint32_t kOnes = 0x3f803f80;
  const int lane = thread_id() % kWarpSize, padded_keys = share.padded_keys, first = team.tile * kTileRows;
  const int rows = all_rows - first;
  if (!One && rows <= 0) return;
  const unsigned char* p_row =
      shared + layout.probability + (first + Post::row(lane % 16)) * layout.probability_stride() * 2 + lane / 16 * 16;
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
    const float* maximum = reinterpret_cast<const float*>(shared + layout.row_maximum) + first;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = Post::row(lane / 4 + half * 8);
      if (row < rows) post.send_sum(first + row, maximum[row] + __logf(sums[half * 2]));
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
    post.send(values, factor, receiver, team.tile, rows);
  }
}

}  // namespace expert
}  // namespace flashrt
