// The inside of a product on Hopper's matrix unit, out = a b^T, without what is made of its sums: a ring of operand
// tiles in shared memory that one thread fills by tensor copies and warpgroups multiply from.
//
// A block's tile is `ARows` rows of `a`, 64 of them or several times 64 a warpgroup, and `BRows` rows of `b`; a stage
// of the ring holds 128 bytes of k of both. One of them is x, the activations, the other the weights, of which tiles
// lie side by side; where x is `b`, a tile has as many of its rows, in steps of 8, as leave no tile nearly empty.
//
// What bounds products of a few hundred rows is the matrix unit at the clock that 700 W leave it (1.6 GHz where all of
// them multiply) and what it waits for at a tile's ends; and L2, 6 TB/s: bytes by tile are (rows + columns) k, so large
// and nearly square tiles win.
#pragma once

#include "tensor_copy.cuh"
#include "vector.cuh"
#include "wgmma.cuh"

namespace flashrt {

// What a warpgroup makes of a stage: `Sums` of a thread, and issue(sums, a, b, more), which starts the products of its
// rows of `a` (64 from there on, and whatever else lies behind the rows of all groups) with those of `b`.
template <int Columns>
struct PlainStep {
  using Sums = float[1][Columns / 2];

  __device__ __forceinline__ static void issue(Sums& sum, uint32_t a, uint32_t b, bool more) {
#pragma unroll
    for (int k = 0; k < 128; k += 32)
      wgmma::multiply_e4m3(sum[0], wgmma::descriptor(a + k, 16), wgmma::descriptor(b + k, 16), more || k > 0);
  }
};

template <int Groups_, int ARows, int BRows, int Stages_, typename Step>
struct ProductRing {
  static constexpr int kGroups = Groups_, kStages = Stages_;
  static constexpr int kStepBytes = 128, kGroupRows = 64, kGroupThreads = 128;
  static constexpr int kThreads = (kGroups + 1) * kGroupThreads;
  static constexpr int kABytes = ARows * kStepBytes, kStageBytes = kABytes + BRows * kStepBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + 1024 + 2 * kStages * static_cast<int>(sizeof(uint64_t));
  static_assert(kSharedBytes <= 227 * 1024, "a block has no more shared memory");
  static_assert(ARows % kGroupRows == 0 && BRows % 8 == 0, "whole rows of the swizzle");
  using Sums = typename Step::Sums;  // of a thread

  // Where a role is: the same sequence of stages for the thread that fills and for those that multiply.
  struct Position {
    int stage = 0;
    uint32_t phase = 0;

    __device__ __forceinline__ void advance() {
      if (++stage == kStages) stage = 0, phase ^= 1;
    }
  };

  unsigned char* tiles;
  uint64_t* full;   // a stage's bytes have arrived
  uint64_t* empty;  // every warp that multiplies is done with the stage

  __device__ __forceinline__ explicit ProductRing(unsigned char* shared) {
    tiles = shared + (1024 - shared_address(shared) % 1024) % 1024;
    full = reinterpret_cast<uint64_t*>(tiles + kStages * kStageBytes);
    empty = full + kStages;
  }

  // By all threads, before anything else.
  __device__ __forceinline__ void init() {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        barrier_init(full + stage, 1);
        barrier_init(empty + stage, kGroups * (kGroupThreads / kWarpSize));
      }
      barrier_init_fence();
    }
    __syncthreads();
  }

  __device__ __forceinline__ uint32_t a(int stage) const { return shared_address(tiles) + stage * kStageBytes; }
  __device__ __forceinline__ uint32_t b(int stage) const { return a(stage) + kABytes; }

  // The filling thread: wait until the stage may be written, and say what will arrive.
  __device__ __forceinline__ void open(const Position& at) const {
    barrier_wait(empty + at.stage, at.phase ^ 1);
    barrier_expect(full + at.stage, kStageBytes);
  }

  // A warpgroup that multiplies: its 64 rows of a tile, over all steps.
  __device__ __forceinline__ void multiply(Sums& sum, Position& at, int steps, int group) const {
    int last = 0;
    for (int step = 0; step < steps; ++step) {
      barrier_wait(full + at.stage, at.phase);
      const uint32_t rows = a(at.stage) + group * kGroupRows * kStepBytes, columns = b(at.stage);
      wgmma::fence();
      Step::issue(sum, rows, columns, step > 0);
      wgmma::commit();
      if (step > 0) {
        wgmma::wait_all_but<1>();
        release(last);
      }
      last = at.stage;
      at.advance();
    }
    wgmma::wait_all_but<0>();
#pragma unroll
    for (auto& part : sum) wgmma::settle(part);
    release(last);
  }

  // The same steps of a warpgroup without rows.
  __device__ __forceinline__ void skip(Position& at, int steps) const {
    for (int step = 0; step < steps; ++step) {
      barrier_wait(full + at.stage, at.phase);
      release(at.stage);
      at.advance();
    }
  }

 private:
  // This warp has read the stage.
  __device__ __forceinline__ void release(int stage) const {
    if (threadIdx.x % kWarpSize == 0) barrier_arrive(empty + stage);
  }
};

// What a launch computes: `tiles` tiles, `row_tiles` of them, of `tile_rows` rows of x, to a tile of weights; `steps`
// stages of k, of which each of `splits` neighbouring blocks takes its share. A warpgroup has the rows from
// `group_rows` times its index on, or all of the tile's where that is 0.
struct ProductShape {
  int rows, steps, tile_rows, group_rows, row_tiles, tiles, splits;

  ProductShape() = default;
  ProductShape(int64_t rows, int tile_rows, int group_rows, int64_t width, int tile_width, int64_t row_bytes,
               int splits = 1)
      : rows(static_cast<int>(rows)),
        steps(static_cast<int>((row_bytes + splits * 128 - 1) / (splits * 128))),
        tile_rows(tile_rows),
        group_rows(group_rows),
        row_tiles(static_cast<int>((rows + tile_rows - 1) / tile_rows)),
        tiles(row_tiles * static_cast<int>((width + tile_width - 1) / tile_width)),
        splits(splits) {}

  // Of tiles, and from one tile of a block to its next.
  __device__ __forceinline__ int first() const { return blockIdx.x / splits; }
  __device__ __forceinline__ int stride() const { return gridDim.x / splits; }
};

// The row tiles of a tile of weights follow each other, so that weights come
// from memory once, and start one further where a block would meet the same (perhaps shorter) row tile each time.
struct ProductTile {
  int row_tile, weight_tile;

  __device__ __forceinline__ ProductTile(int index, const ProductShape& shape) {
    const int stride = shape.stride();
    weight_tile = index / shape.row_tiles;
    row_tile = (index + (stride % shape.row_tiles == 0 ? index / stride : 0)) % shape.row_tiles;
  }
};

// The roles of a block, from its first instruction to its last: the last warpgroup fills the ring, the others multiply.
//   copy_weights(ring, position, step, weight_tile) copies a stage (of this block's share) of what no kernel just in
//   front has written; copy_x(ring, position, step, first_row) copies a stage of x; make_work() may read what the
//   kernel in front has written, and returns work(first_row, weight_tile, multiply), which calls multiply(sums) and
//   does with a warpgroup's sums what the operation is about.
// Registers: what a multiplying thread takes of those that the filling ones give up; 0 leaves them as launched.
template <typename R, int Registers, typename CopyWeights, typename CopyX, typename MakeWork>
__device__ __forceinline__ void run_product(unsigned char* shared, const ProductShape& shape, CopyWeights copy_weights,
                                            CopyX copy_x, MakeWork make_work) {
  R ring(shared);
  ring.init();
  const int group = threadIdx.x / R::kGroupThreads;
  typename R::Position at;
  if (group == R::kGroups) {
    if constexpr (Registers > 0) give_registers<24>();
    if (threadIdx.x % R::kGroupThreads != 0) return;
    for (int index = shape.first(); index < shape.tiles; index += shape.stride()) {
      const ProductTile tile(index, shape);
      int asked = 0;
      if (index == shape.first()) {  // what does not depend on the kernel in front, ahead of it
        for (typename R::Position early; asked < min(R::kStages, shape.steps); ++asked, early.advance()) {
          ring.open(early);
          copy_weights(ring, early, asked, tile.weight_tile);
        }
        dependency_wait();
        dependency_release();
      }
      for (int step = 0; step < shape.steps; ++step, at.advance()) {
        if (step >= asked) {
          ring.open(at);
          copy_weights(ring, at, step, tile.weight_tile);
        }
        copy_x(ring, at, step, tile.row_tile * shape.tile_rows);
      }
    }
  } else {
    if constexpr (Registers > 0) take_registers<Registers>();
    dependency_wait();  // whoever still reads where the result goes, and writes the scales
    const auto work = make_work();
    for (int index = shape.first(); index < shape.tiles; index += shape.stride()) {
      const ProductTile tile(index, shape);
      const int row = tile.row_tile * shape.tile_rows + group * shape.group_rows;
      if (row < shape.rows) {
        work(row, tile.weight_tile, [&](typename R::Sums& sums) { ring.multiply(sums, at, shape.steps, group); });
      } else {
        ring.skip(at, shape.steps);
      }
    }
  }
}

}  // namespace flashrt
