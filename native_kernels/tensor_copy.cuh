// Copies of boxes of a matrix into shared memory by the tensor copy engine.
#pragma once

#include <cuda.h>

#include "hopper.cuh"

namespace flashrt {

// Start the copy of the box at byte `column` of row `row`; its bytes are counted by `barrier`.
__device__ __forceinline__ void tensor_copy(uint32_t shared, const CUtensorMap* map, int column, int row,
                                            uint64_t* barrier) {
#if FLASHRT_DEVICE_HAS_BULK
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
#endif
}

// The same out of three dimensions.
__device__ __forceinline__ void tensor_copy(uint32_t shared, const CUtensorMap* map, int column, int slice, int row,
                                            uint64_t* barrier) {
#if FLASHRT_DEVICE_HAS_BULK
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(shared),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(slice), "r"(row)
      : "memory");
#endif
}

// The same into all `Blocks` of a cluster, at one place in each, counted by the barrier at that place.
template <int Blocks>
__device__ __forceinline__ void tensor_copy_to_all(uint32_t shared, const CUtensorMap* map, int column, int slice,
                                                   int row, uint64_t* barrier) {
#if FLASHRT_DEVICE_HAS_BULK
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, "
      "%4, %5}], [%2], %6;" ::"r"(shared),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(slice), "r"(row),
      "h"(static_cast<uint16_t>((1 << Blocks) - 1))
      : "memory");
#endif
}

// The engine's description of a matrix, asked for ahead of the first copy.
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
#if FLASHRT_DEVICE_HAS_BULK
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

}  // namespace flashrt
