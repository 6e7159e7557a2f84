// y = norm(x) W^T for few rows (1-64), with everything around the product fused: the action expert's four GEMMs.
//   prologue  kPlain: x is already in the weights' type        kNorm: RMSNorm / adaRMS of bf16 rows, then quantised
//   epilogue  kStore: bf16 (+ bias)        kResidual: out += gate * y, in place on the bf16 residual
//             kGeglu: gelu(gate) * up, quantised            kRope: rotary q and k; k, v into the cache, q to `out`
// Weights are fp8 e4m3 with one scale, or bf16; packed by ops/expert.py into tiles of 8 features x 64 bytes of k, so
// that a block's whole share is one contiguous piece.
//
// Bytes moved: N * K * sizeof(weight), each once; activations and outputs are small and stay in L2. Floor on H200 at
// 4.3 TB/s, fp8: qkv 2560x1024 0.6 us, out 1024x2048 0.5 us, gate+up 8192x1024 2.0 us, down 1024x4096 1.0 us.
//
// How: every block copies its weights into shared memory with the bulk copy engine before it waits for the kernel in
// front of it (programmatic dependent launch), so the weight stream does not stop at kernel boundaries. The tensor
// cores see the activations as A (16 rows) and 8 features as B; the warps of a block split k and add up in shared
// memory in a fixed order, so results are bit-identical from run to run.
#include "expert.h"
#include "hopper.cuh"
#include "vector.cuh"

namespace flashrt {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTileFeatures = 8;
constexpr int kBlockBytes = 64;                          // bytes of k per tensor-core step pair
constexpr int kTileBytes = kTileFeatures * kBlockBytes;  // one tile, one k block
constexpr int kRowPad = 64;                              // keeps 16-byte row reads free of bank conflicts
constexpr int kMaxNormWidth = 1024;
constexpr int kNormVectors = kMaxNormWidth / (kWarpSize * 8);
constexpr float kE4m3Max = 448.0f;

struct Layout {
  int k_bytes;         // bytes of one weight row
  int units;           // independent groups of tiles over the whole product
  int units_per_block;
  int x_offset, sum_offset, barrier_offset;  // in dynamic shared memory; the weights come first
};

__device__ __forceinline__ uint8_t to_e4m3(float value) {
  return __nv_cvt_float_to_fp8(fminf(fmaxf(value, -kE4m3Max), kE4m3Max), __NV_SATFINITE, __NV_E4M3);
}

template <bool Fp8>
__device__ __forceinline__ void mma_pair(float (&d)[4], uint4 low, uint4 high, uint4 b) {
  // the 16 bytes a thread holds are k-permuted alike in A and B, which a sum over k does not notice
  if constexpr (Fp8) {
    mma_e4m3(d, low.x, high.x, low.y, high.y, b.x, b.y);
    mma_e4m3(d, low.z, high.z, low.w, high.w, b.z, b.w);
  } else {
    mma_bf16(d, low.x, high.x, low.y, high.y, b.x, b.y);
    mma_bf16(d, low.z, high.z, low.w, high.w, b.z, b.w);
  }
}

// Normalise rows [0, padded_rows) of x into shared memory in the weights' type; rows past the end become zero.
template <bool Fp8>
__device__ void norm_rows(const SkinnyGemm& p, unsigned char* x_shared, int row_stride, int padded_rows) {
  const int lane = threadIdx.x % kWarpSize;
  const int vectors = p.k / (kWarpSize * 8);
  const float quantise = Fp8 ? 1.0f / *p.x_scale : 1.0f;
  for (int row = threadIdx.x / kWarpSize; row < padded_rows; row += kWarps) {
    using Eight = Vector<__nv_bfloat16, 8>;
    Eight values[kNormVectors];
    float squares = 0.0f;
    if (row < p.rows) {
      const Eight* source = reinterpret_cast<const Eight*>(static_cast<const __nv_bfloat16*>(p.x) + int64_t(row) * p.k);
#pragma unroll
      for (int v = 0; v < kNormVectors; ++v) {
        if (v >= vectors) break;
        values[v] = source[v * kWarpSize + lane];
#pragma unroll
        for (int i = 0; i < 8; ++i) squares += to_float(values[v].element[i]) * to_float(values[v].element[i]);
      }
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    const float inverse = rsqrtf(squares / p.k + p.eps);
#pragma unroll
    for (int v = 0; v < kNormVectors; ++v) {
      if (v >= vectors) break;
      const int column = (v * kWarpSize + lane) * 8;
      Eight normed;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float value = 0.0f;
        if (row < p.rows) {
          value = to_float(values[v].element[i]) * inverse * (1.0f + p.norm_scale[column + i]);
          if (p.norm_shift != nullptr) value += p.norm_shift[column + i];
        }
        normed.element[i] = from_float<__nv_bfloat16>(value);
      }
      if constexpr (Fp8) {
        Vector<uint8_t, 8> packed;
#pragma unroll
        for (int i = 0; i < 8; ++i) packed.element[i] = to_e4m3(to_float(normed.element[i]) * quantise);
        *reinterpret_cast<Vector<uint8_t, 8>*>(x_shared + row * row_stride + column) = packed;
      } else {
        *reinterpret_cast<Eight*>(x_shared + row * row_stride + column * 2) = normed;
      }
    }
  }
}

// 16 bytes of a row of x from global memory, zero past the last row.
__device__ __forceinline__ uint4 global_row(const SkinnyGemm& p, int row, int byte, int k_bytes) {
  if (row >= p.rows) return make_uint4(0, 0, 0, 0);
  return *reinterpret_cast<const uint4*>(static_cast<const unsigned char*>(p.x) + int64_t(row) * k_bytes + byte);
}

template <bool Fp8>
__device__ __forceinline__ void store_quantised(void* out, int64_t index, float value, float inverse_scale) {
  const __nv_bfloat16 rounded = from_float<__nv_bfloat16>(value);
  if constexpr (Fp8) {
    static_cast<uint8_t*>(out)[index] = to_e4m3(to_float(rounded) * inverse_scale);
  } else {
    static_cast<__nv_bfloat16*>(out)[index] = rounded;
  }
}

// One output element (two for the paired epilogues): m is the row, `column` the feature within the unit's tile.
template <bool Fp8, SkinnyEpilogue E>
__device__ __forceinline__ void finish(const SkinnyGemm& p, int unit, int m, int column, float first, float second) {
  __nv_bfloat16* out = static_cast<__nv_bfloat16*>(p.out);
  if constexpr (E == SkinnyEpilogue::kStore || E == SkinnyEpilogue::kResidual) {
    const int n = unit * kTileFeatures + column;
    const int64_t index = int64_t(m) * p.n + n;
    if constexpr (E == SkinnyEpilogue::kStore) {
      if (p.bias != nullptr) first += p.bias[n];
      out[index] = from_float<__nv_bfloat16>(first);
    } else {
      const float gate = p.gate != nullptr ? p.gate[n] : 1.0f;
      out[index] = from_float<__nv_bfloat16>(to_float(out[index]) + gate * first);
    }
  } else if constexpr (E == SkinnyEpilogue::kGeglu) {
    const int n = unit * kTileFeatures + column;
    const float inverse_scale = Fp8 ? 1.0f / *p.out_scale : 1.0f;
    store_quantised<Fp8>(p.out, int64_t(m) * (p.n / 2) + n, gelu_tanh(first) * second, inverse_scale);
  } else {
    const int half = p.head_dim / 2, units_per_head = half / kTileFeatures;
    const int head = unit / units_per_head, d = unit % units_per_head * kTileFeatures + column;
    const int position = *p.prefix_length + m;
    if (head < p.heads + p.kv_heads) {
      const float cosine = p.rope_cos[position * half + d], sine = p.rope_sin[position * half + d];
      const float rotated = first * cosine - second * sine;
      second = second * cosine + first * sine;
      first = rotated;
    }
    __nv_bfloat16* target;
    if (head < p.heads) {
      target = out + (int64_t(m) * p.heads + head) * p.head_dim;
    } else if (head < p.heads + p.kv_heads) {
      target = static_cast<__nv_bfloat16*>(p.k_cache) + (int64_t(position) * p.kv_heads + head - p.heads) * p.head_dim;
    } else {
      target = static_cast<__nv_bfloat16*>(p.v_cache) +
               (int64_t(position) * p.kv_heads + head - p.heads - p.kv_heads) * p.head_dim;
    }
    target[d] = from_float<__nv_bfloat16>(first);
    target[d + half] = from_float<__nv_bfloat16>(second);
  }
}

template <bool Fp8, int RowTiles, bool Norm, SkinnyEpilogue E>
__global__ void __launch_bounds__(kThreads) skinny_gemm_kernel(const SkinnyGemm p, const Layout layout) {
  constexpr int Tiles = E == SkinnyEpilogue::kGeglu || E == SkinnyEpilogue::kRope ? 2 : 1;
  constexpr int PaddedRows = 16 * RowTiles;
  extern __shared__ __align__(128) unsigned char shared[];
  unsigned char* weights = shared;
  unsigned char* x_shared = shared + layout.x_offset;
  float* sums = reinterpret_cast<float*>(shared + layout.sum_offset);
  uint64_t* barriers = reinterpret_cast<uint64_t*>(shared + layout.barrier_offset);

  const int first_unit = blockIdx.x * layout.units_per_block;
  const int units = min(layout.units_per_block, layout.units - first_unit);
  const int unit_bytes = Tiles * kTileFeatures * layout.k_bytes;
  const unsigned char* source = static_cast<const unsigned char*>(p.weights) + int64_t(first_unit) * unit_bytes;
#if FLASHRT_DEVICE_HAS_BULK
  if (threadIdx.x == 0) {
    for (int u = 0; u < units; ++u) barrier_init(barriers + u, 1);
    barrier_init_fence();
    for (int u = 0; u < units; ++u) {
      barrier_expect(barriers + u, unit_bytes);
      bulk_copy(weights + u * unit_bytes, source + int64_t(u) * unit_bytes, unit_bytes, barriers + u);
    }
  }
#else
  for (int byte = threadIdx.x * 16; byte < units * unit_bytes; byte += kThreads * 16) {
    async_copy16(weights + byte, source + byte);
  }
  async_copy_wait();
#endif
  __syncthreads();
  dependency_wait();
  dependency_release();

  const int row_stride = layout.k_bytes + kRowPad;
  if constexpr (Norm) {
    norm_rows<Fp8>(p, x_shared, row_stride, PaddedRows);
    __syncthreads();
  }

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int warps_per_unit = kWarps / layout.units_per_block;
  const int unit = warp / warps_per_unit, part = warp % warps_per_unit;
  const int k_blocks = layout.k_bytes / kBlockBytes;
  const int begin = k_blocks * part / warps_per_unit, end = k_blocks * (part + 1) / warps_per_unit;
  float accumulator[RowTiles][Tiles][4] = {};
  if (unit < units) {
    const int row = lane / 4, byte_in_block = lane % 4 * 16;
    const unsigned char* tile = weights + unit * unit_bytes + lane * 16;
#if FLASHRT_DEVICE_HAS_BULK
    if constexpr (Norm) barrier_wait(barriers + unit, 0);
#endif
#pragma unroll 4
    for (int block = begin; block < end; ++block) {
      uint4 low[RowTiles], high[RowTiles];
#pragma unroll
      for (int r = 0; r < RowTiles; ++r) {
        const int byte = block * kBlockBytes + byte_in_block;
        if constexpr (Norm) {
          low[r] = *reinterpret_cast<const uint4*>(x_shared + (r * 16 + row) * row_stride + byte);
          high[r] = *reinterpret_cast<const uint4*>(x_shared + (r * 16 + row + 8) * row_stride + byte);
        } else {
          low[r] = global_row(p, r * 16 + row, byte, layout.k_bytes);
          high[r] = global_row(p, r * 16 + row + 8, byte, layout.k_bytes);
        }
      }
#if FLASHRT_DEVICE_HAS_BULK
      if constexpr (!Norm) barrier_wait(barriers + unit, 0);
#endif
#pragma unroll
      for (int t = 0; t < Tiles; ++t) {
        const uint4 b = *reinterpret_cast<const uint4*>(tile + (t * k_blocks + block) * kTileBytes);
#pragma unroll
        for (int r = 0; r < RowTiles; ++r) mma_pair<Fp8>(accumulator[r][t], low[r], high[r], b);
      }
    }
  }

  constexpr int UnitElements = PaddedRows * kTileFeatures;
  float* own = sums + warp * Tiles * UnitElements;
#pragma unroll
  for (int t = 0; t < Tiles; ++t) {
#pragma unroll
    for (int r = 0; r < RowTiles; ++r) {
      float* target = own + t * UnitElements + (r * 16 + lane / 4) * kTileFeatures + lane % 4 * 2;
      *reinterpret_cast<float2*>(target) = make_float2(accumulator[r][t][0], accumulator[r][t][1]);
      *reinterpret_cast<float2*>(target + 8 * kTileFeatures) =
          make_float2(accumulator[r][t][2], accumulator[r][t][3]);
    }
  }
  __syncthreads();

  const float scale = Fp8 ? *p.x_scale * *p.w_scale : 1.0f;
  for (int index = threadIdx.x; index < units * UnitElements; index += kThreads) {
    const int local_unit = index / UnitElements, element = index % UnitElements;
    const int m = element / kTileFeatures;
    if (m >= p.rows) continue;
    float total[Tiles] = {};
    for (int w = 0; w < warps_per_unit; ++w) {
      const float* part_sums = sums + (local_unit * warps_per_unit + w) * Tiles * UnitElements + element;
#pragma unroll
      for (int t = 0; t < Tiles; ++t) total[t] += part_sums[t * UnitElements];
    }
    finish<Fp8, E>(p, first_unit + local_unit, m, element % kTileFeatures, total[0] * scale,
                   total[Tiles - 1] * scale);
  }
}

struct DeviceLimits {
  int multiprocessors, shared_bytes, major, minor;
};

cudaError_t device_limits(DeviceLimits* limits) {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&limits->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&limits->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&limits->major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&limits->minor, cudaDevAttrComputeCapabilityMinor, device);
  return status;
}

// Shared memory of a block that takes `units_per_block` units; fills the layout's offsets.
int plan(Layout* layout, int units_per_block, int tiles, int padded_rows, bool norm) {
  layout->units_per_block = units_per_block;
  layout->x_offset = units_per_block * tiles * kTileFeatures * layout->k_bytes;
  layout->sum_offset = layout->x_offset + (norm ? padded_rows * (layout->k_bytes + kRowPad) : 0);
  layout->barrier_offset =
      layout->sum_offset + kWarps * tiles * padded_rows * kTileFeatures * static_cast<int>(sizeof(float));
  return layout->barrier_offset + units_per_block * static_cast<int>(sizeof(uint64_t));
}

template <bool Fp8, int RowTiles, bool Norm, SkinnyEpilogue E>
cudaError_t launch(const SkinnyGemm& p, cudaStream_t stream) {
  constexpr int Tiles = E == SkinnyEpilogue::kGeglu || E == SkinnyEpilogue::kRope ? 2 : 1;
  DeviceLimits limits;
  cudaError_t status = device_limits(&limits);
  if (status != cudaSuccess) return status;
  if (Fp8 && limits.major * 10 + limits.minor < 89) return cudaErrorNotSupported;
  Layout layout = {};
  layout.k_bytes = p.k * (Fp8 ? 1 : 2);
  layout.units = p.n / (Tiles * kTileFeatures);
  // the fewest units a block that still fit the product on the chip at once
  int units_per_block = 1;
  while (units_per_block < kWarps && (layout.units + units_per_block - 1) / units_per_block > limits.multiprocessors * 5 / 4)
    units_per_block *= 2;
  int bytes = plan(&layout, units_per_block, Tiles, 16 * RowTiles, Norm);
  while (bytes > limits.shared_bytes && units_per_block > 1) {
    units_per_block /= 2;
    bytes = plan(&layout, units_per_block, Tiles, 16 * RowTiles, Norm);
  }
  if (bytes > limits.shared_bytes) return cudaErrorInvalidValue;

  auto kernel = skinny_gemm_kernel<Fp8, RowTiles, Norm, E>;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((layout.units + units_per_block - 1) / units_per_block);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = limits.major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, p, layout);
}

template <bool Fp8, bool Norm, SkinnyEpilogue E>
cudaError_t launch_rows(const SkinnyGemm& p, cudaStream_t stream) {
  if (p.rows <= 16) return launch<Fp8, 1, Norm, E>(p, stream);
  if (p.rows <= 32) return launch<Fp8, 2, Norm, E>(p, stream);
  return launch<Fp8, 4, Norm, E>(p, stream);
}

template <bool Fp8>
cudaError_t launch_fused(const SkinnyGemm& p, cudaStream_t stream) {
  const bool norm = p.norm_scale != nullptr;
  switch (p.epilogue) {
    case SkinnyEpilogue::kStore:
      return norm ? launch_rows<Fp8, true, SkinnyEpilogue::kStore>(p, stream)
                  : launch_rows<Fp8, false, SkinnyEpilogue::kStore>(p, stream);
    case SkinnyEpilogue::kResidual:
      return norm ? cudaErrorInvalidValue : launch_rows<Fp8, false, SkinnyEpilogue::kResidual>(p, stream);
    case SkinnyEpilogue::kGeglu:
      return norm ? launch_rows<Fp8, true, SkinnyEpilogue::kGeglu>(p, stream) : cudaErrorInvalidValue;
    case SkinnyEpilogue::kRope:
      return norm ? launch_rows<Fp8, true, SkinnyEpilogue::kRope>(p, stream) : cudaErrorInvalidValue;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t skinny_gemm(const SkinnyGemm& p, cudaStream_t stream) {
  const int element_bytes = p.fp8 ? 1 : 2;
  const bool norm = p.norm_scale != nullptr;
  const bool pairs = p.epilogue == SkinnyEpilogue::kGeglu || p.epilogue == SkinnyEpilogue::kRope;
  if (p.rows < 1 || p.rows > kSkinnyMaxRows || p.k * element_bytes % kBlockBytes != 0 || p.n < 1 ||
      p.n % (pairs ? 2 * kTileFeatures : kTileFeatures) != 0)
    return cudaErrorInvalidValue;
  if (norm && (p.k > kMaxNormWidth || p.k % (kWarpSize * 8) != 0)) return cudaErrorInvalidValue;
  if (p.epilogue == SkinnyEpilogue::kRope && p.head_dim % (2 * kTileFeatures) != 0) return cudaErrorInvalidValue;
  if (!aligned_to_16_bytes(p.x) || !aligned_to_16_bytes(p.weights)) return cudaErrorMisalignedAddress;
  return p.fp8 ? launch_fused<true>(p, stream) : launch_fused<false>(p, stream);
}

}  // namespace flashrt
