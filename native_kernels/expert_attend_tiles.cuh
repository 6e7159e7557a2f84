// The persistent expert's attention where there is more than one tile of rows, but for pairs of blocks: a team of warps
// has a tile, and every block of a head has its part of the actions' own keys.
#pragma once

#include "expert_attend.cuh"

namespace flashrt {
namespace expert {

// Of the actions' keys of this block, several tiles, the row of key `index`.
__device__ __forceinline__ int own_row(int index) { return block_id() % kSplits + index * kSplits; }

// What a warp of a team reads of the other blocks' for its scores, where there are more tiles: the queries of its tile
// and those of the actions' own keys that are this block's, of its part of the dot product; as the tensor cores read
// them.
struct Queries {
  static constexpr int Most = 4;  // operands
  uint4 operand[Most], key[Most / 2];
  const unsigned char *from, *key_from;
  int count, rows, keys;  // keys: of the actions
  uint32_t second;

  // q: of this head; kv: of the actions.
  __device__ __forceinline__ void ask(const unsigned char* q, const unsigned char* kv, const Share& share,
                                      const Team<false>& team, int all_rows) {
    const int lane = thread_id() % kWarpSize;
    count = 2 * kSlices >> team.shift;
    rows = all_rows - team.tile * kTileRows, keys = share.keys - share.prefix_keys;
    const int pair = max(0, min(lane / 4, (rows - 1) / 2)), tile = rows > 0 ? team.tile : 0;  // as of activations
    from = q + tile * kTileRows * kHeadRowBytes + team.part * count * kOperandBytes + (pair * 4 + lane % 4) * 16;
    second = pair * 2 + 1 < rows ? kAbsent : 0;
    key_from = kv + own_row(lane / 4) * 2 * kHeadRowBytes + team.part * (count / 2) * kBlockBytes + lane % 4 * 16;
#pragma unroll
    for (int i = 0; i < Most / 2; ++i) key[i] = has_key(i) ? look(key_from + i * kBlockBytes) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < Most; ++i) operand[i] = i < count ? look(from + i * kOperandBytes) : make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ bool has_key(int i) const {
    return static_cast<int>(thread_id()) % kWarpSize / 4 < keys && i < count / 2;
  }
  __device__ __forceinline__ void settle() {
    for (int polls = 0;; count_poll(polls)) {
      if (!__any_sync(0xffffffffu, any_absent(operand, second))) break;
#pragma unroll
      for (int i = 0; i < Most; ++i)
        if (absent(operand[i], second)) operand[i] = look(from + i * kOperandBytes);
    }
  }
  __device__ __forceinline__ void settle_keys() {
    for (int polls = 0;; count_poll(polls)) {
      if (!__any_sync(0xffffffffu, any_absent(key, kAbsent))) break;
#pragma unroll
      for (int i = 0; i < Most / 2; ++i)
        if (absent(key[i])) key[i] = look(key_from + i * kBlockBytes);
    }
  }
};

// The values of the actions that are this block's, of several tiles: one of the last warps each.
struct OwnValues {
  uint4 value;
  const unsigned char* from;
  int index;
  bool has;

  __device__ __forceinline__ void ask(const unsigned char* kv, const Share& share) {
    index = static_cast<int>(thread_id()) / kWarpSize - (kWarps - kOwnRows);
    has = index >= 0 && index < share.keys - share.prefix_keys;
    from = kv + (own_row(index) * 2 + 1) * kHeadRowBytes + thread_id() % kWarpSize * 16;
    value = has ? look(from) : make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ void settle(unsigned char* values, const Share& share) {
    if (!has) return;
    for (int polls = 0; absent(value); count_poll(polls)) value = look(from);
    *reinterpret_cast<uint4*>(values + (share.prefix_keys + index) * kValueStride + thread_id() % kWarpSize * 16) =
        value;
  }
};

// A warp's products of its queries with 8 keys, two rows and two keys a lane.
__device__ __forceinline__ void multiply_keys(float (&sum)[4], const uint4 (&a)[Queries::Most], const uint4 (&b)[2]) {
  float odd[4] = {};
  mma_bf16(sum, a[0].x, a[0].y, a[0].z, a[0].w, b[0].x, b[0].y);
  mma_bf16(odd, a[1].x, a[1].y, a[1].z, a[1].w, b[0].z, b[0].w);
  mma_bf16(sum, a[2].x, a[2].y, a[2].z, a[2].w, b[1].x, b[1].y);
  mma_bf16(odd, a[3].x, a[3].y, a[3].z, a[3].w, b[1].z, b[1].w);
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += odd[i];
}

// Parts of q k^T of a tile: of the prefix's keys, which lie in shared memory, and of the actions' own, which take
// longer to come. `place`: of the tile among those whose scores are taken at once. Scores past the keys are not looked
// at.
__device__ __forceinline__ void scores(unsigned char* shared, const Layout& layout, const Share& share,
                                       Queries& queries, const Team<false>& team, int place) {
  const int lane = thread_id() % kWarpSize, stride = layout.score_stride(), prefix_keys = share.prefix_keys;
  const bool two = queries.count == 4;  // blocks of 64 bytes
  const unsigned char* k_row =
      shared + layout.k + team.part * (queries.count / 2) * kBlockBytes + lane / 4 * kKeyStride + lane % 4 * 16;
  float* target = reinterpret_cast<float*>(shared + layout.score) +
                  (((place << team.shift) + team.part) * kTileRows + lane / 4 * 2) * stride + lane % 4 * 2;
  // of 8 keys, at once; the last are read up to 16 rows past a block's keys, where its values lie
  constexpr int kGroups = 3;
#pragma unroll 1
  for (int first = 0; first < prefix_keys; first += kGroups * 8) {
    uint4 b[kGroups][2];
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
#pragma unroll
      for (int block = 0; block < 2; ++block)
        b[i][block] = block == 0 || two
                          ? *reinterpret_cast<const uint4*>(k_row + (first + i * 8) * kKeyStride + block * kBlockBytes)
                          : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      float sum[4] = {};
      multiply_keys(sum, queries.operand, b[i]);
      const int key = first + i * 8;
      if (key >= prefix_keys) break;
      *reinterpret_cast<float2*>(target + key) = make_float2(sum[0], sum[1]);
      *reinterpret_cast<float2*>(target + stride + key) = make_float2(sum[2], sum[3]);
    }
  }
  queries.settle_keys();
  float sum[4] = {};
  multiply_keys(sum, queries.operand, queries.key);
  __syncwarp();  // what other lanes left behind the prefix's keys is overwritten
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (lane % 4 * 2 + i >= queries.keys) break;
    target[prefix_keys + i] = sum[i], target[stride + prefix_keys + i] = sum[2 + i];
  }
}

// Eight lanes have a row's scores, four keys each a step.
constexpr int kScoreLanes = 8, kStepKeys = 4 * kScoreLanes, kKeySteps = kLaneKeys * kWarpSize / kStepKeys;

// A lane's scores of a row and their maximum, of the parts of a team of at most `MostParts` warps, times `scale`;
// -infinity past the last key. `own`: its first key.
template <int MostParts>
__device__ __forceinline__ void read_scores(float (&value)[kKeySteps][4], float& maximum, const float* score, int own,
                                            int stride, int keys, const Team<false>& team, float scale) {
  constexpr int kAtOnce = 2;  // steps, whose parts are read ahead
#pragma unroll
  for (int first_step = 0; first_step < kKeySteps; first_step += kAtOnce) {
#pragma unroll
    for (int i = first_step; i < first_step + kAtOnce; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) value[i][j] = -INFINITY;
    if (first_step * kStepKeys >= keys) continue;
    float4 sum[kAtOnce] = {};
#pragma unroll
    for (int slice = 0; slice < MostParts; ++slice) {
      if (slice == kSlices / 2 && slice == team.parts()) break;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float4 part =
            *reinterpret_cast<const float4*>(score + slice * kTileRows * stride + (first_step + i) * kStepKeys);
        sum[i].x += part.x, sum[i].y += part.y, sum[i].z += part.z, sum[i].w += part.w;
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float all[4] = {sum[i].x, sum[i].y, sum[i].z, sum[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if ((first_step + i) * kStepKeys + own + j >= keys) continue;  // NaN past the keys
        value[first_step + i][j] = all[j] * scale;
        maximum = fmaxf(maximum, value[first_step + i][j]);
      }
    }
  }
}

// exp(score - maximum) as bf16 of the tiles from `first` on whose scores are taken at once, zeros past the last key: a
// warp has four rows, eight lanes each, four keys a lane at once.
__device__ __forceinline__ void softmax(unsigned char* shared, const Layout& layout, const Share& share,
                                        const Team<false>& team, int first, int rows) {
  constexpr int kLanes = kScoreLanes, kSteps = kKeySteps;
  const int warp = thread_id() / kWarpSize, lane = thread_id() % kWarpSize, tile = warp / 4, place = tile - first;
  if (place < 0 || place >= layout.tiles_at_once || tile * kTileRows >= rows) return;
  const int slot = warp % 4 * 4 + lane / kLanes, own = lane % kLanes * 4, keys = share.keys;
  const int row = tile * kTileRows + slot, stride = layout.score_stride();
  const float* score =
      reinterpret_cast<const float*>(shared + layout.score) + ((place << team.shift) * kTileRows + slot) * stride + own;
  float value[kSteps][4], maximum = -INFINITY;
  read_scores<kSlices>(value, maximum, score, own, stride, keys, team, kScoreScale);
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2)
    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, offset));
  unsigned char* probability = shared + layout.probability + (row * layout.probability_stride() + own) * 2;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    if (i * kStepKeys + own >= share.padded_keys) break;
    *reinterpret_cast<uint2*>(probability + i * kStepKeys * 2) =
        make_uint2(pack_bf16(__expf(value[i][0] - maximum), __expf(value[i][1] - maximum)),
                   pack_bf16(__expf(value[i][2] - maximum), __expf(value[i][3] - maximum)));
  }
  if (own == 0) reinterpret_cast<float*>(shared + layout.row_maximum)[row] = maximum;
}

}  // namespace expert
}  // namespace flashrt
