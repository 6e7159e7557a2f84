// Launch a kernel that begins with dependency_wait(): it may be made ready while the kernel in front of it still runs.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace flashrt {

// Programmatic dependent launch needs compute capability 9.0.
inline bool dependent_launch_supported() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
}

// A grid of `blocks` in clusters of `cluster` (0: none).
template <typename... Parameters>
cudaError_t launch_dependent_clusters(void (*kernel)(Parameters...), dim3 grid, unsigned cluster, dim3 block,
                                      size_t shared_bytes, cudaStream_t stream, Parameters... parameters) {
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (dependent_launch_supported()) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 0) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {cluster, 1, 1};
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, parameters...);
}

template <typename... Parameters>
cudaError_t launch_dependent(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                             cudaStream_t stream, Parameters... parameters) {
  return launch_dependent_clusters(kernel, grid, 0, block, shared_bytes, stream, parameters...);
}

}  // namespace flashrt
