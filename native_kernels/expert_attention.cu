// Attention of the action expert: a few query rows (1-64 a head) over the whole K/V cache, head_dim 256.
//   out = softmax(q k^T / 16) v over keys [0, prefix_length + rows), prefix_length on the device
//
// Bytes moved: 2 * keys * 512 a kv head from L2 or memory, read once by every query head: 570 keys x 8 heads is
// 4.7 MB of L2 reads; q and out are small. No floor to speak of: the work is latency, about 2 us.
//
// How: one cluster of 8 blocks a head, each block takes an eighth of the keys. K and V of the prefix are copied to
// shared memory before the kernel in front has finished (they do not change over the denoise steps); only the
// suffix's rows wait for it. The partial results meet through distributed shared memory, in a fixed order.
#include <cooperative_groups.h>

#include "expert.h"
#include "hopper.cuh"
#include "vector.cuh"

namespace flashrt {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kSplits = 8;
constexpr int kHeadDim = 256;
constexpr int kRowBytes = kHeadDim * 2;
constexpr int kRowStride = kRowBytes + 16;  // bytes; ldmatrix rows fall into different banks
constexpr int kColumns = kHeadDim / kSplits;  // a block's share of the output, and a warp's share of P V
static_assert(kSplits == kWarps, "send_values maps a warp's columns to one block");

struct Layout {
  int block_keys;  // keys a block takes at most, a multiple of 16
  int q_offset, k_offset, v_offset, score_offset, probability_offset, inbox_offset, barrier_offset;
};

__host__ __device__ inline int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

template <int RowTiles>
__device__ void scores(const unsigned char* q, const unsigned char* k, float* out, int keys, int stride) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int n = warp * 16; n < keys; n += kWarps * 16) {
    float sum[RowTiles][2][4] = {};
    const unsigned char* k_row = k + (n + lane % 8 + lane / 16 * 8) * kRowStride + lane / 8 % 2 * 16;
    const unsigned char* q_row = q + lane % 16 * kRowStride + lane / 16 * 16;
#pragma unroll 4
    for (int d = 0; d < kRowBytes; d += 32) {
      uint32_t b[4];
      load_matrix(b, k_row + d);
#pragma unroll
      for (int r = 0; r < RowTiles; ++r) {
        uint32_t a[4];
        load_matrix(a, q_row + r * 16 * kRowStride + d);
        mma_bf16(sum[r][0], a[0], a[1], a[2], a[3], b[0], b[1]);
        mma_bf16(sum[r][1], a[0], a[1], a[2], a[3], b[2], b[3]);
      }
    }
    constexpr float kScale = 0.0625f;  // 1 / sqrt(256)
#pragma unroll
    for (int r = 0; r < RowTiles; ++r) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        float* target = out + (r * 16 + lane / 4) * stride + n + t * 8 + lane % 4 * 2;
        target[0] = sum[r][t][0] * kScale;
        target[1] = sum[r][t][1] * kScale;
        target[8 * stride] = sum[r][t][2] * kScale;
        target[8 * stride + 1] = sum[r][t][3] * kScale;
      }
    }
  }
}

// exp(score - row maximum) as bf16 with zeros past `keys`; the row's maximum and sum go to every block's inbox.
template <int PaddedRows>
__device__ void send_softmax(const float* score, __nv_bfloat16* probability, float2* inbox_stats, int keys,
                             int padded_keys, int score_stride, int probability_stride) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int row = warp; row < PaddedRows; row += kWarps) {
    float maximum = -INFINITY;
    for (int key = lane; key < keys; key += kWarpSize) maximum = fmaxf(maximum, score[row * score_stride + key]);
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
      maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, offset));
    float sum = 0.0f;
    for (int key = lane; key < padded_keys; key += kWarpSize) {
      const float value = key < keys ? __expf(score[row * score_stride + key] - maximum) : 0.0f;
      sum += value;
      probability[row * probability_stride + key] = from_float<__nv_bfloat16>(value);
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
#if FLASHRT_DEVICE_HAS_BULK
    cg::cluster_group cluster = cg::this_cluster();
    if (lane < kSplits)
      cluster.map_shared_rank(inbox_stats, lane)[cluster.block_rank() * PaddedRows + row] = make_float2(maximum, sum);
#endif
  }
}

// P V for this warp's 32 columns, sent to the block that merges them: column group w belongs to block w of the cluster.
template <int RowTiles>
__device__ void send_values(const unsigned char* probability, const unsigned char* v, float* inbox, int padded_keys,
                            int probability_row_bytes) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  float sum[RowTiles][4][4] = {};
  const unsigned char* v_row = v + (lane % 8 + lane / 8 % 2 * 8) * kRowStride + (warp * kColumns + lane / 16 * 8) * 2;
  const unsigned char* p_row = probability + lane % 16 * probability_row_bytes + lane / 16 * 16;
  for (int key = 0; key < padded_keys; key += 16) {
    uint32_t b[2][4];
    load_matrix_transposed(b[0], v_row + key * kRowStride);
    load_matrix_transposed(b[1], v_row + key * kRowStride + 32);
#pragma unroll
    for (int r = 0; r < RowTiles; ++r) {
      uint32_t a[4];
      load_matrix(a, p_row + r * 16 * probability_row_bytes + key * 2);
#pragma unroll
      for (int t = 0; t < 4; ++t)
        mma_bf16(sum[r][t], a[0], a[1], a[2], a[3], b[t / 2][t % 2 * 2], b[t / 2][t % 2 * 2 + 1]);
    }
  }
#if FLASHRT_DEVICE_HAS_BULK
  cg::cluster_group cluster = cg::this_cluster();
  float* remote = cluster.map_shared_rank(inbox, warp) + cluster.block_rank() * 16 * RowTiles * kColumns;
#pragma unroll
  for (int r = 0; r < RowTiles; ++r) {
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      float* target = remote + (r * 16 + lane / 4) * kColumns + t * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(target) = make_float2(sum[r][t][0], sum[r][t][1]);
      *reinterpret_cast<float2*>(target + 8 * kColumns) = make_float2(sum[r][t][2], sum[r][t][3]);
    }
  }
#endif
}

// Merge the eight partial results that lie in this block's inbox and write its 32 columns.
template <int RowTiles>
__device__ void merge(const ExpertAttention& p, const float* inbox, const float2* inbox_stats, int head, int first_row,
                      int column_group) {
  constexpr int PaddedRows = 16 * RowTiles;
  const float quantise = p.fp8_out ? 1.0f / *p.out_scale : 1.0f;
  const int column = threadIdx.x % (kColumns / 4) * 4;
  for (int row = threadIdx.x / (kColumns / 4); row < min(PaddedRows, p.rows - first_row);
       row += kThreads / (kColumns / 4)) {
    float maximum = -INFINITY;
#pragma unroll
    for (int s = 0; s < kSplits; ++s) maximum = fmaxf(maximum, inbox_stats[s * PaddedRows + row].x);
    float total = 0.0f, value[4] = {};
#pragma unroll
    for (int s = 0; s < kSplits; ++s) {
      const float2 stats = inbox_stats[s * PaddedRows + row];
      const float weight = __expf(stats.x - maximum);
      total += weight * stats.y;
      const float4 part = *reinterpret_cast<const float4*>(inbox + (s * PaddedRows + row) * kColumns + column);
      value[0] += weight * part.x;
      value[1] += weight * part.y;
      value[2] += weight * part.z;
      value[3] += weight * part.w;
    }
    const int64_t index = (int64_t(first_row + row) * p.heads + head) * kHeadDim + column_group * kColumns + column;
    Vector<__nv_bfloat16, 4> rounded;
#pragma unroll
    for (int i = 0; i < 4; ++i) rounded.element[i] = from_float<__nv_bfloat16>(value[i] / total);
    if (p.fp8_out) {
      Vector<uint8_t, 4> packed;
#pragma unroll
      for (int i = 0; i < 4; ++i) packed.element[i] = to_e4m3(to_float(rounded.element[i]) * quantise);
      *reinterpret_cast<Vector<uint8_t, 4>*>(static_cast<uint8_t*>(p.out) + index) = packed;
    } else {
      *reinterpret_cast<Vector<__nv_bfloat16, 4>*>(static_cast<__nv_bfloat16*>(p.out) + index) = rounded;
    }
  }
}

template <int RowTiles>
__global__ void __launch_bounds__(kThreads) expert_attention_kernel(const ExpertAttention p, const Layout layout) {
#if FLASHRT_DEVICE_HAS_BULK
  constexpr int PaddedRows = 16 * RowTiles;
  extern __shared__ __align__(128) unsigned char shared[];
  unsigned char* q = shared + layout.q_offset;
  unsigned char* k = shared + layout.k_offset;
  unsigned char* v = shared + layout.v_offset;
  float* score = reinterpret_cast<float*>(shared + layout.score_offset);
  __nv_bfloat16* probability = reinterpret_cast<__nv_bfloat16*>(shared + layout.probability_offset);
  float* inbox = reinterpret_cast<float*>(shared + layout.inbox_offset);
  float2* inbox_stats = reinterpret_cast<float2*>(inbox + kSplits * PaddedRows * kColumns);
  uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + layout.barrier_offset);

  cg::cluster_group cluster = cg::this_cluster();
  const int head = blockIdx.y, kv_head = head / (p.heads / p.kv_heads), first_row = blockIdx.z * PaddedRows;
  const int prefix = *p.prefix_length, total_keys = prefix + p.rows;
  const int share = round_up((total_keys + kSplits - 1) / kSplits, 16);
  const int first = blockIdx.x * share;
  const int keys = max(0, min(share, total_keys - first)), padded_keys = round_up(keys, 16);
  const int prefix_keys = max(0, min(keys, prefix - first));
  const int64_t row_elements = int64_t(p.kv_heads) * kHeadDim;
  const __nv_bfloat16* k_source = static_cast<const __nv_bfloat16*>(p.k_cache) + first * row_elements + kv_head * kHeadDim;
  const __nv_bfloat16* v_source = static_cast<const __nv_bfloat16*>(p.v_cache) + first * row_elements + kv_head * kHeadDim;

  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
    barrier_expect(barrier, 2 * prefix_keys * kRowBytes);
  }
  __syncthreads();
  for (int row = threadIdx.x; row < prefix_keys; row += kThreads) {
    bulk_copy(k + row * kRowStride, k_source + row * row_elements, kRowBytes, barrier);
    bulk_copy(v + row * kRowStride, v_source + row * row_elements, kRowBytes, barrier);
  }
  constexpr int kVectors = kRowBytes / 16;
  for (int i = threadIdx.x; i < (padded_keys - keys) * kVectors; i += kThreads)  // 0 * garbage must stay 0
    *reinterpret_cast<uint4*>(v + (keys + i / kVectors) * kRowStride + i % kVectors * 16) = make_uint4(0, 0, 0, 0);
  cluster.sync();  // every block of the cluster has started: its inbox may be written from now on
  dependency_wait();
  dependency_release();

  for (int i = threadIdx.x; i < (keys - prefix_keys) * kVectors; i += kThreads) {
    const int row = prefix_keys + i / kVectors, byte = i % kVectors * 16;
    *reinterpret_cast<uint4*>(k + row * kRowStride + byte) =
        *reinterpret_cast<const uint4*>(reinterpret_cast<const unsigned char*>(k_source + row * row_elements) + byte);
    *reinterpret_cast<uint4*>(v + row * kRowStride + byte) =
        *reinterpret_cast<const uint4*>(reinterpret_cast<const unsigned char*>(v_source + row * row_elements) + byte);
  }
  for (int i = threadIdx.x; i < PaddedRows * kVectors; i += kThreads) {
    const int row = i / kVectors, byte = i % kVectors * 16;
    const unsigned char* source =
        static_cast<const unsigned char*>(p.q) + (int64_t(first_row + row) * p.heads + head) * kRowBytes;
    *reinterpret_cast<uint4*>(q + row * kRowStride + byte) =
        first_row + row < p.rows ? *reinterpret_cast<const uint4*>(source + byte) : make_uint4(0, 0, 0, 0);
  }
  barrier_wait(barrier, 0);
  __syncthreads();

  const int score_stride = layout.block_keys + 4, probability_stride = layout.block_keys + 8;
  scores<RowTiles>(q, k, score, padded_keys, score_stride);
  __syncthreads();
  send_softmax<PaddedRows>(score, probability, inbox_stats, keys, padded_keys, score_stride, probability_stride);
  __syncthreads();
  send_values<RowTiles>(reinterpret_cast<const unsigned char*>(probability), v, inbox, padded_keys,
                        probability_stride * 2);
  cluster.sync();
  merge<RowTiles>(p, inbox, inbox_stats, head, first_row, blockIdx.x);
#endif
}

template <int RowTiles>
int plan(Layout* layout, int capacity) {
  constexpr int PaddedRows = 16 * RowTiles;
  layout->block_keys = round_up((capacity + kSplits - 1) / kSplits, 16);
  const int k_bytes = layout->block_keys * kRowStride;
  layout->q_offset = 0;
  layout->k_offset = PaddedRows * kRowStride;
  layout->v_offset = layout->k_offset + k_bytes;
  layout->score_offset = layout->v_offset + k_bytes;
  layout->probability_offset =
      layout->score_offset + round_up(PaddedRows * (layout->block_keys + 4) * static_cast<int>(sizeof(float)), 16);
  layout->inbox_offset = layout->probability_offset + round_up(PaddedRows * (layout->block_keys + 8) * 2, 16);
  layout->barrier_offset =
      layout->inbox_offset + kSplits * PaddedRows * static_cast<int>(kColumns * sizeof(float) + sizeof(float2));
  return layout->barrier_offset + static_cast<int>(sizeof(uint64_t));
}

template <int RowTiles>
cudaError_t launch(const ExpertAttention& p, cudaStream_t stream) {
  Layout layout = {};
  const int bytes = plan<RowTiles>(&layout, p.capacity);
  auto kernel = expert_attention_kernel<RowTiles>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = kSplits;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(kSplits, p.heads, (p.rows + 16 * RowTiles - 1) / (16 * RowTiles));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, p, layout);
}

}  // namespace

cudaError_t expert_attention(const ExpertAttention& p, cudaStream_t stream) {
  int device = 0, major = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess) return status;
  if (major < 9) return cudaErrorNotSupported;  // clusters and the bulk copy engine
  if (p.rows < 1 || p.rows > kSkinnyMaxRows || p.kv_heads < 1 || p.heads % p.kv_heads != 0 || p.capacity < p.rows)
    return cudaErrorInvalidValue;
  if (!aligned_to_16_bytes(p.q) || !aligned_to_16_bytes(p.k_cache) || !aligned_to_16_bytes(p.v_cache))
    return cudaErrorMisalignedAddress;
  return p.rows <= 16 ? launch<1>(p, stream) : launch<2>(p, stream);
}

}  // namespace flashrt
