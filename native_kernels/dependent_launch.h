// Launch a kernel that begins with dependency_wait(): it may be made ready while the kernel in front of it still runs.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "device_limits.h"

namespace flashrt {

// Programmatic dependent launch needs compute capability 9.0.
inline bool dependent_launch_supported() {
  DeviceLimits limits = {};
  return device_limits(&limits) == cudaSuccess && limits.capability >= 90;
}

// In clusters of `cluster` blocks, which need it too.
template <typename... Parameters>
cudaError_t launch_dependent_clusters(void (*kernel)(Parameters...), unsigned cluster, dim3 grid, dim3 block,
                                      size_t shared_bytes, cudaStream_t stream, Parameters... parameters) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = dependent_launch_supported() ? cluster > 1 ? 2 : 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, parameters...);
}

template <typename... Parameters>
cudaError_t launch_dependent(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                             cudaStream_t stream, Parameters... parameters) {
  return launch_dependent_clusters(kernel, 1, grid, block, shared_bytes, stream, parameters...);
}

}  // namespace flashrt
