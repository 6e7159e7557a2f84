// The phases of a layer of the persistent expert; the fourth is in expert_gate_up.cuh.
#pragma once

#include "expert_gate_up.cuh"

namespace flashrt {
namespace expert {

template <bool Fp8, bool One, bool Paired>
struct Layer : GateUp<Fp8, One, Paired> {
  using Base = GateUp<Fp8, One, Paired>;
  using Base::add_squares;
  using Base::big;
  using Base::chunk;
  using Base::condition;
  using Base::exchange;
  using Base::give_back;
  using Base::h;
  using Base::Half;
  using Base::input_scale;
  using Base::kSumUnits;
  using Base::p;
  using Base::plan;
  using Base::publish_last;
  using Base::ring;
  using Base::row_factor;
  using Base::row_team;
  using Base::share;
  using Base::shared;
  using Base::spread_units;
  using Base::tiles;
  using Base::UnitsPerHead;
  using Base::visit;
  using Base::weight_scale;

  struct RopeOperands {
    float cosine = 1.0f, sine = 0.0f;
  };

  // Of a tile, this thread's in qkv's epilogue. `Paired`: half a warp has a row of each pair whose other one half has.
  static __device__ __forceinline__ int element_of_thread() {
    if constexpr (!Paired) return thread_id() % kTileElements;
    const int lane = thread_id() % kWarpSize, slot = thread_id() / kWarpSize % 4 * 2 + lane / 8 % 2 + lane / 16 * 8;
    return slot * kTileFeatures + lane % 8;
  }

  __device__ void qkv() {
    if constexpr (kOnMatrixUnit<Fp8, kQkv, Paired>) {
      matrix_qkv();
    } else {
      tiled_qkv();
    }
  }
  __device__ __forceinline__ void tiled_qkv() {
    const unsigned char* parts = exchange().template buffer<kSquaresQkv>();
    const Team<One> team = row_team();
    const int own = thread_id() / kTileElements, element = element_of_thread();
    // one tile: a unit is that of 128 threads; more: a tile is
    const int row = row_of_slot(element / kTileFeatures), tile = One ? 0 : own, m = tile * kTileRows + row;
    const int units = qkv_units<One>(tile);
    const bool busy = One ? own < units : own < tiles();
    Activations<Fp8, kQkv, One> a(exchange().template buffer<kNormedQkv>(), team, p.rows);
    Squares<One, Paired> squares;
    be_patient();
    if (Fp8 && !One) a.await_one();  // bf16 measures slower with it
    squares.ask(parts, team, p.rows);
    a.ask();
    RopeOperands operands[One ? 1 : 2];
#pragma unroll
    for (int i = 0; i < (One ? 1 : 2); ++i)
      operands[i] = rope_operands(qkv_unit(One ? own : i), m, busy && i < units && m < p.rows);
    if (One || a.rows > 0) {
      Sums<Fp8, kQkv, 2, One> sums;
      const int count = qkv_units<One>(team.tile);
      if (!One) add_squares(squares);
      this->multiply(a, team, count, sums, [&] { squares.refresh(); });
      spread_units(sums, count, a.rows);
      if (One) add_squares(squares);
    }
    // a block whose tile of k or v there is not has waited for its first unit only, and what has not come is not given
    // back: the mover would count it as free before it has asked for it
    if (!One && thread_id() / kWarpSize == kWarps - 1) ring.wait(chunk, qkv_units<One>() * Shape<Fp8, kQkv>::Chunks);
    async_copy_wait_committed();  // the conditions
    block_sync();
    give_back(qkv_units<One>() * Shape<Fp8, kQkv>::Chunks);
    if (busy) finish_qkv(team, operands, own, tile, element, units, 2, false);
    if (thread_id() / kWarpSize == kWarps - 1) await_phase(this->arrivals + kKeysCome, visit & 1);
    block_sync();  // the sums have been read; and nobody looks for more while this block still computes
  }

  // By whole warps: this thread's outputs of so many units, an element of a tile. `places`, `across`: how sums lie.
  template <int Most>
  __device__ __forceinline__ void finish_qkv(const Team<One>& team, const RopeOperands (&operands)[Most], int own,
                                             int tile, int element, int units, int places, bool across) {
    const int row = row_of_slot(element / kTileFeatures), m = tile * kTileRows + row;
    const float factor = weight_scale(kQkv) * row_factor(team, tile, row);
#pragma unroll
    for (int i = One ? 0 : 1; i >= 0; --i) {  // others wait longest for k and v
      if (i >= units) continue;
      const int unit = One ? own : i;
      const int shift = kQkvShift + unit * 2 * kTileFeatures + element % kTileFeatures;
      const float2 sum = gather_pair(big(), team, tile, places, unit, element, across);
      rotate(qkv_unit(unit), m, operands[i], sum.x * factor + condition(shift),
             sum.y * factor + condition(shift + kTileFeatures));
    }
  }

  // The same on the matrix unit.
  __device__ __forceinline__ void matrix_qkv() {
    const Team<One> team = row_team();
    const int tile = team.tile, element = element_of_thread(), units = qkv_units<One>(tile);
    const int m = tile * kTileRows + row_of_slot(element / kTileFeatures);
    const bool busy = tile < tiles();
    RopeOperands operands[2];
    this->template wide_product<kQkv, 2>(
        exchange().template buffer<kNormedQkv>(), exchange().template buffer<kSquaresQkv>(),
        [&] {
#pragma unroll
          for (int i = 0; i < 2; ++i) operands[i] = rope_operands(qkv_unit(i), m, busy && i < units && m < p.rows);
        },
        [&](const auto& sum, const Team<One>& of, int rows) { this->spread_sums(sum, qkv_units<One>(of.tile), rows); });
    async_copy_wait_committed();  // the conditions
    block_sync();
    give_back(2 * Shape<Fp8, kQkv>::Chunks);
    if (busy) finish_qkv(team, operands, tile, tile, element, units, kSumUnits, true);
    if (thread_id() / kWarpSize == kWarps - 1) await_phase(this->arrivals + kKeysCome, visit & 1);
    block_sync();
  }

  // What this thread's output of row m needs beside its product; v is not rotated.
  __device__ __forceinline__ RopeOperands rope_operands(int unit, int m, bool any) const {
    RopeOperands operands;
    if (any && unit < (kHeads + 1) * UnitsPerHead) {
      const int d = unit % UnitsPerHead * kTileFeatures + thread_id() % kTileFeatures;
      operands.cosine = p.rope_cos[int64_t(share.prefix + m) * Half + d];
      operands.sine = p.rope_sin[int64_t(share.prefix + m) * Half + d];
    }
    return operands;
  }

  __device__ __forceinline__ unsigned char* queries(int head) const {
    return exchange().template buffer<kQ>() + head * kHeadRowBytes * exchange().padded_rows();
  }

  // An even thread publishes the pair of first halves, its odd neighbour that of second halves.
  __device__ __forceinline__ void rotate(int unit, int m, const RopeOperands& o, float first, float second) {
    const int head = unit / UnitsPerHead, column = thread_id() % kTileFeatures;
    const bool even = column % 2 == 0;
    const float turned_first = first * o.cosine - second * o.sine, turned_second = second * o.cosine + first * o.sine;
    const float theirs = __shfl_xor_sync(0xffffffffu, even ? turned_second : turned_first, 1);
    if (!Paired && m >= p.rows) return;
    const uint32_t word = even ? pack_bf16(turned_first, theirs) : pack_bf16(theirs, turned_second);
    const int d = unit % UnitsPerHead * kTileFeatures + (even ? column : column - 1 + Half);
    const Exchange<One> buffers = exchange();
    if constexpr (Paired) {
      if (head < kHeads) return publish_query(head, m, d, word);
      if (m >= p.rows) return;
    }
    unsigned char* target = head < kHeads
                                ? queries(head) + operand_offset<2>(m, kHeadRowBytes, d * 2)
                                : buffers.template buffer<kKv>() + (m * 2 + head - kHeads) * kHeadRowBytes + d * 2;
    publish(target, buffers.other, word);
    if (p.fill && head >= kHeads) keep(head == kHeads ? p.k_cache : p.v_cache, m, d, word);
  }

  // Two columns of a row and of the next: half a warp has the one, half the other.
  __device__ __forceinline__ void publish_query(int head, int m, int d, uint32_t word) const {
    const uint32_t theirs = __shfl_xor_sync(0xffffffffu, word, 16);
    const bool odd = m % 2 != 0;
    if (odd != (d % 4 == 2) || m / 2 * 2 >= p.rows) return;
    const uint32_t first = odd ? theirs : word, second = odd ? word : theirs;
    store_whole(marked_queries(head) + operand_offset<2>(m / 2 * 2, kHeadRowBytes, d * 2),
                (first & ~1u) | mark_of(visit), second);
  }
  // Behind the letters of a head, which take half of the bytes that there are.
  __device__ __forceinline__ unsigned char* marked_queries(int head) const {
    return exchange().template buffer<kInbox>() + (head * 2 + 1) * tiles() * kNarrowTileBytes;
  }

  // Two elements of a row's keys or values into the cache; one step: the visit is the layer.
  __device__ __forceinline__ void keep(void* cache, int m, int d, uint32_t word) const {
    const int64_t slot = int64_t(visit) * p.capacity + share.prefix + m;
    *reinterpret_cast<uint32_t*>(static_cast<unsigned char*>(cache) + slot * kHeadRowBytes + d * 2) = word;
  }

  __device__ void attend() {
    const int head = block_id() / kSplits, rank = block_id() % kSplits;
    const Exchange<One> buffers = exchange();
    const int head_rows = head * kSplits * buffers.padded_rows();
    unsigned char* values = buffers.template buffer<kInbox>() + head_rows * kSplits * kSplitColumns * 2;
    unsigned char* sums = buffers.template buffer<kStats>() + head_rows * 4;
    const Team<One> team = row_team();
    if constexpr (One) {
      const Inbox inbox{values, sums, buffers.other, rank};
      send_attended(team, head, inbox);
      const int row = thread_id() / kWarpSize;
      if (row < p.rows) {
        Parts parts;
        parts.ask(inbox, share.active, row);
        parts.settle(inbox, row);
        merge<Fp8>(parts, inbox, head, row, buffers.template buffer<kAttendedRows>(), buffers.other, input_scale(kOut));
      }
    } else if constexpr (Paired) {
      const float* rounding = this->conditions + this->copy * Base::kConditionStride + kInputScale;
      const NarrowLetters letters{{values, sums, tiles(), rank, mark_of(visit)}, rounding};
      take_paired_scores(team, head, letters);
      if (team.tile < tiles())
        send_values(shared, plan.attention, share, letters, team, p.rows - team.tile * kTileRows);
      NarrowMail mail(team, p.rows);
      if (mail.rows > 0) {
        mail.collect(letters, team);
        publish_attended(buffers, NarrowMerged(mail, letters.scale()), mail.rows, team.tile * kTileRows,
                         head * kHeadDim + rank * kSplitColumns);
      }
    } else {
      const Letters letters{values, sums, tiles(), rank, mark_of(visit)};
      send_attended(team, head, letters);
      Mail mail(team, p.rows);
      if (mail.rows > 0) {
        mail.collect(letters, team);
        publish_attended(Merged(mail, team), mail.rows, team.tile * kTileRows, head * kHeadDim + rank * kSplitColumns);
      }
    }
    block_sync();
  }

  // The probabilities of a team's rows, and what else P V needs. With more than 32 rows every block has keys.
  __device__ __forceinline__ void take_paired_scores(const Team<One>& team, int head, const NarrowLetters& letters) {
    const Layout& layout = plan.attention;
    const uint32_t phase = visit & 1;
    const int rows = p.rows - team.tile * kTileRows;
    fetch_own_rows(exchange().template buffer<kKv>(), share, shared + layout.k, shared + layout.v,
                   this->arrivals + kOwnRowsCome);
    await_phase(this->arrivals + kOwnRowsCome, phase);  // by then the queries have come, or soon do
    MarkedQueries queries;
    queries.ask(marked_queries(head), team, rows);
    if (rows > 0) queries.settle(letters.mark);
    for (int first = 0; first < tiles(); first += layout.tiles_at_once) {
      const int place = team.tile - first;
      const bool has = rows > 0 && place >= 0 && place < layout.tiles_at_once;
      if (has) scores(shared, layout, share, queries, team, place);
      warpgroup_sync();  // scores meet among the warps of a tile
      if (has) softmax(shared, layout, share, team, letters, place, p.rows);
      if (first + layout.tiles_at_once < tiles()) block_sync();
    }
    warpgroup_sync();
    await_phase(this->arrivals + kValuesCome, phase);
  }
  template <typename Post>
  __device__ __forceinline__ void send_attended(const Team<One>& team, int head, const Post& post) {
    if (share.keys == 0) return;
    take_scores(team, head);
    send_values<One ? 1 : 2>(shared, plan.attention, share, post, team, p.rows);
  }

  // Two columns of a row; four are a word where they are e4m3. By whole warps.
  __device__ __forceinline__ void publish_attended(const Merged& merged, int rows, int first_row, int first_column) {
    const Exchange<One> buffers = exchange();
    const int m = first_row + merged.row, column = first_column + merged.column;
    uint32_t word;
    bool has = merged.sole && merged.row < rows;
    if constexpr (Fp8) {
      const float inverse_scale = inverse_of(input_scale(kOut));
      word = pack_e4m3(merged.value[0] * inverse_scale, merged.value[1] * inverse_scale);
      word |= __shfl_down_sync(0xffffffffu, word, 1) << 16;
      has = has && column % 4 == 0;
    } else {
      word = pack_bf16(merged.value[0], merged.value[1]);
    }
    if (has)
      publish(buffers.template buffer<kAttendedRows>() + this->template tile_offset<kOut>(m, column * (Fp8 ? 1 : 2)),
              buffers.other, word);
  }

  __device__ __forceinline__ void publish_attended(const Exchange<One>& buffers, const NarrowMerged& merged, int rows,
                                                   int first_row, int first_column) {
    const float inverse_scale = inverse_of(input_scale(kOut));
    const int m = first_row + merged.row, column = first_column + merged.column;
    if (merged.sole && merged.row < rows)
      publish(buffers.template buffer<kAttendedRows>() + this->template tile_offset<kOut>(m, column), buffers.other,
              merged.word(inverse_scale));
  }

  // The probabilities of all rows, and what else P V needs, behind a barrier.
  __device__ __forceinline__ void take_scores(const Team<One>& team, int head) {
    const Layout& layout = plan.attention;
    const unsigned char* kv = exchange().template buffer<kKv>();
    const bool last = thread_id() / kWarpSize == kWarps - 1;
    if constexpr (One) {
      SuffixValues values;
      values.ask(share, kv);
      scores(shared, layout, share, queries(head), kv, p.rows);
      values.settle(shared + layout.v);
      block_sync();
      softmax(shared, layout, share, p.rows);
      if (last) await_phase(this->arrivals + kValuesCome, visit & 1);
      block_sync();
    } else {
      Queries own;
      OwnValues values;
      own.ask(queries(head), kv, share, team, p.rows);
      values.ask(kv, share);
      own.settle();
      for (int first = 0; first < tiles(); first += layout.tiles_at_once) {
        const int place = team.tile - first;
        if (own.rows > 0 && place >= 0 && place < layout.tiles_at_once) scores(shared, layout, share, own, team, place);
        if (first == 0) values.settle(shared + layout.v, share);
        block_sync();
        softmax(shared, layout, share, team, first, p.rows);
        if (last) await_phase(this->arrivals + kValuesCome, visit & 1);
        block_sync();
      }
    }
  }

  // h += gate * (input W): products 3 and 5, with what the norm behind them needs. A thread has the same element of h
  // in both, and always.
  __device__ __forceinline__ void add(float sum, int product, int gate) {
    const float scale = weight_scale(product) * input_scale(product);
    h = round_bf16(h + this->own_condition(gate) * (sum * scale));
  }

  __device__ void out(int step, int layer) {
    const unsigned char* x = exchange().template buffer<kAttendedRows>();
    this->template narrow_product<kOut>(x, step, layer, [&](float sum) {
      const float scale = this->own_condition(kMlpScale);
      add(sum, kOut, kOutGate);
      this->template publish_normed<kGateUp, kNormedMlp, kSquaresMlp>(exchange(), scale + 1.0f);
    });
  }

  __device__ void down(int step, int layer) {
    const unsigned char* x = exchange().template buffer<kHidden>();
    const auto finish = [&](float sum) {
      const float scale = this->own_condition(kNextScale);
      add(sum, kDown, kDownGate);
      if (layer + 1 < p.layers) {
        this->template publish_normed<kQkv, kNormedQkv, kSquaresQkv>(exchange(this->next_copy()), scale + 1.0f);
      } else {
        publish_last(exchange(step % kCopies));
      }
    };
    if (!One && quartered<Fp8>(p.rows)) {
      this->quartered_product(x, finish);
    } else {
      this->template narrow_product<kDown>(x, step, layer, finish);
    }
  }
};

}  // namespace expert
}  // namespace flashrt
