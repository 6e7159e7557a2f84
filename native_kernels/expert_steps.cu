// All denoise steps of the action expert in one launch: the blocks stay on their multiprocessors, the weights keep
// streaming, and what stands between two dependent products is a barrier over the grid and not a kernel boundary.
//
// A step is: x -> h = W_in x + b; for every layer
//   1 q, k, v = rope(norm(h) W_qkv)      2 attention, a team of 8 blocks a head
//   3 h += gate * (attended W_out)       4 hidden = geglu(norm(h) W_gate_up)      5 h += gate * (hidden W_down)
// and x += dt * (norm(h) W_out + b) at the end. Widths are those of the published 300M expert (pi0, pi0.5).
//
// Bytes moved, e4m3: 17.3 MB of weights a layer, 311 MB a step: 73 us a step at 4.3 TB/s, the floor. Each block holds a
// ring of 16 KB weight chunks in shared memory, filled by the bulk copy engine in the fixed order of use, several
// chunks ahead across barriers, layers and steps. What is left is latency: 5 barriers a layer.
//
// e4m3 weights meet 16-bit activations in products 1 and 4 (widened in registers: exact) and e4m3 activations in 3 and 5.
// Sums are taken in a fixed order: results are bit-identical from run to run.
#include "attention_tiles.cuh"
#include "expert.h"
#include "product_tiles.cuh"

#pragma nv_diag_suppress 177  // below sm_90 the kernel is empty and leaves everything here unused

namespace flashrt {
namespace {

constexpr int kThreads = attention::kThreads;
constexpr int kWarps = attention::kWarps;
constexpr int kWidth = 1024, kMlp = 4096, kHeads = 8, kHeadDim = attention::kHeadDim, kAttended = kHeads * kHeadDim;
constexpr int kQkvHeads = kHeads + 2;
constexpr int kChunkBytes = 16384;
constexpr int kMaxSlots = 8;
constexpr int kMaxActionDim = 64;
constexpr int kTeam = attention::kSplits;  // blocks that share a head
static_assert(kThreads * 4 == kWidth, "normalise gives every thread four columns");

struct Plan {
  attention::Layout attention;
  int slots, x_stride, x_offset, sum_offset;  // the ring comes first; x, sums and the attention's operands overlap
};

template <int RowTiles>
constexpr int kAttentionTiles = RowTiles < 2 ? 1 : 2;

struct Product {
  int k, n, tiles;  // tiles of 8 features that share an epilogue
};
__device__ constexpr Product kShapes[kProducts] = {
    {kWidth, kQkvHeads * kHeadDim, 2}, {kAttended, kWidth, 1}, {kWidth, 2 * kMlp, 2}, {kMlp, kWidth, 1}};

template <bool Fp8, int P>
struct Shape {
  static constexpr int kBytes = kShapes[P].k * (Fp8 ? 1 : 2);
  static constexpr int Tiles = kShapes[P].tiles;
  static constexpr int Units = kShapes[P].n / (Tiles * kTileFeatures);
  static constexpr int UnitBytes = Tiles * kTileFeatures * kBytes;
  static constexpr int Chunks = UnitBytes / kChunkBytes;         // a unit's
  static constexpr int Blocks = kChunkBytes / Tiles / kTileBytes;  // k blocks of a chunk
  static_assert(UnitBytes % kChunkBytes == 0 && Blocks % kWarps == 0);
};

struct Range {
  int first, count;
};

// This block's units of a product.
template <bool Fp8, int P>
__device__ __forceinline__ Range own_units() {
  constexpr int units = Shape<Fp8, P>::Units;
  const int first = units * blockIdx.x / gridDim.x;
  return {first, static_cast<int>(units * (blockIdx.x + 1) / gridDim.x) - first};
}

// The weight stream of one block: every chunk of its units, in the order of use. Only thread 0 issues.
template <bool Fp8>
struct Stream {
  unsigned char* ring;
  uint64_t* full;
  int slots;
  int issued = 0, taken = 0;  // chunks so far; `taken` is known to every thread
  int product = 0, layer = 0, step = 0, chunk = 0;

  template <int P>
  __device__ __forceinline__ bool source(const ExpertSteps& p, const unsigned char*& from) {
    const Range units = own_units<Fp8, P>();
    if (chunk >= units.count * Shape<Fp8, P>::Chunks) return false;
    constexpr int64_t layer_bytes = int64_t(Shape<Fp8, P>::Units) * Shape<Fp8, P>::UnitBytes;
    from = static_cast<const unsigned char*>(p.weights[P]) + layer * layer_bytes +
           int64_t(units.first) * Shape<Fp8, P>::UnitBytes + int64_t(chunk) * kChunkBytes;
    return true;
  }

  // Ask for the next chunk, if there is one. The slot it goes to must have been taken.
  __device__ void issue(const ExpertSteps& p) {
    const unsigned char* from = nullptr;
    while (step < p.steps) {
      const bool found = product == kQkv      ? source<kQkv>(p, from)
                         : product == kOut    ? source<kOut>(p, from)
                         : product == kGateUp ? source<kGateUp>(p, from)
                                              : source<kDown>(p, from);
      if (found) break;
      chunk = 0;
      if (++product == kProducts) {
        product = 0;
        if (++layer == p.layers) {
          layer = 0;
          ++step;
        }
      }
    }
    if (step == p.steps) return;
    const int slot = issued % slots;
    barrier_expect(full + slot, kChunkBytes);
    bulk_copy(ring + slot * kChunkBytes, from, kChunkBytes, full + slot);
    ++issued;
    ++chunk;
  }

  // The chunk `ahead` of the next one to be taken, once it has arrived.
  __device__ __forceinline__ const unsigned char* wait(int ahead) const {
    const int index = taken + ahead, slot = index % slots;
    barrier_wait(full + slot, index / slots & 1);
    return ring + slot * kChunkBytes;
  }

  // Give back `count` chunks that every warp has read, and ask for as many.
  __device__ __forceinline__ void release(const ExpertSteps& p, int count) {
    taken += count;
    if (threadIdx.x == 0)
      for (int i = 0; i < count; ++i) issue(p);
  }
};

// A barrier over the grid that can be split: what a block does between arrive and wait costs nothing.
struct GridBarrier {
  unsigned* counter;
  unsigned target = 0;

  __device__ __forceinline__ void arrive() {
    __syncthreads();
    target += gridDim.x;
    if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
  }
  __device__ __forceinline__ void wait() {
    if (threadIdx.x == 0) {
      unsigned seen;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
      } while (seen < target);
    }
    __syncthreads();
  }
};

struct Style {
  float4 scale, shift;  // of this thread's four columns; scale holds 1 + scale
};

__device__ __forceinline__ Style load_style(const ExpertSteps& p, int step, int norm) {
  const int64_t offset = step * p.step_stride + norm * p.norm_stride + threadIdx.x * 4;
  Style style;
  style.scale = *reinterpret_cast<const float4*>(p.norm_scale + offset);
  style.scale.x += 1.0f, style.scale.y += 1.0f, style.scale.z += 1.0f, style.scale.w += 1.0f;
  style.shift =
      p.norm_shift != nullptr ? *reinterpret_cast<const float4*>(p.norm_shift + offset) : make_float4(0, 0, 0, 0);
  return style;
}

// Sums over a warp of 16 values a lane, by halving: lanes 2r and 2r + 1 end up with value r.
__device__ __forceinline__ float warp_sums(float (&value)[16]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int count = 8; count > 0; count /= 2) {
    const bool upper = lane & (count * 2);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float kept = upper ? value[i + count] : value[i], sent = upper ? value[i] : value[i + count];
      value[i] = kept + __shfl_xor_sync(0xffffffffu, sent, count * 2);
    }
  }
  return value[0] + __shfl_xor_sync(0xffffffffu, value[0], 1);
}

// Norm of h's rows into shared memory as fp16 (e4m3 weights) or bf16: four columns a thread, 16 rows at a time.
template <bool Fp8, int RowTiles>
__device__ void normalise(const ExpertSteps& p, const Style& style, unsigned char* x, int x_stride,
                          float (*partial)[16]) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const uint2* source = static_cast<const uint2*>(p.h) + threadIdx.x;
#pragma unroll 1
  for (int first = 0; first < p.rows; first += 16) {
    uint2 raw[16];
    float squares[16];
#pragma unroll
    for (int r = 0; r < 16; ++r) {
      raw[r] = make_uint2(0, 0);
      if (first + r < p.rows) raw[r] = __ldcg(source + (first + r) * (kWidth / 4));
    }
#pragma unroll
    for (int r = 0; r < 16; ++r) {
      const float a = __uint_as_float(raw[r].x << 16), b = __uint_as_float(raw[r].x & 0xffff0000u);
      const float c = __uint_as_float(raw[r].y << 16), d = __uint_as_float(raw[r].y & 0xffff0000u);
      squares[r] = a * a + b * b + c * c + d * d;
    }
    const float sum = warp_sums(squares);
    if (lane % 2 == 0) partial[warp][lane / 2] = sum;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += partial[w][lane % 16];
    const float inverse = rsqrtf(total * (1.0f / kWidth) + p.eps);
#pragma unroll
    for (int r = 0; r < 16; ++r) {
      const float i = __shfl_sync(0xffffffffu, inverse, r);
      if (first + r >= p.rows) continue;
      const float a = __uint_as_float(raw[r].x << 16) * i * style.scale.x + style.shift.x;
      const float b = __uint_as_float(raw[r].x & 0xffff0000u) * i * style.scale.y + style.shift.y;
      const float c = __uint_as_float(raw[r].y << 16) * i * style.scale.z + style.shift.z;
      const float d = __uint_as_float(raw[r].y & 0xffff0000u) * i * style.scale.w + style.shift.w;
      unsigned char* target = x + (first + r) * x_stride + threadIdx.x * 8;
      if constexpr (Fp8) {
        reinterpret_cast<__half2*>(target)[0] = __floats2half2_rn(a, b);
        reinterpret_cast<__half2*>(target)[1] = __floats2half2_rn(c, d);
      } else {
        reinterpret_cast<__nv_bfloat162*>(target)[0] = __floats2bfloat162_rn(a, b);
        reinterpret_cast<__nv_bfloat162*>(target)[1] = __floats2bfloat162_rn(c, d);
      }
    }
    __syncthreads();
  }
}

// Of h: another block may have written it since this multiprocessor's L1 saw it.
__device__ __forceinline__ float load_fresh(const __nv_bfloat16* address) {
  return to_float(__ushort_as_bfloat16(__ldcg(reinterpret_cast<const unsigned short*>(address))));
}

__device__ __forceinline__ uint4 shared_row(const ExpertSteps& p, const unsigned char* x, int row, int x_stride,
                                            int byte) {
  if (row >= p.rows) return make_uint4(0, 0, 0, 0);
  return *reinterpret_cast<const uint4*>(x + row * x_stride + byte);
}

__device__ __forceinline__ uint4 global_row(const ExpertSteps& p, const void* x, int row, int k_bytes, int byte) {
  if (row >= p.rows) return make_uint4(0, 0, 0, 0);
  return __ldcg(reinterpret_cast<const uint4*>(static_cast<const unsigned char*>(x) + int64_t(row) * k_bytes + byte));
}

// Products 1 and 4: Group units at once on the normed rows in shared memory; each warp has its k blocks of every chunk.
template <bool Fp8, int RowTiles, int P, int Group>
__device__ __forceinline__ void multiply_normed(const ExpertSteps& p, const Stream<Fp8>& stream, const unsigned char* x,
                                                int x_stride, int units,
                                                float (&sum)[Group][RowTiles][Shape<Fp8, P>::Tiles][4]) {
  using S = Shape<Fp8, P>;
  constexpr int Own = S::Blocks / kWarps;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, row = lane / 4;
#pragma unroll
  for (int chunk = 0; chunk < S::Chunks; ++chunk) {
#pragma unroll
    for (int o = 0; o < Own; ++o) {
      const int local = warp * Own + o;
      const int byte = (chunk * S::Blocks + local) * kBlockBytes + lane % 4 * 16;
      uint4 low[RowTiles][2], high[RowTiles][2];
#pragma unroll
      for (int r = 0; r < RowTiles; ++r) {
        if constexpr (Fp8) {
          low[r][0] = shared_row(p, x, r * 16 + row, x_stride, byte * 2);
          low[r][1] = shared_row(p, x, r * 16 + row, x_stride, byte * 2 + 16);
          high[r][0] = shared_row(p, x, r * 16 + row + 8, x_stride, byte * 2);
          high[r][1] = shared_row(p, x, r * 16 + row + 8, x_stride, byte * 2 + 16);
        } else {
          low[r][0] = shared_row(p, x, r * 16 + row, x_stride, byte);
          high[r][0] = shared_row(p, x, r * 16 + row + 8, x_stride, byte);
        }
      }
#pragma unroll
      for (int g = 0; g < Group; ++g) {
        if (g >= units) break;
        const unsigned char* weights = stream.wait(g * S::Chunks + chunk) + local * kTileBytes + lane * 16;
#pragma unroll
        for (int t = 0; t < S::Tiles; ++t) {
          const uint4 packed = *reinterpret_cast<const uint4*>(weights + t * S::Blocks * kTileBytes);
          if constexpr (Fp8) {
            uint32_t b[8];
            widen(packed, b);
#pragma unroll
            for (int r = 0; r < RowTiles; ++r) multiply_f16(sum[g][r][t], low[r], high[r], b);
          } else {
#pragma unroll
            for (int r = 0; r < RowTiles; ++r) multiply<false>(sum[g][r][t], low[r][0], high[r][0], packed);
          }
        }
      }
    }
  }
}

// Products 3 and 5: one unit on rows in global memory; each warp reads its own part of k only.
template <bool Fp8, int RowTiles, int P>
__device__ __forceinline__ void multiply_plain(const ExpertSteps& p, const Stream<Fp8>& stream, const void* x,
                                               float (&sum)[1][RowTiles][1][4]) {
  using S = Shape<Fp8, P>;
  constexpr int Own = S::Blocks / kWarps;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, row = lane / 4;
  uint4 low[2][Own][RowTiles], high[2][Own][RowTiles];
  const auto load = [&](int chunk) {
#pragma unroll
    for (int o = 0; o < Own; ++o) {
      const int byte = (chunk * S::Blocks + warp * Own + o) * kBlockBytes + lane % 4 * 16;
#pragma unroll
      for (int r = 0; r < RowTiles; ++r) {
        low[chunk % 2][o][r] = global_row(p, x, r * 16 + row, S::kBytes, byte);
        high[chunk % 2][o][r] = global_row(p, x, r * 16 + row + 8, S::kBytes, byte);
      }
    }
  };
  load(0);
#pragma unroll
  for (int chunk = 0; chunk < S::Chunks; ++chunk) {
    if (chunk + 1 < S::Chunks) load(chunk + 1);
    const unsigned char* weights = stream.wait(chunk) + warp * Own * kTileBytes + lane * 16;
#pragma unroll
    for (int o = 0; o < Own; ++o) {
      const uint4 packed = *reinterpret_cast<const uint4*>(weights + o * kTileBytes);
#pragma unroll
      for (int r = 0; r < RowTiles; ++r)
        multiply<Fp8>(sum[0][r][0], low[chunk % 2][o][r], high[chunk % 2][o][r], packed);
    }
  }
}

// Every warp's part of the sums of Group units into shared memory: [warp][unit][tile][row][feature].
template <int RowTiles, int Tiles, int Group>
__device__ __forceinline__ void spread(float* sums, const float (&sum)[Group][RowTiles][Tiles][4]) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  constexpr int TileElements = 16 * RowTiles * kTileFeatures;
#pragma unroll
  for (int g = 0; g < Group; ++g) {
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
#pragma unroll
      for (int r = 0; r < RowTiles; ++r) {
        float* target = sums + ((warp * Group + g) * Tiles + t) * TileElements + (r * 16 + lane / 4) * kTileFeatures +
                        lane % 4 * 2;
        *reinterpret_cast<float2*>(target) = make_float2(sum[g][r][t][0], sum[g][r][t][1]);
        *reinterpret_cast<float2*>(target + 8 * kTileFeatures) = make_float2(sum[g][r][t][2], sum[g][r][t][3]);
      }
    }
  }
}

template <int RowTiles, int Tiles, int Group>
__device__ __forceinline__ float gather(const float* sums, int unit, int tile, int element) {
  constexpr int TileElements = 16 * RowTiles * kTileFeatures;
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += sums[((w * Group + unit) * Tiles + tile) * TileElements + element];
  return total;
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

template <bool Fp8, int RowTiles>
struct Expert {
  static constexpr int TileElements = 16 * RowTiles * kTileFeatures;
  static constexpr int AttentionTiles = kAttentionTiles<RowTiles>;

  const ExpertSteps& p;
  const Plan& plan;
  unsigned char* shared;
  Stream<Fp8> stream;
  GridBarrier grid;
  uint64_t* kv_barrier;
  float (*partial)[16];
  int kv_phase = 0;
  unsigned team_target = 0;

  __device__ unsigned char* x() { return shared + plan.x_offset; }
  __device__ float* sums() { return reinterpret_cast<float*>(shared + plan.sum_offset); }
  __device__ float weight_scale(int layer, int product) const {
    return Fp8 ? p.weight_scale[layer * kProducts + product] : 1.0f;
  }
  __device__ float input_scale(int layer, int product) const {
    return Fp8 ? p.input_scale[layer * 2 + (product == kDown)] : 1.0f;
  }

  __device__ void qkv(int step, int layer) {
    constexpr int Group = RowTiles == 1 ? 2 : 1;
    using S = Shape<Fp8, kQkv>;
    const Style style = load_style(p, step, 2 * layer);
    const float scale = weight_scale(layer, kQkv);
    const int prefix = *p.prefix_length;
    const Range units = own_units<Fp8, kQkv>();
    const float2 ahead = angle(units.first + threadIdx.x / TileElements, threadIdx.x, prefix);
    grid.wait();
    normalise<Fp8, RowTiles>(p, style, x(), plan.x_stride, partial);
    for (int first = 0; first < units.count; first += Group) {
      const int count = min(Group, units.count - first);
      float sum[Group][RowTiles][S::Tiles][4] = {};
      multiply_normed<Fp8, RowTiles, kQkv, Group>(p, stream, x(), plan.x_stride, count, sum);
      if (first > 0) __syncthreads();  // the last group's sums are being read
      spread<RowTiles, S::Tiles, Group>(sums(), sum);
      __syncthreads();
      stream.release(p, count * S::Chunks);
      for (int i = threadIdx.x; i < count * TileElements; i += kThreads) {
        const int unit = i / TileElements, element = i % TileElements, m = element / kTileFeatures;
        if (m >= p.rows) continue;
        const bool known = first == 0 && i == threadIdx.x;
        rotate(layer, units.first + first + unit, m, element % kTileFeatures, prefix + m,
               known ? ahead : angle(units.first + first + unit, i, prefix),
               gather<RowTiles, S::Tiles, Group>(sums(), unit, 0, element) * scale,
               gather<RowTiles, S::Tiles, Group>(sums(), unit, 1, element) * scale);
      }
    }
    grid.arrive();
  }

  static constexpr int Half = kHeadDim / 2, UnitsPerHead = Half / kTileFeatures;

  // cos and sin for output `index` of a unit; (1, 0) for v, which is not rotated.
  __device__ __forceinline__ float2 angle(int unit, int index, int prefix) const {
    const int element = index % TileElements, m = element / kTileFeatures;
    if (m >= p.rows || unit >= (kHeads + 1) * UnitsPerHead) return make_float2(1.0f, 0.0f);
    const int64_t entry = int64_t(prefix + m) * Half + unit % UnitsPerHead * kTileFeatures + element % kTileFeatures;
    return make_float2(p.rope_cos[entry], p.rope_sin[entry]);
  }

  __device__ __forceinline__ void rotate(int layer, int unit, int m, int column, int position, float2 angle,
                                         float first, float second) {
    const int head = unit / UnitsPerHead, d = unit % UnitsPerHead * kTileFeatures + column;
    const float rotated = first * angle.x - second * angle.y;
    second = second * angle.x + first * angle.y;
    first = rotated;
    const int64_t slot = (int64_t(layer) * p.capacity + position) * kHeadDim;
    __nv_bfloat16* target = head < kHeads    ? static_cast<__nv_bfloat16*>(p.q) + (m * kHeads + head) * kHeadDim
                            : head == kHeads ? static_cast<__nv_bfloat16*>(p.k_cache) + slot
                                             : static_cast<__nv_bfloat16*>(p.v_cache) + slot;
    target[d] = from_float<__nv_bfloat16>(first);
    target[d + Half] = from_float<__nv_bfloat16>(second);
  }

  __device__ void attend(int layer) {
#if FLASHRT_DEVICE_HAS_BULK
    constexpr int Rows = 16 * AttentionTiles;
    const int team = blockIdx.x / kTeam, head = team % kHeads, first_row = team / kHeads * Rows;
    const bool busy = first_row < p.rows;  // alike in all blocks of a team
    unsigned char* base = x();
    const __nv_bfloat16* k = static_cast<const __nv_bfloat16*>(p.k_cache) + int64_t(layer) * p.capacity * kHeadDim;
    const __nv_bfloat16* v = static_cast<const __nv_bfloat16*>(p.v_cache) + int64_t(layer) * p.capacity * kHeadDim;
    const attention::Share share(blockIdx.x % kTeam, *p.prefix_length, p.rows);
    const float inverse_scale = Fp8 ? 1.0f / input_scale(layer, kOut) : 1.0f;
    if (busy) {
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // x and sums were written here a moment ago
      attention::load_prefix(base + plan.attention.k, base + plan.attention.v, k, v, kHeadDim, share, kv_barrier);
    }
    grid.wait();
    if (busy) {
      const int64_t offset = int64_t(first_row) * kAttended + head * kHeadDim;
      const int rows = p.rows - first_row;
      attention::load_suffix<AttentionTiles>(base, plan.attention, static_cast<const __nv_bfloat16*>(p.q) + offset,
                                             rows, kAttended, k, v, kHeadDim, share);
      barrier_wait(kv_barrier, kv_phase);
      kv_phase ^= 1;
      __syncthreads();
      const int64_t out = (offset + blockIdx.x % kTeam * attention::kColumns) * (Fp8 ? 1 : 2);
      team_target += kTeam;
      attention::GlobalExchange exchange{
          static_cast<int>(blockIdx.x % kTeam),
          p.inboxes + team * kTeam * attention::GlobalExchange::inbox_floats(Rows), p.barrier + 2 + team, team_target,
          Rows};
      attention::attend<AttentionTiles>(base, plan.attention, share, exchange, rows,
                                        static_cast<unsigned char*>(p.attended) + out, kAttended, Fp8, inverse_scale);
    }
    grid.arrive();
#endif
  }

  // h += gate * (input W): products 3 and 5. Block and element of h are the same in both, whatever the grid.
  template <int P>
  __device__ void add_product(const void* input, int step, int layer, int norm) {
    using S = Shape<Fp8, P>;
    const Range units = own_units<Fp8, P>();
    const float scale = weight_scale(layer, P) * input_scale(layer, P);
    const float* gate = p.gate == nullptr ? nullptr : p.gate + step * p.step_stride + norm * p.norm_stride;
    __nv_bfloat16* h = static_cast<__nv_bfloat16*>(p.h);
    const int column = threadIdx.x % kTileFeatures, first_m = threadIdx.x / kTileFeatures;
    const int first_n = units.first * kTileFeatures + column;
    // of the first unit's first row: nothing else writes it, so it can be read ahead of the barrier
    const float ahead_gate = gate == nullptr || units.count == 0 ? 1.0f : gate[first_n];
    const float ahead_h = units.count > 0 && first_m < p.rows ? load_fresh(h + first_m * kWidth + first_n) : 0.0f;
    grid.wait();
    for (int unit = 0; unit < units.count; ++unit) {
      float sum[1][RowTiles][1][4] = {};
      multiply_plain<Fp8, RowTiles, P>(p, stream, input, sum);
      if (unit > 0) __syncthreads();
      spread<RowTiles, 1, 1>(sums(), sum);
      __syncthreads();
      stream.release(p, S::Chunks);
      for (int i = threadIdx.x; i < TileElements; i += kThreads) {
        const int m = i / kTileFeatures, n = (units.first + unit) * kTileFeatures + column;
        if (m >= p.rows) break;
        const bool ahead = unit == 0 && m == first_m;
        const float g = ahead ? ahead_gate : gate == nullptr ? 1.0f : gate[n];
        const float before = ahead ? ahead_h : load_fresh(h + m * kWidth + n);
        const float product = gather<RowTiles, 1, 1>(sums(), 0, 0, i) * scale;
        h[m * kWidth + n] = from_float<__nv_bfloat16>(before + g * product);
      }
    }
    grid.arrive();
  }

  __device__ void gate_up(int step, int layer) {
    constexpr int Group = RowTiles == 1 ? 4 / Shape<Fp8, kGateUp>::Chunks : 1;
    using S = Shape<Fp8, kGateUp>;
    const Style style = load_style(p, step, 2 * layer + 1);
    const float scale = weight_scale(layer, kGateUp), inverse_scale = Fp8 ? 1.0f / input_scale(layer, kDown) : 1.0f;
    const Range units = own_units<Fp8, kGateUp>();
    grid.wait();
    normalise<Fp8, RowTiles>(p, style, x(), plan.x_stride, partial);
    for (int first = 0; first < units.count; first += Group) {
      const int count = min(Group, units.count - first);
      float sum[Group][RowTiles][S::Tiles][4] = {};
      multiply_normed<Fp8, RowTiles, kGateUp, Group>(p, stream, x(), plan.x_stride, count, sum);
      if (first > 0) __syncthreads();
      spread<RowTiles, S::Tiles, Group>(sums(), sum);
      __syncthreads();
      stream.release(p, count * S::Chunks);
      for (int i = threadIdx.x; i < count * TileElements; i += kThreads) {
        const int unit = i / TileElements, element = i % TileElements, m = element / kTileFeatures;
        if (m >= p.rows) continue;
        const float gate = gather<RowTiles, S::Tiles, Group>(sums(), unit, 0, element) * scale;
        const float up = gather<RowTiles, S::Tiles, Group>(sums(), unit, 1, element) * scale;
        const int n = (units.first + first + unit) * kTileFeatures + element % kTileFeatures;
        store_quantised<Fp8>(p.hidden, int64_t(m) * kMlp + n, gelu_tanh(gate) * up, inverse_scale);
      }
    }
    grid.arrive();
  }

  // The seam between two steps, one block a row: x += dt * (norm(h) W_out + b), then h = W_in x + b.
  __device__ void seam(int step) {
    const bool first = step == 0, last = step == p.steps;
    const int row = blockIdx.x;
    float* normed = sums();
    float* action = normed + kWidth;
    const bool busy = row < p.rows;
    Style style = {};
    if (busy && !first) style = load_style(p, step - 1, 2 * p.layers);
    if (!first) grid.wait();
    if (busy) {
      const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
      if (!first) {
        const uint2 raw = __ldcg(static_cast<const uint2*>(p.h) + row * (kWidth / 4) + threadIdx.x);
        const float a = __uint_as_float(raw.x << 16), b = __uint_as_float(raw.x & 0xffff0000u);
        const float c = __uint_as_float(raw.y << 16), d = __uint_as_float(raw.y & 0xffff0000u);
        const float inverse =
            rsqrtf(block_sum(a * a + b * b + c * c + d * d, partial[0]) * (1.0f / kWidth) + p.eps);
        reinterpret_cast<float4*>(normed)[threadIdx.x] =
            make_float4(a * inverse * style.scale.x + style.shift.x, b * inverse * style.scale.y + style.shift.y,
                        c * inverse * style.scale.z + style.shift.z, d * inverse * style.scale.w + style.shift.w);
        __syncthreads();
        for (int i = warp; i < p.action_dim; i += kWarps) {
          const float4* weight = reinterpret_cast<const float4*>(p.out_weight + i * kWidth);
          float sum = 0.0f;
#pragma unroll
          for (int j = 0; j < kWidth / 4 / kWarpSize; ++j) {
            const float4 w = weight[j * kWarpSize + lane];
            const float4 n = reinterpret_cast<const float4*>(normed)[j * kWarpSize + lane];
            sum += w.x * n.x + w.y * n.y + w.z * n.z + w.w * n.w;
          }
#pragma unroll
          for (int offset = kWarpSize / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
          if (lane == 0) {
            float* x = p.x + row * p.action_dim + i;
            *x -= (sum + p.out_bias[i]) / p.steps;
            action[i] = *x;
          }
        }
      } else {
        for (int i = threadIdx.x; i < p.action_dim; i += kThreads) action[i] = p.x[row * p.action_dim + i];
      }
      __syncthreads();
      if (!last) {
        __nv_bfloat16* h = static_cast<__nv_bfloat16*>(p.h) + row * kWidth;
        for (int i = threadIdx.x; i < kWidth; i += kThreads) {
          const float4* weight = reinterpret_cast<const float4*>(p.in_weight + i * p.action_dim);
          float sum = p.in_bias[step * p.in_bias_stride + i];
          for (int j = 0; j < p.action_dim / 4; ++j) {
            const float4 w = weight[j], a = reinterpret_cast<const float4*>(action)[j];
            sum += w.x * a.x + w.y * a.y + w.z * a.z + w.w * a.w;
          }
          h[i] = from_float<__nv_bfloat16>(sum);
        }
      }
    }
    if (!last) grid.arrive();
  }
};

template <bool Fp8, int RowTiles>
__global__ void __launch_bounds__(kThreads, 1) expert_steps_kernel(const ExpertSteps p, const Plan plan) {
#if FLASHRT_DEVICE_HAS_BULK
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ uint64_t barriers[kMaxSlots + 1];
  __shared__ float partial[kWarps][16];
  if (threadIdx.x == 0) {
    for (int i = 0; i <= kMaxSlots; ++i) barrier_init(barriers + i, 1);
    barrier_init_fence();
  }
  __syncthreads();
  Expert<Fp8, RowTiles> expert{p, plan, shared, {shared, barriers, plan.slots}, {p.barrier}, barriers + kMaxSlots,
                               partial};
  if (threadIdx.x == 0)
    for (int i = 0; i < plan.slots; ++i) expert.stream.issue(p);
  for (int step = 0; step < p.steps; ++step) {
    expert.seam(step);
    for (int layer = 0; layer < p.layers; ++layer) {
      expert.qkv(step, layer);
      expert.attend(layer);
      expert.template add_product<kOut>(p.attended, step, layer, 2 * layer);
      expert.gate_up(step, layer);
      expert.template add_product<kDown>(p.hidden, step, layer, 2 * layer + 1);
    }
  }
  expert.seam(p.steps);
  if (threadIdx.x == 0 && atomicAdd(p.barrier + 1, 1) == gridDim.x - 1)  // the last block leaves all words zero
    for (int i = 0; i < kExpertBarrierWords; ++i) p.barrier[i] = 0;
#endif
}

template <bool Fp8, int RowTiles>
cudaError_t launch(const ExpertSteps& p, cudaStream_t stream) {
  int device = 0, shared_limit = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;
  constexpr int Groups = RowTiles == 1 ? 4 : 1;
  Plan plan = {attention::Layout(16 * kAttentionTiles<RowTiles>, p.capacity), 0, 0, 0, 0};
  plan.x_stride = kWidth * 2 + (Fp8 ? kRowPadFp16 : kRowPadBf16);
  const int x_bytes = attention::round_up(p.rows * plan.x_stride, 128);
  const int sum_bytes = kWarps * Groups * 2 * 16 * RowTiles * kTileFeatures * static_cast<int>(sizeof(float));
  const int attention_bytes = plan.attention.bytes_without_inbox();
  const int work_bytes = attention_bytes > x_bytes + sum_bytes ? attention_bytes : x_bytes + sum_bytes;
  const int fixed_bytes = 1024;  // the kernel's static shared memory and the alignment
  plan.slots = (shared_limit - fixed_bytes - work_bytes) / kChunkBytes;
  if (plan.slots > kMaxSlots) plan.slots = kMaxSlots;
  // what one call of multiply takes must be in the ring at once
  if (plan.slots < (RowTiles == 1 || !Fp8 ? 4 : 2)) return cudaErrorNotSupported;
  plan.x_offset = plan.slots * kChunkBytes;
  plan.sum_offset = plan.x_offset + x_bytes;
  const int bytes = plan.x_offset + work_bytes;

  auto kernel = expert_steps_kernel<Fp8, RowTiles>;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  // a barrier over the grid needs all of its blocks on the device at once: the attribute makes that a condition
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(multiprocessors);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const int teams = kHeads * ((p.rows + 16 * kAttentionTiles<RowTiles> - 1) / (16 * kAttentionTiles<RowTiles>));
  if (multiprocessors < teams * kTeam || multiprocessors < p.rows) return cudaErrorNotSupported;
  return cudaLaunchKernelEx(&config, kernel, p, plan);
}

}  // namespace

cudaError_t expert_steps(const ExpertSteps& p, cudaStream_t stream) {
  int device = 0, major = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess) return status;
  if (major < 9) return cudaErrorNotSupported;  // the bulk copy engine
  if (p.rows < 1 || p.rows > kSkinnyMaxRows || p.layers < 1 || p.steps < 1 || p.capacity < p.rows ||
      p.action_dim < 4 || p.action_dim > kMaxActionDim || p.action_dim % 4 != 0)
    return cudaErrorInvalidValue;
  if (p.rows <= 16) return p.fp8 ? launch<true, 1>(p, stream) : launch<false, 1>(p, stream);
  return p.fp8 ? launch<true, 4>(p, stream) : launch<false, 4>(p, stream);
}

}  // namespace flashrt
