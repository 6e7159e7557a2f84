// How a kernel stores its result: rounded to the element type, or as e4m3 of value / scale.
#pragma once

#include <cuda_fp8.h>

#include <type_traits>

#include "vector.cuh"

namespace flashrt {

struct E4M3 {
  uint8_t bits;
};

// Saturating; NaN stays NaN, so a broken activation is not hidden.
__device__ __forceinline__ E4M3 to_e4m3_saturated(float value) {
  return {__nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3)};
}

// `inverse_scale` is 1 / scale and unused where nothing is quantised.
template <typename Out>
__device__ __forceinline__ Out store_as(float value, float inverse_scale) {
  if constexpr (std::is_same_v<Out, E4M3>) {
    return to_e4m3_saturated(value * inverse_scale);
  } else {
    return from_float<Out>(value);
  }
}

template <typename Out>
__device__ __forceinline__ float inverse_scale_of(const float* scale) {
  if constexpr (std::is_same_v<Out, E4M3>) {
    return 1.0f / *scale;
  } else {
    return 1.0f;
  }
}

// Four e4m3 in a word, the first in its lowest byte.
__device__ __forceinline__ uint32_t pack_e4m3(float a, float b, float c, float d) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}

// N values at once: a pair of them is one e4m3 conversion.
template <typename Out, int N>
__device__ __forceinline__ Vector<Out, N> store_all(const float (&values)[N], float inverse_scale) {
  Vector<Out, N> result;
  if constexpr (std::is_same_v<Out, E4M3> && N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4)
      reinterpret_cast<uint32_t*>(&result)[i / 4] =
          pack_e4m3(values[i] * inverse_scale, values[i + 1] * inverse_scale, values[i + 2] * inverse_scale,
                    values[i + 3] * inverse_scale);
  } else if constexpr (std::is_same_v<Out, E4M3> && N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const float2 pair = make_float2(values[i] * inverse_scale, values[i + 1] * inverse_scale);
      const __nv_fp8x2_storage_t bits = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
      result.element[i].bits = static_cast<uint8_t>(bits);
      result.element[i + 1].bits = static_cast<uint8_t>(bits >> 8);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) result.element[i] = store_as<Out>(values[i], inverse_scale);
  }
  return result;
}

template <typename T>
struct Type {
  using type = T;
};

// Call launch(Type<T>, Type<Out>) for the element type of `dtype`, quantised or not.
template <typename Launch>
cudaError_t dispatch(DType dtype, bool quantised, Launch launch) {
  const Type<E4M3> e4m3;
  const auto choose = [&](auto type) { return quantised ? launch(type, e4m3) : launch(type, type); };
  switch (dtype) {
    case DType::kFloat32:
      return choose(Type<float>());
    case DType::kFloat16:
      return choose(Type<__half>());
    case DType::kBFloat16:
      return choose(Type<__nv_bfloat16>());
  }
  return cudaErrorInvalidValue;
}

}  // namespace flashrt
