// Launchers of the vision tower's and the prefix's kernels. Like those of flashrt_native.h they only enqueue work.
// A scale, where it may be null, asks for e4m3 output of value / *scale.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "flashrt_native.h"

namespace flashrt {

enum class Activation : int { kIdentity = 0, kGelu = 1, kGeglu = 2 };

enum class RowNorm : int { kRms = 0, kLayer = 1, kAda = 2 };

// row_norm.cu; residual and total are null together, bias is null for kRms; gate goes with the residual of kAda, whose
// style_stride is the floats from one row's gate, weight and bias to the next one's, 0 where all rows have the same;
// half: bf16 x, fp16 out.
cudaError_t row_norm(RowNorm kind, const void* x, const void* residual, const float* gate, const float* weight,
                     const float* bias, const float* scale, void* out, void* total, int64_t style_stride, int64_t rows,
                     int64_t width, float eps, DType dtype, bool half, cudaStream_t stream);

// activation.cu
cudaError_t activation(Activation kind, const void* x, void* out, const float* scale, int64_t rows, int64_t width,
                       DType dtype, cudaStream_t stream);

// geglu_product.cu, compute capability 9.0 only
cudaError_t geglu_product(const void* x, const void* w, const float* x_scale, const float* w_scale, const float* scale,
                          void* out, int64_t rows, int64_t width, int64_t depth, cudaStream_t stream);

// linear_product.cu, compute capability 9.0 only; bias may be null
cudaError_t linear_product(const void* x, const void* w, const void* bias, const float* x_scale, const float* w_scale,
                           const float* scale, void* out, int64_t rows, int64_t width, int64_t depth,
                           cudaStream_t stream);

// qkv_rope.cu
cudaError_t qkv_rope(const void* qkv, const float* cos, const float* sin, const int64_t* slots, int64_t start, void* q,
                     void* k_cache, void* v_cache, int64_t capacity, int64_t tokens, int heads, int kv_heads,
                     int head_dim, DType dtype, cudaStream_t stream);

// prefix_attention.cu, compute capability 9.0 only; `valid` may be null
cudaError_t prefix_attention(const void* q, const void* k, const void* v, const int* valid, const float* scale,
                             void* out, int64_t rows, int64_t keys, cudaStream_t stream);

// vision_attention.cu, compute capability 9.0 only
cudaError_t vision_attention(const void* qkv, const float* scale, void* out, int64_t views, int64_t heads,
                             cudaStream_t stream);

// camera_patches.cu; out fp32, or with `levels` fp16
cudaError_t camera_patches(const uint8_t* frames, const int64_t* views, void* out, int count, int size, int patch,
                           bool antialias, bool levels, cudaStream_t stream);

// patch_product.cu, compute capability 9.0 only
cudaError_t patch_product(const void* x, const void* w, const float* table, float factor, void* out, int64_t rows,
                          int64_t width, int64_t depth, int64_t tokens, cudaStream_t stream);

// embed_tokens.cu
cudaError_t embed_tokens(const void* table, const int64_t* ids, void* out, int64_t tokens, int64_t vocabulary,
                         int width, float factor, DType dtype, cudaStream_t stream);

}  // namespace flashrt
