// Gather rows of the token embedding, times a factor, behind the image tokens:  out[t] = factor * table[ids[t]].
//
// Shapes: table (vocabulary, width) and out (tokens, width), one 16-bit or 32-bit element type; ids (tokens,) int64 on
// the device. An id outside the vocabulary gives NaN: an error that shows, where a read out of bounds would not.
//
// Bytes moved: 2 * tokens * width * sizeof(T): 48 x 2048 bf16 is 0.4 MB; the launch (2 us) is all there is.
#include "prefix.h"
#include "vector.cuh"

namespace flashrt {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    embed_tokens_kernel(const T* table, const int64_t* ids, T* out, int64_t vocabulary, int width, float factor) {
  const int64_t id = ids[blockIdx.x];
  const bool known = id >= 0 && id < vocabulary;
  for (int i = threadIdx.x; i < width; i += kThreads) {
    const float value = known ? to_float(table[id * width + i]) : __int_as_float(0x7fc00000);
    out[static_cast<int64_t>(blockIdx.x) * width + i] = from_float<T>(value * factor);
  }
}

template <typename T>
cudaError_t launch(const void* table, const int64_t* ids, void* out, int64_t tokens, int64_t vocabulary, int width,
                   float factor, cudaStream_t stream) {
  embed_tokens_kernel<T><<<static_cast<unsigned>(tokens), kThreads, 0, stream>>>(
      static_cast<const T*>(table), ids, static_cast<T*>(out), vocabulary, width, factor);
  return cudaGetLastError();
}

}  // namespace

cudaError_t embed_tokens(const void* table, const int64_t* ids, void* out, int64_t tokens, int64_t vocabulary,
                         int width, float factor, DType dtype, cudaStream_t stream) {
  if (tokens < 0 || tokens > INT32_MAX || width < 1) return cudaErrorInvalidValue;
  if (tokens == 0) return cudaSuccess;
  switch (dtype) {
    case DType::kFloat32:
      return launch<float>(table, ids, out, tokens, vocabulary, width, factor, stream);
    case DType::kFloat16:
      return launch<__half>(table, ids, out, tokens, vocabulary, width, factor, stream);
    case DType::kBFloat16:
      return launch<__nv_bfloat16>(table, ids, out, tokens, vocabulary, width, factor, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace flashrt
