// What the persistent expert's norms leave to the products behind them, and how their rows are published.
#pragma once

#include "expert_frame.cuh"

namespace flashrt {
namespace expert {

template <bool Fp8, bool One, bool Paired>
struct NormedFrame : Frame<Fp8, One, Paired> {
  using Base = Frame<Fp8, One, Paired>;
  using Base::h;
  using Base::inverse;
  using Base::p;
  using Base::row_of_thread;
  using Base::scratch;

  // Every warp's part of the sums of its tile's rows; behind the next barrier inverse_rms() has the whole.
  __device__ __forceinline__ void add_squares(Squares<One, Paired>& squares) {
    const float sum = squares.settle();
    if (thread_id() % 8 < 4) inverse[thread_id() / kWarpSize * kTileRows + Squares<One, Paired>::settled_row()] = sum;
  }

  // r / kHeadroom of a row of a tile, by eight neighbouring lanes of that row.
  __device__ __forceinline__ float inverse_rms(const Team<One>& team, int tile, int row) const {
    const int part = thread_id() % 8;
    const float* from = inverse + ((tile << team.shift) + part) * kTileRows + row;
    float sum = One || part < team.parts() ? from[0] : 0.0f;
    if (One) sum += from[8 * kTileRows];
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return inverse_of_squares(sum);
  }
  // Of a row's whole sum of squares. Every reader takes it the same way: powers must agree to the bit.
  __device__ __forceinline__ float inverse_of_squares(float sum) const {
    return rsqrtf(sum * (1.0f / kWidth) + p.eps) / kHeadroom;
  }
  // What the sums of the thread's row of qkv are multiplied by. Rows of e4m3 were published times a power of two, which
  // the norm before gave and every block knows from the same sums; this norm gives that of the next.
  __device__ __forceinline__ float row_factor(const Team<One>& team, int tile, int row) {
    const float inverse = inverse_rms(team, tile, row);
    if constexpr (!kOnMatrixUnit<Fp8, kQkv, Paired>) return inverse;
    const int m = tile * kTileRows + row;
    power(kMlpPower, m) = power_of(inverse);
    return unpowered(inverse, power(kQkvPower, m));
  }
  // What the rows of a norm are published times: of qkv, of gate-up, and of a step's first.
  enum Power : int { kQkvPower, kMlpPower, kFirstPower };
  __device__ __forceinline__ float& power(Power which, int row) const { return scratch[which * kExpertMaxRows + row]; }
  // Behind the product of a step's first norm: x changes little from step to step.
  __device__ __forceinline__ void keep_power() const {
    if constexpr (kOnMatrixUnit<Fp8, kQkv, Paired>) copy_powers(kFirstPower, kMlpPower);
  }
  // Of the thread's row and of one that the other block has.
  __device__ __forceinline__ void copy_powers(Power to, Power from) const {
    const int m = row_of_thread(), other = m ^ Base::kHalfRows;
    power(to, m) = power(from, m), power(to, other) = power(from, other);
  }
  // With it the root mean square of the row at that norm is between 1/8 and 1/4, or less where it was below 1/256. It
  // may grow 56 times until a value that is all of its row exceeds what e4m3 holds, less by as much as |1 + scale| of
  // its column is more than 1. Where the squares overflow the rows become NaN, not zeros.
  static __device__ __forceinline__ float power_of(float inverse) {
    const float power = fminf(__uint_as_float(__float_as_uint(inverse) & 0x7f800000u) * (kHeadroom / 4), 32.0f);
    return inverse > 0.0f ? power : __uint_as_float(0x7fffffffu);
  }
  // r of a norm by the power of its rows: 4 to 8 where they are as large as at the norm before. Of rows that have
  // shrunk 16 to 32 times e4m3 has kept no more than a bit or two: that must not pass in silence either.
  static __device__ __forceinline__ float unpowered(float inverse, float power) {
    const float factor = inverse * kHeadroom * __uint_as_float(0x7f000000u - __float_as_uint(power));
    return factor <= 128.0f ? factor : __uint_as_float(0x7fffffffu);
  }

  // h (1 + scale) of this thread's element and the sum of squares of its row's for the given buffers of a copy.
  // All threads of a warp take part; those of rows past the end publish nothing.
  template <int P, int Normed, int SquaresOf>
  __device__ __forceinline__ void publish_normed(const Exchange<One>& to, float factor) {
    const int m = row_of_thread(), column = this->column_of_thread();
    publish_row<P, Normed>(to, factor, m, column);
    publish_squares<SquaresOf>(to, m, column);
  }
  template <int P, int Normed>
  __device__ __forceinline__ void publish_row(const Exchange<One>& to, float factor, int m, int column) const {
    constexpr bool Narrow = kOnMatrixUnit<Fp8, P, Paired>;
    const float scaled =
        Narrow ? or_nan(h * factor * power(P == kQkv ? kQkvPower : kMlpPower, m)) : h * factor * kHeadroom;
    const float next = __shfl_down_sync(0xffffffffu, scaled, 1);
    const bool has = m < p.rows;
    if constexpr (Narrow) {
      uint32_t word = pack_e4m3(scaled, next);
      word |= __shfl_down_sync(0xffffffffu, word, 2) << 16;
      if (has && column % 4 == 0)
        publish(to.template buffer<Normed>() + this->template tile_offset<P>(m, this->first_column() + column),
                to.other, word);
    } else if (has && column % 2 == 0) {
      publish(to.template buffer<Normed>() + activation_offset<Fp8, P>(m, (this->first_column() + column) * 2),
              to.other, Fp8 ? pack_f16(scaled, next) : pack_bf16(scaled, next));
    }
  }
  // A value that e4m3 does not hold must not pass as its largest: NaN goes through to the actions, which are refused.
  static __device__ __forceinline__ float or_nan(float value) {
    return fabsf(value) <= 448.0f ? value : __uint_as_float(0x7fffffffu);
  }
  template <int SquaresOf>
  __device__ __forceinline__ void publish_squares(const Exchange<One>& to, int m, int column) const {
    using Parts = Squares<One, Paired>;
    float squares = h * h;
#pragma unroll
    for (int offset = Base::kColumns / 2; offset > 0; offset /= 2)
      squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    if (m < p.rows && column == 1)
      publish(to.template buffer<SquaresOf>() + Parts::offset_of(m) + Parts::part() * kTileRows * 4, to.other,
              __float_as_uint(squares));
  }

  // The last h of a step, for the seam.
  __device__ __forceinline__ void publish_last(const Exchange<One>& to) {
    const int m = row_of_thread(), column = this->column_of_thread();
    const float next = __shfl_down_sync(0xffffffffu, h, 1);
    if (m < p.rows && column % 2 == 0)
      publish(to.template buffer<kLast>() + (m * kWidth + this->first_column() + column) * 2, to.other,
              pack_bf16(h, next));
  }
};

}  // namespace expert
}  // namespace flashrt
