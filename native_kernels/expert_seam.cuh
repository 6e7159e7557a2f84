// What the persistent expert computes between two steps.
#pragma once

#include "expert_layer.cuh"

namespace flashrt {
namespace expert {

template <bool Fp8, bool One, bool Paired>
struct Seam : Layer<Fp8, One, Paired> {
  using Base = Layer<Fp8, One, Paired>;
  using Base::exchange;
  using Base::h;
  using Base::p;
  using Base::scratch;
  using Base::style;

  // Between two steps: x += dt * (norm(h) W_out + b), some blocks a row; then h = W_in x + b, every block its part.
  __device__ void seam(int step) {
    if (step > 0 && !p.fill) {
      if constexpr (One) {
        project_out(step - 1);
      } else {
        project_rows_out(step - 1);
      }
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
    const unsigned char* from = exchange(step % kCopies).template buffer<kLast>() + (row * kWidth + column) * 2;
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
      block_sync();
      if (lane == 0) scratch[warp * 3] = dot, scratch[warp * 3 + 1] = shifted, scratch[warp * 3 + 2] = squares;
      block_sync();
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

  // The same where there are more tiles: two blocks a row, a warp an output at a time. All that does not wait for h is
  // asked for and multiplied ahead of it.
  __device__ void project_rows_out(int step) {
    const int row = block_id() / 2, warp = thread_id() / kWarpSize, lane = thread_id() % kWarpSize;
    if (row >= p.rows) return;
    constexpr int kPieces = kWidth / (8 * kWarpSize);
    const float *scale = style(p.norm_scale, step, 2 * p.layers), *shift = style(p.norm_shift, step, 2 * p.layers);
    const unsigned char* from = exchange(step % kCopies).template buffer<kLast>() + (row * kWidth + lane * 8) * 2;
    for (int output = block_id() % 2 * kWarps + warp; output < p.action_dim; output += 2 * kWarps) {
      float weight[kPieces][8], shifted = 0.0f;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int column = (i * kWarpSize + lane) * 8;
        float s[8], t[8] = {};
        load_eight(weight[i], p.out_weight + output * kWidth + column);
        load_eight(s, scale + column);
        if (shift != nullptr) load_eight(t, shift + column);
#pragma unroll
        for (int j = 0; j < 8; ++j) shifted += t[j] * weight[i][j], weight[i][j] *= 1.0f + s[j];
      }
      const float bias = p.out_bias[output], before = p.x[row * p.action_dim + output];
      uint4 raw[kPieces];
#pragma unroll
      for (int i = 0; i < kPieces; ++i) raw[i] = look(from + i * kWarpSize * 16);
      await_all(raw, from, kWarpSize * 16);
      float dot = 0.0f, squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const uint32_t pairs[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float value = j % 2 == 0 ? low_bf16(pairs[j / 2]) : high_bf16(pairs[j / 2]);
          dot += value * weight[i][j], squares += value * value;
        }
      }
#pragma unroll
      for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        dot += __shfl_xor_sync(0xffffffffu, dot, offset);
        shifted += __shfl_xor_sync(0xffffffffu, shifted, offset);
        squares += __shfl_xor_sync(0xffffffffu, squares, offset);
      }
      const float velocity = dot * rsqrtf(squares * (1.0f / kWidth) + p.eps) + shifted + bias;
      if (lane == 0) advance(step, row, output, before, velocity);
    }
  }

  // Looks again at all that has not come, until everything has: one by one each would take a way to L2 and back. By
  // whole warps.
  template <int Count>
  static __device__ __forceinline__ void await_all(uint4 (&words)[Count], const unsigned char* from, int step) {
    for (int polls = 0;; count_poll(polls)) {
      if (!__any_sync(0xffffffffu, any_absent(words, kAbsent))) break;
#pragma unroll
      for (int i = 0; i < Count; ++i)
        if (absent(words[i])) words[i] = look(from + i * step);
    }
  }

  static __device__ __forceinline__ void load_eight(float (&value)[8], const float* from) {
    const float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
    value[0] = low.x, value[1] = low.y, value[2] = low.z, value[3] = low.w;
    value[4] = high.x, value[5] = high.y, value[6] = high.z, value[7] = high.w;
  }

  // One Euler step of one coordinate, with the pull of the guidance where there is one.
  __device__ __forceinline__ void advance(int step, int row, int output, float velocity) {
    advance(step, row, output, p.x[row * p.action_dim + output], velocity);
  }
  __device__ __forceinline__ void advance(int step, int row, int output, float before, float velocity) {
    const int index = row * p.action_dim + output;
    const float change = -velocity / p.steps;
    float after = before + change;
    // where the weight is zero every bit stays as it is, whatever the target holds
    if (p.guide_gain != nullptr && p.guide_weight[index] != 0.0f) {
      const float time = 1.0f - static_cast<float>(step) / p.steps;
      after += p.guide_gain[step] / p.steps * p.guide_weight[index] *
               (p.guide_target[index] - before - time * p.steps * change);
    }
    p.x[index] = after;
    if (step + 1 < p.steps)
      publish(exchange(step % kCopies).template buffer<kActions>() + (row * kMaxActionDim + output) * 4,
              exchange(step % kCopies).other, __float_as_uint(after));
  }

  __device__ void project_in(int step) {
    const int m = this->row_of_thread(), n = this->first_column() + this->column_of_thread();
    const float factor = style(p.norm_scale, step, 0)[n] + 1.0f;
    const float mix_bias = p.mix_weights == nullptr ? 0.0f : p.mix_bias[n];
    float value = m < p.rows ? in_product(step, m, n) : 0.0f;
    if (p.mix_weights != nullptr) {
      value = __fdividef(value, 1.0f + __expf(-value));
      const float next = __shfl_down_sync(0xffffffffu, value, 1);
      if (m < p.rows && n % 2 == 0)
        publish(exchange(step % kCopies).template buffer<kMixed>() + activation_offset<Fp8, kMix>(m, n * 2),
                exchange(step % kCopies).other, pack_bf16(value, next));
      block_sync();  // the sums of the last product have been read
      const auto finish = [&](float sum) { value = sum + mix_bias; };
      if constexpr (Paired) {
        finish(mixed(step));
      } else {
        this->template narrow_product<kMix>(exchange(step % kCopies).template buffer<kMixed>(), step, 0, finish);
      }
    }
    h = round_bf16(value);
    if constexpr (kOnMatrixUnit<Fp8, kQkv, Paired>) {
      if (step == 0) {
        const int column = this->column_of_thread();
        this->template publish_squares<kSquaresQkv>(exchange(), m, column);
        take_first_powers(m);
        this->template publish_row<kQkv, kNormedQkv>(exchange(), factor, m, column);
        return;
      }
      this->copy_powers(this->kQkvPower, this->kFirstPower);
    }
    this->template publish_normed<kQkv, kNormedQkv, kSquaresQkv>(exchange(), factor);
  }

  // By a pair of blocks, this thread's element of the mix: the product is of a block's 8 columns of all rows, and they
  // send each other those of the rows that they have not.
  __device__ __forceinline__ float mixed(int step) {
    const int rank = block_id() % 2, element = thread_id() % kTileElements;
    const int row = row_of_slot(element / kTileFeatures);
    uint64_t* come = this->arrivals + kMixCome;
    float* here = reinterpret_cast<float*>(this->shared + this->plan.received);
    float* place = here + (thread_id() / kTileElements * Base::kHalfRows + row % Base::kHalfRows) * Base::kColumns +
                   rank * kTileFeatures + element % kTileFeatures;
    if (thread_id() == 0) barrier_expect(come, this->tiles() * (kTileElements / 2 * 4));
    this->template narrow_product<kMix>(exchange(step % kCopies).template buffer<kMixed>(), step, 0, [&](float sum) {
      if (row / Base::kHalfRows == rank) {
        *place = sum;
      } else {
        give(address_in(shared_address(place), 1 - rank), sum, address_in(shared_address(come), 1 - rank));
      }
    });
    await_phase(come, step & 1);
    return this->row_of_thread() < p.rows ? here[thread_id()] : 0.0f;
  }

  // Those of a launch's first norm, which has none before it: of its own squares, for which everybody waits once more.
  __device__ void take_first_powers(int m) {
    const Team<One> team = this->row_team();
    if (team.tile < this->tiles()) {
      Squares<One, Paired> squares;
      squares.ask(exchange().template buffer<kSquaresQkv>(), team, p.rows);
      this->add_squares(squares);
    }
    block_sync();
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) inverse[i] = this->inverse_rms(team, team.tile, (m ^ i * Base::kHalfRows) % kTileRows);
    block_sync();
#pragma unroll
    for (int i = 0; i < 2; ++i) this->power(this->kQkvPower, m ^ i * Base::kHalfRows) = this->power_of(inverse[i]);
  }

  __device__ __forceinline__ float in_product(int step, int m, int n) {
    const float* weight = p.in_weight + n * p.action_dim;
    const unsigned char* actions =
        step == 0 ? reinterpret_cast<const unsigned char*>(p.x + m * p.action_dim)
                  : exchange((step - 1) % kCopies).template buffer<kActions>() + m * kMaxActionDim * 4;
    constexpr int kPieces = One ? 4 : 8;  // at once
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
      if (!One && step > 0)
        for (int polls = 0; any_absent(x, kAbsent); count_poll(polls))
#pragma unroll
          for (int i = 0; i < kPieces; ++i)
            if (absent(x[i])) x[i] = look(actions + (first + i) * 16);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        if (One && step > 0 && absent(x[i])) x[i] = await(actions + (first + i) * 16);
        sum += w[i].x * __uint_as_float(x[i].x) + w[i].y * __uint_as_float(x[i].y) + w[i].z * __uint_as_float(x[i].z) +
               w[i].w * __uint_as_float(x[i].w);
      }
    }
    return sum;
  }
};

}  // namespace expert
}  // namespace flashrt
