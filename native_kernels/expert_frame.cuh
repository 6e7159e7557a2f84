// What the persistent expert's phases share: where a block's pieces lie, the conditioning, and the products of one unit
// of 8 columns.
#pragma once

#include "expert_inbox.cuh"
#include "expert_paired_attend.cuh"

namespace flashrt {
namespace expert {

struct Plan {
  Layout attention;
  int slots, big, small;  // the ring comes first; then the sums of products with many tiles, and of those with one
  int received;           // sums from the other block of a pair
  bool paired;
};

constexpr int kSmallBytes = kWarps * kTileElements * 4, kBigBytes = 2 * kGateUpUnits * kSmallBytes;

// What the epilogues of a visit need of the conditioning, and its scales: where each lies in a table of floats. It is
// copied a visit ahead, as it comes from DRAM, where a load would stand behind the weights asked for before it.
enum Condition : int {
  kOutGate = 0,
  kMlpScale = kOutGate + kTileFeatures,  // of the norm behind the out projection
  kDownGate = kMlpScale + kTileFeatures,
  kNextScale = kDownGate + kTileFeatures,      // of the next layer's first norm
  kQkvShift = kNextScale + kTileFeatures,      // shift W: two units of two halves
  kGateShift = kQkvShift + 4 * kTileFeatures,  // shift W
  kUpShift = kGateShift + kGateUpUnits * kTileFeatures,
  kWeightScale = kUpShift + kGateUpUnits * kTileFeatures,  // of each product
  kInputScale = kWeightScale + kProducts,                  // of out and of down
  kConditions = kInputScale + 4
};
static_assert(kWeightScale == 4 * kWarpSize);  // 16 bytes a lane
// Of a pair's second eight columns the first four kinds lie behind all.
constexpr int kPairConditions = kConditions + kQkvShift;

// `One`: a single tile of rows, for which loops and most addresses are constants. `Paired`: more than two, for pairs of
// blocks and the matrix unit.
template <bool Fp8, bool One, bool Paired>
struct Frame {
  static constexpr int Half = kHeadDim / 2, UnitsPerHead = Half / kTileFeatures;

  const ExpertSteps& p;
  const Plan& plan;
  unsigned char* shared;
  Ring ring;
  const Share& share;
  uint64_t* arrivals;  // barriers by Arrival
  float* inverse;      // parts of the sums of squares: (warp, row)
  float* scratch;      // three floats a warp; `Paired`: powers of two by row (expert_normed.cuh)
  float* conditions;   // of each copy's visit
  Cursor chunk = {};
  int visit = 0, copy = 0;  // copy: visit % kCopies
  float h = 0.0f;           // row row_of_thread(), column first_column() + column_of_thread()

  // Of h and of the epilogues of products 3 and 5: a block has its 8 columns, or of a pair's 16 half of each tile's
  // rows, so that there are half as many parts of a row's sum of squares.
  static constexpr int kColumns = Paired ? 2 * kTileFeatures : kTileFeatures;
  static constexpr int kHalfRows = kTileRows / 2;                                  // of a tile, a block's of a pair
  static constexpr int kConditionStride = Paired ? kPairConditions : kConditions;  // of the copies
  static __device__ __forceinline__ unsigned column_of_thread() { return thread_id() % kColumns; }
  static __device__ __forceinline__ unsigned first_column() {
    return (Paired ? block_id() & ~1u : block_id()) * kTileFeatures;
  }
  static __device__ __forceinline__ int row_of_place(int place) {
    return Paired ? block_id() % 2 * kHalfRows + place : row_of_slot(place);
  }
  static __device__ __forceinline__ int row_of_thread() {
    return thread_id() / kTileElements * kTileRows + row_of_place(thread_id() % kTileElements / kColumns);
  }
  __device__ float* big() const { return reinterpret_cast<float*>(shared + plan.big); }
  __device__ float* small() const { return reinterpret_cast<float*>(shared + plan.small); }
  __device__ __forceinline__ int tiles() const { return One ? 1 : (p.rows + kTileRows - 1) / kTileRows; }
  __device__ __forceinline__ Team<One> row_team() const {
    if constexpr (!Paired) return Team<One>(p.rows);
    const int warp = thread_id() / kWarpSize;
    return {2, warp / 4, warp % 4};
  }
  __device__ __forceinline__ Exchange<One> exchange(int of_copy) const {
    const int rows = tiles() * kTileRows, bytes = kExchangeRowBytes * rows;
    return {static_cast<unsigned char*>(p.exchange) + of_copy * bytes, of_copy == 0 ? (kCopies - 1) * bytes : -bytes,
            rows};
  }
  __device__ __forceinline__ Exchange<One> exchange() const { return exchange(copy); }
  __device__ __forceinline__ int next_copy() const { return copy + 1 == kCopies ? 0 : copy + 1; }
  __device__ __forceinline__ void end_visit() { ++visit, copy = next_copy(); }

  __device__ __forceinline__ float condition(int index) const { return conditions[copy * kConditionStride + index]; }
  // Of this thread's column, one of the first four kinds, which are of columns of h.
  __device__ __forceinline__ float own_condition(int index) const {
    const unsigned column = column_of_thread();
    if (!Paired) return condition(index + column);
    return condition(index + column % kTileFeatures + column / kTileFeatures * kConditions);
  }
  __device__ __forceinline__ float weight_scale(int product) const {
    return Fp8 ? condition(kWeightScale + product) : 1.0f;
  }
  __device__ __forceinline__ float input_scale(int product) const {
    return Fp8 ? condition(kInputScale + (product == kDown)) : 1.0f;
  }
  __device__ const float* style(const float* base, int step, int norm) const {
    return base == nullptr ? nullptr : base + step * p.step_stride + norm * p.norm_stride;
  }
  // What stays as it is where the policy has no gates or shifts.
  __device__ void blank_conditions() const {
    for (int i = thread_id(); i < kCopies * kConditionStride; i += kThreads) {
      const int start = (Paired ? i % kConditionStride : i) % kConditions / kTileFeatures * kTileFeatures;
      conditions[i] = start == kOutGate || start == kDownGate ? 1.0f : 0.0f;
    }
  }

  // By one warp, a visit ahead, 16 bytes a lane; it waits for them in front of the next visit's first barrier.
  __device__ __forceinline__ void copy_conditions(int step, int layer, int of_copy) const {
    const int lane = thread_id() % kWarpSize;
    float* target = conditions + of_copy * kConditionStride;
    const float* from = condition_source(step, layer, lane);
    if (from != nullptr) async_copy16(target + lane * 4, from);
    if (Paired && lane < kQkvShift / 4 && from != nullptr)
      async_copy16(target + kConditions + lane * 4, from + kTileFeatures);
    if (Fp8 && lane == 0) async_copy16(target + kWeightScale, p.weight_scale + layer * kProducts);
    if (Fp8 && lane == 1) async_copy8(target + kInputScale, p.input_scale + layer * 2);
    async_copy_commit();
  }
  __device__ __forceinline__ const float* condition_source(int step, int layer, int lane) const {
    const int half = lane % 2 * 4;
    if (lane < kQkvShift / 4) {
      const int kind = lane / 2;
      const float* base = style(kind % 2 == 0 ? p.gate : p.norm_scale, step, 2 * layer + (kind + 1) / 2);
      return base == nullptr ? nullptr : base + first_column() + half;
    }
    constexpr int64_t Features = kQkvHeads * kHeadDim + 2 * kMlp;
    if (p.shift_products == nullptr) return nullptr;
    const float* base = p.shift_products + (int64_t(step) * p.layers + layer) * Features;
    if (lane >= kGateShift / 4)
      return base + kQkvHeads * kHeadDim + lane / 8 % 2 * kMlp + block_id() * kGateUpUnits * kTileFeatures +
             lane % 8 * 4;
    const int index = (lane - kQkvShift / 4) / 4, unit = qkv_unit(index);
    if (index >= qkv_units<One>()) return nullptr;
    return base + unit / UnitsPerHead * kHeadDim + lane / 2 % 2 * Half + unit % UnitsPerHead * kTileFeatures + half;
  }
  // The next visit's, by a warp whose activations take their time.
  __device__ __forceinline__ void copy_next_conditions(int step, int layer) const {
    if (thread_id() / kWarpSize != kWarps - 3) return;
    if (++layer == p.layers) layer = 0, ++step;
    if (step < p.steps) copy_conditions(step, layer, next_copy());
  }

  // Behind the out projection: what the block has blanked so far will be fenced, and the next visit's keys and values
  // copied;
  __device__ __forceinline__ void order_published() const {
    if (thread_id() == kThreads - kWarpSize) poke(&ring.counters->ordered, visit + 1);
  }
  // and in front of the last barrier of a visit: it has been fenced.
  __device__ __forceinline__ void await_order() const {
    if (thread_id() / kWarpSize == kWarps - 1)
      for (int polls = 0; peek(&ring.counters->fenced) <= static_cast<unsigned>(visit); count_peek(polls)) {
      }
  }

  // Where block `block` of k of unit `unit` lies in the ring, of those from `chunk` on. Of products whose halves of k
  // lie apart those of gate-up lie so of two units, a chunk each, which are one operand of the matrix unit.
  template <int P>
  __device__ __forceinline__ int unit_place(int unit, int block) const {
    using S = Shape<Fp8, P>;
    if (!S::Halved) return place<P>(unit * S::UnitBlocks + block);
    const int half = block / kHalfBlocks, rest = block % kHalfBlocks * kTileBytes;
    constexpr int HalfBytes = S::UnitBytes / 2;
    if (P == kQkv) return place<P>(unit * S::UnitBlocks) + half * HalfBytes + rest;
    return place<P>((unit / 2 * 2 + half) * S::UnitBlocks) + unit % 2 * HalfBytes + rest;
  }

  // Where block `block` of k lies in the ring, of those from `chunk` on.
  template <int P>
  __device__ __forceinline__ int place(int block) const {
    using S = Shape<Fp8, P>;
    int slot = chunk.slot + block / S::Blocks;
    if (slot >= ring.slots) slot -= ring.slots;
    return slot * kChunkBytes + block % S::Blocks * kTileBytes;
  }

  // This warp's part of the first `count` of some units, from `chunk` on. `meanwhile` is called where there is one
  // tile, behind the wait for the activations.
  template <int P, int Units, typename Meanwhile>
  __device__ __forceinline__ void multiply(Activations<Fp8, P, One>& a, const Team<One>& team, int count,
                                           Sums<Fp8, P, Units, One>& sums, Meanwhile meanwhile) {
    using S = Shape<Fp8, P>;
    constexpr int Quarters = P == kDown && Units == kQuarters ? kQuarters : 1;
    int offset[Units];
#pragma unroll
    for (int unit = 0; unit < Units; ++unit) {
      const int block = team.part * (S::UnitBlocks / Quarters >> team.shift);
      // by quarters: the block of k, of all in the ring
      const int from = Quarters > 1 ? place<P>(unit * (S::UnitBlocks / Quarters) + block) : unit_place<P>(unit, block);
      offset[unit] = from + weight_lane<Fp8, P>() * 16;
    }
    if constexpr (One) {
#pragma unroll
      for (int group = 0; group < S::Groups >> 4; ++group) {
        a.settle(a.operand[group % 2], group);
        if (group == 0) meanwhile(), ring.wait(chunk, count * S::Chunks);
        multiply_units(sums, a.operand[group % 2], offset, count, group);
        if (group + 2 < S::Groups >> 4) a.ask(a.operand[group % 2], group + 2);
      }
    } else {
      int group = 0;
      ring.wait(chunk, count * S::Chunks / Quarters);
#pragma unroll 1
      for (; group + 2 < a.groups; group += 2) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          a.settle(a.operand[i], group + i);
          multiply_units(sums, a.operand[i], offset, count, group + i);
          a.ask(a.operand[i], group + i + 2);
        }
      }
      a.settle(a.operand[0], group);
      multiply_units(sums, a.operand[0], offset, count, group);
      a.settle(a.operand[1], group + 1);
      multiply_units(sums, a.operand[1], offset, count, group + 1);
    }
  }
  template <int P, int Units>
  __device__ __forceinline__ void multiply_units(Sums<Fp8, P, Units, One>& sums, const uint4 (&operand)[kGroupOperands],
                                                 const int (&offset)[Units], int count, int group) const {
    constexpr int Step = Shape<Fp8, P>::GroupBlocks * kTileBytes;
#pragma unroll
    for (int unit = 0; unit < Units; ++unit)
      if (unit < count) multiply_group(sums, unit, operand, ring.chunks + offset[unit] + group * Step);
  }

  // Byte `byte` of row `row` among the activations of product P.
  template <int P>
  __device__ __forceinline__ int tile_offset(int row, int byte) const {
    if (kOnMatrixUnit<Fp8, P, Paired> || (kMayPair<Fp8, P, One> && plan.paired))
      return matrix_offset(row, Shape<Fp8, P, kOnMatrixUnit<Fp8, P, Paired>>::RowBytes, byte);
    return activation_offset<Fp8, P>(row, byte);
  }

  // Behind a barrier: this block has read the next `count` chunks, and others may take their place. The last warp
  // tells: where there is one tile, it has no row to finish, or the last.
  __device__ __forceinline__ void give_back(int count) {
    for (int i = 0; i < count; ++i) chunk.advance(ring.slots);
    if (thread_id() == kThreads - kWarpSize) poke(&ring.counters->used, chunk.chunk);
  }

  // The down projection by quarters: this block's of four units, of which it sends three to their blocks. Every
  // thread's element, by `finish(sum)`.
  template <typename Finish>
  __device__ __forceinline__ void quartered_product(const unsigned char* x, Finish finish) {
    using S = Shape<Fp8, kDown>;
    const Team<One> team = row_team();
    const int quarter = block_id() % kQuarters, tile = thread_id() / kTileElements,
              element = thread_id() % kTileElements;
    Activations<Fp8, kDown, One> a(x, team, p.rows, kQuarters, quarter);
    be_patient();
    a.ask();
    if (a.rows > 0) {
      Sums<Fp8, kDown, kQuarters, One> sums;
      multiply(a, team, kQuarters, sums, [] {});
#pragma unroll
      for (int unit = 0; unit < kQuarters; ++unit) {
        float sum[1][4];
        sums.total(sum, unit);
        spread(big() + unit * (kWarps * kTileElements), thread_id() / kWarpSize, sum[0], a.rows);
      }
    }
    await_order();
    block_sync();
    give_back(S::Chunks);
    if (tile < tiles()) finish(share_quarters(team, quarter, tile, element));
    block_sync();
  }

  // This thread's element of all four units: three are sent, the own is added to what the others send.
  __device__ __forceinline__ float share_quarters(const Team<One>& team, int quarter, int tile, int element) const {
    const uint32_t mark = mark_of(visit);
    const auto place = [&](int unit, int from) {  // of a unit's block, from another block's quarter
      const int block = block_id() - quarter + unit;
      return exchange().template buffer<kDownParts>() +
             (((block * tiles() + tile) * kQuarters + from) * kTileElements + element) * 4;
    };
    const bool has = row_of_thread() < p.rows;
    float part[kQuarters];
    uint32_t word[kQuarters];
#pragma unroll
    for (int unit = 0; unit < kQuarters; ++unit) {
      part[unit] = gather(big() + unit * (kWarps * kTileElements), team, tile, element);
      if (unit != quarter && has) store(place(unit, quarter), (__float_as_uint(part[unit]) & ~1u) | mark);
    }
#pragma unroll
    for (int from = 0; from < kQuarters; ++from)
      word[from] = has && from != quarter ? look_word(place(quarter, from)) : mark;
    float sum = 0.0f;
#pragma unroll
    for (int from = 0; from < kQuarters; ++from) {
      for (int polls = 0; ((word[from] ^ mark) & 1) != 0; count_poll(polls))
        word[from] = look_word(place(quarter, from));
      sum += from == quarter ? part[from] : __uint_as_float(word[from]);
    }
    return sum;
  }

  // A product of one unit of 8 columns on `x`: every thread's element, by `finish(sum)`, which whole warps call.
  template <int P, typename Finish>
  __device__ __forceinline__ void narrow_product(const unsigned char* x, int step, int layer, Finish finish) {
    if constexpr (kMayPair<Fp8, P, One>) {
      if (Paired || plan.paired) return paired_product<P>(x, step, layer, finish);
    }
    tiled_product<P>(x, step, layer, finish);
  }
  template <int P, typename Finish>
  __device__ __forceinline__ void tiled_product(const unsigned char* x, int step, int layer, Finish finish) {
    const Team<One> team = row_team();
    Activations<Fp8, P, One> a(x, team, p.rows);
    if constexpr (P == kOut) copy_next_conditions(step, layer);
    if constexpr (P == kDown || P == kMix) be_patient();
    a.ask();
    if (One || a.rows > 0) {
      Sums<Fp8, P, 1, One> sums;
      multiply(a, team, 1, sums, [] {});
      float sum[1][4];
      sums.total(sum, 0);
      spread(small(), thread_id() / kWarpSize, sum[0], a.rows);
    }
    if (P == kDown) await_order();
    block_sync();
    give_back(Shape<Fp8, P>::Chunks);
    const int tile = thread_id() / kTileElements;
    if (tile < tiles()) finish(gather(small(), team, tile, thread_id() % kTileElements));
    block_sync();  // nobody looks for more while this block still computes
  }

  // The same by a pair of blocks, each half of k of both units; of each tile's rows the first block finishes the first
  // half, which are those of half of a warp's lanes.
  template <int P, typename Finish>
  __device__ __forceinline__ void paired_product(const unsigned char* x, int step, int layer, Finish finish) {
    using S = Shape<Fp8, P>;
    const Team<One> team = matrix_team();
    const int rank = block_id() % 2, place_of_warp = team.tile << team.shift | team.part;
    Activations<Fp8, P, One> a(x, team, p.rows, 2, rank);
    if constexpr (P == kOut) copy_next_conditions(step, layer);
    if constexpr (P == kDown) be_patient();
    a.ask();
    if (thread_id() == 0) barrier_expect(arrivals + kSumsCome, tiles() * 4 * kSentBytes);
    // in the kernel without pairs, where this is never executed, as it leaves that kernel's other code as it was
    constexpr int Parts = Paired ? 1 : 2;
    float sum[Parts][8 / Parts] = {};
    const int first = team.part * (S::UnitBlocks / 2 >> team.shift);
    const unsigned char* weights[Parts];
#pragma unroll
    for (int part = 0; part < Parts; ++part)
      weights[part] = ring.chunks + place<P>(first / (S::Blocks / 2) * S::Blocks) +
                      (part * (S::Blocks / 2) + first % (S::Blocks / 2)) * kTileBytes;
    ring.wait(chunk, S::Chunks);
    multiply_64(sum, a, weights);
    if (a.rows > 0) {
      const int lane = thread_id() % kWarpSize;
      const bool own = lane / 16 == rank;
      const unsigned char* to = shared + (own ? plan.small : plan.received) + place_of_warp * kSentBytes;
      const uint32_t barrier = address_in(shared_address(arrivals + kSumsCome), 1 - rank);
#pragma unroll
      for (int i = 0; i < 2; ++i)  // the first eight columns, and the others
        keep_or_give(own, shared_address(to) + sent_offset(i, lane % 16), 1 - rank,
                     sum[i * (Parts - 1)] + i * 4 % (8 / Parts), barrier);
    }
    if (P == kDown) await_order();
    block_sync();
    give_back(S::Chunks);
    const int tile = thread_id() / kTileElements;
    if (tile < tiles()) {
      const float half = gather_pair_row(shared + plan.small, tile);
      await_phase(arrivals + kSumsCome, P == kOut ? 0 : 1);  // two a visit
      finish(half + gather_pair_row(shared + plan.received, tile));
    }
    block_sync();  // nobody looks for more while this block still computes
  }
};

}  // namespace expert
}  // namespace flashrt
