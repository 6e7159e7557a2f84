// Tells whether this build holds code for the GPU in use, before anything depends on it.
#include "flashrt_native.h"

namespace flashrt {
namespace {

__global__ void probe_kernel() {}

}  // namespace

cudaError_t device_supported() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, probe_kernel);
}

}  // namespace flashrt
