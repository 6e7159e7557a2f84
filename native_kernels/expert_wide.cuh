// How the persistent expert's sums of qkv and gate-up meet; and, of more than two tiles of rows, these products with
// e4m3 weights on Hopper's matrix unit.
#pragma once

#include "expert_normed.cuh"

namespace flashrt {
namespace expert {

template <bool Fp8, bool One, bool Paired>
struct WideFrame : NormedFrame<Fp8, One, Paired> {
  using Base = NormedFrame<Fp8, One, Paired>;
  using Base::big;
  using Base::p;
  using Base::ring;

  static constexpr int kSumUnits = kGateUpUnits;  // of two tiles, for which a warp's sums have room

  // The sums of `Units` units of rows `x` and of their squares. `meanwhile` is called when the rows have been asked
  // for.
  template <int P, int Units, typename Meanwhile>
  __device__ __forceinline__ void wide_product(const unsigned char* x, const unsigned char* squares_of,
                                               Meanwhile meanwhile) {
    using S = Shape<Fp8, P, true>;
    static_assert(S::Groups / 4 == 2 && S::Chunks == 1 && S::Tiles == 2);
    const Team<One> team = matrix_team(), row_team = this->row_team();
    Activations<Fp8, P, One, true> a(x, team, p.rows);
    a.await_one();
    Squares<One> squares;
    squares.ask(squares_of, row_team, p.rows);
    a.ask();
    meanwhile();
    if (row_team.tile < this->tiles()) this->add_squares(squares);
    ring.wait(this->chunk, Units);
    constexpr int Parts = 2, Sums = Units * 8 / Parts;
    uint32_t weights[Parts];
#pragma unroll
    for (int part = 0; part < Parts; ++part)
      weights[part] = tile_descriptor(
          ring.chunks + this->template unit_place<P>(part * Units / Parts, team.part * (S::UnitBlocks / 4)));
    float sum[Parts][Sums] = {};
    if (a.rows > 0) a.settle(a.operand[0], 0), a.settle(a.operand[1], 1);
    multiply_parts(sum, a.operand, weights);
    spread_sums(sum, P == kQkv ? qkv_units<One>(team.tile) : Units, a.rows);
  }

  // Of as many neighbouring conditions, from a multiple of it on; of pairs one by one, which measures 0.1 us faster
  // there.
  template <int Count>
  __device__ __forceinline__ void condition_columns(float (&value)[Count], int index) const {
    struct alignas(Count * 4) Columns {
      float value[Count];
    };
    const float* from = this->conditions + this->copy * kConditions + index;
    Columns columns;
    if constexpr (!Paired) columns = *reinterpret_cast<const Columns*>(from);
#pragma unroll
    for (int i = 0; i < Count; ++i) value[i] = Paired ? from[i] : columns.value[i];
  }

  // The first `count` of a warp's units of two tiles, into the big region; not on the matrix unit.
  template <int P, int Units>
  __device__ __forceinline__ void spread_units(const Sums<Fp8, P, Units, One>& sums, int count, int rows) const {
#pragma unroll
    for (int unit = 0; unit < Units; ++unit) {
      if (unit >= count) break;
      float sum[2][4];
      sums.total(sum, unit);
      spread_pairs(big(), Units, unit, sum, rows);
    }
  }

  // A warp's sums of `count` units on the matrix unit.
  template <int Parts, int Sums>
  __device__ __forceinline__ void spread_sums(const float (&sums)[Parts][Sums], int count, int rows) const {
#pragma unroll
    for (int unit = 0; unit < Parts * Sums / 8; ++unit) {
      if (unit >= count) break;
      float sum[2][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i / 4][i % 4] = sums[unit * 8 / Sums][unit * 8 % Sums + i];
      spread_pairs(big(), kSumUnits, unit, sum, rows);
    }
  }
};

}  // namespace expert
}  // namespace flashrt
