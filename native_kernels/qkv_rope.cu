// Split a fused projection into q, k, v; rotate q and k on half-split pairs; write k and v into the cache:
//   q[t, h], k[slot(t), g] = (a cos - b sin) | (b cos + a sin) with a | b the halves of the head; v[slot(t), g] copied.
//
// Shapes: qkv (tokens, (heads + 2 kv_heads) * head_dim), q (tokens, heads, head_dim), caches (capacity, kv_heads,
// head_dim), one element type; cos, sin (tokens, head_dim / 2) fp32; slot(t) = slots[t] (int64 on the device), or
// start + t without slots. A slot outside the cache is not written.
//
// Bytes moved: each element of qkv read and written once, plus the tables: 560 x 2560 bf16 is 6.3 MB, 1.5 us at
// 4.3 TB/s; in a warm L2 the launch (2 us) is all there is.
#include "dependent_launch.h"
#include "hopper.cuh"
#include "prefix.h"
#include "vector.cuh"

namespace flashrt {
namespace {

constexpr int kThreads = 256;

struct Problem {
  const void* qkv;
  const float* cos;
  const float* sin;
  const int64_t* slots;
  void* q;
  void* k_cache;
  void* v_cache;
  int64_t start, capacity, items;
  int heads, kv_heads, half;
};

// One thread: N elements of each half of one head.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) qkv_rope_kernel(Problem problem) {
  dependency_wait();
  dependency_release();
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= problem.items) return;
  using Part = Vector<T, N>;
  using Angles = Vector<float, N>;
  const int half = problem.half;
  const int parts = half / N;
  const int all_heads = problem.heads + 2 * problem.kv_heads;
  const int offset = static_cast<int>(item % parts) * N;
  const int head = static_cast<int>(item / parts % all_heads);
  const int64_t token = item / parts / all_heads;

  const T* source = static_cast<const T*>(problem.qkv) + (token * all_heads + head) * 2 * half + offset;
  Part first = *reinterpret_cast<const Part*>(source);
  Part second = *reinterpret_cast<const Part*>(source + half);
  if (head < problem.heads + problem.kv_heads) {
    const Angles cos = *reinterpret_cast<const Angles*>(problem.cos + token * half + offset);
    const Angles sin = *reinterpret_cast<const Angles*>(problem.sin + token * half + offset);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float a = to_float(first.element[i]);
      const float b = to_float(second.element[i]);
      // without contraction, as the definition rounds each product
      first.element[i] = from_float<T>(__fsub_rn(__fmul_rn(a, cos.element[i]), __fmul_rn(b, sin.element[i])));
      second.element[i] = from_float<T>(__fadd_rn(__fmul_rn(b, cos.element[i]), __fmul_rn(a, sin.element[i])));
    }
  }
  T* target;
  if (head < problem.heads) {
    target = static_cast<T*>(problem.q) + (token * problem.heads + head) * 2 * half;
  } else {
    const int64_t slot = problem.slots != nullptr ? problem.slots[token] : problem.start + token;
    if (slot < 0 || slot >= problem.capacity) return;
    const int kv_head = head - problem.heads;
    const bool is_k = kv_head < problem.kv_heads;
    target = static_cast<T*>(is_k ? problem.k_cache : problem.v_cache) +
             (slot * problem.kv_heads + kv_head % problem.kv_heads) * 2 * half;
  }
  *reinterpret_cast<Part*>(target + offset) = first;
  *reinterpret_cast<Part*>(target + offset + half) = second;
}

template <typename T>
cudaError_t launch(Problem problem, int64_t tokens, cudaStream_t stream) {
  constexpr int N = kElementsPer16Bytes<T>;
  const bool whole = problem.half % N == 0 && aligned_to_16_bytes(problem.qkv) && aligned_to_16_bytes(problem.q) &&
                     aligned_to_16_bytes(problem.cos) && aligned_to_16_bytes(problem.sin) &&
                     aligned_to_16_bytes(problem.k_cache) && aligned_to_16_bytes(problem.v_cache);
  problem.items = tokens * (problem.heads + 2 * problem.kv_heads) * (problem.half / (whole ? N : 1));
  const dim3 grid(static_cast<unsigned>((problem.items + kThreads - 1) / kThreads));
  return launch_dependent(whole ? qkv_rope_kernel<T, N> : qkv_rope_kernel<T, 1>, grid, kThreads, 0, stream, problem);
}

}  // namespace

cudaError_t qkv_rope(const void* qkv, const float* cos, const float* sin, const int64_t* slots, int64_t start, void* q,
                     void* k_cache, void* v_cache, int64_t capacity, int64_t tokens, int heads, int kv_heads,
                     int head_dim, DType dtype, cudaStream_t stream) {
  if (tokens < 0 || heads < 1 || kv_heads < 1 || head_dim < 2 || head_dim % 2 != 0) return cudaErrorInvalidValue;
  if (tokens == 0) return cudaSuccess;
  const Problem problem = {qkv,   cos,      sin, slots, q,        k_cache,     v_cache,
                           start, capacity, 0,   heads, kv_heads, head_dim / 2};
  switch (dtype) {
    case DType::kFloat32:
      return launch<float>(problem, tokens, stream);
    case DType::kFloat16:
      return launch<__half>(problem, tokens, stream);
    case DType::kBFloat16:
      return launch<__nv_bfloat16>(problem, tokens, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace flashrt
