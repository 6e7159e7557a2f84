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
// served in tiles of 16: all warps share the k of one tile; of more, a team of warps has each. Of more than two tiles
// Hopper's matrix unit takes the products of e4m3 weights, all with e4m3 activations, those of 3 and 5 shared by pairs
// of blocks, which also share h by rows (expert_matrix.cuh). Sums are taken in a fixed order: results are bit-identical
// from run to run.
#include "device_limits.h"
#include "expert_seam.cuh"

#pragma nv_diag_suppress 177  // below sm_90 the kernel is empty and leaves everything here unused

namespace flashrt {
namespace {

using namespace expert;

template <bool Fp8, bool One, bool Paired>
struct Expert : Seam<Fp8, One, Paired> {
  using Base = Seam<Fp8, One, Paired>;
  using Base::attend;
  using Base::copy_conditions;
  using Base::down;
  using Base::gate_up;
  using Base::out;
  using Base::p;
  using Base::plan;
  using Base::qkv;
  using Base::seam;
  using Base::share;
  using Base::shared;

  __device__ __forceinline__ void run() {
    if (thread_id() / kWarpSize == kWarps - 3) copy_conditions(0, 0, 0);
    blank_values(shared, plan.attention, share);
    for (int step = 0; step < p.steps; ++step) {
      seam(step);
      for (int layer = 0; layer < p.layers; ++layer, this->end_visit()) {
        qkv();
        if (layer == 0) this->keep_power();
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

// Beside the threads that compute: the warp that moves the weights; with pairs, where registers are short, it has a
// warpgroup of its own, as only whole warpgroups can give theirs away.
template <bool Paired>
constexpr int kAllThreads = kThreads + (Paired ? 4 : 1) * kWarpSize;
constexpr int kMoverRegisters = 32, kComputingRegisters = 112;
static_assert(kComputingRegisters * kThreads + kMoverRegisters * 4 * kWarpSize <= 96 * kAllThreads<true>);

template <bool Fp8, bool One, bool Paired>
__global__ void __launch_bounds__(kAllThreads<Paired>, 1) expert_steps_kernel(const ExpertSteps p, const Plan plan) {
#if FLASHRT_DEVICE_HAS_BULK
  if constexpr (Paired && !kHasMatrixUnit) {  // only the matrix unit's products know whose rows and columns are whose
    __trap();
    return;
  }
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ uint64_t full[kMaxSlots], arrivals[Paired ? kArrivals : kMixCome];
  __shared__ Counters counters;
  __shared__ Source sources[kMaxSources];
  __shared__ Share share;
  __shared__ __align__(16) float inverse[kWarps * kTileRows],
      conditions[kCopies * Expert<Fp8, One, Paired>::kConditionStride],
      scratch[Paired ? 3 * kExpertMaxRows : kWarps * 3];
  if (thread_id() == 0) {
    for (int i = 0; i < kMaxSlots; ++i) barrier_init(full + i, 1);
    for (int i = 0; i < kSumsCome; ++i) barrier_init(arrivals + i, kWarpSize);
    for (int i = kSumsCome; i < (Paired ? kOwnRowsCome : kMixCome); ++i) barrier_init(arrivals + i, 1);
    if constexpr (Paired) barrier_init(arrivals + kOwnRowsCome, kOwnRows);
    barrier_init_fence();
    counters = {};
    const int prefix = *p.prefix_length;
    if (prefix < 0 || prefix > p.capacity - p.rows) __trap();  // rows that the caches do not have
    share = Share::of<One>(block_id() % kSplits, prefix, p.rows);
  }
  if (static_cast<int>(thread_id()) <= sources_of_visit<Fp8, One>())
    sources[thread_id()] =
        source<Fp8, One, kOnMatrixUnit<Fp8, kQkv, Paired>>(p, thread_id(), kHasMatrixUnit && (Paired || plan.paired));
  __syncthreads();
  const Ring ring{shared, &counters, plan.slots};
  // by thread_id() the compiler would not see that whole warpgroups go one way
  if (Paired ? threadIdx.x / kThreads == 1 : thread_id() >= kMoverThread) {
    if constexpr (Paired) {
      give_registers<kMoverRegisters>();
      if (threadIdx.x / kWarpSize != kWarps) return;
    }
    const int64_t first = int64_t(share.first) * kHeadRowBytes;
    const PrefixRows rows{static_cast<const unsigned char*>(p.k_cache) + first,
                          static_cast<const unsigned char*>(p.v_cache) + first,
                          int64_t(p.capacity) * kHeadRowBytes,
                          share.prefix_keys,
                          shared + plan.attention.k,
                          shared + plan.attention.v};
    Mover<Fp8, One>{p, ring, full, arrivals, sources, rows}.run();
    return;
  }
  if constexpr (Paired) take_registers<kComputingRegisters>();
  Expert<Fp8, One, Paired> expert{{{{{{{p, plan, shared, ring, share, arrivals, inverse, scratch, conditions}}}}}}};
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
  constexpr int kFixedBytes = Paired ? 5120 : 4096;  // the kernel's static shared memory and the alignment
  static_assert((kMaxSlots + kArrivals) * 8 + sizeof(Counters) + kMaxSources * sizeof(Source) + sizeof(Share) + 32 +
                    (kWarps * kTileRows + kCopies * Expert<Fp8, One, Paired>::kConditionStride + 3 * kExpertMaxRows) *
                        4 <=
                kFixedBytes);
  // what is multiplied before anything is given back; with pairs down waits where there are fewer than six
  constexpr int kLeastSlots = 4, kGoodSlots = Paired ? 6 : kLeastSlots;
  // where there are more tiles, small sums take turns with the big ones
  const int small_bytes = One ? kSmallBytes : 0, received_bytes = Paired ? tiles * 4 * kSentBytes : 0;
  // the scores of all tiles at once, or of half of them, or of one
  for (const int least : {kGoodSlots, kLeastSlots}) {
    for (int at_once = tiles, last = 0; at_once != last; last = at_once, at_once = (at_once + 1) / 2) {
      const int score_bytes = at_once * slices * kTileRows * attention.score_stride() * 4;
      const int big_bytes =
          max(Paired ? kPairedBigBytes : kBigBytes, score_bytes + probability_bytes + tiles * kTileRows * 4);
      const int work_bytes = big_bytes + small_bytes + received_bytes + key_bytes + value_bytes;
      plan.slots = min(kMaxSlots, (shared_limit - work_bytes - kFixedBytes) / kChunkBytes);
      if (plan.slots < least) continue;
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
  config.blockDim = dim3(kAllThreads<Paired>);
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
  if (p.fp8 && p.rows > 2 * kTileRows && limits.capability == 90 && !p.unpaired)
    return launch<true, false, true>(p, limits, stream);
  if (p.fp8) return one ? launch<true, true>(p, limits, stream) : launch<true, false>(p, limits, stream);
  return one ? launch<false, true>(p, limits, stream) : launch<false, false>(p, limits, stream);
}

}  // namespace flashrt
