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

  static constexpr int kSumUnits = 2;  // of two tiles, for which a warp's sums have room

  // The sums of `Units` units of rows `x`, by `take(sums, team, rows of its tile)`, and of their squares. `meanwhile`
  // is called when the rows have been asked for.
  template <int P, int Units, typename Meanwhile, typename Take>
  __device__ __forceinline__ void wide_product(const unsigned char* x, const unsigned char* squares_of,
                                               Meanwhile meanwhile, Take take) {
    using S = Shape<Fp8, P, true>;
    static_assert(S::Groups / 4 == 2 && S::Chunks == 1 && S::Tiles == 2);
    const Team<One> team = matrix_team(), row_team = this->row_team();
    Activations<Fp8, P, One, true> a(x, team, p.rows);
    Squares<One, Paired> squares;
    a.ask();  // ahead of the squares, which are half as much and published last
    squares.ask(squares_of, row_team, p.rows);
    meanwhile();
    if (row_team.tile < this->tiles()) this->add_squares(squares);
    ring.wait(this->chunk, Units);
    // chunks are halves of k: of qkv of both units, of gate-up of two of the four
    constexpr int Parts = Units / 2, kHalfBytes = kHalfBlocks * kTileBytes;
    const unsigned char* weights[Parts];
#pragma unroll
    for (int part = 0; part < Parts; ++part)
      weights[part] = ring.chunks + this->template place<P>((part * 2 + team.part / 2) * S::Blocks) +
                      team.part % 2 * (kHalfBytes / 2);
    float sum[Parts][16] = {};
    if (a.rows > 0) a.settle(a.operand[0], 0), a.settle(a.operand[1], 1);
    multiply_groups<kHalfBytes>(sum, a.operand, weights);
    take(sum, team, a.rows);
  }

  // Gate-up's sums of a warpgroup's quarter of k meet by unit: it keeps those of one and leaves the others to the other
  // warpgroups, 16 bytes a lane as the matrix unit leaves them.
  static_assert(kGateUpUnits == 4 && kPairedBigBytes == kGateUpUnits * 3 * 4 * 2 * kSentBytes);
  __device__ __forceinline__ unsigned char* handed(int unit, int from, int tile) const {
    return this->shared + this->plan.big + ((unit * 3 + from) * 4 + tile) * 2 * kSentBytes +
           thread_id() % kWarpSize * 16;
  }
  __device__ __forceinline__ void hand_out(const float (&sum)[2][16], const Team<One>& team, float (&own)[8]) const {
#pragma unroll
    for (int unit = 0; unit < kGateUpUnits; ++unit) {
      const float* from = sum[unit / 2] + unit % 2 * 8;
      if (unit == team.part) {
#pragma unroll
        for (int i = 0; i < 8; ++i) own[i] = from[i];
      } else {
        unsigned char* target = handed(unit, team.part - (team.part > unit), team.tile);
        *reinterpret_cast<float4*>(target) = make_float4(from[0], from[1], from[2], from[3]);
        *reinterpret_cast<float4*>(target + kSentBytes) = make_float4(from[4], from[5], from[6], from[7]);
      }
    }
  }

  // Behind a barrier: geglu of a warpgroup's unit. A lane has two neighbouring columns of two rows of its tile.
  __device__ __forceinline__ void finish_unit(float (&own)[8]) {
    const Team<One> team = matrix_team();
    const int lane = thread_id() % kWarpSize, unit = team.part, tile = team.tile;
#pragma unroll
    for (int from = 0; from < 3; ++from)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 part = *reinterpret_cast<const float4*>(handed(unit, from, tile) + i * kSentBytes);
        own[i * 4] += part.x, own[i * 4 + 1] += part.y, own[i * 4 + 2] += part.z, own[i * 4 + 3] += part.w;
      }
    float factor[2];
    row_factors(factor, unit, tile);
    const float inverse_scale = inverse_of(this->input_scale(kDown));
    const int column = lane % 4 * 2, shift = unit * kTileFeatures + column;
    uint32_t pair[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float value[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float gate = own[row * 2 + i] * factor[row] + this->condition(kGateShift + shift + i);
        const float up = own[4 + row * 2 + i] * factor[row] + this->condition(kUpShift + shift + i);
        value[i] = round_bf16(gelu(gate) * up);
      }
      pair[row] = pack_e4m3(value[0] * inverse_scale, value[1] * inverse_scale);
    }
    // an even lane publishes four columns of the first row, its neighbour those of the second
    const bool even = lane % 2 == 0;
    const uint32_t theirs = __shfl_xor_sync(0xffffffffu, even ? pair[1] : pair[0], 1);
    const uint32_t word = even ? pair[0] | theirs << 16 : theirs | pair[1] << 16;
    const int m = tile * kTileRows + row_of_slot(lane / 4 + (even ? 0 : 8));
    if (m >= p.rows) return;
    const int n = (block_id() * kGateUpUnits + unit) * kTileFeatures + column / 4 * 4;
    publish(this->exchange().template buffer<kHidden>() + this->template tile_offset<kDown>(m, n),
            this->exchange().other, word);
  }

  // What the sums of a lane's two rows are multiplied by; and the powers of the next norm.
  __device__ __forceinline__ void row_factors(float (&factor)[2], int unit, int tile) const {
    const int lane = thread_id() % kWarpSize;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane / 4 * 2 + i, m = tile * kTileRows + row;
      float sum = this->inverse[(tile * 4 + lane % 4) * kTileRows + row];
#pragma unroll
      for (int offset = 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      const float inverse = this->inverse_of_squares(sum);
      factor[i] = this->weight_scale(kGateUp) * this->unpowered(inverse, this->power(Base::kMlpPower, m));
      if (unit == 0) this->power(Base::kQkvPower, m) = this->power_of(inverse);
    }
  }

  // Of as many neighbouring conditions, from a multiple of it on.
  template <int Count>
  __device__ __forceinline__ void condition_columns(float (&value)[Count], int index) const {
    struct alignas(Count * 4) Columns {
      float value[Count];
    };
    const float* from = this->conditions + this->copy * Base::kConditionStride + index;
    const Columns columns = *reinterpret_cast<const Columns*>(from);
#pragma unroll
    for (int i = 0; i < Count; ++i) value[i] = columns.value[i];
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
