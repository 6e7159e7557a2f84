// y = norm(x) W^T for few rows (1-64), with everything around the product fused: the action expert's four GEMMs, and
// with x quantised beforehand those of a language model that decodes one token.
//   input     kPlain: x is already in the weights' type        kWide: fp16 beside e4m3 weights
//             kNorm: bf16, RMSNorm / adaRMS by every block, up to 16 rows; more are normed once, by row_norm.cu
//   epilogue  kStore: bf16 (+ bias)        kResidual: out += gate * y, in place on the bf16 residual
//             kGeglu: gelu(gate) * up, quantised            kRope: rotary q and k; k, v into the cache, q to `out`
// Weights are fp8 e4m3 with one scale, or bf16; packed by ops/expert.py into tiles of 8 features x 64 bytes of k, so
// that a block's whole share is one contiguous piece.
//
// Bytes moved: N * K * sizeof(weight), each once; activations and outputs are small and stay in L2. Floor on H200 at
// 4.3 TB/s, fp8: qkv 2560x1024 0.6 us, out 1024x2048 0.5 us, gate+up 8192x1024 2.0 us, down 1024x4096 1.0 us; of
// Gemma-2B: qkv 2560x2048 1.2 us, out 2048x2048 1.0 us, gate+up 32768x2048 15.6 us, down 2048x16384 7.8 us.
//
// How: every block copies its weights into shared memory with the bulk copy engine before it waits for the kernel in
// front of it (programmatic dependent launch), so the weight stream does not stop at kernel boundaries. The tensor
// cores see the activations as A (16 rows) and 8 features as B; the warps of a block split k and add up in shared
// memory in a fixed order, so results are bit-identical from run to run. A product too large for that streams its
// weights from memory instead.
#include "device_limits.h"
#include "skinny_epilogue.cuh"
#include "skinny_product.cuh"

namespace flashrt {
namespace {

using namespace skinny;

constexpr int kStreamedBlocks = 2;  // a multiprocessor, of a product whose weights do not fit on the chip

template <bool Fp8, int RowTiles, Input I, SkinnyEpilogue E, bool Streamed>
__global__ void __launch_bounds__(kThreads, Streamed ? kStreamedBlocks : 1)
    skinny_gemm_kernel(const SkinnyGemm p, const Layout layout) {
  constexpr int Tiles = E == SkinnyEpilogue::kGeglu || E == SkinnyEpilogue::kRope ? 2 : 1;
  constexpr int PaddedRows = 16 * RowTiles;
  constexpr bool Norm = I == Input::kNorm;
  extern __shared__ __align__(128) unsigned char shared[];
  unsigned char* weights = shared;
  unsigned char* x_shared = shared + layout.x_offset;
  float* sums = reinterpret_cast<float*>(shared + layout.sum_offset);
  [[maybe_unused]] uint64_t* barriers = reinterpret_cast<uint64_t*>(shared + layout.barrier_offset);

  const int first_unit = blockIdx.x * layout.units_per_block;
  const int units = min(layout.units_per_block, layout.units - first_unit);
  const int unit_bytes = Tiles * kTileFeatures * layout.k_bytes;
  const unsigned char* source = static_cast<const unsigned char*>(p.weights) + int64_t(first_unit) * unit_bytes;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int warps_per_unit = kWarps / layout.units_per_block;
  const int unit = warp / warps_per_unit, part = warp % warps_per_unit;
  const int k_blocks = layout.k_bytes / kBlockBytes;
  const int begin = k_blocks * part / warps_per_unit, end = k_blocks * (part + 1) / warps_per_unit;
  if constexpr (Streamed) {
    if (unit < units) prefetch_streamed<Tiles>(layout, source + int64_t(unit) * unit_bytes, begin, end);
  } else {
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
  }
  constexpr bool Rope = E == SkinnyEpilogue::kRope;
  constexpr int UnitElements = PaddedRows * kTileFeatures;
  constexpr int kAhead = 2;  // outputs of a thread whose operands are read ahead
  Operands ahead[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int index = threadIdx.x + i * kThreads;
    const Element e(p, Rope, first_unit + index / UnitElements, index % UnitElements);
    if (index < units * UnitElements && e.m < p.rows) load_constant<E>(p, e, ahead[i]);
  }
  const float scale = Fp8 ? (I == Input::kPlain ? *p.x_scale : 1.0f) * *p.w_scale : 1.0f;
  const float inverse_out_scale = Fp8 && E == SkinnyEpilogue::kGeglu ? 1.0f / *p.out_scale : 1.0f;
  [[maybe_unused]] NormStyle style;
  if constexpr (Norm) {
    load_style(p, style);
    for (int byte = threadIdx.x * 16; byte < (PaddedRows - p.rows) * layout.x_stride; byte += kThreads * 16)
      *reinterpret_cast<uint4*>(x_shared + p.rows * layout.x_stride + byte) = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();
  dependency_wait();
  dependency_release();

#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int index = threadIdx.x + i * kThreads;
    const Element e(p, Rope, first_unit + index / UnitElements, index % UnitElements);
    if (index < units * UnitElements && e.m < p.rows) load_residual<E>(p, e, ahead[i]);
  }
  if constexpr (Norm) {
    norm_rows<Fp8>(p, style, x_shared, layout.x_stride);
    __syncthreads();
  }

  float accumulator[RowTiles][Tiles][4] = {};
  if (unit < units && Streamed) {
    const unsigned char* tile = source + int64_t(unit) * unit_bytes + lane * 16;
    accumulate_streamed<Fp8, RowTiles, Tiles>(p, layout, tile, begin, end, accumulator);
  } else if (unit < units) {
    const unsigned char* tile = weights + unit * unit_bytes + lane * 16;
    accumulate<Fp8, RowTiles, Tiles, I>(p, layout, x_shared, tile, barriers + unit, begin, end, accumulator);
  }

  float* own = sums + warp * Tiles * UnitElements;
#pragma unroll
  for (int t = 0; t < Tiles; ++t) {
#pragma unroll
    for (int r = 0; r < RowTiles; ++r) {
      float* target = own + t * UnitElements + (r * 16 + lane / 4) * kTileFeatures + lane % 4 * 2;
      *reinterpret_cast<float2*>(target) = make_float2(accumulator[r][t][0], accumulator[r][t][1]);
      *reinterpret_cast<float2*>(target + 8 * kTileFeatures) = make_float2(accumulator[r][t][2], accumulator[r][t][3]);
    }
  }
  __syncthreads();

#pragma unroll kAhead
  for (int i = 0; i * kThreads < units * UnitElements; ++i) {
    const int index = threadIdx.x + i * kThreads;
    const int local_unit = index / UnitElements, element = index % UnitElements;
    const Element e(p, Rope, first_unit + local_unit, element);
    if (index >= units * UnitElements || e.m >= p.rows) continue;
    Operands operands;
    if (i < kAhead) {
      operands = i == 0 ? ahead[0] : ahead[1];
    } else {
      load_constant<E>(p, e, operands);
      load_residual<E>(p, e, operands);
    }
    float total[Tiles] = {};
    for (int w = 0; w < warps_per_unit; ++w) {
      const float* part_sums = sums + (local_unit * warps_per_unit + w) * Tiles * UnitElements + element;
#pragma unroll
      for (int t = 0; t < Tiles; ++t) total[t] += part_sums[t * UnitElements];
    }
    finish<Fp8, E>(p, e, operands, total[0] * scale, total[Tiles - 1] * scale, inverse_out_scale);
  }
}

// Shared memory of a block that takes `units_per_block` units; fills the layout's offsets.
int plan(Layout* layout, int units_per_block, int tiles, int padded_rows, bool norm) {
  layout->units_per_block = units_per_block;
  layout->x_offset = units_per_block * tiles * kTileFeatures * layout->k_bytes;
  layout->sum_offset = layout->x_offset + (norm ? padded_rows * layout->x_stride : 0);
  layout->barrier_offset =
      layout->sum_offset + kWarps * tiles * padded_rows * kTileFeatures * static_cast<int>(sizeof(float));
  return layout->barrier_offset + units_per_block * static_cast<int>(sizeof(uint64_t));
}

template <bool Fp8, int RowTiles, Input I, SkinnyEpilogue E, bool Streamed>
cudaError_t launch_planned(const SkinnyGemm& p, const Layout& layout, int bytes, bool dependent, cudaStream_t stream) {
  auto kernel = skinny_gemm_kernel<Fp8, RowTiles, I, E, Streamed>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((layout.units + layout.units_per_block - 1) / layout.units_per_block);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, p, layout);
}

template <bool Fp8, int RowTiles, Input I, SkinnyEpilogue E>
cudaError_t launch(const SkinnyGemm& p, cudaStream_t stream) {
  constexpr int Tiles = E == SkinnyEpilogue::kGeglu || E == SkinnyEpilogue::kRope ? 2 : 1;
  DeviceLimits limits = {};
  cudaError_t status = device_limits(&limits);
  if (status != cudaSuccess) return status;
  if (Fp8 && limits.capability < 89) return cudaErrorNotSupported;
  Layout layout = {};
  layout.k_bytes = p.k * (Fp8 ? 1 : 2);
  layout.x_stride = p.k * 2 + (Fp8 ? kRowPadFp16 : kRowPadBf16);
  layout.units = p.n / (Tiles * kTileFeatures);
  // the fewest units a block that still fit the product on the chip at once
  int units_per_block = 1;
  while (units_per_block < kWarps && (layout.units + units_per_block - 1) / units_per_block > limits.multiprocessors)
    units_per_block *= 2;
  constexpr bool Norm = I == Input::kNorm;
  int bytes = plan(&layout, units_per_block, Tiles, 16 * RowTiles, Norm);
  const bool dependent = limits.capability >= 90;
  if constexpr (RowTiles == 1 && I == Input::kPlain) {
    if (bytes > limits.shared_bytes) {
      const int resident = kStreamedBlocks * limits.multiprocessors;
      for (units_per_block = 1; units_per_block < kWarps; units_per_block *= 2)
        if ((layout.units + units_per_block - 1) / units_per_block <= resident) break;
      layout.units_per_block = units_per_block;
      layout.x_offset = layout.sum_offset = 0;
      layout.barrier_offset = kWarps * Tiles * 16 * kTileFeatures * static_cast<int>(sizeof(float));
      return launch_planned<Fp8, RowTiles, I, E, true>(p, layout, layout.barrier_offset, dependent, stream);
    }
  }
  while (bytes > limits.shared_bytes && units_per_block > 1) {
    units_per_block /= 2;
    bytes = plan(&layout, units_per_block, Tiles, 16 * RowTiles, Norm);
  }
  if (bytes > limits.shared_bytes) return cudaErrorInvalidValue;
  return launch_planned<Fp8, RowTiles, I, E, false>(p, layout, bytes, dependent, stream);
}

template <bool Fp8, Input I, SkinnyEpilogue E>
cudaError_t launch_rows(const SkinnyGemm& p, cudaStream_t stream) {
  if (p.rows <= 16) return launch<Fp8, 1, I, E>(p, stream);
  if (p.rows <= 32) return launch<Fp8, 2, I, E>(p, stream);
  return launch<Fp8, 4, I, E>(p, stream);
}

// Behind a norm: by the kernel itself, or before.
template <bool Fp8, SkinnyEpilogue E>
cudaError_t launch_normed(const SkinnyGemm& p, cudaStream_t stream) {
  if (p.norm_scale != nullptr)
    return p.rows <= kSkinnyMaxNormRows ? launch<Fp8, 1, Input::kNorm, E>(p, stream) : cudaErrorInvalidValue;
  if constexpr (Fp8)
    if (p.wide) return launch_rows<Fp8, Input::kWide, E>(p, stream);
  return launch_rows<Fp8, Input::kPlain, E>(p, stream);
}

template <bool Fp8>
cudaError_t launch_fused(const SkinnyGemm& p, cudaStream_t stream) {
  const bool plain = p.norm_scale == nullptr && !p.wide;
  switch (p.epilogue) {
    case SkinnyEpilogue::kStore:
      return plain ? launch_rows<Fp8, Input::kPlain, SkinnyEpilogue::kStore>(p, stream) : cudaErrorInvalidValue;
    case SkinnyEpilogue::kResidual:
      return plain ? launch_rows<Fp8, Input::kPlain, SkinnyEpilogue::kResidual>(p, stream) : cudaErrorInvalidValue;
    case SkinnyEpilogue::kGeglu:
      return launch_normed<Fp8, SkinnyEpilogue::kGeglu>(p, stream);
    case SkinnyEpilogue::kRope:
      return launch_normed<Fp8, SkinnyEpilogue::kRope>(p, stream);
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
  if (p.wide && (norm || !p.fp8)) return cudaErrorInvalidValue;
  if (norm && (p.k > kMaxNormWidth || p.k % (kWarpSize * 8) != 0)) return cudaErrorInvalidValue;
  if (p.epilogue == SkinnyEpilogue::kRope && p.head_dim % (2 * kTileFeatures) != 0) return cudaErrorInvalidValue;
  if (!aligned_to_16_bytes(p.x) || !aligned_to_16_bytes(p.weights) || !aligned_to_16_bytes(p.norm_scale) ||
      !aligned_to_16_bytes(p.norm_shift))
    return cudaErrorInvalidValue;
  return p.fp8 ? launch_fused<true>(p, stream) : launch_fused<false>(p, stream);
}

}  // namespace flashrt
