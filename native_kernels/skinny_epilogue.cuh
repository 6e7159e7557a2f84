// What the skinny GEMM does with its sums: the operands that an output element needs beside them, and the store.
#pragma once

#include "skinny_rows.cuh"

namespace flashrt {
namespace skinny {

template <bool Fp8>
__device__ __forceinline__ void store_quantised(void* out, int64_t index, float value, float inverse_scale) {
  const __nv_bfloat16 rounded = from_float<__nv_bfloat16>(value);
  if constexpr (Fp8) {
    static_cast<uint8_t*>(out)[index] = to_e4m3(to_float(rounded) * inverse_scale);
  } else {
    static_cast<__nv_bfloat16*>(out)[index] = rounded;
  }
}

// What an output element needs beside the product, read ahead so that no load stands between product and store.
struct Operands {
  float first = 0.0f, second = 0.0f;  // kStore: bias; kResidual: gate, residual; kRope: cosine, sine
  int position = 0;                   // kRope: slot in the cache
};

struct Element {
  int m, n;  // row; first feature (kStore, kResidual, kGeglu), or the dimension within its head (kRope)
  int head;  // kRope
  __device__ __forceinline__ Element(const SkinnyGemm& p, bool rope, int unit, int element) {
    m = element / kTileFeatures;
    const int units_per_head = rope ? p.head_dim / (2 * kTileFeatures) : 1;
    head = rope ? unit / units_per_head : 0;
    n = (rope ? unit % units_per_head : unit) * kTileFeatures + element % kTileFeatures;
  }
};

// The operands that no kernel of the chain writes.
template <SkinnyEpilogue E>
__device__ __forceinline__ void load_constant(const SkinnyGemm& p, const Element& e, Operands& operands) {
  if constexpr (E == SkinnyEpilogue::kStore) {
    operands.first = p.bias != nullptr ? p.bias[e.n] : 0.0f;
  } else if constexpr (E == SkinnyEpilogue::kResidual) {
    operands.first = p.gate != nullptr ? p.gate[e.n] : 1.0f;
  } else if constexpr (E == SkinnyEpilogue::kRope) {
    operands.position = *p.prefix_length + e.m;
    const int64_t index = int64_t(operands.position) * (p.head_dim / 2) + e.n;
    operands.first = p.rope_cos[index];
    operands.second = p.rope_sin[index];
  }
}

template <SkinnyEpilogue E>
__device__ __forceinline__ void load_residual(const SkinnyGemm& p, const Element& e, Operands& operands) {
  if constexpr (E == SkinnyEpilogue::kResidual)
    operands.second = to_float(static_cast<const __nv_bfloat16*>(p.out)[int64_t(e.m) * p.n + e.n]);
}

// Store one output element, or the two of a paired epilogue.
template <bool Fp8, SkinnyEpilogue E>
__device__ __forceinline__ void finish(const SkinnyGemm& p, const Element& e, const Operands& operands, float first,
                                       float second, float inverse_out_scale) {
  __nv_bfloat16* out = static_cast<__nv_bfloat16*>(p.out);
  if constexpr (E == SkinnyEpilogue::kStore) {
    out[int64_t(e.m) * p.n + e.n] = from_float<__nv_bfloat16>(first + operands.first);
  } else if constexpr (E == SkinnyEpilogue::kResidual) {
    out[int64_t(e.m) * p.n + e.n] = from_float<__nv_bfloat16>(operands.second + operands.first * first);
  } else if constexpr (E == SkinnyEpilogue::kGeglu) {
    store_quantised<Fp8>(p.out, int64_t(e.m) * (p.n / 2) + e.n, gelu_tanh(first) * second, inverse_out_scale);
  } else {
    const int half = p.head_dim / 2, first_k = p.heads, first_v = p.heads + p.kv_heads;
    if (e.head < first_v) {
      const float rotated = first * operands.first - second * operands.second;
      second = second * operands.first + first * operands.second;
      first = rotated;
    }
    __nv_bfloat16* target;
    if (e.head < first_k) {
      target = out + (int64_t(e.m) * p.heads + e.head) * p.head_dim;
    } else {
      void* cache = e.head < first_v ? p.k_cache : p.v_cache;
      const int kv_head = e.head - (e.head < first_v ? first_k : first_v);
      target = static_cast<__nv_bfloat16*>(cache) + (int64_t(operands.position) * p.kv_heads + kv_head) * p.head_dim;
    }
    target[e.n] = from_float<__nv_bfloat16>(first);
    target[e.n + half] = from_float<__nv_bfloat16>(second);
  }
}

}  // namespace skinny
}  // namespace flashrt
