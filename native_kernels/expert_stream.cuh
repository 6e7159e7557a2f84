// The persistent expert's frame: which block computes what, the ring its weights stream through, the barrier over the
// grid.
#pragma once

#include "attention_tiles.cuh"
#include "expert.h"
#include "product_tiles.cuh"

namespace flashrt {
namespace expert {

constexpr int kThreads = attention::kThreads;  // that compute; one more warp moves weights
constexpr int kWarps = attention::kWarps;
constexpr int kWidth = 1024, kMlp = 4096, kHeads = 8, kHeadDim = attention::kHeadDim, kAttended = kHeads * kHeadDim;
constexpr int kQkvHeads = kHeads + 2;
constexpr int kChunkBytes = 16384;
constexpr int kMaxSlots = 8;
constexpr int kMaxActionDim = 64;
constexpr float kHeadroom = 1.0f / 16;  // of h (1 + scale) in fp16
static_assert(kThreads * 4 == kWidth, "the seam gives every thread four columns");

struct Product {
  int k, n, tiles;  // tiles of 8 features that share an epilogue
};
__device__ constexpr Product kShapes[kProducts] = {
    {kWidth, kQkvHeads * kHeadDim, 2}, {kAttended, kWidth, 1}, {kWidth, 2 * kMlp, 2}, {kMlp, kWidth, 1}};

template <bool Fp8, int P>
struct Shape {
  static constexpr int kBytes = kShapes[P].k * (Fp8 ? 1 : 2);
  static constexpr int Tiles = kShapes[P].tiles;
  static constexpr int Units = kShapes[P].n / (Tiles * kTileFeatures);
  static constexpr int UnitBytes = Tiles * kTileFeatures * kBytes;
  static constexpr int Chunks = UnitBytes / kChunkBytes;           // a unit's
  static constexpr int Blocks = kChunkBytes / Tiles / kTileBytes;  // k blocks of a chunk
  static_assert(UnitBytes % kChunkBytes == 0 && Blocks % kWarps == 0);
};

struct Range {
  int first, count;
};

// This block's units of a product.
template <bool Fp8, int P>
__device__ __forceinline__ Range own_units() {
  constexpr int units = Shape<Fp8, P>::Units;
  const int first = units * blockIdx.x / gridDim.x;
  return {first, static_cast<int>(units * (blockIdx.x + 1) / gridDim.x) - first};
}

// The weight stream of one block: every chunk of its units, in the order of use, through a ring of `slots` chunks (a
// power of two). One thread of the moving warp fills it; every computing warp reports when it has read a chunk.
struct Ring {
  unsigned char* chunks;
  uint64_t *full, *empty;
  int slots;

  __device__ __forceinline__ void fill(int index, const unsigned char* from) const {
    const int slot = index & (slots - 1);
    if (index >= slots) barrier_wait(empty + slot, (index / slots - 1) & 1);
    barrier_expect(full + slot, kChunkBytes);
    bulk_copy(chunks + slot * kChunkBytes, from, kChunkBytes, full + slot);
  }
  // Chunk `index`, once it has arrived.
  __device__ __forceinline__ const unsigned char* wait(int index) const {
    const int slot = index & (slots - 1);
    barrier_wait(full + slot, (index / slots) & 1);
    return chunks + slot * kChunkBytes;
  }
  __device__ __forceinline__ void release(int index, int count) const {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0)
      for (int i = 0; i < count; ++i) barrier_arrive(empty + ((index + i) & (slots - 1)));
  }
};

template <bool Fp8, int P>
__device__ __forceinline__ int fill_product(const ExpertSteps& p, const Ring& ring, int layer, int index) {
  const Range units = own_units<Fp8, P>();
  constexpr int64_t layer_bytes = int64_t(Shape<Fp8, P>::Units) * Shape<Fp8, P>::UnitBytes;
  const unsigned char* from = static_cast<const unsigned char*>(p.weights[P]) + layer * layer_bytes +
                              int64_t(units.first) * Shape<Fp8, P>::UnitBytes;
  const int chunks = units.count * Shape<Fp8, P>::Chunks;
  for (int chunk = 0; chunk < chunks; ++chunk) ring.fill(index + chunk, from + int64_t(chunk) * kChunkBytes);
  return index + chunks;
}

template <bool Fp8>
__device__ void move_weights(const ExpertSteps& p, const Ring& ring) {
  int index = 0;
  for (int step = 0; step < p.steps; ++step) {
    for (int layer = 0; layer < p.layers; ++layer) {
      index = fill_product<Fp8, kQkv>(p, ring, layer, index);
      index = fill_product<Fp8, kOut>(p, ring, layer, index);
      index = fill_product<Fp8, kGateUp>(p, ring, layer, index);
      index = fill_product<Fp8, kDown>(p, ring, layer, index);
    }
  }
}

using attention::team_barrier;

// A barrier over the grid that can be split: what a block does between arrive and wait costs nothing.
struct GridBarrier {
  unsigned* counter;
  unsigned target = 0;

  __device__ __forceinline__ void arrive() {
    team_barrier();
    target += gridDim.x;
    if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
  }
  __device__ __forceinline__ void wait() {
    if (threadIdx.x == 0) {
      unsigned seen;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
      } while (seen < target);
    }
    team_barrier();
  }
};

}  // namespace expert
}  // namespace flashrt
