// The fourth phase of a layer of the persistent expert: hidden = geglu(norm(h) W_gate_up).
#pragma once

#include "expert_wide.cuh"

namespace flashrt {
namespace expert {

template <bool Fp8, bool One, bool Paired>
struct GateUp : WideFrame<Fp8, One, Paired> {
  using Base = WideFrame<Fp8, One, Paired>;
  using Base::add_squares;
  using Base::big;
  using Base::condition;
  using Base::exchange;
  using Base::give_back;
  using Base::input_scale;
  using Base::inverse_rms;
  using Base::p;
  using Base::row_team;
  using Base::spread_units;
  using Base::tiles;
  using Base::weight_scale;

  __device__ void gate_up() {
    if constexpr (kOnMatrixUnit<Fp8, kGateUp, Paired>) {
      matrix_gate_up();
    } else {
      tiled_gate_up();
    }
  }
  __device__ __forceinline__ void tiled_gate_up() {
    constexpr int Chunks = Shape<Fp8, kGateUp>::Chunks, Group = 4 / Chunks;  // units at once
    const unsigned char* parts = exchange().template buffer<kSquaresMlp>();
    const Team<One> team = row_team();
    Activations<Fp8, kGateUp, One> a(exchange().template buffer<kNormedMlp>(), team, p.rows);
    Squares<One, Paired> squares;
    be_patient();
    if (Fp8 && !One) a.await_one();  // bf16 measures slower with it
    squares.ask(parts, team, p.rows);
    a.ask();
    if (!One) {
      this->order_published();
      if (a.rows > 0) add_squares(squares);
    }
    for (int first = 0; first < kGateUpUnits; first += Group) {
      if (!One && first > 0) a.ask();
      if (One || a.rows > 0) {
        Sums<Fp8, kGateUp, Group, One> sums;
        this->multiply(a, team, Group, sums, [&] {
          if (first == 0) squares.refresh(), this->order_published();
        });
        spread_units(sums, Group, a.rows);
        if (One && first == 0) add_squares(squares);
      }
      block_sync();
      give_back(Group * Chunks);
      finish_hidden<Group>(team, first);
      block_sync();
    }
  }

  // The same on the matrix unit.
  __device__ __forceinline__ void matrix_gate_up() {
    float own[8] = {};
    this->template wide_product<kGateUp, kGateUpUnits>(
        exchange().template buffer<kNormedMlp>(), exchange().template buffer<kSquaresMlp>(),
        [&] { this->order_published(); },
        [&](const auto& sum, const Team<One>& team, int rows) {
          if (rows > 0) this->hand_out(sum, team, own);
        });
    block_sync();
    give_back(kGateUpUnits * Shape<Fp8, kGateUp>::Chunks);
    if (matrix_team().tile < tiles()) this->finish_unit(own);
    block_sync();
  }

  // Of `Group` units from `first` on; one tile: a warp's outputs are a row's, neighbours in memory.
  template <int Group>
  __device__ __forceinline__ void finish_hidden(const Team<true>& team, int first) {
    const int row = row_of_slot(thread_id() / kWarpSize), column = thread_id() % kTileFeatures;
    const int own = thread_id() % kWarpSize / kTileFeatures, unit = first + own % Group;
    const int shift = unit * kTileFeatures + column;
    if (row >= p.rows) return;
    const float factor = weight_scale(kGateUp) * inverse_rms(team, 0, row);
    const float2 sum =
        gather_pair(big(), team, 0, Group, own % Group, thread_id() / kWarpSize * kTileFeatures + column);
    const float gate = sum.x * factor + condition(kGateShift + shift);
    const float value = gelu(gate) * (sum.y * factor + condition(kUpShift + shift));
    publish_hidden(row, (block_id() * kGateUpUnits + unit) * kTileFeatures + column, own < Group, round_bf16(value),
                   input_scale(kDown));
  }

  // The same of all tiles: eight lanes a row, each `Group` columns of a unit, which make a word.
  template <int Group>
  __device__ __forceinline__ void finish_hidden(const Team<false>& team, int first) {
    const int warp = thread_id() / kWarpSize, lane = thread_id() % kWarpSize, tile = warp / 4;
    const int slot = warp % 4 * 4 + lane / 8, own = lane % 8 * Group / kTileFeatures;
    const int column = lane * Group % kTileFeatures, unit = first + own, m = tile * kTileRows + row_of_slot(slot);
    if (tile >= tiles()) return;
    const float factor = weight_scale(kGateUp) * inverse_rms(team, tile, row_of_slot(slot));
    float2 sum[Group];
    gather_columns(sum, big(), team, tile, own, slot * kTileFeatures + column);
    float value[Group], gate_shift[Group], up_shift[Group];
    this->condition_columns(gate_shift, kGateShift + unit * kTileFeatures + column);
    this->condition_columns(up_shift, kUpShift + unit * kTileFeatures + column);
#pragma unroll
    for (int i = 0; i < Group; ++i)
      value[i] = round_bf16(gelu(sum[i].x * factor + gate_shift[i]) * (sum[i].y * factor + up_shift[i]));
    if (m >= p.rows) return;
    const int n = (block_id() * kGateUpUnits + unit) * kTileFeatures + column;
    uint32_t word = 0;
    if constexpr (Fp8) {
      const float inverse_scale = inverse_of(input_scale(kDown));
#pragma unroll
      for (int i = 0; i < Group; i += 2)
        word |= pack_e4m3(value[i] * inverse_scale, value[i + 1] * inverse_scale) << (8 * i);
    } else {
      word = pack_bf16(value[0], value[1]);
    }
    publish(exchange().template buffer<kHidden>() + this->template tile_offset<kDown>(m, n * (Fp8 ? 1 : 2)),
            exchange().other, word);
  }

  // By whole warps: four (e4m3) or two neighbours make a word.
  __device__ __forceinline__ void publish_hidden(int m, int n, bool busy, float value, float scale) {
    unsigned char* buffer = exchange().template buffer<kHidden>();
    const int64_t other = exchange().other;
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
};

}  // namespace expert
}  // namespace flashrt
