// Attention of the action expert: a few query rows (1-64 a head) over the whole K/V cache, head_dim 256.
//   out = softmax(q k^T / 16) v over keys [0, prefix_length + rows), prefix_length on the device
//
// Bytes moved: 2 * keys * 512 a kv head from L2 or memory, read once by every query head: 570 keys x 8 heads is
// 4.7 MB of L2 reads; q and out are small. No floor to speak of: the work is latency, about 2 us.
//
// How: one cluster of 8 blocks a head, each block takes an eighth of the keys. K and V of the prefix are copied to
// shared memory before the kernel in front has finished (they do not change over the denoise steps); only the
// suffix's rows wait for it. The partial results meet through distributed shared memory, in a fixed order.
#include "attention_tiles.cuh"
#include "expert.h"

namespace flashrt {
namespace {

using attention::kHeadDim;
using attention::kThreads;

constexpr int kSplits = 8;

template <int RowTiles>
__global__ void __launch_bounds__(kThreads)
    expert_attention_kernel(const ExpertAttention p, const attention::Layout layout) {
#if FLASHRT_DEVICE_HAS_BULK
  constexpr int PaddedRows = 16 * RowTiles;
  extern __shared__ __align__(128) unsigned char shared[];
  const int split = blockIdx.x, head = blockIdx.y, first_row = blockIdx.z * PaddedRows;
  const int kv_head = head / (p.heads / p.kv_heads), rows = p.rows - first_row;
  const attention::Share share(split, kSplits, *p.prefix_length, p.rows);
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
  attention::attend<kSplits, RowTiles>(shared, layout, share, exchange, rows,
                                       static_cast<unsigned char*>(p.out) + out_offset, q_row_elements, p.fp8_out,
                                       inverse_scale);
#endif
}

template <int RowTiles>
cudaError_t launch(const ExpertAttention& p, cudaStream_t stream) {
  const attention::Layout layout(16 * RowTiles, p.capacity, kSplits);
  const int bytes = layout.inbox + attention::inbox_floats(kSplits, 16 * RowTiles) * static_cast<int>(sizeof(float));
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
    return cudaErrorInvalidValue;
  return p.rows <= 16 ? launch<1>(p, stream) : launch<2>(p, stream);
}

}  // namespace flashrt
