// How the persistent expert's sums of qkv and gate-up meet; and, of more than two tiles of rows, these products with
// e4m3 weights on Hopper's matrix unit.
#pragma once

#include "expert_frame.cuh"

namespace flashrt {
namespace expert {

template <bool Fp8, bool One, bool Paired>
struct WideFrame : Frame<Fp8, One, Paired> {
  using Base = Frame<Fp8, One, Paired>;
  using Base::big;
  using Base::p;
  using Base::ring;

  static constexpr int kPanelUnits = kGateUpUnits;  // a warpgroup's sums of so many take the place of its panel

  // The sums of `Units` units of rows `x` and of their squares. The weights are widened while the rows are on their
  // way, as many at once as a panel holds. `meanwhile` is called when the rows have been asked for.
  template <int P, int Units, typename Meanwhile>
  __device__ __forceinline__ void wide_product(const unsigned char* x, const unsigned char* squares_of,
                                               Meanwhile meanwhile) {
    using S = Shape<Fp8, P>;
    constexpr int Tiles = Units * S::Tiles / 4, Groups = S::Groups / 4;  // of a warp
    constexpr int Blocks = 4 / Tiles;                                    // of k in a panel
    static_assert(Groups % 2 == 0 && Blocks % 2 == 0 && S::GroupBlocks == 1);
    const Team<One> team = matrix_team(), row_team = this->row_team();
    unsigned char* panel = this->shared + this->plan.big + team.part * kPanelBytes;
    Activations<Fp8, P, One> a(x, team, p.rows);
    ring.wait(this->chunk, Units * S::Chunks);
    const int first = team.tile * Tiles;
    const unsigned char* weights = ring.chunks +
                                   this->template place<P>(first / S::Tiles * S::UnitBlocks + team.part * Groups) +
                                   first % S::Tiles * S::Blocks * kTileBytes;
    widen_panel<Tiles>(panel, weights, S::Blocks * kTileBytes);
    Squares<One> squares;
    squares.ask(squares_of, row_team, p.rows);
    a.ask();
    meanwhile();
    if (row_team.tile < this->tiles()) this->add_squares(squares);
    float sum[Units * S::Tiles * 4] = {};
#pragma unroll
    for (int group = 0; group < Groups; group += 2) {
      if (group > 0 && group % Blocks == 0) {
        warpgroup_sync();
        widen_panel<Tiles>(panel, weights + group * kTileBytes, S::Blocks * kTileBytes);
      }
      if (a.rows > 0) a.settle(a.operand[0], group), a.settle(a.operand[1], group + 1);
      multiply_blocks(sum, a.operand, panel + group % Blocks * 4 * Tiles * kAtomBytes, 4 * Tiles * kAtomBytes);
      if (a.rows > 0 && group + 2 < Groups) a.ask(a.operand[0], group + 2), a.ask(a.operand[1], group + 3);
    }
    warpgroup_sync();  // the sums lie where the panel was
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
  template <int Sums>
  __device__ __forceinline__ void spread_sums(const float (&sums)[Sums], int count, int rows) const {
#pragma unroll
    for (int unit = 0; unit < Sums / 8; ++unit) {
      if (unit >= count) break;
      float sum[2][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i / 4][i % 4] = sums[unit * 8 + i];
      spread_pairs(big(), kPanelUnits, unit, sum, rows);
    }
  }
};

}  // namespace expert
}  // namespace flashrt
