// Attention of many queries over one K/V head, as Gemma's prefix has it, optionally quantised to e4m3 of value /
// *scale:
//   out = softmax(q k^T / 16) v over the keys [0, *valid), or all of them without `valid`
//
// Shapes: q, out (rows, 256) with rows = tokens * heads, k and v (keys, 256), bf16 (out also e4m3), contiguous. Queries
// of different heads see the same keys, so a head is nothing but more rows.
//
// Bytes moved: q, k, v, out once: 560 tokens x 8 heads are 4.1 MB with e4m3 out, 1 us at 4.3 TB/s; 2.6 GFLOP, 3.3 us at
// 790 TFLOP/s. K and V come from L2 once for 128 rows: 20 MB.
//
// A cluster of two blocks takes 128 rows, and each of them every second tile of 64 keys. A block is three warpgroups:
// one copies K and V into a ring of two tiles each, by the copy engine, whose bytes the matrix unit may read without a
// fence; two attend with 64 rows each and multiply in turn, so that one exponentiates while the other multiplies. In
// the end each block merges half of the columns, and the other half goes to its neighbour's shared memory. fp32 softmax
// in base 2; probabilities are rounded to bf16 for the product.
#include "dependent_launch.h"
#include "device_limits.h"
#include "prefix.h"
#include "quantise.cuh"
#include "tensor_copy.cuh"
#include "tensor_map.h"
#include "tile_copies.cuh"
#include "wgmma.cuh"

#pragma nv_diag_suppress 177  // elsewhere than on sm_90a the kernel is empty and leaves everything here unused

namespace flashrt {
namespace {

constexpr int kDim = 256, kRows = 64, kKeys = 64, kGroups = 2, kSplits = 2, kStages = 2;
constexpr int kGroupThreads = 128, kWorkers = kGroups * kGroupThreads, kThreads = kWorkers + kGroupThreads;
constexpr int kBlockRows = kGroups * kRows;
constexpr int kRowVectors = kDim * 2 / 16;                           // 16-byte pieces of a row
constexpr int kPanelBytes = 64 * 128, kTileBytes = 4 * kPanelBytes;  // 64 rows x 64 columns; 64 x 256
constexpr int kGivenBytes = kRows * kDim / kSplits * 2;              // of a group's rows, to the other block
constexpr int kSharedBytes = kTileBytes * (kGroups + 2 * kStages) + kGroups * kGivenBytes + 1024;  // and alignment
constexpr int kHalf = 64;  // of the columns' sums of a thread
constexpr int kSplitColumns = kDim / kSplits;
constexpr float kFactor = 0.0625f * 1.4426950408889634f;  // 1 / sqrt(256), to base 2

struct Problem {
  CUtensorMap q, k, v;
  const int* valid;
  const float* scale;
  void* out;
  int rows, keys;
};

__device__ __forceinline__ void group_barrier(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

// Tiles on their way through shared memory.
struct Tiles {
  uint64_t full[2 * kStages], empty[2 * kStages];  // of K and V in turn: has come; has been read by all who attend
  uint64_t q[kGroups];
  uint64_t last;   // the last tile of V has come, but for the rows that are no keys
  uint64_t given;  // what the other block has found has come

  __device__ __forceinline__ void init() {
    for (int i = 0; i < 2 * kStages; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, kWorkers / kWarpSize);
    }
    for (int i = 0; i < kGroups; ++i) barrier_init(q + i, 1);
    barrier_init(&last, 1);
    barrier_init(&given, 1);
    barrier_init_fence();
    barrier_expect(&given, kGroups * (kGivenBytes + kRows * sizeof(float2)));
  }
};

// By a whole warp: one of its lanes arrives for all.
__device__ __forceinline__ void warp_arrive(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % kWarpSize == 0) barrier_arrive(barrier);
}

// 16 bytes.
__device__ __forceinline__ void store_zeros(uint32_t shared) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(shared), "r"(0) : "memory");
}

// By one thread: start the copy of rows [first, first + 64) into panels of 64 columns.
__device__ __forceinline__ void copy_tile(uint32_t shared, const CUtensorMap* rows, int first, uint64_t* barrier) {
  barrier_expect(barrier, kTileBytes);
#pragma unroll
  for (int panel = 0; panel < 4; ++panel) tensor_copy(shared + panel * kPanelBytes, rows, panel * 128, first, barrier);
}

// One warpgroup's running softmax: a thread has rows lane / 4 and 8 further of its warp's 16. `sum` is of this thread's
// columns only until the end.
struct State {
  float low[kHalf] = {}, high[kHalf] = {};  // columns 0-127 and 128-255
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};

  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) low[i] *= factor[i / 2 % 2], high[i] *= factor[i / 2 % 2];
  }

  // Scores of 64 keys, of which those from `left` on do not count, become probabilities.
  __device__ __forceinline__ void absorb(float (&score)[32], int left, uint32_t (&probability)[4][4]) {
    const int column = threadIdx.x % 4 * 2;
    if (left < kKeys) {
#pragma unroll
      for (int i = 0; i < 32; ++i)
        if (i / 4 * 8 + column + i % 2 >= left) score[i] = -INFINITY;
    }
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = maximum[r];
#pragma unroll
      for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fmaxf(score[4 * i + 2 * r], score[4 * i + 2 * r + 1]));
      largest = quad_max(largest);  // finite: the first key of a tile counts
      factor[r] = exp2f((maximum[r] - largest) * kFactor);
      maximum[r] = largest;
      sum[r] *= factor[r];
      const float offset = largest * kFactor;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int at = 4 * i + 2 * r + j;
          score[at] = exp2f(fmaf(score[at], kFactor, -offset));
          sum[r] += score[at];
        }
      }
    }
    rescale(factor);
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) probability[k][i] = pack_bf16(score[8 * k + 2 * i], score[8 * k + 2 * i + 1]);
  }
};

// The copying warp: this block's tiles of K and V in turn, each as soon as its place is free.
__device__ __forceinline__ void copy_tiles(const Problem& p, int keys, int rank, uint32_t ring, Tiles& tiles) {
  const int lane = threadIdx.x % kWarpSize;
  int at = 0;
  uint32_t phase = 1;
  for (int first = rank * kKeys; first < keys; first += kSplits * kKeys) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const uint32_t tile = ring + at * kTileBytes;
      const bool whole = part == 0 || first + kKeys <= keys;
      if (lane == 0) {  // by one lane: one that looks later than that which copies could miss a phase
        barrier_wait(tiles.empty + at, phase);
        copy_tile(tile, part == 0 ? &p.k : &p.v, first, whole ? tiles.full + at : &tiles.last);
      }
      if (!whole) {  // zero probabilities times whatever lies behind the keys must stay zero
        barrier_wait(&tiles.last, 0);
        for (int i = (keys - first) * kRowVectors + lane; i < kKeys * kRowVectors; i += kWarpSize)
          store_zeros(swizzled(tile, i / kRowVectors, i % kRowVectors, kPanelBytes));
        wgmma::operand_fence();
        warp_arrive(tiles.full + at);
      }
      if (++at == 2 * kStages) at = 0, phase ^= 1;
    }
  }
}

// The groups multiply in turn: what one has in flight would otherwise share the matrix unit with the other's, and both
// would exponentiate while it idles. A turn is waited for by 128 threads and given by the other 128.
__device__ __forceinline__ void await_turn(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(kGroups + 1 + group), "n"(kWorkers) : "memory");
}
__device__ __forceinline__ void give_turn(int group) {
  asm volatile("bar.arrive %0, %1;" ::"r"(kGroups + 1 + 1 - group), "n"(kWorkers) : "memory");
}

__device__ __forceinline__ void start_scores(float (&score)[32], uint32_t q, uint32_t k) {
#pragma unroll
  for (int d = 0; d < kDim / 16; ++d) {
    const uint32_t offset = d / 4 * kPanelBytes + d % 4 * 32;
    wgmma::multiply_64x64(score, wgmma::descriptor(q + offset, 16), wgmma::descriptor(k + offset, 16), d > 0);
  }
  wgmma::commit();
}

__device__ __forceinline__ void start_values(State& state, const uint32_t (&probability)[4][4], uint32_t v) {
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step) {
    const uint32_t at = v + step * 16 * 128;
    wgmma::multiply_64x128(state.low, probability[step], wgmma::descriptor(at, kPanelBytes));
    wgmma::multiply_64x128(state.high, probability[step], wgmma::descriptor(at + 2 * kPanelBytes, kPanelBytes));
  }
  wgmma::commit();
}

// This group's rows with this block's tiles. A turn is the scores of a tile and P V of the one before.
__device__ __forceinline__ void attend(int keys, int rank, int group, uint32_t q, uint32_t ring, Tiles& tiles,
                                       State& state) {
  int at = 0, before = 0;  // places in the ring: of this tile's K, of the last one's V
  uint32_t phase = 0, phase_before = 0, probability[4][4];
  if (group == 1 && rank * kKeys < keys) give_turn(group);  // group 0 begins
  for (int first = rank * kKeys; first < keys; first += kSplits * kKeys) {
    const bool again = first >= kSplits * kKeys;
    float score[32];
    barrier_wait(tiles.full + at, phase);
    if (again) barrier_wait(tiles.full + before, phase_before);
    await_turn(group);
    wgmma::fence();
    start_scores(score, q, ring + at * kTileBytes);
    if (again) start_values(state, probability, ring + before * kTileBytes);
    wgmma::wait();
    if (group == 0 || first + kSplits * kKeys < keys) give_turn(group);  // as often as one is awaited
    wgmma::settle(score);
    wgmma::settle(state.low);
    wgmma::settle(state.high);
    warp_arrive(tiles.empty + at);
    if (again) warp_arrive(tiles.empty + before);
    state.absorb(score, keys - first, probability);
    before = at + 1, phase_before = phase;
    at += 2;
    if (at == 2 * kStages) at = 0, phase ^= 1;
  }
  if (rank * kKeys < keys) {
    barrier_wait(tiles.full + before, phase_before);
    wgmma::fence();
    start_values(state, probability, ring + before * kTileBytes);
    wgmma::wait();
    wgmma::settle(state.low);
    wgmma::settle(state.high);
  }
}

__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// What the two blocks of a cluster exchange of a group's rows: half of the columns as fp16 (averages of v, which must
// stay below 65504), each row by its own sum,
// words in the order of threads; of every row the maximum and the sum.
struct Exchange {
  uint4* values;
  float2* rows;
  uint64_t* come;

  __device__ __forceinline__ void send(const float (&half)[kHalf], const float2 (&row)[2], int to) const {
    const int thread = threadIdx.x % kGroupThreads;
    const uint32_t barrier = address_in(shared_address(come), to);
    const float inverse[2] = {row[0].y > 0.0f ? 1.0f / row[0].y : 0.0f, row[1].y > 0.0f ? 1.0f / row[1].y : 0.0f};
    const auto pair = [&](int at) {
      return pack_f16(half[at] * inverse[at / 2 % 2], half[at + 1] * inverse[at / 2 % 2]);
    };
#pragma unroll
    for (int i = 0; i < kHalf / 8; ++i)
      give(address_in(shared_address(values + i * kGroupThreads + thread), to),
           make_uint4(pair(8 * i), pair(8 * i + 2), pair(8 * i + 4), pair(8 * i + 6)), barrier);
    if (thread % 4 != 0) return;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      give(address_in(shared_address(rows + thread / 32 * 16 + thread % 32 / 4 + r * 8), to), row[r], barrier);
  }

  // This block's half of the columns from both blocks' sums, as `Out` into rows of that half.
  template <typename Out>
  __device__ __forceinline__ void merge(const float (&own)[kHalf], const float2 (&mine)[2], float inverse_scale,
                                        Out* staged) const {
    const int thread = threadIdx.x % kGroupThreads, warp = thread / 32, lane = thread % 32;
    float of_mine[2], of_theirs[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float2 a = mine[r], b = rows[warp * 16 + lane / 4 + r * 8];
      const float largest = fmaxf(a.x, b.x);
      of_mine[r] = a.y > 0.0f ? exp2f((a.x - largest) * kFactor) : 0.0f;
      of_theirs[r] = b.y > 0.0f ? exp2f((b.x - largest) * kFactor) * b.y : 0.0f;
      const float total = a.y * of_mine[r] + of_theirs[r], inverse = total > 0.0f ? 1.0f / total : 0.0f;
      of_mine[r] *= inverse, of_theirs[r] *= inverse;
    }
#pragma unroll
    for (int i = 0; i < kHalf / 8; ++i) {
      const uint4 words = values[i * kGroupThreads + thread];
      const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = 8 * i + 2 * j, r = j % 2, row = warp * 16 + lane / 4 + r * 8;
        const float2 given = __half22float2(*reinterpret_cast<const __half2*>(word + j));
        const float pair[2] = {own[at] * of_mine[r] + given.x * of_theirs[r],
                               own[at + 1] * of_mine[r] + given.y * of_theirs[r]};
        *reinterpret_cast<Vector<Out, 2>*>(staged + row * kSplitColumns + at / 4 * 8 + lane % 4 * 2) =
            store_all<Out>(pair, inverse_scale);
      }
    }
  }
};

template <typename Out>
__global__ void __launch_bounds__(kThreads, 1) prefix_attention_kernel(const __grid_constant__ Problem p) {
#if FLASHRT_DEVICE_HAS_WGMMA
  extern __shared__ unsigned char raw[];
  __shared__ Tiles barriers;
  __shared__ float2 given_rows[kGroups][kRows];
  const int group = threadIdx.x / kGroupThreads, thread = threadIdx.x % kGroupThreads;
  const int rank = blockIdx.x % kSplits, first_row = blockIdx.x / kSplits * kBlockRows;
  unsigned char* tiles = raw + (1024 - shared_address(raw) % 1024) % 1024;
  unsigned char* ring = tiles + kTileBytes * kGroups;
  if (threadIdx.x == 0) barriers.init();
  __syncthreads();
  cluster_arrive();  // this block's barriers may be counted on
  dependency_wait();
  const int keys = p.valid == nullptr ? p.keys : max(0, min(p.keys, *p.valid));
  if (group == kGroups) {
    // 65536 registers: 256 threads that attend take 216, 128 keep 40
    give_registers<40>();
    if (thread < kWarpSize) copy_tiles(p, keys, rank, shared_address(ring), barriers);
    cluster_wait();
    return;
  }
  take_registers<216>();
  const int group_row = first_row + group * kRows;
  const uint32_t q = shared_address(tiles) + group * kTileBytes;
  if (thread == 0) copy_tile(q, &p.q, group_row, barriers.q + group);
  barrier_wait(barriers.q + group, 0);
  State state;
  attend(keys, rank, group, q, shared_address(ring), barriers, state);
  dependency_release();

#pragma unroll
  for (int i = 0; i < kHalf; ++i) {  // low becomes the half that this block keeps
    const float sent = rank == 0 ? state.high[i] : state.low[i];
    state.low[i] = rank == 0 ? state.low[i] : state.high[i];
    state.high[i] = sent;
  }
  const float2 rows[2] = {make_float2(state.maximum[0], quad_sum(state.sum[0])),
                          make_float2(state.maximum[1], quad_sum(state.sum[1]))};
  const Exchange exchange{reinterpret_cast<uint4*>(ring + 2 * kStages * kTileBytes + group * kGivenBytes),
                          given_rows[group], &barriers.given};
  cluster_wait();
  exchange.send(state.high, rows, 1 - rank);
  barrier_wait(&barriers.given, 0);
  group_barrier(group);                                              // every warp is done with q
  Out* staged = reinterpret_cast<Out*>(tiles + group * kTileBytes);  // in its place
  exchange.merge<Out>(state.low, rows, inverse_scale_of<Out>(p.scale), staged);
  group_barrier(group);
  constexpr int Vectors = kSplitColumns * sizeof(Out) / 16;  // of a row here
  for (int i = thread; i < kRows * Vectors && group_row + i / Vectors < p.rows; i += kGroupThreads)
    reinterpret_cast<uint4*>(p.out)[(int64_t(group_row + i / Vectors) * kSplits + rank) * Vectors + i % Vectors] =
        reinterpret_cast<const uint4*>(staged)[i];
#endif
}

template <typename Out>
cudaError_t launch(const Problem& problem, cudaStream_t stream) {
  const cudaError_t status =
      cudaFuncSetAttribute(prefix_attention_kernel<Out>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  const dim3 grid(static_cast<unsigned>((problem.rows + kBlockRows - 1) / kBlockRows) * kSplits);
  return launch_dependent_clusters(prefix_attention_kernel<Out>, kSplits, grid, kThreads, kSharedBytes, stream,
                                   problem);
}

}  // namespace

cudaError_t prefix_attention(const void* q, const void* k, const void* v, const int* valid, const float* scale,
                             void* out, int64_t rows, int64_t keys, cudaStream_t stream) {
  if (rows < 0 || keys < 1 || rows > INT32_MAX || keys > INT32_MAX) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  if (!aligned_to_16_bytes(q) || !aligned_to_16_bytes(k) || !aligned_to_16_bytes(v) || !aligned_to_16_bytes(out))
    return cudaErrorInvalidValue;
  Problem problem = {{}, {}, {}, valid, scale, out, static_cast<int>(rows), static_cast<int>(keys)};
  int multiprocessors = 0;
  cudaError_t status = hopper_multiprocessors(&multiprocessors);
  if (status == cudaSuccess) status = describe_matrix(problem.q, q, rows, kDim * 2, kRows);
  if (status == cudaSuccess) status = describe_matrix(problem.k, k, keys, kDim * 2, kKeys);
  if (status == cudaSuccess) status = describe_matrix(problem.v, v, keys, kDim * 2, kKeys);
  if (status != cudaSuccess) return status;
  return scale == nullptr ? launch<__nv_bfloat16>(problem, stream) : launch<E4M3>(problem, stream);
}

}  // namespace flashrt
