// Residual add, then Gemma's RMSNorm, in one pass over memory:
//   residual_out = x + residual                                              (rounded to the element type)
//   out          = residual_out * rsqrt(mean(residual_out^2) + eps) * (1 + weight)   (fp32, rounded once)
//
// Shapes: x, residual, out, residual_out (rows, width) contiguous, one element type (fp32, fp16, bf16);
// weight (width,), fp32 or the element type. residual_out may be residual and out may be x (in place).
//
// Bytes moved: 4 * rows * width * sizeof(T) + width * sizeof(W), each element once; no arithmetic to speak of, so the
// floor is those bytes over the memory bandwidth. Measured on an H200 (4.8 TB/s) in bf16, weight fp32, inside a CUDA
// graph (benchmarks/bench_add_rms_norm.py): 16384 x 2048 65.8 us, floor 55.9 (4.1 TB/s, what a plain copy reaches);
// 968 x 2048 5.7 us, floor 3.3; 10 x 1024 1.5 us, floor 0.02: a launch.
//
// One block a row. A row stays in registers between the two passes (up to kMaxVectors 16-byte vectors a thread:
// 32768 elements of 16 bits). Rows that are not whole aligned vectors take the scalar kernel, which reads its
// own residual_out again.
#include "vector.cuh"

namespace flashrt {
namespace {

constexpr int kMaxVectors = 4;
constexpr int kMaxThreads = 1024;

template <typename T, typename W, int Vectors>
__global__ void __launch_bounds__(kMaxThreads)
    add_rms_norm_vector_kernel(const T* x, const T* residual, const W* weight, T* out, T* residual_out, int width,
                               float eps) {
  constexpr int N = kElementsPer16Bytes<T>;
  using Row = Vector<T, N>;
  using Weight = Vector<W, N>;
  __shared__ float scratch[kMaxWarpsPerBlock];

  const int64_t row = static_cast<int64_t>(blockIdx.x) * (width / N);
  const Row* x_row = reinterpret_cast<const Row*>(x) + row;
  const Row* residual_row = reinterpret_cast<const Row*>(residual) + row;
  Row* out_row = reinterpret_cast<Row*>(out) + row;
  Row* residual_out_row = reinterpret_cast<Row*>(residual_out) + row;

  Row total[Vectors];
  float squares = 0.0f;
#pragma unroll
  for (int v = 0; v < Vectors; ++v) {
    const int index = v * blockDim.x + threadIdx.x;
    if (index >= width / N) break;
    const Row a = x_row[index];
    const Row b = residual_row[index];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      total[v].element[i] = from_float<T>(to_float(a.element[i]) + to_float(b.element[i]));
      const float value = to_float(total[v].element[i]);
      squares += value * value;
    }
    residual_out_row[index] = total[v];
  }

  const float scale = rsqrtf(block_sum(squares, scratch) / width + eps);
#pragma unroll
  for (int v = 0; v < Vectors; ++v) {
    const int index = v * blockDim.x + threadIdx.x;
    if (index >= width / N) break;
    const Weight w = reinterpret_cast<const Weight*>(weight)[index];
    Row normed;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      normed.element[i] = from_float<T>(to_float(total[v].element[i]) * scale * (1.0f + to_float(w.element[i])));
    }
    out_row[index] = normed;
  }
}

template <typename T, typename W>
__global__ void __launch_bounds__(kMaxThreads)
    add_rms_norm_scalar_kernel(const T* x, const T* residual, const W* weight, T* out, T* residual_out, int width,
                               float eps) {
  __shared__ float scratch[kMaxWarpsPerBlock];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * width;
  float squares = 0.0f;
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    const T total = from_float<T>(to_float(x[row + i]) + to_float(residual[row + i]));
    residual_out[row + i] = total;
    squares += to_float(total) * to_float(total);
  }
  const float scale = rsqrtf(block_sum(squares, scratch) / width + eps);
  for (int i = threadIdx.x; i < width; i += blockDim.x) {  // each thread reads only what it wrote itself
    out[row + i] = from_float<T>(to_float(residual_out[row + i]) * scale * (1.0f + to_float(weight[i])));
  }
}

// Threads for `items` per-thread work items: a multiple of the warp, at most kMaxThreads.
int block_threads(int64_t items) {
  const int64_t rounded = (items + kWarpSize - 1) / kWarpSize * kWarpSize;
  return static_cast<int>(rounded < kMaxThreads ? rounded : kMaxThreads);
}

template <typename T, typename W>
cudaError_t launch(const void* x, const void* residual, const void* weight, void* out, void* residual_out, int64_t rows,
                   int64_t width, float eps, cudaStream_t stream) {
  const T* x_ptr = static_cast<const T*>(x);
  const T* residual_ptr = static_cast<const T*>(residual);
  const W* weight_ptr = static_cast<const W*>(weight);
  T* out_ptr = static_cast<T*>(out);
  T* residual_out_ptr = static_cast<T*>(residual_out);
  const dim3 grid(static_cast<unsigned>(rows));
  const int columns = static_cast<int>(width);

  constexpr int N = kElementsPer16Bytes<T>;
  const int64_t vectors_per_row = width / N;
  const int threads = block_threads(vectors_per_row);
  const int64_t vectors_per_thread = threads > 0 ? (vectors_per_row + threads - 1) / threads : 0;
  const bool whole_vectors = width % N == 0 && aligned_to_16_bytes(x) && aligned_to_16_bytes(residual) &&
                             aligned_to_16_bytes(weight) && aligned_to_16_bytes(out) &&
                             aligned_to_16_bytes(residual_out);
  if (!whole_vectors || vectors_per_thread > kMaxVectors) {
    add_rms_norm_scalar_kernel<T, W><<<grid, block_threads(width), 0, stream>>>(
        x_ptr, residual_ptr, weight_ptr, out_ptr, residual_out_ptr, columns, eps);
  } else if (vectors_per_thread == 1) {
    add_rms_norm_vector_kernel<T, W, 1>
        <<<grid, threads, 0, stream>>>(x_ptr, residual_ptr, weight_ptr, out_ptr, residual_out_ptr, columns, eps);
  } else {
    add_rms_norm_vector_kernel<T, W, kMaxVectors>
        <<<grid, threads, 0, stream>>>(x_ptr, residual_ptr, weight_ptr, out_ptr, residual_out_ptr, columns, eps);
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_weight(const void* x, const void* residual, const void* weight, void* out, void* residual_out,
                          int64_t rows, int64_t width, float eps, DType dtype, DType weight_dtype,
                          cudaStream_t stream) {
  if (weight_dtype == dtype) return launch<T, T>(x, residual, weight, out, residual_out, rows, width, eps, stream);
  if (weight_dtype == DType::kFloat32)
    return launch<T, float>(x, residual, weight, out, residual_out, rows, width, eps, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t add_rms_norm(const void* x, const void* residual, const void* weight, void* out, void* residual_out,
                         int64_t rows, int64_t width, float eps, DType dtype, DType weight_dtype, cudaStream_t stream) {
  if (rows < 0 || rows > INT32_MAX || width < 1 || width > INT32_MAX) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  switch (dtype) {
    case DType::kFloat32:
      return launch<float, float>(x, residual, weight, out, residual_out, rows, width, eps, stream);
    case DType::kFloat16:
      return launch_weight<__half>(x, residual, weight, out, residual_out, rows, width, eps, dtype, weight_dtype,
                                   stream);
    case DType::kBFloat16:
      return launch_weight<__nv_bfloat16>(x, residual, weight, out, residual_out, rows, width, eps, dtype, weight_dtype,
                                          stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace flashrt
