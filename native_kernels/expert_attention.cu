// Attention of the action expert: a few query rows (1-64 a head) over the whole K/V cache, head_dim 256.
//   out = softmax(q k^T / 16) v over keys [0, prefix_length + rows), prefix_length on the device
//
// Bytes moved: 2 * keys * 512 a kv head from L2 or memory, read once by every query head: 570 keys x 8 heads is
// 4.7 MB of L2 reads; q and out are small. No floor to speak of: the work is latency, about 2 us.
//
// How: one cluster of 8 blocks a head, each block takes an eighth of the keys. K and V of the prefix are copied to
// shared memory before the kernel in front has finished (they do not change over the denoise steps); only the
// suffix's rows wait for it. The partial results meet through distributed shared memory, in a fixed order.
// Without clusters (`scratch`; one kv head): a block takes 16 of the rows * heads queries, which read the same keys,
// and up to 64 keys (82 KB of shared memory), and leaves its partial result in memory; the last block of a tile merges
// them.
#include "attention_tiles.cuh"
#include "dependent_launch.h"
#include "expert.h"

namespace flashrt {
namespace {

using attention::kHeadDim;
using attention::kThreads;

constexpr int kSplits = 8;
constexpr int kPartKeys = 64, kPartRows = 16;
constexpr int kPartFloats = attention::inbox_floats(1, kPartRows);
// Scratch: how many blocks of each tile have come, for any number of rows; then the partial results, tile by tile.
constexpr int kMaxTiles = 1024, kCounterBytes = kMaxTiles * 4;

template <int RowTiles>
__global__ void __launch_bounds__(kThreads)
    expert_attention_kernel(const ExpertAttention p, const attention::Layout layout) {
#if FLASHRT_DEVICE_HAS_BULK
  constexpr int PaddedRows = 16 * RowTiles;
  extern __shared__ __align__(128) unsigned char shared[];
  const int split = blockIdx.x, head = blockIdx.y, first_row = blockIdx.z * PaddedRows;
  const int kv_head = head / (p.heads / p.kv_heads), rows = p.rows - first_row;
  const attention::Share share(split, kSplits, *p.prefix_length, p.rows, p.capacity);
  const int64_t row_elements = int64_t(p.kv_heads) * kHeadDim, q_row_elements = int64_t(p.heads) * kHeadDim;
  const __nv_bfloat16* k = static_cast<const __nv_bfloat16*>(p.k_cache) + kv_head * kHeadDim;
  const __nv_bfloat16* v = static_cast<const __nv_bfloat16*>(p.v_cache) + kv_head * kHeadDim;
  const float inverse_scale = p.fp8_out ? 1.0f / *p.out_scale : 1.0f;

  attention::load_prefix(shared + layout.k, shared + layout.v, k, v, row_elements, share);
  attention::cg::this_cluster().sync();  // every block has started: its inbox may be written from now on
  dependency_wait();
  dependency_release();

  const int64_t q_offset = first_row * q_row_elements + head * kHeadDim;
  attention::load_suffix<RowTiles>(shared, layout, static_cast<const __nv_bfloat16*>(p.q) + q_offset, rows,
                                   q_row_elements, k, v, row_elements, share);
  async_copy_wait();
  __syncthreads();
  const int64_t out_offset = (q_offset + split * (kHeadDim / kSplits)) * (p.fp8_out ? 1 : 2);
  attention::ClusterExchange exchange{split, reinterpret_cast<float*>(shared + layout.inbox)};
  attention::attend<kSplits, RowTiles>(shared, layout, share, exchange, rows);
  exchange.sync();
  attention::merge<kSplits, RowTiles>(exchange.inbox(split), rows, static_cast<unsigned char*>(p.out) + out_offset,
                                      q_row_elements, p.fp8_out, inverse_scale);
#endif
}

__global__ void __launch_bounds__(kThreads, 2)
    expert_attention_parts_kernel(const ExpertAttention p, const attention::Layout layout) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ bool last;
  const int part = blockIdx.x, tile = blockIdx.y, parts = gridDim.x, queries = p.rows * p.heads;
  const attention::Share share(part, parts, *p.prefix_length, p.rows, p.capacity);
  const __nv_bfloat16* k = static_cast<const __nv_bfloat16*>(p.k_cache);
  const __nv_bfloat16* v = static_cast<const __nv_bfloat16*>(p.v_cache);
  const int64_t first = int64_t(tile) * kPartRows * kHeadDim;
  const float inverse_scale = p.fp8_out ? 1.0f / *p.out_scale : 1.0f;
  unsigned* counter = static_cast<unsigned*>(p.scratch) + tile;
  float* inboxes = static_cast<float*>(p.scratch) + kMaxTiles + int64_t(tile) * parts * kPartFloats;

  attention::load_prefix(shared + layout.k, shared + layout.v, k, v, kHeadDim, share);
  dependency_wait();
  dependency_release();
  const int rows = queries - tile * kPartRows;
  if (share.keys > 0) {
    const __nv_bfloat16* q = static_cast<const __nv_bfloat16*>(p.q) + first;
    attention::load_suffix<1>(shared, layout, q, rows, kHeadDim, k, v, kHeadDim, share);
  }
  async_copy_wait();
  __syncthreads();
  if (share.keys > 0) {
    const attention::OwnInbox exchange{inboxes + int64_t(part) * kPartFloats};
    attention::attend<1, 1>(shared, layout, share, exchange, rows);
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(counter, parts - 1) == static_cast<unsigned>(parts - 1);  // and zero again
  __syncthreads();
  if (!last) return;
  __threadfence();
  unsigned char* out = static_cast<unsigned char*>(p.out) + first * (p.fp8_out ? 1 : 2);
  float* weight = reinterpret_cast<float*>(shared + layout.k);  // nobody reads keys any more
  attention::merge_parts(inboxes, share.active, rows, weight, out, p.fp8_out, inverse_scale);
}

int parts_of(int capacity) { return (capacity + kPartKeys - 1) / kPartKeys; }
int tiles_of(int rows, int heads) { return (rows * heads + kPartRows - 1) / kPartRows; }

cudaError_t launch_parts(const ExpertAttention& p, int shared_limit, cudaStream_t stream) {
  const int parts = parts_of(p.capacity);
  const attention::Layout layout(kPartRows, p.capacity, parts);
  const int bytes = layout.inbox;
  if (tiles_of(p.rows, p.heads) > kMaxTiles) return cudaErrorInvalidValue;
  if (p.kv_heads != 1 || bytes > shared_limit || !aligned_to_16_bytes(p.scratch)) return cudaErrorInvalidValue;
  auto kernel = expert_attention_parts_kernel;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  return launch_dependent(kernel, dim3(parts, tiles_of(p.rows, p.heads)), dim3(kThreads), bytes, stream, p, layout);
}

int cluster_bytes(const attention::Layout& layout, int padded_rows) {
  return layout.inbox + attention::inbox_floats(kSplits, padded_rows) * static_cast<int>(sizeof(float));
}

template <int RowTiles>
cudaError_t launch(const ExpertAttention& p, int shared_limit, cudaStream_t stream) {
  const attention::Layout layout(16 * RowTiles, p.capacity, kSplits);
  const int bytes = cluster_bytes(layout, 16 * RowTiles);
  if (bytes > shared_limit) return cudaErrorNotSupported;
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

int64_t expert_attention_bytes(int rows, int heads, int capacity) {
  return kCounterBytes + int64_t(tiles_of(rows, heads)) * parts_of(capacity) * kPartFloats * int64_t(sizeof(float));
}

bool expert_attention_in_clusters(int rows, int capacity) {
  DeviceLimits limits = {};
  if (device_limits(&limits) != cudaSuccess || limits.capability < 90) return false;
  const int padded_rows = rows <= 16 ? 16 : 32;
  return cluster_bytes(attention::Layout(padded_rows, capacity, kSplits), padded_rows) <= limits.shared_bytes;
}

cudaError_t expert_attention(const ExpertAttention& p, cudaStream_t stream) {
  DeviceLimits limits = {};
  const cudaError_t status = device_limits(&limits);
  if (status != cudaSuccess) return status;
  if (p.scratch == nullptr && limits.capability < 90) return cudaErrorNotSupported;  // clusters
  if (p.rows < 1 || p.rows > kSkinnyMaxRows || p.kv_heads < 1 || p.heads % p.kv_heads != 0 || p.capacity < p.rows)
    return cudaErrorInvalidValue;
  if (!aligned_to_16_bytes(p.q) || !aligned_to_16_bytes(p.k_cache) || !aligned_to_16_bytes(p.v_cache) ||
      !aligned_to_16_bytes(p.out))
    return cudaErrorInvalidValue;
  if (p.scratch != nullptr) return launch_parts(p, limits.shared_bytes, stream);
  return p.rows <= 16 ? launch<1>(p, limits.shared_bytes, stream) : launch<2>(p, limits.shared_bytes, stream);
}

}  // namespace flashrt
