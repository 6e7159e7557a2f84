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
// weight chunks in shared memory is kept full in the fixed order of use, across phases, layers and steps, by a warp
// that does nothing else (expert_mover.cuh). What is left is latency: six exchanges a layer. They have no barriers: the
// words that go from block to block say themselves whether they have come (expert_stream.cuh).
//
// e4m3 weights meet 16-bit activations in products 1 and 4 (widened: exact) and e4m3 activations in 3 and 5. Rows are
// served in tiles of 16: all warps share the k of one tile; of more, a team of warps has each, and of more than two
// Hopper's matrix unit takes the products of e4m3 weights, those of 3 and 5 shared by pairs of blocks
// (expert_matrix.cuh). Sums are taken in a fixed
// order: results are bit-identical from run to run.
#include "device_limits.h"
#include "expert_layer.cuh"

#pragma nv_diag_suppress 177  // below sm_90 the kernel is empty and leaves everything here unused

namespace flashrt {
namespace {

using namespace expert;

template <bool Fp8, bool One, bool Paired>
struct Expert : Layer<Fp8, One, Paired> {
  using Base = Layer<Fp8, One, Paired>;
  using Base::attend;
  using Base::copy_conditions;
  using Base::down;
  using Base::exchange;
  using Base::gate_up;
  using Base::h;
  using Base::out;
  using Base::p;
  using Base::plan;
  using Base::qkv;
  using Base::scratch;
  using Base::share;
  using Base::shared;
  using Base::style;

  // Between two steps: x += dt * (norm(h) W_out + b), some blocks a row; then h = W_in x + b, every block its columns.
  __device__ void seam(int step) {
    if (step > 0 && !p.fill) {
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
    const int m = this->row_of_thread(), n = block_id() * kTileFeatures + thread_id() % kTileFeatures;
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
      this->template narrow_product<kMix>(exchange(step % kCopies).template buffer<kMixed>(), step, 0,
                                          [&](float sum) { value = sum + mix_bias; });
    }
    h = round_bf16(value);
    this->template publish_normed<kQkv, kNormedQkv, kSquaresQkv>(exchange(), factor);
  }

  __device__ __forceinline__ float in_product(int step, int m, int n) {
    const float* weight = p.in_weight + n * p.action_dim;
    const unsigned char* actions =
        step == 0 ? reinterpret_cast<const unsigned char*>(p.x + m * p.action_dim)
                  : exchange((step - 1) % kCopies).template buffer<kActions>() + m * kMaxActionDim * 4;
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
        sum += w[i].x * __uint_as_float(x[i].x) + w[i].y * __uint_as_float(x[i].y) + w[i].z * __uint_as_float(x[i].z) +
               w[i].w * __uint_as_float(x[i].w);
      }
    }
    return sum;
  }

  __device__ __forceinline__ void run() {
    if (thread_id() / kWarpSize == kWarps - 3) copy_conditions(0, 0, 0);
    blank_values(shared, plan.attention, share);
    for (int step = 0; step < p.steps; ++step) {
      seam(step);
      for (int layer = 0; layer < p.layers; ++layer, this->end_visit()) {
        qkv();
        attend();
        out(step, layer);
        gate_up();
        down(step, layer);
      }
    }
    seam(p.steps);
  }
};

__device__ __forceinline__ void blank(unsigned char* from, int bytes) {
  uint4* words = reinterpret_cast<uint4*>(from);
  for (int i = block_id() * kThreads + thread_id(); i < bytes / 16; i += kBlocks * kThreads)
    words[i] = make_uint4(kAbsent, kAbsent, kAbsent, kAbsent);
}

// All copies of the exchange but the last, which the first to publish blanks, before anyone waits for anything; and
// where words have marks, those of all copies, which nobody blanks.
template <bool One>
__device__ void blank_exchange(const Exchange<One>& exchange) {
  const int rows = exchange.padded_rows(), last = (kCopies - 1) * kExchangeRowBytes * rows;
  constexpr int Unmarked = bytes_before(kInbox);
  blank(exchange.base, last);
  if (!One) blank(exchange.base + last + Unmarked * rows, (kExchangeRowBytes - Unmarked) * rows);
}

template <bool Fp8, bool One, bool Paired>
__global__ void __launch_bounds__(kThreads + kWarpSize, 1) expert_steps_kernel(const ExpertSteps p, const Plan plan) {
#if FLASHRT_DEVICE_HAS_BULK
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ uint64_t full[kMaxSlots], prefix_full[3];
  __shared__ Counters counters;
  __shared__ Source sources[kMaxSources];
  __shared__ Share share;
  __shared__ __align__(16) float inverse[kWarps * kTileRows], conditions[kCopies * kConditions], scratch[kWarps * 3];
  if (thread_id() == 0) {
    for (int i = 0; i < kMaxSlots; ++i) barrier_init(full + i, 1);
    for (int i = 0; i < 2; ++i) barrier_init(prefix_full + i, kWarpSize);
    barrier_init(prefix_full + 2, 1);
    barrier_init_fence();
    counters = {};
    const int prefix = *p.prefix_length;
    if (prefix < 0 || prefix > p.capacity - p.rows) __trap();  // rows that the caches do not have
    share = Share(block_id() % kSplits, prefix, p.rows);
  }
  if (static_cast<int>(thread_id()) <= sources_of_visit<Fp8, One>())
    sources[thread_id()] = source<Fp8, One>(p, thread_id(), kHasMatrixUnit && (Paired || plan.paired));
  __syncthreads();
  const Ring ring{shared, &counters, plan.slots};
  if (thread_id() >= kMoverThread) {
    const int64_t first = int64_t(share.first) * kHeadRowBytes;
    const PrefixRows rows{static_cast<const unsigned char*>(p.k_cache) + first,
                          static_cast<const unsigned char*>(p.v_cache) + first,
                          int64_t(p.capacity) * kHeadRowBytes,
                          share.prefix_keys,
                          shared + plan.attention.k,
                          shared + plan.attention.v};
    Mover<Fp8, One>{p, ring, full, prefix_full, sources, rows}.run();
    return;
  }
  Expert<Fp8, One, Paired> expert{{{{p, plan, shared, ring, share, prefix_full, inverse, scratch, conditions}}}};
  blank_exchange(expert.exchange(0));
  expert.blank_conditions();
  grid_barrier(p.barrier);
  expert.run();
  if (thread_id() == 0 && atomicAdd(p.barrier + 1, 1) == kBlocks - 1)  // the last block leaves both words zero
    p.barrier[0] = p.barrier[1] = 0;
#endif
}

// Where everything lies in dynamic shared memory; false where it does not fit.
template <bool Fp8, bool One, bool Paired>
bool lay_out(Plan& plan, const ExpertSteps& p, int shared_limit, int& bytes) {
  Layout& attention = plan.attention;
  attention.block_keys = Layout::keys_of_block(p.capacity);
  if (attention.block_keys > kLaneKeys * kWarpSize) return false;
  const int tiles = (p.rows + kTileRows - 1) / kTileRows, slices = tiles <= 2 ? kSlices : kSlices / 2;
  const int key_bytes = attention.block_keys * kKeyStride, value_bytes = attention.block_keys * kValueStride;
  const int probability_bytes = tiles * kTileRows * attention.probability_stride() * 2;
  constexpr int kFixedBytes = 4096;  // the kernel's static shared memory and the alignment
  constexpr int kLeastSlots = 4;     // what is multiplied before anything is given back
  // where there are more tiles, small sums take turns with the big ones
  const int small_bytes = One ? kSmallBytes : 0, received_bytes = Paired ? tiles * 4 * kSentBytes : 0;
  // the scores of all tiles at once, or of half of them
  for (int at_once = tiles; at_once > 0; at_once /= 2) {
    const int score_bytes = at_once * slices * kTileRows * attention.score_stride() * 4;
    const int big_bytes = max(kBigBytes, score_bytes + probability_bytes + tiles * kTileRows * 4);
    const int work_bytes = big_bytes + small_bytes + received_bytes + key_bytes + value_bytes;
    plan.slots = min(kMaxSlots, (shared_limit - work_bytes - kFixedBytes) / kChunkBytes);
    if (plan.slots < kLeastSlots) continue;
    plan.big = plan.slots * kChunkBytes;
    plan.small = One ? plan.big + big_bytes : plan.big;
    plan.received = plan.big + big_bytes + small_bytes;
    attention.tiles_at_once = at_once;
    attention.score = plan.big;
    attention.probability = attention.score + score_bytes;
    attention.row_maximum = attention.probability + probability_bytes;
    attention.k = plan.received + received_bytes;
    attention.v = attention.k + key_bytes;
    bytes = attention.v + value_bytes;
    return true;
  }
  return false;
}

template <bool Fp8, bool One, bool Paired = false>
cudaError_t launch(const ExpertSteps& p, const DeviceLimits& limits, cudaStream_t stream) {
  if (limits.multiprocessors < kBlocks) return cudaErrorNotSupported;
  Plan plan = {};
  plan.paired = Paired;
  int bytes = 0;
  if (!lay_out<Fp8, One, Paired>(plan, p, limits.shared_bytes, bytes))
    return Paired ? launch<Fp8, One>(p, limits, stream) : cudaErrorNotSupported;

  auto kernel = expert_steps_kernel<Fp8, One, Paired>;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  // blocks wait for each other: all must be on the device at once, and the attribute makes that a condition
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = 2;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(kBlocks);
  config.blockDim = dim3(kThreads + kWarpSize);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = Paired ? 2 : 1;
  if (Paired) {
    int pairs = 0;
    status = cudaOccupancyMaxActiveClusters(&pairs, kernel, &config);
    if (status != cudaSuccess) return status;
    if (pairs < kBlocks / 2) return launch<Fp8, One>(p, limits, stream);
  }
  return cudaLaunchKernelEx(&config, kernel, p, plan);
}

// Whether everything lies as the kernel's vectors and bulk copies read it.
bool aligned(const ExpertSteps& p) {
  const void* vectors[] = {p.weights[kQkv],  p.weights[kOut], p.weights[kGateUp], p.weights[kDown],
                           p.weight_scale,   p.norm_scale,    p.norm_shift,       p.gate,
                           p.shift_products, p.k_cache,       p.v_cache,          p.x,
                           p.in_weight,      p.out_weight,    p.mix_weights,      p.exchange};
  for (const void* pointer : vectors)
    if (!aligned_to_16_bytes(pointer)) return false;
  return reinterpret_cast<uintptr_t>(p.input_scale) % 8 == 0 && p.step_stride % 4 == 0 && p.norm_stride % 4 == 0;
}

}  // namespace

int64_t expert_exchange_bytes(int rows) {
  return kCopies * int64_t(kExchangeRowBytes) * ((rows + kTileRows - 1) / kTileRows * kTileRows);
}

cudaError_t expert_steps(const ExpertSteps& p, cudaStream_t stream) {
  DeviceLimits limits = {};
  const cudaError_t status = device_limits(&limits);
  if (status != cudaSuccess) return status;
  if (limits.capability < 90) return cudaErrorNotSupported;  // the bulk copy engine
  if (p.rows < 1 || p.rows > kExpertMaxRows || p.layers < 1 || p.steps < 1 || p.capacity < p.rows || p.action_dim < 4 ||
      p.action_dim > kMaxActionDim || p.action_dim % 4 != 0 || (p.fill && p.steps != 1) || !aligned(p))
    return cudaErrorInvalidValue;
  const bool one = p.rows <= kTileRows;
  if (p.fp8 && p.rows > 2 * kTileRows && limits.capability == 90) return launch<true, false, true>(p, limits, stream);
  if (p.fp8) return one ? launch<true, true>(p, limits, stream) : launch<true, false>(p, limits, stream);
  return one ? launch<false, true>(p, limits, stream) : launch<false, false>(p, limits, stream);
}

}  // namespace flashrt
