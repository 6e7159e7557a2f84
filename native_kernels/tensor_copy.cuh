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

}  // namespace flashrt
