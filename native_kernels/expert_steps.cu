// All denoise steps of the action expert in one launch: the blocks stay on their multiprocessors, the weights keep
// streaming, and what stands between two dependent products is a barrier over the grid and not a kernel boundary.
//
// A step is: x -> h = W_in x + b; for every layer
//   1 q, k, v = rope(norm(h) W_qkv)      2 attention, a team of blocks a head
//   3 h += gate * (attended W_out)       4 hidden = geglu(norm(h) W_gate_up)      5 h += gate * (hidden W_down)
// and x += dt * (norm(h) W_out + b) at the end. Widths are those of the published 300M expert (pi0, pi0.5).
//
// The norms never stand in the way: norm(h) W = r * (h (1 + scale)) W + shift W with r = rsqrt(mean(h^2) + eps). Who
// writes h writes h (1 + scale) and its part of the sum of squares beside it; r is applied to the product, and
// shift W is a constant of the step.
//
// Bytes moved, e4m3: 17.3 MB of weights a layer, 311 MB a step: 73 us a step at 4.3 TB/s, the floor. One warp of each
// block does nothing but keep a ring of 16 KB weight chunks in shared memory full, in the fixed order of use, across
// barriers, layers and steps. What is left is latency: 5 barriers a layer.
//
// e4m3 weights meet 16-bit activations in products 1 and 4 (widened in registers: exact) and e4m3 activations in 3
// and 5. Sums are taken in a fixed order: results are bit-identical from run to run.
#include "expert_products.cuh"

#pragma nv_diag_suppress 177  // below sm_90 the kernel is empty and leaves everything here unused

namespace flashrt {
namespace {

using namespace expert;

struct Plan {
  attention::Layout attention;
  int slots, work_offset;  // the ring comes first; sums and the attention's operands overlap behind it
};

// Few rows are one team of 16 blocks a head; more are teams of 8 for 32 rows each.
template <int RowTiles>
struct Teams {
  static constexpr int Tiles = RowTiles == 1 ? 1 : 2;
  static constexpr int Splits = RowTiles == 1 ? 16 : 8;
};

template <bool Fp8, int RowTiles>
struct Expert {
  static constexpr int TileElements = 16 * RowTiles * kTileFeatures;
  static constexpr int Half = kHeadDim / 2, UnitsPerHead = Half / kTileFeatures;
  static constexpr int Parts = Shape<Fp8, kOut>::Units;  // of a row's sum of squares
  static_assert(Parts == 4 * kWarpSize);
  using T = Teams<RowTiles>;

  const ExpertSteps& p;
  const Plan& plan;
  unsigned char* work;
  Ring ring;
  GridBarrier grid;
  float* inverse;  // shared: r / kHeadroom of every row
  float* scratch;
  int chunk = 0;
  unsigned team_target = 0;

  __device__ float* sums() { return reinterpret_cast<float*>(work); }
  __device__ float weight_scale(int layer, int product) const {
    return Fp8 ? p.weight_scale[layer * kProducts + product] : 1.0f;
  }
  __device__ float input_scale(int layer, int product) const {
    return Fp8 ? p.input_scale[layer * 2 + (product == kDown)] : 1.0f;
  }
  __device__ const float* style(const float* base, int step, int norm) const {
    return base == nullptr ? nullptr : base + step * p.step_stride + norm * p.norm_stride;
  }

  // The parts of the sums of squares of this warp's first rows: asked for early, added up when the product is done.
  struct Squares {
    float4 part[2];
  };
  __device__ __forceinline__ Squares load_squares() const {
    Squares squares = {};
    const int row = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (row + i * kWarps < p.rows)
        squares.part[i] = __ldcg(reinterpret_cast<const float4*>(p.squares + (row + i * kWarps) * Parts) + lane);
    return squares;
  }

  // r of every row from the parts that the writers of h left; the next team_barrier() makes it known.
  __device__ __forceinline__ void inverse_rms(const Squares& squares) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int i = 0; i < 2 * RowTiles; ++i) {
      const int row = threadIdx.x / kWarpSize + i * kWarps;
      if (row >= p.rows) break;
      const float4 part =
          i < 2 ? squares.part[i % 2] : __ldcg(reinterpret_cast<const float4*>(p.squares + row * Parts) + lane);
      float sum = (part.x + part.y) + (part.z + part.w);
#pragma unroll
      for (int offset = kWarpSize / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      if (lane == 0) inverse[row] = rsqrtf(sum * (1.0f / kWidth) + p.eps) / kHeadroom;
    }
  }

  // shift W of a feature at this step.
  __device__ __forceinline__ float shift_product(int step, int layer, int feature) const {
    constexpr int64_t Features = kQkvHeads * kHeadDim + 2 * kMlp;
    return p.shift_products == nullptr ? 0.0f
                                       : p.shift_products[(int64_t(step) * p.layers + layer) * Features + feature];
  }

  __device__ void qkv(int step, int layer) {
    constexpr int Group = RowTiles == 1 ? 2 : 1;
    using S = Shape<Fp8, kQkv>;
    const float scale = weight_scale(layer, kQkv);
    const int prefix = *p.prefix_length;
    const Range units = own_units<Fp8, kQkv>();
    const RopeOperands ahead =
        rope_operands(step, layer, units.first + threadIdx.x / TileElements, threadIdx.x, prefix);
    grid.wait();
    const Squares squares = load_squares();
    for (int first = 0; first < units.count; first += Group) {
      const int count = min(Group, units.count - first);
      float sum[Group][RowTiles][S::Tiles][4] = {};
      multiply_scaled<Fp8, RowTiles, kQkv, Group>(p, ring, chunk, count, sum);
      if (first == 0) inverse_rms(squares);
      chunk += count * S::Chunks;
      if (first > 0) team_barrier();  // the last group's sums are being read
      spread<RowTiles, S::Tiles, Group>(sums(), sum);
      team_barrier();
      for (int i = threadIdx.x; i < count * TileElements; i += kThreads) {
        const int unit = i / TileElements, element = i % TileElements, m = element / kTileFeatures;
        if (m >= p.rows) continue;
        const RopeOperands operands =
            first == 0 && i == threadIdx.x ? ahead : rope_operands(step, layer, units.first + first + unit, i, prefix);
        const float factor = scale * inverse[m];
        rotate(layer, units.first + first + unit, m, element % kTileFeatures, prefix + m, operands,
               gather<RowTiles, S::Tiles, Group>(sums(), unit, 0, element) * factor,
               gather<RowTiles, S::Tiles, Group>(sums(), unit, 1, element) * factor);
      }
    }
    grid.arrive();
  }

  struct RopeOperands {
    float cosine = 1.0f, sine = 0.0f, first_shift = 0.0f, second_shift = 0.0f;
  };

  // What output `index` of a unit needs beside its product; v is not rotated.
  __device__ __forceinline__ RopeOperands rope_operands(int step, int layer, int unit, int index, int prefix) const {
    RopeOperands operands;
    const int element = index % TileElements, m = element / kTileFeatures;
    if (m >= p.rows || unit >= kQkvHeads * UnitsPerHead) return operands;
    const int d = unit % UnitsPerHead * kTileFeatures + element % kTileFeatures;
    const int feature = unit / UnitsPerHead * kHeadDim + d;
    operands.first_shift = shift_product(step, layer, feature);
    operands.second_shift = shift_product(step, layer, feature + Half);
    if (unit < (kHeads + 1) * UnitsPerHead) {
      operands.cosine = p.rope_cos[int64_t(prefix + m) * Half + d];
      operands.sine = p.rope_sin[int64_t(prefix + m) * Half + d];
    }
    return operands;
  }

  __device__ __forceinline__ void rotate(int layer, int unit, int m, int column, int position, const RopeOperands& o,
                                         float first, float second) {
    const int head = unit / UnitsPerHead, d = unit % UnitsPerHead * kTileFeatures + column;
    first += o.first_shift, second += o.second_shift;
    const int64_t slot = (int64_t(layer) * p.capacity + position) * kHeadDim;
    __nv_bfloat16* target = head < kHeads    ? static_cast<__nv_bfloat16*>(p.q) + (m * kHeads + head) * kHeadDim
                            : head == kHeads ? static_cast<__nv_bfloat16*>(p.k_cache) + slot
                                             : static_cast<__nv_bfloat16*>(p.v_cache) + slot;
    target[d] = from_float<__nv_bfloat16>(first * o.cosine - second * o.sine);
    target[d + Half] = from_float<__nv_bfloat16>(second * o.cosine + first * o.sine);
  }

  __device__ void attend(int layer) {
    constexpr int Rows = 16 * T::Tiles, Floats = attention::inbox_floats(T::Splits, Rows);
    const int team = blockIdx.x / T::Splits, rank = blockIdx.x % T::Splits;
    const int head = team % kHeads, first_row = team / kHeads * Rows;
    const bool busy = first_row < p.rows;  // alike in all blocks of a team
    const __nv_bfloat16* k = static_cast<const __nv_bfloat16*>(p.k_cache) + int64_t(layer) * p.capacity * kHeadDim;
    const __nv_bfloat16* v = static_cast<const __nv_bfloat16*>(p.v_cache) + int64_t(layer) * p.capacity * kHeadDim;
    const attention::Share share(rank, T::Splits, *p.prefix_length, p.rows);
    const float inverse_scale = Fp8 ? 1.0f / input_scale(layer, kOut) : 1.0f;
    if (busy) attention::load_prefix(work + plan.attention.k, work + plan.attention.v, k, v, kHeadDim, share);
    grid.wait();
    if (busy) {
      const int64_t offset = int64_t(first_row) * kAttended + head * kHeadDim;
      attention::load_suffix<T::Tiles>(work, plan.attention, static_cast<const __nv_bfloat16*>(p.q) + offset,
                                       p.rows - first_row, kAttended, k, v, kHeadDim, share);
      async_copy_wait();
      team_barrier();
      const int64_t out = (offset + rank * (kHeadDim / T::Splits)) * (Fp8 ? 1 : 2);
      team_target += T::Splits;
      attention::GlobalExchange exchange{rank, p.inboxes + int64_t(team) * T::Splits * Floats, Floats,
                                         p.barrier + 2 + team, team_target};
      attention::attend<T::Splits, T::Tiles>(work, plan.attention, share, exchange, p.rows - first_row,
                                             static_cast<unsigned char*>(p.attended) + out, kAttended, Fp8,
                                             inverse_scale);
    }
    grid.arrive();
  }

  // h += gate * (input W): products 3 and 5, with what the norm behind them needs. A unit is the same 8 columns of h in
  // both, and always one block's.
  template <int P>
  __device__ void add_product(const void* input, int step, int layer, int norm) {
    using S = Shape<Fp8, P>;
    const Range units = own_units<Fp8, P>();
    const float scale = weight_scale(layer, P) * input_scale(layer, P);
    const float *gate = style(p.gate, step, norm), *next = style(p.norm_scale, step, norm + 1);
    __nv_bfloat16* h = static_cast<__nv_bfloat16*>(p.h);
    const int column = threadIdx.x % kTileFeatures, first_m = threadIdx.x / kTileFeatures;
    const int first_n = units.first * kTileFeatures + column;
    // of the first unit: nothing else writes it, so it can be read ahead of the barrier
    const bool any = units.count > 0;
    const float ahead_gate = any && gate != nullptr ? gate[first_n] : 1.0f;
    const float ahead_next = any ? next[first_n] : 0.0f;
    const float ahead_h = any && first_m < p.rows ? load_fresh(h + first_m * kWidth + first_n) : 0.0f;
    grid.wait();
    for (int unit = 0; unit < units.count; ++unit) {
      float sum[1][RowTiles][1][4] = {};
      multiply_plain<Fp8, RowTiles, P>(p, ring, chunk, input, sum);
      chunk += S::Chunks;
      if (unit > 0) team_barrier();
      spread<RowTiles, 1, 1>(sums(), sum);
      team_barrier();
      const int n = (units.first + unit) * kTileFeatures + column;
      const float g = unit == 0 ? ahead_gate : gate == nullptr ? 1.0f : gate[n];
      const float factor = (unit == 0 ? ahead_next : next[n]) + 1.0f;
      for (int i = threadIdx.x; i < TileElements; i += kThreads) {
        const int m = i / kTileFeatures;  // the 8 lanes of a row stay together
        float value = 0.0f;
        if (m < p.rows) {
          const float before = unit == 0 && m == first_m ? ahead_h : load_fresh(h + m * kWidth + n);
          const __nv_bfloat16 rounded =
              from_float<__nv_bfloat16>(before + g * gather<RowTiles, 1, 1>(sums(), 0, 0, i) * scale);
          value = to_float(rounded);
          h[m * kWidth + n] = rounded;
          store_scaled<Fp8>(p.scaled, m * kWidth + n, value * factor);
        }
        float squares = value * value;
#pragma unroll
        for (int offset = kTileFeatures / 2; offset > 0; offset /= 2)
          squares += __shfl_xor_sync(0xffffffffu, squares, offset);
        if (m < p.rows && column == 0) p.squares[m * Parts + units.first + unit] = squares;
      }
    }
    grid.arrive();
  }

  // What the norm's shift adds to gate and up of hidden feature n.
  __device__ __forceinline__ float2 shifts(int step, int layer, int n) const {
    constexpr int First = kQkvHeads * kHeadDim;
    return make_float2(shift_product(step, layer, First + n), shift_product(step, layer, First + kMlp + n));
  }

  __device__ void gate_up(int step, int layer) {
    using S = Shape<Fp8, kGateUp>;
    constexpr int Group = RowTiles == 1 ? 4 / S::Chunks : Fp8 ? 2 : 1;
    constexpr int kAhead = 2;
    const float scale = weight_scale(layer, kGateUp), inverse_scale = Fp8 ? 1.0f / input_scale(layer, kDown) : 1.0f;
    const Range units = own_units<Fp8, kGateUp>();
    // the shifts of this thread's first outputs, ahead of the barrier
    float2 ahead[kAhead] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int index = threadIdx.x + i * kThreads, unit = index / TileElements;
      if (unit < units.count)
        ahead[i] = shifts(step, layer, (units.first + unit) * kTileFeatures + index % kTileFeatures);
    }
    grid.wait();
    const Squares squares = load_squares();
    for (int first = 0; first < units.count; first += Group) {
      const int count = min(Group, units.count - first);
      float sum[Group][RowTiles][S::Tiles][4] = {};
      multiply_scaled<Fp8, RowTiles, kGateUp, Group>(p, ring, chunk, count, sum);
      if (first == 0) inverse_rms(squares);
      chunk += count * S::Chunks;
      if (first > 0) team_barrier();
      spread<RowTiles, S::Tiles, Group>(sums(), sum);
      team_barrier();
#pragma unroll
      for (int o = 0; o < Group * TileElements / kThreads; ++o) {
        const int i = threadIdx.x + o * kThreads;
        const int unit = i / TileElements, element = i % TileElements, m = element / kTileFeatures;
        if (unit >= count || m >= p.rows) continue;
        const int n = (units.first + first + unit) * kTileFeatures + element % kTileFeatures;
        const float2 shift = first == 0 && o < kAhead ? ahead[o % kAhead] : shifts(step, layer, n);
        const float factor = scale * inverse[m];
        const float gate = gather<RowTiles, S::Tiles, Group>(sums(), unit, 0, element) * factor + shift.x;
        const float up = gather<RowTiles, S::Tiles, Group>(sums(), unit, 1, element) * factor + shift.y;
        store_quantised<Fp8>(p.hidden, int64_t(m) * kMlp + n, gelu_tanh(gate) * up, inverse_scale);
      }
    }
    grid.arrive();
  }

  // The sum over the computing warps, known to every thread.
  __device__ __forceinline__ float team_sum(float value) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    team_barrier();
    if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
    team_barrier();
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += scratch[w];
    return total;
  }

  // The seam between two steps, one block a row: x += dt * (norm(h) W_out + b), then h = W_in x + b.
  __device__ void seam(int step) {
    const bool first = step == 0, last = step == p.steps;
    float* action = sums() + kWidth;
    if (!first) grid.wait();
    if (blockIdx.x < p.rows) {
      if (first) {
        for (int i = threadIdx.x; i < p.action_dim; i += kThreads) action[i] = p.x[blockIdx.x * p.action_dim + i];
      } else {
        project_out(step - 1, action);
      }
      team_barrier();
      if (!last) project_in(step, action);
    }
    if (!last) grid.arrive();
  }

  __device__ __forceinline__ void project_out(int step, float* action) {
    const int lane = threadIdx.x % kWarpSize, row = blockIdx.x;
    float* normed = sums();
    const uint2 raw = __ldcg(static_cast<const uint2*>(p.h) + row * (kWidth / 4) + threadIdx.x);
    float value[4] = {__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000u), __uint_as_float(raw.y << 16),
                      __uint_as_float(raw.y & 0xffff0000u)};
    const float squares = value[0] * value[0] + value[1] * value[1] + value[2] * value[2] + value[3] * value[3];
    const float r = rsqrtf(team_sum(squares) * (1.0f / kWidth) + p.eps);
    const float *scale = style(p.norm_scale, step, 2 * p.layers), *shift = style(p.norm_shift, step, 2 * p.layers);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = threadIdx.x * 4 + i;
      normed[column] = value[i] * r * (1.0f + scale[column]) + (shift == nullptr ? 0.0f : shift[column]);
    }
    team_barrier();
    for (int i = threadIdx.x / kWarpSize; i < p.action_dim; i += kWarps) {
      const float4* weight = reinterpret_cast<const float4*>(p.out_weight + i * kWidth);
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kWidth / 4 / kWarpSize; ++j) {
        const float4 w = weight[j * kWarpSize + lane],
                     n = reinterpret_cast<const float4*>(normed)[j * kWarpSize + lane];
        sum += w.x * n.x + w.y * n.y + w.z * n.z + w.w * n.w;
      }
#pragma unroll
      for (int offset = kWarpSize / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      if (lane == 0) {
        float* x = p.x + row * p.action_dim + i;
        *x -= (sum + p.out_bias[i]) / p.steps;
        action[i] = *x;
      }
    }
  }

  __device__ __forceinline__ void project_in(int step, const float* action) {
    const int row = blockIdx.x;
    __nv_bfloat16* h = static_cast<__nv_bfloat16*>(p.h) + row * kWidth;
    const float* scale = style(p.norm_scale, step, 0);
    float squares = 0.0f;
    for (int i = threadIdx.x; i < kWidth; i += kThreads) {
      const float4* weight = reinterpret_cast<const float4*>(p.in_weight + i * p.action_dim);
      float sum = p.in_bias[step * p.in_bias_stride + i];
      for (int j = 0; j < p.action_dim / 4; ++j) {
        const float4 w = weight[j], a = reinterpret_cast<const float4*>(action)[j];
        sum += w.x * a.x + w.y * a.y + w.z * a.z + w.w * a.w;
      }
      const __nv_bfloat16 rounded = from_float<__nv_bfloat16>(sum);
      const float value = to_float(rounded);
      h[i] = rounded;
      store_scaled<Fp8>(p.scaled, row * kWidth + i, value * (1.0f + scale[i]));
      squares += value * value;
    }
    squares = team_sum(squares);
    if (threadIdx.x < Parts) p.squares[row * Parts + threadIdx.x] = threadIdx.x == 0 ? squares : 0.0f;
  }
};

template <bool Fp8, int RowTiles>
__global__ void __launch_bounds__(kThreads + kWarpSize, 1) expert_steps_kernel(const ExpertSteps p, const Plan plan) {
#if FLASHRT_DEVICE_HAS_BULK
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ uint64_t full[kMaxSlots], empty[kMaxSlots];
  __shared__ float inverse[kSkinnyMaxRows], scratch[kWarps];
  if (threadIdx.x == 0) {
    for (int i = 0; i < kMaxSlots; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, kWarps);
    }
    barrier_init_fence();
  }
  __syncthreads();
  const Ring ring{shared, full, empty, plan.slots};
  if (threadIdx.x >= kThreads) {
    if (threadIdx.x == kThreads) move_weights<Fp8>(p, ring);
    return;
  }
  Expert<Fp8, RowTiles> expert{p, plan, shared + plan.work_offset, ring, {p.barrier}, inverse, scratch};
  for (int step = 0; step < p.steps; ++step) {
    expert.seam(step);
    for (int layer = 0; layer < p.layers; ++layer) {
      expert.qkv(step, layer);
      expert.attend(layer);
      expert.template add_product<kOut>(p.attended, step, layer, 2 * layer);
      expert.gate_up(step, layer);
      expert.template add_product<kDown>(p.hidden, step, layer, 2 * layer + 1);
    }
  }
  expert.seam(p.steps);
  if (threadIdx.x == 0 && atomicAdd(p.barrier + 1, 1) == gridDim.x - 1)  // the last block leaves all words zero
    for (int i = 0; i < kExpertBarrierWords; ++i) p.barrier[i] = 0;
#endif
}

template <bool Fp8, int RowTiles>
cudaError_t launch(const ExpertSteps& p, cudaStream_t stream) {
  int device = 0, shared_limit = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;
  using T = Teams<RowTiles>;
  constexpr int Groups = RowTiles == 1 ? 4 : Fp8 ? 2 : 1;
  Plan plan = {attention::Layout(16 * T::Tiles, p.capacity, T::Splits), 0, 0};
  const int sum_bytes = kWarps * Groups * 2 * 16 * RowTiles * kTileFeatures * static_cast<int>(sizeof(float));
  const int work_bytes = plan.attention.inbox > sum_bytes ? plan.attention.inbox : sum_bytes;
  constexpr int fixed_bytes = 1024;  // the kernel's static shared memory and the alignment
  plan.slots = kMaxSlots;
  while (plan.slots > 0 && plan.slots * kChunkBytes + work_bytes + fixed_bytes > shared_limit) plan.slots /= 2;
  // what one call of multiply takes must be in the ring at once
  if (plan.slots < (RowTiles == 1 || !Fp8 ? 4 : 2)) return cudaErrorNotSupported;
  plan.work_offset = plan.slots * kChunkBytes;
  const int bytes = plan.work_offset + work_bytes;

  auto kernel = expert_steps_kernel<Fp8, RowTiles>;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  // a barrier over the grid needs all of its blocks on the device at once: the attribute makes that a condition
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(multiprocessors);
  config.blockDim = dim3(kThreads + kWarpSize);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const int teams = kHeads * ((p.rows + 16 * T::Tiles - 1) / (16 * T::Tiles));
  if (multiprocessors < teams * T::Splits || multiprocessors < p.rows) return cudaErrorNotSupported;
  return cudaLaunchKernelEx(&config, kernel, p, plan);
}

}  // namespace

cudaError_t expert_steps(const ExpertSteps& p, cudaStream_t stream) {
  int device = 0, major = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess) return status;
  if (major < 9) return cudaErrorNotSupported;  // the bulk copy engine
  if (p.rows < 1 || p.rows > kSkinnyMaxRows || p.layers < 1 || p.steps < 1 || p.capacity < p.rows || p.action_dim < 4 ||
      p.action_dim > kMaxActionDim || p.action_dim % 4 != 0)
    return cudaErrorInvalidValue;
  if (p.rows <= 16) return p.fp8 ? launch<true, 1>(p, stream) : launch<false, 1>(p, stream);
  return p.fp8 ? launch<true, 4>(p, stream) : launch<false, 4>(p, stream);
}

}  // namespace flashrt
