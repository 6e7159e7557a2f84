// Describes a matrix of bytes to the tensor copy engine: what cuTensorMapEncodeTiled makes of it, on the host.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace flashrt {

// cuTensorMapEncodeTiled of the driver that is loaded (the module links no libcuda); null where it has none.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    const bool usable = status == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return usable ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function) : nullptr;
  }();
  return encoder;
}

// Boxes of `box_rows` x 128 bytes out of (rows, row_bytes) contiguous bytes, in the 128-byte swizzle. What lies outside
// the matrix arrives as zeros. `data` on 16 bytes, row_bytes a multiple of 16.
inline cudaError_t describe_matrix(CUtensorMap& map, const void* data, int64_t rows, int64_t row_bytes, int box_rows) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(row_bytes), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[2] = {128, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(data), sizes, pitch, box,
                                 steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Boxes of `box_rows` x 128 bytes out of one of the `slices` pieces of `slice_bytes` that make a row, in the 128-byte
// swizzle: what lies outside the slice arrives as zeros. `data` on 16 bytes, slice_bytes a multiple of 16.
inline cudaError_t describe_slices(CUtensorMap& map, const void* data, int64_t rows, int slices, int slice_bytes,
                                   int box_rows) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(slice_bytes), static_cast<cuuint64_t>(slices),
                               static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[2] = {sizes[0], sizes[0] * sizes[1]};
  const cuuint32_t box[3] = {128, 1, static_cast<cuuint32_t>(box_rows)}, steps[3] = {1, 1, 1};
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<void*>(data), sizes, pitch, box,
                                 steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace flashrt
