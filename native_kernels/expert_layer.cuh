// The five phases of a layer of the persistent expert.
#pragma once

#include "expert_frame.cuh"

namespace flashrt {
namespace expert {

template <bool Fp8>
struct Layer : Frame<Fp8> {
  using Frame<Fp8>::p;
  using Frame<Fp8>::plan;
  using Frame<Fp8>::shared;
  using Frame<Fp8>::ring;
  using Frame<Fp8>::share;
  using Frame<Fp8>::chunk;
  using Frame<Fp8>::visit;
  using Frame<Fp8>::h;
  using Frame<Fp8>::big;
  using Frame<Fp8>::exchange;
  using Frame<Fp8>::tiles;
  using Frame<Fp8>::weight_scale;
  using Frame<Fp8>::input_scale;
  using Frame<Fp8>::shift_product;
  using Frame<Fp8>::refill;
  using Frame<Fp8>::order_published;
  using Frame<Fp8>::add_squares;
  using Frame<Fp8>::inverse_rms;
  using Frame<Fp8>::publish_last;
  using Frame<Fp8>::prefetch;
  using Frame<Fp8>::Half;
  using Frame<Fp8>::UnitsPerHead;

  __device__ void qkv(int step, int layer) {
    using S = Shape<Fp8, kQkv>;
    const unsigned char* x = exchange().template buffer<kNormedQkv>(visit);
    const unsigned char* parts = exchange().template buffer<kSquaresQkv>(visit);
    const float scale = weight_scale(layer, kQkv);
    const int count = qkv_units(), own = thread_id() / kTileElements, element = thread_id() % kTileElements;
    const bool busy = own < count;
    const int unit = qkv_unit(own);
    Activations<Fp8, kQkv> a;
    Squares squares;
    for (int tile = 0; tile < tiles(); ++tile) {
      const int m = tile * kTileRows + element / kTileFeatures;
      if (tile == 0) a.ask(x, 0, p.rows), squares.ask(parts, 0, p.rows);
      const RopeOperands operands = rope_operands(step, layer, unit, m, busy && m < p.rows);
      a.settle();
      Cursor cursor = chunk;
      ring.wait(cursor, count * S::Chunks);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (i < count) this->template product_unit<kQkv>(a, cursor, 2, i, p.rows - tile * kTileRows);
      add_squares(squares);
      if (tile + 1 < tiles()) a.ask(x, tile + 1, p.rows), squares.ask(parts, tile + 1, p.rows);
      __syncthreads();
      if (tile + 1 == tiles()) chunk = cursor;
      if (busy) {  // whole warps
        const float factor = scale * inverse_rms(element / kTileFeatures);
        rotate(unit, m, operands, gather(big(), 2 * S::Tiles, own * S::Tiles, element) * factor,
               gather(big(), 2 * S::Tiles, own * S::Tiles + 1, element) * factor);
      }
      __syncthreads();  // the sums have been read; and nobody looks for more while this block still computes
    }
    refill(count * S::Chunks);
  }

  struct RopeOperands {
    float cosine = 1.0f, sine = 0.0f, first_shift = 0.0f, second_shift = 0.0f;
  };

  // What this thread's output of row m needs beside its product; v is not rotated.
  __device__ __forceinline__ RopeOperands rope_operands(int step, int layer, int unit, int m, bool any) const {
    RopeOperands operands;
    if (!any) return operands;
    const int d = unit % UnitsPerHead * kTileFeatures + thread_id() % kTileFeatures;
    const int feature = unit / UnitsPerHead * kHeadDim + d;
    operands.first_shift = shift_product(step, layer, feature);
    operands.second_shift = shift_product(step, layer, feature + Half);
    if (unit < (kHeads + 1) * UnitsPerHead) {
      operands.cosine = p.rope_cos[int64_t(share.prefix + m) * Half + d];
      operands.sine = p.rope_sin[int64_t(share.prefix + m) * Half + d];
    }
    return operands;
  }

  // An even thread publishes the pair of first halves, its odd neighbour that of second halves.
  __device__ __forceinline__ void rotate(int unit, int m, const RopeOperands& o, float first, float second) {
    const int head = unit / UnitsPerHead, column = thread_id() % kTileFeatures;
    const bool even = column % 2 == 0;
    first += o.first_shift, second += o.second_shift;
    const float turned_first = first * o.cosine - second * o.sine, turned_second = second * o.cosine + first * o.sine;
    const float theirs = __shfl_xor_sync(0xffffffffu, even ? turned_second : turned_first, 1);
    if (m >= p.rows) return;
    const uint32_t word = even ? pack_bf16(turned_first, theirs) : pack_bf16(theirs, turned_second);
    const int d = unit % UnitsPerHead * kTileFeatures + (even ? column : column - 1 + Half);
    const Exchange buffers = exchange();
    unsigned char* row = head < kHeads ? buffers.buffer<kQ>(visit) + (m * kHeads + head) * kHeadRowBytes
                                       : buffers.buffer<kKv>(visit) + (m * 2 + head - kHeads) * kHeadRowBytes;
    publish(row + d * 2, exchange().other(visit), word);
  }

  __device__ void attend(int layer) {
    order_published();
    const int head = block_id() / kSplits, rank = block_id() % kSplits;
    const int64_t other = exchange().other(visit);
    const Exchange buffers = exchange();
    const int head_rows = head * kSplits * kSplits * buffers.padded_rows;
    const Inbox inbox{buffers.buffer<kInbox>(visit) + int64_t(head_rows) * kSplitColumns * 2,
                      buffers.buffer<kStats>(visit) + head * kSplits * buffers.padded_rows * 4, other,
                      buffers.padded_rows, rank};
    const float scale = input_scale(layer, kOut);
    if (share.keys > 0) {
      const Layout& layout = plan.attention;
      load_suffix(shared, layout, share, buffers.buffer<kKv>(visit));
      load_queries(shared, layout, buffers.buffer<kQ>(visit) + head * kHeadRowBytes, p.rows);
      async_copy_wait();
      __syncthreads();
      scores(shared, layout, share.keys);
      __syncthreads();
      for (int tile = 0; tile < layout.tiles; ++tile) softmax(shared, layout, share, inbox, tile, p.rows);
      __syncthreads();
      send_values(shared, layout, share, inbox, p.rows);
    }
    unsigned char* out = buffers.buffer<kAttendedRows>(visit);
    int row = thread_id() / kWarpSize;
    Parts next;
    if (row < p.rows) next.ask(inbox, share.active, row);
    for (; row < p.rows; row += kWarps) {
      Parts parts = next;
      if (row + kWarps < p.rows) next.ask(inbox, share.active, row + kWarps);
      parts.settle(inbox, row);
      merge<Fp8>(parts, inbox, head, row, out, other, scale);
    }
  }

  // h += gate * (input W): products 3 and 5, with what the norm behind them needs. A unit is the same 8 columns of h in
  // both, and always one block's.
  __device__ __forceinline__ void add(float sum, const Residual& o) {
    h = round_bf16(h + o.gate * (sum * (o.weight * o.input)));
  }

  __device__ void out(int step, int layer) {
    const unsigned char* x = exchange().template buffer<kAttendedRows>(visit);
    this->template narrow_product<kOut>(x, step, layer, [&](float sum, const Residual& o) {
      add(sum, o);
      this->template publish_normed<kGateUp, kNormedMlp, kSquaresMlp>(visit, o.scale + 1.0f);
    });
  }

  __device__ void down(int step, int layer) {
    order_published();
    const unsigned char* x = exchange().template buffer<kHidden>(visit);
    this->template narrow_product<kDown>(x, step, layer, [&](float sum, const Residual& o) {
      add(sum, o);
      if (layer + 1 < p.layers) {
        this->template publish_normed<kQkv, kNormedQkv, kSquaresQkv>(visit + 1, o.scale + 1.0f);
      } else {
        publish_last(step);
      }
    });
  }

  __device__ void gate_up(int step, int layer) {
    using S = Shape<Fp8, kGateUp>;
    constexpr int Group = 4 / S::Chunks, Features = kQkvHeads * kHeadDim;
    const unsigned char* x = exchange().template buffer<kNormedMlp>(visit);
    const unsigned char* parts = exchange().template buffer<kSquaresMlp>(visit);
    const float scale = weight_scale(layer, kGateUp), hidden_scale = input_scale(layer, kDown);
    // a warp's outputs are one row: the neighbours in memory
    const int own = thread_id() % kWarpSize / kTileFeatures, warp = thread_id() / kWarpSize;
    const int element = warp * kTileFeatures + thread_id() % kTileFeatures;
    Activations<Fp8, kGateUp> a;
    Squares squares;
    for (int first = 0; first < kGateUpUnits; first += Group) {
      const bool busy = own < Group;
      const int n = (block_id() * kGateUpUnits + first + own % Group) * kTileFeatures + element % kTileFeatures;
      if (first == 0 || tiles() > 1) a.ask(x, 0, p.rows), squares.ask(parts, 0, p.rows);
      const float gate_shift = shift_product(step, layer, Features + n);
      const float up_shift = shift_product(step, layer, Features + kMlp + n);
      for (int tile = 0; tile < tiles(); ++tile) {
        a.settle();
        if (tile == 0 && first == 0) prefetch(p.k_cache, plan.attention.k, layer);
        Cursor cursor = chunk;
        ring.wait(cursor, Group * S::Chunks);
#pragma unroll
        for (int i = 0; i < Group; ++i)
          this->template product_unit<kGateUp>(a, cursor, Group, i, p.rows - tile * kTileRows);
        if (first == 0 || tiles() > 1) add_squares(squares);
        if (tile + 1 < tiles()) a.ask(x, tile + 1, p.rows), squares.ask(parts, tile + 1, p.rows);
        __syncthreads();
        if (tile + 1 == tiles()) chunk = cursor;
        const int m = tile * kTileRows + warp;
        if (m < p.rows) {
          const float factor = scale * inverse_rms(warp);
          const float gate = gather(big(), Group * S::Tiles, own % Group * S::Tiles, element) * factor + gate_shift;
          const float up = gather(big(), Group * S::Tiles, own % Group * S::Tiles + 1, element) * factor + up_shift;
          publish_hidden(m, n, busy, round_bf16(gelu(gate) * up), hidden_scale);
        }
        __syncthreads();
      }
      refill(Group * S::Chunks);
    }
  }

  // By whole warps: four (e4m3) or two neighbours make a word.
  __device__ __forceinline__ void publish_hidden(int m, int n, bool busy, float value, float scale) {
    unsigned char* buffer = exchange().template buffer<kHidden>(visit);
    const int64_t other = exchange().other(visit);
    if constexpr (Fp8) {
      uint32_t word = static_cast<uint32_t>(to_e4m3(value * inverse_of(scale))) << (n % 4 * 8);
      word |= __shfl_xor_sync(0xffffffffu, word, 1);
      word |= __shfl_xor_sync(0xffffffffu, word, 2);
      if (busy && n % 4 == 0) publish(buffer + activation_offset<Fp8, kDown>(m, n), other, word);
    } else {
      const float next = __shfl_down_sync(0xffffffffu, value, 1);
      if (busy && n % 2 == 0) publish(buffer + activation_offset<Fp8, kDown>(m, n * 2), other, pack_bf16(value, next));
    }
  }
  // gelu_tanh without the branch of exact division
  static __device__ __forceinline__ float gelu(float x) {
    const float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return x * (1.0f - __fdividef(1.0f, 1.0f + __expf(2.0f * inner)));
  }
};

}  // namespace expert
}  // namespace flashrt
