// All denoise steps of the action expert in one launch: the blocks stay on their multiprocessors, the weights keep
// streaming, and what stands between two dependent products is the flight of a word and not a kernel boundary.
//
// A step is: x -> h = W_in x + b (pi0: h = W_mix silu(W_in x + b) + b_mix); for every layer
//   1 q, k, v = rope(norm(h) W_qkv)      2 attention, a team of blocks a head
//   3 h += gate * (attended W_out)       4 hidden = geglu(norm(h) W_gate_up)      5 h += gate * (hidden W_down)
// and x += dt * (norm(h) W_out + b) at the end. Widths are those of the published 300M expert (pi0, pi0.5).
//
// The norms never stand in the way: norm(h) W = r * (h (1 + scale)) W + shift W with r = rsqrt(mean(h^2) + eps). Who
// writes h writes h (1 + scale) and its part of the sum of squares; r is applied to the product, and shift W is a
// constant of the step. h itself stays in a register of the thread that adds to it, over all layers.
//
// Bytes moved, e4m3: 17.3 MB of weights a layer, 311 MB a step: 73 us a step at 4.3 TB/s, the floor. A ring of 16 KB
// weight chunks in shared memory is kept full in the fixed order of use, across phases, layers and steps. What is left
// is latency: six exchanges a layer. They have no barriers: the words that go from block to block say themselves
// whether they have come (expert_stream.cuh).
//
// e4m3 weights meet 16-bit activations in products 1 and 4 (widened in registers: exact) and e4m3 activations in 3
// and 5. Rows are served in tiles of 16, one after the other over the same chunks. Sums are taken in a fixed order:
// results are bit-identical from run to run.
#include "expert_attend.cuh"

#pragma nv_diag_suppress 177  // below sm_90 the kernel is empty and leaves everything here unused

namespace flashrt {
namespace {

using namespace expert;

struct Plan {
  Layout attention;
  int slots, big, small;  // the ring comes first; then the sums of products with many tiles, and of those with one
};

constexpr int kSmallBytes = kWarps * kTileStride * 4, kBigBytes = 8 * kSmallBytes;

template <bool Fp8>
struct Expert {
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

  __device__ void qkv(int step, int layer) {
    using S = Shape<Fp8, kQkv>;
    const unsigned char* x = exchange().buffer<kNormedQkv>(visit);
    const unsigned char* parts = exchange().buffer<kSquaresQkv>(visit);
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
        if (i < count) product_unit<kQkv>(a, cursor, 2, i, p.rows - tile * kTileRows);
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
    unsigned char* row = head < kHeads ? exchange().buffer<kQ>(visit) + (m * kHeads + head) * kHeadRowBytes
                                       : exchange().buffer<kKv>(visit) + (m * 2 + head - kHeads) * kHeadRowBytes;
    publish(row + d * 2, exchange().other(visit), word);
  }

  // Keys and values of the prefix for the attention after next, at times when nothing urgent is asked for: 6 MB of L2
  // traffic for all blocks. Every warp is past this layer's scores and P V.
  __device__ __forceinline__ void prefetch(const void* cache, int place, int layer) {
    const int next = layer + 1 < p.layers ? layer + 1 : 0;
    load_prefix(shared + place, share,
                static_cast<const __nv_bfloat16*>(cache) + int64_t(next) * p.capacity * kHeadDim);
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
      publish(exchange().buffer<Normed>(copy) +
                  activation_offset<Fp8, P>(m, (block_id() * kTileFeatures + column) * 2),
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

  // What the epilogue of products 3 and 5 needs beside the sum.
  struct Residual {
    float gate = 1.0f, weight = 1.0f, input = 1.0f, scale = 0.0f;
  };
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

  // h += gate * (input W): products 3 and 5, with what the norm behind them needs. A unit is the same 8 columns of h in
  // both, and always one block's.
  __device__ __forceinline__ void add(float sum, const Residual& o) {
    h = round_bf16(h + o.gate * (sum * (o.weight * o.input)));
  }

  __device__ void out(int step, int layer) {
    narrow_product<kOut>(exchange().buffer<kAttendedRows>(visit), step, layer, [&](float sum, const Residual& o) {
      add(sum, o);
      publish_normed<kGateUp, kNormedMlp, kSquaresMlp>(visit, o.scale + 1.0f);
    });
  }

  __device__ void down(int step, int layer) {
    order_published();
    narrow_product<kDown>(exchange().buffer<kHidden>(visit), step, layer, [&](float sum, const Residual& o) {
      add(sum, o);
      if (layer + 1 < p.layers) {
        publish_normed<kQkv, kNormedQkv, kSquaresQkv>(visit + 1, o.scale + 1.0f);
      } else {
        publish_last(step);
      }
    });
  }

  __device__ void gate_up(int step, int layer) {
    using S = Shape<Fp8, kGateUp>;
    constexpr int Group = 4 / S::Chunks, Features = kQkvHeads * kHeadDim;
    const unsigned char* x = exchange().buffer<kNormedMlp>(visit);
    const unsigned char* parts = exchange().buffer<kSquaresMlp>(visit);
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
        for (int i = 0; i < Group; ++i) product_unit<kGateUp>(a, cursor, Group, i, p.rows - tile * kTileRows);
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
    unsigned char* buffer = exchange().buffer<kHidden>(visit);
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

  // Between two steps: x += dt * (norm(h) W_out + b), some blocks a row; then h = W_in x + b, every block its columns.
  __device__ void seam(int step) {
    if (step > 0) {
      project_out(step - 1);
    }
    if (step == p.steps) return;
    project_in(step);
  }

  __device__ void project_out(int step) {
    const int blocks = p.rows <= kBlocks / 8 ? 8 : 2;  // of a row
    const int row = block_id() / blocks, first = block_id() % blocks;
    if (row >= p.rows) return;
    const int warp = thread_id() / kWarpSize, lane = thread_id() % kWarpSize;
    constexpr int Quarters = 4, Outputs = kWarps / Quarters;  // at once
    const int column = warp / Outputs * (kWidth / Quarters) + lane * 8;
    const float *scale = style(p.norm_scale, step, 2 * p.layers), *shift = style(p.norm_shift, step, 2 * p.layers);
    const unsigned char* from = exchange().buffer<kLast>(step) + (row * kWidth + column) * 2;
    for (int base = 0; base < p.action_dim; base += blocks * Outputs) {
      const int output = base + warp % Outputs * blocks + first;
      float dot = 0.0f, shifted = 0.0f, squares = 0.0f;
      if (output < p.action_dim) {
        float w[8], s[8], t[8] = {};
        load_eight(w, p.out_weight + output * kWidth + column);
        load_eight(s, scale + column);
        if (shift != nullptr) load_eight(t, shift + column);
        const uint4 raw = await(from);
        const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float value = i % 2 == 0 ? low_bf16(pairs[i / 2]) : high_bf16(pairs[i / 2]);
          dot += value * (1.0f + s[i]) * w[i];
          shifted += t[i] * w[i];
          squares += value * value;
        }
      }
      __syncwarp();
#pragma unroll
      for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        dot += __shfl_xor_sync(0xffffffffu, dot, offset);
        shifted += __shfl_xor_sync(0xffffffffu, shifted, offset);
        squares += __shfl_xor_sync(0xffffffffu, squares, offset);
      }
      __syncthreads();
      if (lane == 0) scratch[warp * 3] = dot, scratch[warp * 3 + 1] = shifted, scratch[warp * 3 + 2] = squares;
      __syncthreads();
      if (lane == 0 && warp < Outputs && output < p.action_dim) {
        for (int quarter = 1; quarter < Quarters; ++quarter) {
          const float* part = scratch + (quarter * Outputs + warp) * 3;
          dot += part[0], shifted += part[1], squares += part[2];
        }
        const float velocity = dot * rsqrtf(squares * (1.0f / kWidth) + p.eps) + shifted + p.out_bias[output];
        advance(step, row, output, velocity);
      }
    }
  }

  static __device__ __forceinline__ void load_eight(float (&value)[8], const float* from) {
    const float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
    value[0] = low.x, value[1] = low.y, value[2] = low.z, value[3] = low.w;
    value[4] = high.x, value[5] = high.y, value[6] = high.z, value[7] = high.w;
  }

  // One Euler step of one coordinate, with the pull of the guidance where there is one.
  __device__ __forceinline__ void advance(int step, int row, int output, float velocity) {
    const int index = row * p.action_dim + output;
    const float before = p.x[index], change = -velocity / p.steps;
    float after = before + change;
    if (p.guide_gain != nullptr) {
      const float time = 1.0f - static_cast<float>(step) / p.steps;
      after += p.guide_gain[step] / p.steps * p.guide_weight[index] *
               (p.guide_target[index] - before - time * p.steps * change);
    }
    p.x[index] = after;
    if (step + 1 < p.steps)
      publish(exchange().buffer<kActions>(step) + (row * kMaxActionDim + output) * 4, exchange().other(step),
              __float_as_uint(after));
  }

  __device__ void project_in(int step) {
    const int m = thread_id() / kTileFeatures, n = block_id() * kTileFeatures + thread_id() % kTileFeatures;
    const float factor = style(p.norm_scale, step, 0)[n] + 1.0f;
    const float mix_bias = p.mix_weights == nullptr ? 0.0f : p.mix_bias[n];
    float value = m < p.rows ? in_product(step, m, n) : 0.0f;
    if (p.mix_weights != nullptr) {
      value = __fdividef(value, 1.0f + __expf(-value));
      const float next = __shfl_down_sync(0xffffffffu, value, 1);
      if (m < p.rows && n % 2 == 0)
        publish(exchange().buffer<kMixed>(step) + activation_offset<Fp8, kMix>(m, n * 2), exchange().other(step),
                pack_bf16(value, next));
      __syncthreads();  // the sums of the last product have been read
      narrow_product<kMix>(exchange().buffer<kMixed>(step), step, 0,
                         [&](float sum, const Residual&) { value = sum + mix_bias; });
    }
    h = round_bf16(value);
    publish_normed<kQkv, kNormedQkv, kSquaresQkv>(visit, factor);
  }

  __device__ __forceinline__ float in_product(int step, int m, int n) {
    const float* weight = p.in_weight + n * p.action_dim;
    const unsigned char* actions = step == 0 ? reinterpret_cast<const unsigned char*>(p.x + m * p.action_dim)
                                             : exchange().buffer<kActions>(step - 1) + m * kMaxActionDim * 4;
    constexpr int kPieces = 4;
    float sum = p.in_bias[step * p.in_bias_stride + n];
    for (int first = 0; first < p.action_dim / 4; first += kPieces) {
      float4 w[kPieces];
      uint4 x[kPieces];
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const bool has = first + i < p.action_dim / 4;
        w[i] = has ? reinterpret_cast<const float4*>(weight)[first + i] : make_float4(0, 0, 0, 0);
        x[i] = has ? look(actions + (first + i) * 16) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        if (step > 0 && absent(x[i])) x[i] = await(actions + (first + i) * 16);
        sum += w[i].x * __uint_as_float(x[i].x) + w[i].y * __uint_as_float(x[i].y) +
               w[i].z * __uint_as_float(x[i].z) + w[i].w * __uint_as_float(x[i].w);
      }
    }
    return sum;
  }

  __device__ void run() {
    blank_values(shared, plan.attention, share);
    prefetch(p.k_cache, plan.attention.k, -1);
    prefetch(p.v_cache, plan.attention.v, -1);
    for (int step = 0; step < p.steps; ++step) {
      seam(step);
      for (int layer = 0; layer < p.layers; ++layer, ++visit) {
        qkv(step, layer);
        attend(layer);
        out(step, layer);
        gate_up(step, layer);
        down(step, layer);
      }
    }
    seam(p.steps);
    async_copy_wait();
  }
};

// The first copy of the exchange, before anyone waits for anything.
__device__ void blank_exchange(const Exchange& exchange) {
  uint4* words = reinterpret_cast<uint4*>(exchange.base);
  const int64_t count = exchange.copy_bytes() / 16;
  for (int64_t i = block_id() * kThreads + thread_id(); i < count; i += kBlocks * kThreads)
    words[i] = make_uint4(kAbsent, kAbsent, kAbsent, kAbsent);
}

template <bool Fp8>
__global__ void __launch_bounds__(kThreads, 1) expert_steps_kernel(const ExpertSteps p, const Plan plan) {
#if FLASHRT_DEVICE_HAS_BULK
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ uint64_t full[kMaxSlots];
  __shared__ Mover mover;
  __shared__ Source sources[kMaxSources];
  __shared__ Share share;
  __shared__ __align__(16) float inverse[kWarps * kTileRows], scratch[kWarps * 3];
  if (thread_id() == 0) {
    for (int i = 0; i < kMaxSlots; ++i) barrier_init(full + i, 1);
    barrier_init_fence();
    mover = {0, 0, p.mix_weights == nullptr ? 0 : -1, 0};
    share = Share(block_id() % kSplits, *p.prefix_length, p.rows);
  }
  const int visit_sources = sources_of_visit<Fp8>();
  if (thread_id() <= visit_sources) sources[thread_id()] = source<Fp8>(p, thread_id());
  __syncthreads();
  const Ring ring{shared, full, plan.slots};
  if (thread_id() == kThreads - kWarpSize) mover.fill(p, ring, sources, visit_sources, plan.slots);
  Expert<Fp8> expert{p, plan, shared, ring, &mover, sources, share, inverse, scratch};
  blank_exchange(expert.exchange());
  grid_barrier(p.barrier);
  expert.run();
  if (thread_id() == 0 && atomicAdd(p.barrier + 1, 1) == kBlocks - 1)  // the last block leaves both words zero
    p.barrier[0] = p.barrier[1] = 0;
#endif
}

template <bool Fp8>
cudaError_t launch(const ExpertSteps& p, cudaStream_t stream) {
  int device = 0, shared_limit = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;
  if (multiprocessors < kBlocks) return cudaErrorNotSupported;
  Plan plan = {};
  Layout& attention = plan.attention;
  attention.block_keys = Layout::keys_of_block(p.capacity);
  if (attention.block_keys > kLaneKeys * kWarpSize) return cudaErrorNotSupported;
  attention.tiles = (p.rows + kTileRows - 1) / kTileRows;
  attention.parts = attention.tiles == 1 ? 2 : 1;
  const int rows = attention.tiles * kTileRows, key_bytes = attention.block_keys * kRowStride;
  const int query_bytes = rows * kRowStride, score_bytes = rows * attention.parts * attention.score_stride() * 4;
  const int probability_bytes = rows * attention.probability_stride() * 2;
  const int big_bytes = max(kBigBytes, query_bytes + score_bytes + probability_bytes + rows * 4);
  const int work_bytes = big_bytes + kSmallBytes + 2 * key_bytes;
  constexpr int kFixedBytes = 2048;  // the kernel's static shared memory and the alignment
  plan.slots = min(kMaxSlots, (shared_limit - work_bytes - kFixedBytes) / kChunkBytes);
  if (plan.slots < 4) return cudaErrorNotSupported;  // what one tile of rows reads before it gives anything back
  plan.big = plan.slots * kChunkBytes;
  plan.small = plan.big + big_bytes;
  attention.q = plan.big;
  attention.score = attention.q + query_bytes;
  attention.probability = attention.score + score_bytes;
  attention.row_scale = attention.probability + probability_bytes;
  attention.k = plan.small + kSmallBytes;
  attention.v = attention.k + key_bytes;
  const int bytes = attention.v + key_bytes;

  auto kernel = expert_steps_kernel<Fp8>;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  // blocks wait for each other: all must be on the device at once, and the attribute makes that a condition
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(kBlocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, p, plan);
}

}  // namespace

int64_t expert_exchange_bytes(int rows) {
  return 2 * int64_t(kExchangeRowBytes) * ((rows + kTileRows - 1) / kTileRows * kTileRows);
}

cudaError_t expert_steps(const ExpertSteps& p, cudaStream_t stream) {
  int device = 0, major = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess) return status;
  if (major < 9) return cudaErrorNotSupported;  // the bulk copy engine
  if (p.rows < 1 || p.rows > kExpertMaxRows || p.layers < 1 || p.steps < 1 || p.capacity < p.rows ||
      p.action_dim < 4 || p.action_dim > kMaxActionDim || p.action_dim % 4 != 0)
    return cudaErrorInvalidValue;
  return p.fp8 ? launch<true>(p, stream) : launch<false>(p, stream);
}

}  // namespace flashrt
