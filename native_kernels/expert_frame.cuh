// What the persistent expert's phases share: where a block's pieces lie, how it publishes the residual, and the product
// of one unit of 8 columns.
#pragma once

#include "expert_attend.cuh"

namespace flashrt {
namespace expert {

struct Plan {
  Layout attention;
  int slots, big, small;  // the ring comes first; then the sums of products with many tiles, and of those with one
};

constexpr int kSmallBytes = kWarps * kTileStride * 4, kBigBytes = 8 * kSmallBytes;

// What the epilogue of products 3 and 5 needs beside the sum.
struct Residual {
  float gate = 1.0f, weight = 1.0f, input = 1.0f, scale = 0.0f;
};

template <bool Fp8>
struct Frame {
  static constexpr int Half = kHeadDim / 2, UnitsPerHead = Half / kTileFeatures;

  const ExpertSteps& p;
  const Plan& plan;
  unsigned char* shared;
  Ring ring;
  // in shared memory too, as registers are short
  Mover* mover;
  const Source* sources;
  const Share& share;
  float* inverse;  // parts of the sums of squares: (warp, row)
  float* scratch;  // three floats a warp
  Cursor chunk = {};
  int visit = 0;
  float h = 0.0f;  // row thread_id() / 8, column block_id() * 8 + thread_id() % 8

  __device__ float* big() const { return reinterpret_cast<float*>(shared + plan.big); }
  __device__ float* small() const { return reinterpret_cast<float*>(shared + plan.small); }
  __device__ Exchange exchange() const {
    return {static_cast<unsigned char*>(p.exchange), (p.rows + kTileRows - 1) / kTileRows * kTileRows};
  }
  __device__ int tiles() const { return (p.rows + kTileRows - 1) / kTileRows; }
  __device__ float weight_scale(int layer, int product) const {
    return Fp8 ? p.weight_scale[layer * kProducts + product] : 1.0f;
  }
  __device__ float input_scale(int layer, int product) const {
    return Fp8 ? p.input_scale[layer * 2 + (product == kDown)] : 1.0f;
  }
  __device__ const float* style(const float* base, int step, int norm) const {
    return base == nullptr ? nullptr : base + step * p.step_stride + norm * p.norm_stride;
  }
  // shift W of a feature at this step.
  __device__ __forceinline__ float shift_product(int step, int layer, int feature) const {
    constexpr int64_t Features = kQkvHeads * kHeadDim + 2 * kMlp;
    return p.shift_products == nullptr ? 0.0f
                                       : p.shift_products[(int64_t(step) * p.layers + layer) * Features + feature];
  }

  // Behind a barrier: `chunks` chunks have been read by all, and others take their place. Off the critical path: this
  // warp's activations take longer to come than it takes to ask.
  __device__ __forceinline__ void refill(int chunks) {
    if (thread_id() == kThreads - kWarpSize) mover->fill(p, ring, sources, sources_of_visit<Fp8>(), chunks);
  }

  // Behind a barrier, by a warp that has nothing else to wait for: what the block has blanked so far is blank for all
  // who see what it publishes behind its next barrier.
  __device__ __forceinline__ void order_published() const {
    if (thread_id() == kThreads - 2 * kWarpSize) exchange_fence();
  }

  // Every warp's part of the sums of a tile's rows; behind the next barrier inverse_rms() has the whole.
  __device__ __forceinline__ void add_squares(Squares& squares) {
    const float4 sum = squares.settle();
    if (thread_id() % kWarpSize < 4)
      reinterpret_cast<float4*>(inverse)[thread_id() / kWarpSize * 4 + thread_id() % kWarpSize] = sum;
  }

  // r / kHeadroom of row `slot` of the tile, by eight neighbouring lanes of that row.
  __device__ __forceinline__ float inverse_rms(int slot) const {
    const int part = thread_id() % 8;
    float sum = inverse[part * kTileRows + slot] + inverse[(part + 8) * kTileRows + slot];
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return rsqrtf(sum * (1.0f / kWidth) + p.eps) / kHeadroom;
  }

  // This warp's part of one of `units` units of two tiles, into the big region.
  template <int P>
  __device__ __forceinline__ void product_unit(const Activations<Fp8, P>& a, Cursor& cursor, int units, int unit,
                                               int rows) {
    float sum[2][4] = {};
    multiply_unit(a, ring, cursor, sum);
    spread(big(), 2 * units, 2 * unit, sum[0], rows);
    spread(big(), 2 * units, 2 * unit + 1, sum[1], rows);
  }

  // Keys and values of the prefix for the attention after next, at times when nothing urgent is asked for: 6 MB of L2
  // traffic for all blocks. Every warp is past this layer's scores and P V.
  __device__ __forceinline__ void prefetch(const void* cache, int place, int layer) {
    const int next = layer + 1 < p.layers ? layer + 1 : 0;
    load_prefix(shared + place, share,
                static_cast<const __nv_bfloat16*>(cache) + int64_t(next) * p.capacity * kHeadDim);
  }

  // h (1 + scale) of this thread's element and the sum of squares of its eight for copy `copy` of the given buffers.
  // All threads of a warp take part; those of rows past the end publish nothing.
  template <int P, int Normed, int SquaresOf>
  __device__ __forceinline__ void publish_normed(int copy, float factor) {
    const int m = thread_id() / kTileFeatures, column = thread_id() % kTileFeatures;
    const int64_t other = exchange().other(copy);
    const float scaled = h * factor * kHeadroom, next = __shfl_down_sync(0xffffffffu, scaled, 1);
    float squares = h * h;
#pragma unroll
    for (int offset = kTileFeatures / 2; offset > 0; offset /= 2)
      squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    if (m >= p.rows) return;
    if (column % 2 == 0)
      publish(exchange().buffer<Normed>(copy) + activation_offset<Fp8, P>(m, (block_id() * kTileFeatures + column) * 2),
              other, Fp8 ? pack_f16(scaled, next) : pack_bf16(scaled, next));
    if (column == 1)
      publish(exchange().buffer<SquaresOf>(copy) + square_offset(m) + block_id() * kTileRows * 4, other,
              __float_as_uint(squares));
  }

  // The last h of a step, for the seam.
  __device__ __forceinline__ void publish_last(int copy) {
    const int m = thread_id() / kTileFeatures, column = thread_id() % kTileFeatures;
    const float next = __shfl_down_sync(0xffffffffu, h, 1);
    if (m < p.rows && column % 2 == 0)
      publish(exchange().buffer<kLast>(copy) + (m * kWidth + block_id() * kTileFeatures + column) * 2,
              exchange().other(copy), pack_bf16(h, next));
  }

  __device__ __forceinline__ Residual residual(int step, int layer, int product, int norm) const {
    const int n = block_id() * kTileFeatures + thread_id() % kTileFeatures;
    const float* gates = style(p.gate, step, norm);
    return {gates == nullptr ? 1.0f : gates[n], weight_scale(layer, product), input_scale(layer, product),
            style(p.norm_scale, step, norm + 1)[n]};
  }

  // A product of one unit of 8 columns on `x`: every thread's element, by `finish(sum, residual)`, which whole warps
  // call.
  template <int P, typename Finish>
  __device__ __forceinline__ void narrow_product(const unsigned char* x, int step, int layer, Finish finish) {
    using S = Shape<Fp8, P>;
    Activations<Fp8, P> a;
    a.ask(x, 0, p.rows);
    // behind the activations in the queue: it is needed later
    const Residual operands = P == kMix ? Residual{} : residual(step, layer, P, 2 * layer + (P == kDown));
    for (int tile = 0; tile < tiles(); ++tile) {
      a.settle();
      if (P == kDown && tile == 0) prefetch(p.v_cache, plan.attention.v, layer);
      float sum[1][4] = {};
      Cursor cursor = chunk;
      ring.wait(cursor, S::Chunks);
      multiply_unit(a, ring, cursor, sum);
#pragma unroll
      for (int batch = 1; batch < S::Batches; ++batch) {
        a.ask(x, tile, p.rows, batch);
        a.settle();
        multiply_unit(a, ring, cursor, sum);
      }
      if (tile + 1 < tiles()) a.ask(x, tile + 1, p.rows);
      spread(small(), 1, 0, sum[0], p.rows - tile * kTileRows);
      __syncthreads();
      if (tile + 1 == tiles()) chunk = cursor;
      if (thread_id() / kTileElements == tile) finish(gather(small(), 1, 0, thread_id() % kTileElements), operands);
      __syncthreads();
    }
    refill(S::Chunks);
  }
};

}  // namespace expert
}  // namespace flashrt
