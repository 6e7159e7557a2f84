// How a warp of a product stores a row of its sums.
//
// Of a tile's row a thread has columns 8 i + lane % 4 * 2 and the next one, for every group i of 8 columns. What a quad
// has of 8 (e4m3) or 4 (bf16) groups it exchanges, so that each thread stores 16 bytes; groups left over go as they
// are. `columns` of the row lie inside the result: a multiple of 16, none where it is not positive.
#pragma once

#include "quantise.cuh"

namespace flashrt {

// Four words a thread between the four threads of a quad: word t of thread q becomes word q of thread t.
__device__ __forceinline__ void quad_transpose(uint32_t (&word)[4]) {
  const bool odd = threadIdx.x % 2 == 1, high = threadIdx.x % 4 >= 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? word[i] : word[i + 1], 1);
    (odd ? word[i] : word[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, high ? word[i] : word[i + 2], 2);
    (high ? word[i] : word[i + 2]) = got;
  }
}

// `value`: this thread's two of each group, as e4m3 of value * inverse_scale.
template <int N>
__device__ __forceinline__ void store_row(const float (&value)[N], uint8_t* row, int columns, float inverse_scale) {
  constexpr int Groups = N / 2;
  static_assert(Groups % 2 == 0, "groups are stored in pairs");
  const int lane = threadIdx.x % 4;
  const auto pair = [&](int group) {
    return pack_e4m3(value[2 * group] * inverse_scale, value[2 * group + 1] * inverse_scale,
                     value[2 * group + 2] * inverse_scale, value[2 * group + 3] * inverse_scale);
  };
#pragma unroll
  for (int i = 0; i + 8 <= Groups; i += 8) {
    uint32_t word[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) word[w] = pair(i + 2 * w);
    quad_transpose(word);
    const int at = i * 8 + lane * 16;
    if (at < columns)
      *reinterpret_cast<uint4*>(row + at) =
          make_uint4(__byte_perm(word[0], word[1], 0x5410), __byte_perm(word[2], word[3], 0x5410),
                     __byte_perm(word[0], word[1], 0x7632), __byte_perm(word[2], word[3], 0x7632));
  }
#pragma unroll
  for (int i = Groups / 8 * 8; i < Groups; i += 2) {
    const uint32_t word = pair(i);
    const int at = i * 8 + lane * 2;
    if (at < columns) {
      *reinterpret_cast<uint16_t*>(row + at) = static_cast<uint16_t>(word);
      *reinterpret_cast<uint16_t*>(row + at + 8) = static_cast<uint16_t>(word >> 16);
    }
  }
}

// The same in bf16.
template <int N>
__device__ __forceinline__ void store_row(const float (&value)[N], __nv_bfloat16* row, int columns, float) {
  constexpr int Groups = N / 2;
  const int lane = threadIdx.x % 4;
  const auto pair = [&](int group) {
    const __nv_bfloat162 packed = __floats2bfloat162_rn(value[2 * group], value[2 * group + 1]);
    return *reinterpret_cast<const uint32_t*>(&packed);
  };
#pragma unroll
  for (int i = 0; i + 4 <= Groups; i += 4) {
    uint32_t word[4] = {pair(i), pair(i + 1), pair(i + 2), pair(i + 3)};
    quad_transpose(word);
    const int at = (i + lane) * 8;
    if (at < columns) *reinterpret_cast<uint4*>(row + at) = make_uint4(word[0], word[1], word[2], word[3]);
  }
#pragma unroll
  for (int i = Groups / 4 * 4; i < Groups; ++i) {
    const int at = i * 8 + lane * 2;
    if (at < columns) *reinterpret_cast<uint32_t*>(row + at) = pair(i);
  }
}

// A matrix of 8 x 8 elements of 16 bits, a row in four neighbouring threads, transposed within a warp.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// Sums whose rows are columns of the result, as where the weights are the product's first operand: `value(i)` gives of
// the rows 8 i + lane % 4 * 2 and the next one of the result, `Groups` times 8 of them, columns lane / 4 and 8 further
// of the warp's 16, in the order row, row's second column, next row, its second column. As e4m3, `out` at the warp's
// first column of row 0; rows from `rows` on are not stored, nor is anything where `inside` is false.
template <int Groups, typename Value>
__device__ __forceinline__ void store_columns(Value value, uint8_t* out, int64_t width, int rows, bool inside) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int first = 0; first < Groups; first += 4) {
    uint32_t word[4] = {};
#pragma unroll
    for (int i = first; i < first + 4 && i < Groups; ++i) {
      const Vector<float, 4> v = value(i);
      // bytes of a row: column 2 c, 2 c + 8, 2 c + 1, 2 c + 9 for thread c of four
      word[i - first] =
          __byte_perm(transposed(pack_e4m3(v.element[0], v.element[1], v.element[2], v.element[3])), 0, 0x3120);
    }
    quad_transpose(word);
    const int group = first + lane % 4, row = group * 8 + lane / 4;
    if (inside && group < Groups && row < rows)
      *reinterpret_cast<uint4*>(out + row * width) =
          make_uint4(__byte_perm(word[0], word[1], 0x5410), __byte_perm(word[2], word[3], 0x5410),
                     __byte_perm(word[0], word[1], 0x7632), __byte_perm(word[2], word[3], 0x7632));
  }
}

}  // namespace flashrt
