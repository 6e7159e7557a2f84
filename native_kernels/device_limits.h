// What the GPU in use offers, as far as launchers choose by it.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

namespace flashrt {

struct DeviceLimits {
  int capability;    // 10 * major + minor
  int shared_bytes;  // of a block
  int multiprocessors;
};

// A build of FLASHRT_CUDA_ARCHS=89-virtual runs the paths of a small GPU of compute capability 8.9 on any newer one.
inline cudaError_t device_limits(DeviceLimits* limits) {
  int device = 0, major = 0, minor = 0;
  cudaError_t status = cudaGetDevice(&device);
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(value, attribute, device);
  };
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&minor, cudaDevAttrComputeCapabilityMinor);
  ask(&limits->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(&limits->multiprocessors, cudaDevAttrMultiProcessorCount);
  limits->capability = 10 * major + minor;
#ifdef FLASHRT_AS_SMALL_GPU
  constexpr int kSharedBytes = 99 << 10, kMultiprocessors = 20;
  limits->capability = std::min(limits->capability, 89);
  limits->shared_bytes = std::min(limits->shared_bytes, kSharedBytes);
  limits->multiprocessors = std::min(limits->multiprocessors, kMultiprocessors);
#endif
  return status;
}

// Of a GPU with Hopper's matrix unit; cudaErrorNotSupported elsewhere, where kernels for it are empty.
inline cudaError_t hopper_multiprocessors(int* multiprocessors) {
  DeviceLimits limits = {};
  const cudaError_t status = device_limits(&limits);
  *multiprocessors = limits.multiprocessors;
  return status == cudaSuccess && limits.capability != 90 ? cudaErrorNotSupported : status;
}

}  // namespace flashrt
