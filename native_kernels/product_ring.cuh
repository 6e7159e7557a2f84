// The inside of a product of e4m3 operands on Hopper's matrix unit, out = a b^T, without what is made of its sums: a
// ring of operand tiles in shared memory that one thread fills by tensor copies and warpgroups multiply from.
//
// A block's tile is 64 rows of `a` a warpgroup and `Columns` rows of `b`; a stage of the ring holds 128 e4m3 of k of
// both. What bounds products of a few hundred rows beside the matrix unit is the way from L2 into the multiprocessors,
// 6 TB/s in all: bytes by tile are (rows + columns) k, so large and nearly square tiles win.
#pragma once

#include "tensor_copy.cuh"
#include "vector.cuh"
#include "wgmma.cuh"

namespace flashrt {

// The columns go to the matrix unit in `Parts` instructions: one of 256 columns takes more registers than four
// warpgroups have.
template <int Groups_, int Columns_, int Stages_, int Parts_ = 1>
struct ProductRing {
  static constexpr int kGroups = Groups_, kColumns = Columns_, kStages = Stages_, kParts = Parts_;
  static constexpr int kStepBytes = 128, kGroupRows = 64, kGroupThreads = 128;
  static constexpr int kRows = kGroups * kGroupRows, kThreads = (kGroups + 1) * kGroupThreads;
  static constexpr int kABytes = kRows * kStepBytes, kStageBytes = kABytes + kColumns * kStepBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + 1024 + 2 * kStages * static_cast<int>(sizeof(uint64_t));
  static_assert(kSharedBytes <= 227 * 1024, "a block has no more shared memory");
  static constexpr int kPartColumns = kColumns / kParts;
  using Sums = float[kParts][kPartColumns / 2];  // of a thread

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
#pragma unroll
      for (int k = 0; k < kStepBytes; k += 32)
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          wgmma::multiply_e4m3(sum[part], wgmma::descriptor(rows + k, 16),
                               wgmma::descriptor(columns + part * kPartColumns * kStepBytes + k, 16),
                               step > 0 || k > 0);
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
    for (int part = 0; part < kParts; ++part) wgmma::settle(sum[part]);
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

// What a launch computes: `tiles` tiles, `row_tiles` of them to a tile of columns; `steps` stages of k.
struct ProductShape {
  int rows, steps, row_tiles, tiles;

  template <typename R>
  static ProductShape of(int64_t rows, int64_t columns, int tile_columns, int64_t depth) {
    const int row_tiles = static_cast<int>((rows + R::kRows - 1) / R::kRows);
    return {static_cast<int>(rows), static_cast<int>((depth + R::kStepBytes - 1) / R::kStepBytes), row_tiles,
            row_tiles * static_cast<int>((columns + tile_columns - 1) / tile_columns)};
  }
};

// The tiles of a block are every gridDim-th. The row tiles of a column tile follow each other, so that weights come
// from memory once, and start one further where a block would meet the same (perhaps shorter) row tile each time.
struct ProductTile {
  int row_tile, column_tile;

  __device__ __forceinline__ ProductTile(int index, int row_tiles) {
    const int blocks = gridDim.x;
    column_tile = index / row_tiles;
    row_tile = (index + (blocks % row_tiles == 0 ? index / blocks : 0)) % row_tiles;
  }
};

// The roles of a block, from its first instruction to its last: the last warpgroup fills the ring, the others multiply.
//   copy_b(ring, position, step, column_tile) copies a stage of `b`, which no kernel just in front has written;
//   make_work() may read what it has written, and returns work(first_row, column_tile, multiply), which calls
//   multiply(sums) and does with the sums of a warpgroup's 64 rows what the operation is about.
// Registers: what a multiplying thread takes of those that the filling ones give up; 0 leaves them as launched.
template <typename R, int Registers, typename CopyB, typename MakeWork>
__device__ __forceinline__ void run_product(unsigned char* shared, const ProductShape& shape, const CUtensorMap* a,
                                            CopyB copy_b, MakeWork make_work) {
  R ring(shared);
  ring.init();
  const int group = threadIdx.x / R::kGroupThreads;
  typename R::Position at;
  if (group == R::kGroups) {
    if constexpr (Registers > 0) give_registers<32>();
    if (threadIdx.x % R::kGroupThreads != 0) return;
    for (int index = blockIdx.x; index < shape.tiles; index += gridDim.x) {
      const ProductTile tile(index, shape.row_tiles);
      int asked = 0;
      if (index == static_cast<int>(blockIdx.x)) {  // what does not depend on the kernel in front, ahead of it
        for (typename R::Position early; asked < min(R::kStages, shape.steps); ++asked, early.advance()) {
          ring.open(early);
          copy_b(ring, early, asked, tile.column_tile);
        }
        dependency_wait();
        dependency_release();
      }
      for (int step = 0; step < shape.steps; ++step, at.advance()) {
        if (step >= asked) {
          ring.open(at);
          copy_b(ring, at, step, tile.column_tile);
        }
        tensor_copy(ring.a(at.stage), a, step * R::kStepBytes, tile.row_tile * R::kRows, ring.full + at.stage);
      }
    }
  } else {
    if constexpr (Registers > 0) take_registers<Registers>();
    dependency_wait();  // whoever still reads where the result goes, and writes the scales
    const auto work = make_work();
    for (int index = blockIdx.x; index < shape.tiles; index += gridDim.x) {
      const ProductTile tile(index, shape.row_tiles);
      const int row = tile.row_tile * R::kRows + group * R::kGroupRows;
      if (row < shape.rows) {
        work(row, tile.column_tile, [&](typename R::Sums& sums) { ring.multiply(sums, at, shape.steps, group); });
      } else {
        ring.skip(at, shape.steps);
      }
    }
  }
}

}  // namespace flashrt
