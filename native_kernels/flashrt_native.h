// The launchers that bindings.cpp exposes. Each one only enqueues work on `stream`: no allocation, no
// synchronisation, so all of them can be captured into a CUDA graph. They return the launch's status.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace flashrt {

// Raise it with every change of a launcher's arguments or of how weights are packed for it: ops/native.py refuses a
// module built from other sources.
constexpr int kInterfaceVersion = 11;

// Codes that ops/native.py passes for torch dtypes.
enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Whether this build holds code for the current device: cudaSuccess or cudaErrorNoKernelImageForDevice.
cudaError_t device_supported();

// add_rms_norm.cu
cudaError_t add_rms_norm(const void* x, const void* residual, const void* weight, void* out, void* residual_out,
                         int64_t rows, int64_t width, float eps, DType dtype, DType weight_dtype, cudaStream_t stream);

}  // namespace flashrt
