// [Residual add, then] RMSNorm, adaptive RMSNorm or LayerNorm [, then quantisation to e4m3], in one pass over memory:
//   total = [gate *] x [+ residual]                                    (rounded to the element type)
//   RMS   : out = total * rsqrt(mean(total^2) + eps) * (1 + weight)    (fp32, rounded once)
//   Ada   : the same + bias; weight and bias are the conditioning's scale and shift, gate is the style's in front
//   Layer : out = (total - mean) * rsqrt(var + eps) * weight + bias
//
// Shapes: x, residual, total (rows, width) contiguous, one element type (fp32, fp16, bf16); weight, bias, gate (width,)
// fp32, or for Ada one for each row, each `style_stride` floats apart; out (rows, width) of the element type, or e4m3
// of value / *scale, or (`half`, of bf16) rounded as such and stored as fp16. total may be residual (in place).
//
// Bytes moved: rows * width * (2 or 4 element reads and writes, 1 for e4m3), each once, no arithmetic to speak of:
// 560 x 2048 bf16 with residual to e4m3 is 8.0 MB, 1.9 us at 4.3 TB/s; in a warm L2 the launch (2 us) is all there is.
// An expert's adaRMS of 50 x 1024 bf16 is 0.4 MB and 12 KB of style: the launch.
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
  const float* gate;
  const float* weight;
  const float* bias;
  const float* scale;
  void* out;
  void* total;
  int64_t style_stride;
  int width;
  float eps;
};

// What stands beside e4m3 weights in fp16 was bf16 before.
template <typename T, typename Out>
constexpr bool kHalf = std::is_same_v<T, __nv_bfloat16> && std::is_same_v<Out, __half>;

template <typename T, typename Out>
__device__ __forceinline__ float rounded(float value) {
  return kHalf<T, Out> ? to_float(from_float<T>(value)) : value;
}

// x + residual, gated or not, rounded once to the element type; without contraction, as the definition rounds it.
template <typename T>
__device__ __forceinline__ T add(T x, T residual, float gate) {
  return from_float<T>(__fadd_rn(to_float(residual), __fmul_rn(gate, to_float(x))));
}

// One normed value; `weight` as stored.
template <RowNorm kind>
__device__ __forceinline__ float styled(float normed, float weight, float bias) {
  if constexpr (kind == RowNorm::kLayer) return normed * weight + bias;
  if constexpr (kind == RowNorm::kAda) return normed * (1.0f + weight) + bias;
  return normed * (1.0f + weight);
}

template <typename T, typename Out, RowNorm kind, int Vectors>
__global__ void __launch_bounds__(kMaxThreads) row_norm_vector_kernel(Rows rows) {
  constexpr int N = kElementsPer16Bytes<T>;
  using Row = Vector<T, N>;
  using Result = Vector<Out, N>;
  using Weight = Vector<float, N>;
  constexpr bool kLayer = kind == RowNorm::kLayer, kBiased = kind != RowNorm::kRms;
  __shared__ float scratch[2][kMaxWarpsPerBlock];

  const int width = rows.width;
  const int64_t style = kind == RowNorm::kAda ? blockIdx.x * rows.style_stride : 0;
  const Weight* weights = reinterpret_cast<const Weight*>(rows.weight + style);
  const Weight* biases = reinterpret_cast<const Weight*>(rows.bias + style);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (width / N);
  const Row* x = static_cast<const Row*>(rows.x) + row;
  const Row* residual = static_cast<const Row*>(rows.residual) + row;

  // constants, ahead of the wait for the kernel in front; those of later vectors when they are needed. Styles of a row
  // each are none: the kernel in front may have written them
  Weight first_weight, first_bias;
  const bool constant = kind != RowNorm::kAda || rows.style_stride == 0;
  const auto read_first = [&] {
    if (static_cast<int>(threadIdx.x) >= width / N) return;
    first_weight = weights[threadIdx.x];
    if constexpr (kBiased) first_bias = biases[threadIdx.x];
  };
  if (constant) read_first();
  dependency_wait();
  if (!constant) read_first();
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
      Weight gate;
      if constexpr (kind == RowNorm::kAda) gate = reinterpret_cast<const Weight*>(rows.gate + style)[index];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float factor = kind == RowNorm::kAda ? gate.element[i] : 1.0f;
        total[v].element[i] = add(total[v].element[i], other.element[i], factor);
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
    const Weight weight = v == 0 ? first_weight : weights[index];
    Weight bias = {};
    if constexpr (kBiased) bias = v == 0 ? first_bias : biases[index];
    float values[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float normed = (to_float(total[v].element[i]) - mean) * factor;
      values[i] = rounded<T, Out>(styled<kind>(normed, weight.element[i], bias.element[i]));
    }
    static_cast<Result*>(rows.out)[row + index] = store_all<Out>(values, inverse_scale);
  }
}

template <typename T, typename Out, RowNorm kind>
__global__ void __launch_bounds__(kMaxThreads) row_norm_scalar_kernel(Rows rows) {
  constexpr bool kLayer = kind == RowNorm::kLayer;
  __shared__ float scratch[2][kMaxWarpsPerBlock];
  dependency_wait();
  dependency_release();
  const int width = rows.width;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * width;
  const T* x = static_cast<const T*>(rows.x) + row;
  const T* residual = static_cast<const T*>(rows.residual) + row;
  T* total = static_cast<T*>(rows.total) + row;
  const T* source = rows.residual == nullptr ? x : total;
  const int64_t style = kind == RowNorm::kAda ? blockIdx.x * rows.style_stride : 0;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    if (rows.residual != nullptr)
      total[i] = add(x[i], residual[i], kind == RowNorm::kAda ? rows.gate[style + i] : 1.0f);
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
    const float bias = kind == RowNorm::kRms ? 0.0f : rows.bias[style + i];
    const float value = rounded<T, Out>(styled<kind>(normed, rows.weight[style + i], bias));
    static_cast<Out*>(rows.out)[row + i] = store_as<Out>(value, inverse_scale);
  }
}

int block_threads(int64_t items) {
  const int64_t rounded = (items + kWarpSize - 1) / kWarpSize * kWarpSize;
  return static_cast<int>(rounded < kMaxThreads ? rounded : kMaxThreads);
}

template <typename T, typename Out, RowNorm kind>
cudaError_t launch(const Rows& rows, int64_t count, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(count));
  constexpr int N = kElementsPer16Bytes<T>;
  const int64_t vectors_per_row = rows.width / N;
  const int threads = block_threads(vectors_per_row);
  const int64_t vectors_per_thread = threads > 0 ? (vectors_per_row + threads - 1) / threads : 0;
  const bool whole_vectors = rows.width % N == 0 && aligned_to_16_bytes(rows.x) && aligned_to_16_bytes(rows.residual) &&
                             aligned_to_16_bytes(rows.weight) && aligned_to_16_bytes(rows.bias) &&
                             aligned_to_16_bytes(rows.out) && aligned_to_16_bytes(rows.total) &&
                             aligned_to_16_bytes(rows.gate) && rows.style_stride % 4 == 0;
  if (!whole_vectors || vectors_per_thread > kMaxVectors)
    return launch_dependent(row_norm_scalar_kernel<T, Out, kind>, grid, block_threads(rows.width), 0, stream, rows);
  if (vectors_per_thread == 1)
    return launch_dependent(row_norm_vector_kernel<T, Out, kind, 1>, grid, threads, 0, stream, rows);
  return launch_dependent(row_norm_vector_kernel<T, Out, kind, kMaxVectors>, grid, threads, 0, stream, rows);
}

template <typename T, typename Out>
cudaError_t launch_kind(RowNorm kind, const Rows& rows, int64_t count, cudaStream_t stream) {
  switch (kind) {
    case RowNorm::kRms:
      return launch<T, Out, RowNorm::kRms>(rows, count, stream);
    case RowNorm::kLayer:
      return launch<T, Out, RowNorm::kLayer>(rows, count, stream);
    case RowNorm::kAda:
      return launch<T, Out, RowNorm::kAda>(rows, count, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t row_norm(RowNorm kind, const void* x, const void* residual, const float* gate, const float* weight,
                     const float* bias, const float* scale, void* out, void* total, int64_t style_stride, int64_t rows,
                     int64_t width, float eps, DType dtype, bool half, cudaStream_t stream) {
  if (rows < 0 || rows > INT32_MAX || width < 1 || width > INT32_MAX || style_stride < 0) return cudaErrorInvalidValue;
  const bool gated = kind == RowNorm::kAda && residual != nullptr;
  if (weight == nullptr || (kind != RowNorm::kRms && bias == nullptr) || gated != (gate != nullptr))
    return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  const Rows problem = {x, residual, gate, weight, bias, scale, out, total, style_stride, static_cast<int>(width), eps};
  if (half) {
    if (dtype != DType::kBFloat16 || scale != nullptr) return cudaErrorInvalidValue;
    return launch_kind<__nv_bfloat16, __half>(kind, problem, rows, stream);
  }
  return dispatch(dtype, scale != nullptr, [&](auto type, auto result) {
    return launch_kind<typename decltype(type)::type, typename decltype(result)::type>(kind, problem, rows, stream);
  });
}

}  // namespace flashrt
