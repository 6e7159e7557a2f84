// [Residual add, then] RMSNorm or LayerNorm [, then quantisation to e4m3], in one pass over memory:
//   total = x [+ residual]                                             (rounded to the element type)
//   RMS   : out = total * rsqrt(mean(total^2) + eps) * (1 + weight)    (fp32, rounded once)
//   Layer : out = (total - mean) * rsqrt(var + eps) * weight + bias
//
// Shapes: x, residual, total (rows, width) contiguous, one element type (fp32, fp16, bf16); weight, bias (width,)
// fp32; out (rows, width) of the element type, or e4m3 of value / *scale. total may be residual (in place).
//
// Bytes moved: rows * width * (2 or 4 element reads and writes, 1 for e4m3), each once, no arithmetic to speak of:
// 560 x 2048 bf16 with residual to e4m3 is 8.0 MB, 1.9 us at 4.3 TB/s; in a warm L2 the launch (2 us) is all there is.
//
// One block a row, which stays in registers between the passes (up to kMaxVectors 16-byte vectors a thread). LayerNorm
// takes the variance around the mean in a second reduction, as the definition does: no cancellation. Rows that are not
// whole aligned vectors take the scalar kernel, which reads its own total again.
#include "dependent_launch.h"
#include "hopper.cuh"
#include "prefix.h"
#include "quantise.cuh"

namespace flashrt {
namespace {

constexpr int kMaxVectors = 4;
constexpr int kMaxThreads = 1024;

struct Rows {
  const void* x;
  const void* residual;
  const float* weight;
  const float* bias;
  const float* scale;
  void* out;
  void* total;
  int width;
  float eps;
};

template <typename T, typename Out, bool kLayer, int Vectors>
__global__ void __launch_bounds__(kMaxThreads) row_norm_vector_kernel(Rows rows) {
  constexpr int N = kElementsPer16Bytes<T>;
  using Row = Vector<T, N>;
  using Result = Vector<Out, N>;
  using Weight = Vector<float, N>;
  __shared__ float scratch[2][kMaxWarpsPerBlock];

  const int width = rows.width;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (width / N);
  const Row* x = static_cast<const Row*>(rows.x) + row;
  const Row* residual = static_cast<const Row*>(rows.residual) + row;

  // constants, ahead of the wait for the kernel in front; those of later vectors when they are needed
  Weight first_weight, first_bias;
  if (static_cast<int>(threadIdx.x) < width / N) {
    first_weight = reinterpret_cast<const Weight*>(rows.weight)[threadIdx.x];
    if constexpr (kLayer) first_bias = reinterpret_cast<const Weight*>(rows.bias)[threadIdx.x];
  }
  dependency_wait();
  dependency_release();
  const float inverse_scale = inverse_scale_of<Out>(rows.scale);
  Row total[Vectors];
  float sum = 0.0f;
#pragma unroll
  for (int v = 0; v < Vectors; ++v) {
    const int index = v * blockDim.x + threadIdx.x;
    if (index >= width / N) break;
    total[v] = x[index];
    if (rows.residual != nullptr) {
      const Row other = residual[index];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        total[v].element[i] = from_float<T>(to_float(total[v].element[i]) + to_float(other.element[i]));
      }
      static_cast<Row*>(rows.total)[row + index] = total[v];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float value = to_float(total[v].element[i]);
      sum += kLayer ? value : value * value;
    }
  }

  float mean = 0.0f;
  float variance = block_sum(sum, scratch[0]) / width;
  if constexpr (kLayer) {
    mean = variance;
    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < Vectors; ++v) {
      if (v * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x) >= width / N) break;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float centred = to_float(total[v].element[i]) - mean;
        squares += centred * centred;
      }
    }
    variance = block_sum(squares, scratch[1]) / width;
  }
  const float factor = rsqrtf(variance + rows.eps);
#pragma unroll
  for (int v = 0; v < Vectors; ++v) {
    const int index = v * blockDim.x + threadIdx.x;
    if (index >= width / N) break;
    const Weight weight = v == 0 ? first_weight : reinterpret_cast<const Weight*>(rows.weight)[index];
    Weight bias;
    if constexpr (kLayer) bias = v == 0 ? first_bias : reinterpret_cast<const Weight*>(rows.bias)[index];
    float values[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float normed = (to_float(total[v].element[i]) - mean) * factor;
      values[i] = kLayer ? normed * weight.element[i] + bias.element[i] : normed * (1.0f + weight.element[i]);
    }
    static_cast<Result*>(rows.out)[row + index] = store_all<Out>(values, inverse_scale);
  }
}

template <typename T, typename Out, bool kLayer>
__global__ void __launch_bounds__(kMaxThreads) row_norm_scalar_kernel(Rows rows) {
  __shared__ float scratch[2][kMaxWarpsPerBlock];
  dependency_wait();
  dependency_release();
  const int width = rows.width;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * width;
  const T* x = static_cast<const T*>(rows.x) + row;
  const T* residual = static_cast<const T*>(rows.residual) + row;
  T* total = static_cast<T*>(rows.total) + row;
  const T* source = rows.residual == nullptr ? x : total;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    if (rows.residual != nullptr) total[i] = from_float<T>(to_float(x[i]) + to_float(residual[i]));
    const float value = to_float(source[i]);  // each thread reads only what it wrote itself
    sum += kLayer ? value : value * value;
  }
  float mean = 0.0f;
  float variance = block_sum(sum, scratch[0]) / width;
  if constexpr (kLayer) {
    mean = variance;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
      const float centred = to_float(source[i]) - mean;
      squares += centred * centred;
    }
    variance = block_sum(squares, scratch[1]) / width;
  }
  const float factor = rsqrtf(variance + rows.eps);
  const float inverse_scale = inverse_scale_of<Out>(rows.scale);
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    const float normed = (to_float(source[i]) - mean) * factor;
    const float value = kLayer ? normed * rows.weight[i] + rows.bias[i] : normed * (1.0f + rows.weight[i]);
    static_cast<Out*>(rows.out)[row + i] = store_as<Out>(value, inverse_scale);
  }
}

int block_threads(int64_t items) {
  const int64_t rounded = (items + kWarpSize - 1) / kWarpSize * kWarpSize;
  return static_cast<int>(rounded < kMaxThreads ? rounded : kMaxThreads);
}

template <typename T, typename Out, bool kLayer>
cudaError_t launch(const Rows& rows, int64_t count, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(count));
  constexpr int N = kElementsPer16Bytes<T>;
  const int64_t vectors_per_row = rows.width / N;
  const int threads = block_threads(vectors_per_row);
  const int64_t vectors_per_thread = threads > 0 ? (vectors_per_row + threads - 1) / threads : 0;
  const bool whole_vectors = rows.width % N == 0 && aligned_to_16_bytes(rows.x) && aligned_to_16_bytes(rows.residual) &&
                             aligned_to_16_bytes(rows.weight) && aligned_to_16_bytes(rows.bias) &&
                             aligned_to_16_bytes(rows.out) && aligned_to_16_bytes(rows.total);
  if (!whole_vectors || vectors_per_thread > kMaxVectors)
    return launch_dependent(row_norm_scalar_kernel<T, Out, kLayer>, grid, block_threads(rows.width), 0, stream, rows);
  if (vectors_per_thread == 1)
    return launch_dependent(row_norm_vector_kernel<T, Out, kLayer, 1>, grid, threads, 0, stream, rows);
  return launch_dependent(row_norm_vector_kernel<T, Out, kLayer, kMaxVectors>, grid, threads, 0, stream, rows);
}

}  // namespace

cudaError_t row_norm(const void* x, const void* residual, const float* weight, const float* bias, const float* scale,
                     void* out, void* total, int64_t rows, int64_t width, float eps, DType dtype, cudaStream_t stream) {
  if (rows < 0 || rows > INT32_MAX || width < 1 || width > INT32_MAX) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  const Rows problem = {x, residual, weight, bias, scale, out, total, static_cast<int>(width), eps};
  return dispatch(dtype, scale != nullptr, [&](auto type, auto result) {
    using T = typename decltype(type)::type;
    using Out = typename decltype(result)::type;
    return bias != nullptr ? launch<T, Out, true>(problem, rows, stream) : launch<T, Out, false>(problem, rows, stream);
  });
}

}  // namespace flashrt
