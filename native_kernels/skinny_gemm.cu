// y = norm(x) W^T for few rows (1-64), with everything around the product fused: the action expert's four GEMMs, and
// with x quantised beforehand (kPlain, up to 16 rows) those of a language model that decodes one token.
//   prologue  kPlain: x is already in the weights' type        kNorm: RMSNorm / adaRMS of bf16 rows, then quantised
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
#include "expert.h"
#include "product_tiles.cuh"

namespace flashrt {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kStreamedBlocks = 2;  // a multiprocessor, of a product whose weights do not fit on the chip
constexpr int kMaxNormWidth = 1024;
constexpr int kNormVectors = kMaxNormWidth / (kWarpSize * 8);

struct Layout {
  int k_bytes;  // bytes of one weight row
  int units;    // independent groups of tiles over the whole product
  int units_per_block;
  int x_stride;                              // bytes of one normed row in shared memory
  int x_offset, sum_offset, barrier_offset;  // in dynamic shared memory; the weights come first
};

using Eight = Vector<__nv_bfloat16, 8>;

// This lane's part of the norm's scale and shift; constant over the steps, so it is read ahead of the wait.
struct NormStyle {
  float scale[kNormVectors][8], shift[kNormVectors][8];
};

__device__ __forceinline__ void load_style(const SkinnyGemm& p, NormStyle& style) {
#pragma unroll
  for (int v = 0; v < kNormVectors; ++v) {
    const int column = (v * kWarpSize + threadIdx.x % kWarpSize) * 8;
    if (column >= p.k) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 scale = *reinterpret_cast<const float4*>(p.norm_scale + column + half * 4);
      const float4 shift = p.norm_shift == nullptr ? make_float4(0, 0, 0, 0)
                                                   : *reinterpret_cast<const float4*>(p.norm_shift + column + half * 4);
      const float scales[4] = {scale.x, scale.y, scale.z, scale.w}, shifts[4] = {shift.x, shift.y, shift.z, shift.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        style.scale[v][half * 4 + i] = 1.0f + scales[i];
        style.shift[v][half * 4 + i] = shifts[i];
      }
    }
  }
}

__device__ __forceinline__ void load_row(const SkinnyGemm& p, int row, Eight (&values)[kNormVectors]) {
  const Eight* source = reinterpret_cast<const Eight*>(static_cast<const __nv_bfloat16*>(p.x) + int64_t(row) * p.k);
#pragma unroll
  for (int v = 0; v < kNormVectors; ++v) {
    if ((v * kWarpSize + threadIdx.x % kWarpSize) * 8 >= p.k) break;
    values[v] = source[v * kWarpSize + threadIdx.x % kWarpSize];
  }
}

// Normalise x's rows into shared memory as bf16, or fp16 for e4m3 weights, one warp a row; the next row is on its way
// meanwhile.
template <bool Fp8>
__device__ void norm_rows(const SkinnyGemm& p, const NormStyle& style, unsigned char* x_shared, int row_stride) {
  const int lane = threadIdx.x % kWarpSize;
  int row = threadIdx.x / kWarpSize;
  Eight values[kNormVectors];
  if (row < p.rows) load_row(p, row, values);
  for (; row < p.rows; row += kWarps) {
    Eight following[kNormVectors];
    if (row + kWarps < p.rows) load_row(p, row + kWarps, following);
    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < kNormVectors; ++v) {
      if ((v * kWarpSize + lane) * 8 >= p.k) break;
#pragma unroll
      for (int i = 0; i < 8; ++i) squares += to_float(values[v].element[i]) * to_float(values[v].element[i]);
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    const float inverse = rsqrtf(squares / p.k + p.eps);
#pragma unroll
    for (int v = 0; v < kNormVectors; ++v) {
      const int column = (v * kWarpSize + lane) * 8;
      if (column >= p.k) break;
      Eight normed;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        normed.element[i] =
            from_float<__nv_bfloat16>(to_float(values[v].element[i]) * inverse * style.scale[v][i] + style.shift[v][i]);
      }
      if constexpr (Fp8) {
        Vector<__half, 8> half;
#pragma unroll
        for (int i = 0; i < 8; ++i) half.element[i] = from_float<__half>(to_float(normed.element[i]));
        *reinterpret_cast<Vector<__half, 8>*>(x_shared + row * row_stride + column * 2) = half;
      } else {
        *reinterpret_cast<Eight*>(x_shared + row * row_stride + column * 2) = normed;
      }
    }
#pragma unroll
    for (int v = 0; v < kNormVectors; ++v) values[v] = following[v];
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

// What an output element needs beside the product, read ahead so that no load stands between product and store.
struct Operands {
  float first = 0.0f, second = 0.0f;  // kStore: bias; kResidual: gate, residual; kRope: cosine, sine
  int position = 0;                   // kRope: slot in the cache
};

struct Element {
  int m, n;  // row; first feature (kStore, kResidual, kGeglu), or the dimension within its head (kRope)
  int head;  // kRope
  __device__ __forceinline__ Element(const SkinnyGemm& p, bool rope, int unit, int element) {
    m = element / kTileFeatures;
    const int units_per_head = rope ? p.head_dim / (2 * kTileFeatures) : 1;
    head = rope ? unit / units_per_head : 0;
    n = (rope ? unit % units_per_head : unit) * kTileFeatures + element % kTileFeatures;
  }
};

// The operands that no kernel of the chain writes.
template <SkinnyEpilogue E>
__device__ __forceinline__ void load_constant(const SkinnyGemm& p, const Element& e, Operands& operands) {
  if constexpr (E == SkinnyEpilogue::kStore) {
    operands.first = p.bias != nullptr ? p.bias[e.n] : 0.0f;
  } else if constexpr (E == SkinnyEpilogue::kResidual) {
    operands.first = p.gate != nullptr ? p.gate[e.n] : 1.0f;
  } else if constexpr (E == SkinnyEpilogue::kRope) {
    operands.position = *p.prefix_length + e.m;
    const int64_t index = int64_t(operands.position) * (p.head_dim / 2) + e.n;
    operands.first = p.rope_cos[index];
    operands.second = p.rope_sin[index];
  }
}

template <SkinnyEpilogue E>
__device__ __forceinline__ void load_residual(const SkinnyGemm& p, const Element& e, Operands& operands) {
  if constexpr (E == SkinnyEpilogue::kResidual)
    operands.second = to_float(static_cast<const __nv_bfloat16*>(p.out)[int64_t(e.m) * p.n + e.n]);
}

// Store one output element, or the two of a paired epilogue.
template <bool Fp8, SkinnyEpilogue E>
__device__ __forceinline__ void finish(const SkinnyGemm& p, const Element& e, const Operands& operands, float first,
                                       float second, float inverse_out_scale) {
  __nv_bfloat16* out = static_cast<__nv_bfloat16*>(p.out);
  if constexpr (E == SkinnyEpilogue::kStore) {
    out[int64_t(e.m) * p.n + e.n] = from_float<__nv_bfloat16>(first + operands.first);
  } else if constexpr (E == SkinnyEpilogue::kResidual) {
    out[int64_t(e.m) * p.n + e.n] = from_float<__nv_bfloat16>(operands.second + operands.first * first);
  } else if constexpr (E == SkinnyEpilogue::kGeglu) {
    store_quantised<Fp8>(p.out, int64_t(e.m) * (p.n / 2) + e.n, gelu_tanh(first) * second, inverse_out_scale);
  } else {
    const int half = p.head_dim / 2, first_k = p.heads, first_v = p.heads + p.kv_heads;
    if (e.head < first_v) {
      const float rotated = first * operands.first - second * operands.second;
      second = second * operands.first + first * operands.second;
      first = rotated;
    }
    __nv_bfloat16* target;
    if (e.head < first_k) {
      target = out + (int64_t(e.m) * p.heads + e.head) * p.head_dim;
    } else {
      void* cache = e.head < first_v ? p.k_cache : p.v_cache;
      const int kv_head = e.head - (e.head < first_v ? first_k : first_v);
      target = static_cast<__nv_bfloat16*>(cache) + (int64_t(operands.position) * p.kv_heads + kv_head) * p.head_dim;
    }
    target[e.n] = from_float<__nv_bfloat16>(first);
    target[e.n + half] = from_float<__nv_bfloat16>(second);
  }
}

// This warp's k blocks [begin, end) of one unit: x from shared memory when it was normed here, else from L2.
template <bool Fp8, int RowTiles, int Tiles, bool Norm>
__device__ __forceinline__ void accumulate(const SkinnyGemm& p, const Layout& layout, const unsigned char* x_shared,
                                           const unsigned char* tile, [[maybe_unused]] uint64_t* barrier, int begin,
                                           int end, float (&accumulator)[RowTiles][Tiles][4]) {
  const int lane = threadIdx.x % kWarpSize, row = lane / 4, byte_in_block = lane % 4 * 16;
  const int k_blocks = layout.k_bytes / kBlockBytes;
  if constexpr (Norm) barrier_wait(barrier, 0);
#pragma unroll 8
  for (int block = begin; block < end; ++block) {
    const int byte = block * kBlockBytes + byte_in_block;
    if constexpr (Norm && Fp8) {
      uint4 low[RowTiles][2], high[RowTiles][2];
#pragma unroll
      for (int r = 0; r < RowTiles; ++r) {
        const uint4* rows = reinterpret_cast<const uint4*>(x_shared + (r * 16 + row) * layout.x_stride + byte * 2);
        const uint4* eighth =
            reinterpret_cast<const uint4*>(x_shared + (r * 16 + row + 8) * layout.x_stride + byte * 2);
        low[r][0] = rows[0], low[r][1] = rows[1], high[r][0] = eighth[0], high[r][1] = eighth[1];
      }
#pragma unroll
      for (int t = 0; t < Tiles; ++t) {
        const uint4 packed = *reinterpret_cast<const uint4*>(tile + (t * k_blocks + block) * kTileBytes);
        uint32_t b[8];
        widen(packed, b);
#pragma unroll
        for (int r = 0; r < RowTiles; ++r) multiply_f16(accumulator[r][t], low[r], high[r], b);
      }
    } else {
      uint4 low[RowTiles], high[RowTiles];
#pragma unroll
      for (int r = 0; r < RowTiles; ++r) {
        if constexpr (Norm) {
          low[r] = *reinterpret_cast<const uint4*>(x_shared + (r * 16 + row) * layout.x_stride + byte);
          high[r] = *reinterpret_cast<const uint4*>(x_shared + (r * 16 + row + 8) * layout.x_stride + byte);
        } else {
          low[r] = global_row(p, r * 16 + row, byte, layout.k_bytes);
          high[r] = global_row(p, r * 16 + row + 8, byte, layout.k_bytes);
        }
      }
      if constexpr (!Norm) barrier_wait(barrier, 0);
#pragma unroll
      for (int t = 0; t < Tiles; ++t) {
        const uint4 b = *reinterpret_cast<const uint4*>(tile + (t * k_blocks + block) * kTileBytes);
#pragma unroll
        for (int r = 0; r < RowTiles; ++r) multiply<Fp8>(accumulator[r][t], low[r], high[r], b);
      }
    }
  }
}

// The same with weights from global memory, a batch of k blocks in flight at once: for products of several waves, where
// the pauses of blocks that first load and then add up would be a third of the time.
template <bool Fp8, int RowTiles, int Tiles>
__device__ __forceinline__ void accumulate_streamed(const SkinnyGemm& p, const Layout& layout,
                                                    const unsigned char* tile, int begin, int end,
                                                    float (&accumulator)[RowTiles][Tiles][4]) {
  constexpr int kBatch = 8 / Tiles;
  const int lane = threadIdx.x % kWarpSize, row = lane / 4, byte_in_block = lane % 4 * 16;
  const int k_blocks = layout.k_bytes / kBlockBytes;
  for (int first = begin; first < end; first += kBatch) {
    uint4 b[kBatch][Tiles];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int t = 0; t < Tiles; ++t) {
        const unsigned char* source = tile + (int64_t(t) * k_blocks + first + i) * kTileBytes;
        b[i][t] = first + i < end ? __ldcs(reinterpret_cast<const uint4*>(source)) : make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i >= end) break;
      const int byte = (first + i) * kBlockBytes + byte_in_block;
#pragma unroll
      for (int r = 0; r < RowTiles; ++r) {
        const uint4 low = global_row(p, r * 16 + row, byte, layout.k_bytes);
        const uint4 high = global_row(p, r * 16 + row + 8, byte, layout.k_bytes);
#pragma unroll
        for (int t = 0; t < Tiles; ++t) multiply<Fp8>(accumulator[r][t], low, high, b[i][t]);
      }
    }
  }
}

// Asks for a warp's first weights of a streamed product, which then come while the kernel in front ends. They stay in
// L2: 64 KB of every block are a third of it.
template <int Tiles>
__device__ __forceinline__ void prefetch_streamed(const Layout& layout, const unsigned char* tile, int begin, int end) {
  constexpr int kAheadBytes = 8192 / Tiles, kLine = 128;
  const int lane = threadIdx.x % kWarpSize, bytes = min((end - begin) * kTileBytes, kAheadBytes);
#pragma unroll
  for (int t = 0; t < Tiles; ++t) {
    const unsigned char* first = tile + (int64_t(t) * (layout.k_bytes / kBlockBytes) + begin) * kTileBytes;
    for (int byte = lane * kLine; byte < bytes; byte += kWarpSize * kLine) prefetch_l2(first + byte);
  }
}

template <bool Fp8, int RowTiles, bool Norm, SkinnyEpilogue E, bool Streamed>
__global__ void __launch_bounds__(kThreads, Streamed ? kStreamedBlocks : 1)
    skinny_gemm_kernel(const SkinnyGemm p, const Layout layout) {
  constexpr int Tiles = E == SkinnyEpilogue::kGeglu || E == SkinnyEpilogue::kRope ? 2 : 1;
  constexpr int PaddedRows = 16 * RowTiles;
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
  const float scale = Fp8 ? (Norm ? 1.0f : *p.x_scale) * *p.w_scale : 1.0f;
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
    accumulate<Fp8, RowTiles, Tiles, Norm>(p, layout, x_shared, tile, barriers + unit, begin, end, accumulator);
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
  layout->sum_offset = layout->x_offset + (norm ? padded_rows * layout->x_stride : 0);
  layout->barrier_offset =
      layout->sum_offset + kWarps * tiles * padded_rows * kTileFeatures * static_cast<int>(sizeof(float));
  return layout->barrier_offset + units_per_block * static_cast<int>(sizeof(uint64_t));
}

template <bool Fp8, int RowTiles, bool Norm, SkinnyEpilogue E, bool Streamed>
cudaError_t launch_planned(const SkinnyGemm& p, const Layout& layout, int bytes, bool dependent, cudaStream_t stream) {
  auto kernel = skinny_gemm_kernel<Fp8, RowTiles, Norm, E, Streamed>;
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

template <bool Fp8, int RowTiles, bool Norm, SkinnyEpilogue E>
cudaError_t launch(const SkinnyGemm& p, cudaStream_t stream) {
  constexpr int Tiles = E == SkinnyEpilogue::kGeglu || E == SkinnyEpilogue::kRope ? 2 : 1;
  DeviceLimits limits;
  cudaError_t status = device_limits(&limits);
  if (status != cudaSuccess) return status;
  if (Fp8 && limits.major * 10 + limits.minor < 89) return cudaErrorNotSupported;
  Layout layout = {};
  layout.k_bytes = p.k * (Fp8 ? 1 : 2);
  layout.x_stride = p.k * 2 + (Fp8 ? kRowPadFp16 : kRowPadBf16);
  layout.units = p.n / (Tiles * kTileFeatures);
  // the fewest units a block that still fit the product on the chip at once
  int units_per_block = 1;
  while (units_per_block < kWarps && (layout.units + units_per_block - 1) / units_per_block > limits.multiprocessors)
    units_per_block *= 2;
  int bytes = plan(&layout, units_per_block, Tiles, 16 * RowTiles, Norm);
  const bool dependent = limits.major >= 9;
  if constexpr (RowTiles == 1 && !Norm) {
    if (bytes > limits.shared_bytes) {
      const int resident = kStreamedBlocks * limits.multiprocessors;
      for (units_per_block = 1; units_per_block < kWarps; units_per_block *= 2)
        if ((layout.units + units_per_block - 1) / units_per_block <= resident) break;
      layout.units_per_block = units_per_block;
      layout.x_offset = layout.sum_offset = 0;
      layout.barrier_offset = kWarps * Tiles * 16 * kTileFeatures * static_cast<int>(sizeof(float));
      return launch_planned<Fp8, RowTiles, Norm, E, true>(p, layout, layout.barrier_offset, dependent, stream);
    }
  }
  while (bytes > limits.shared_bytes && units_per_block > 1) {
    units_per_block /= 2;
    bytes = plan(&layout, units_per_block, Tiles, 16 * RowTiles, Norm);
  }
  if (bytes > limits.shared_bytes) return cudaErrorInvalidValue;
  return launch_planned<Fp8, RowTiles, Norm, E, false>(p, layout, bytes, dependent, stream);
}

template <bool Fp8, bool Norm, SkinnyEpilogue E>
cudaError_t launch_rows(const SkinnyGemm& p, cudaStream_t stream) {
  if (p.rows <= 16) return launch<Fp8, 1, Norm, E>(p, stream);
  if (p.rows <= 32) return launch<Fp8, 2, Norm, E>(p, stream);
  return launch<Fp8, 4, Norm, E>(p, stream);
}

template <bool Fp8, SkinnyEpilogue E>
cudaError_t launch_normed(const SkinnyGemm& p, cudaStream_t stream) {
  if (p.norm_scale != nullptr) return launch_rows<Fp8, true, E>(p, stream);
  return p.rows <= 16 ? launch<Fp8, 1, false, E>(p, stream) : cudaErrorInvalidValue;
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
  if (norm && (p.k > kMaxNormWidth || p.k % (kWarpSize * 8) != 0)) return cudaErrorInvalidValue;
  if (p.epilogue == SkinnyEpilogue::kRope && p.head_dim % (2 * kTileFeatures) != 0) return cudaErrorInvalidValue;
  if (!aligned_to_16_bytes(p.x) || !aligned_to_16_bytes(p.weights)) return cudaErrorMisalignedAddress;
  return p.fp8 ? launch_fused<true>(p, stream) : launch_fused<false>(p, stream);
}

}  // namespace flashrt
