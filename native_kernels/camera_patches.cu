// Camera images to the vision tower's patches: resize with padding, [-1, 1], and the order of a patch convolution.
//   antialias (openpi): triangle filter of the scale's width, columns then rows, each pass rounded to 8 bits (Pillow)
//   bilinear (LeRobot): the two nearest rows and columns, float32, no rounding
//   out = level / 255 * 2 - 1, black outside the scaled image; or, antialiased, the levels as they are: level - 128.
//
// Shapes: frames: uint8 bytes; view v is RGB (height, width, 3) at frames + offset; views (count, 3) int64 on the
// device: offset, height, width, so any camera size goes without a new graph. out (count, (size / patch)^2,
// 3 * patch^2) fp32, element order channel, row, column; levels are fp16, which holds them exactly, each patch padded
// by zeros to whole 16 bytes.
//
// Bytes moved: every pixel once and the output once: two 640 x 480 views are 1.8 MB in, 1.2 MB out: 0.7 us at 4.3
// TB/s; the filter's arithmetic (about 7 x 7 taps a pixel there) makes it about 5 us.
#include "dependent_launch.h"
#include "hopper.cuh"
#include "prefix.h"
#include "vector.cuh"

namespace flashrt {
namespace {

constexpr int kThreads = 128;

struct Taps {
  int first, count;
  float centre, support, inverse_scale, total;
};

__device__ __forceinline__ float triangle(const Taps& taps, int source) {
  return fmaxf(0.0f, 1.0f - fabsf((source + 0.5f - taps.centre) * taps.inverse_scale));
}

// The source pixels of output pixel `target` of `out_size` from `in_size`, antialiased.
__device__ __forceinline__ Taps make_taps(int target, int in_size, int out_size) {
  const float scale = static_cast<float>(in_size) / out_size;
  Taps taps;
  taps.support = fmaxf(scale, 1.0f);
  taps.inverse_scale = 1.0f / taps.support;
  taps.centre = scale * (target + 0.5f);
  taps.first = max(static_cast<int>(taps.centre - taps.support + 0.5f), 0);
  taps.count = min(static_cast<int>(taps.centre + taps.support + 0.5f), in_size) - taps.first;
  taps.total = 0.0f;
  for (int i = 0; i < taps.count; ++i) taps.total += triangle(taps, taps.first + i);
  return taps;
}

__device__ __forceinline__ float to_level(float value) { return fminf(fmaxf(floorf(value + 0.5f), 0.0f), 255.0f); }

__device__ void antialiased(const uint8_t* image, int height, int width, int row, int column, int rows, int columns,
                            float (&level)[3]) {
  const Taps across = make_taps(column, width, columns);
  const Taps down = make_taps(row, height, rows);
  float sum[3] = {0.0f, 0.0f, 0.0f};
  for (int j = 0; j < down.count; ++j) {
    const uint8_t* line = image + (static_cast<int64_t>(down.first + j) * width + across.first) * 3;
    float inner[3] = {0.0f, 0.0f, 0.0f};
    for (int i = 0; i < across.count; ++i) {
      const float weight = triangle(across, across.first + i);
#pragma unroll
      for (int c = 0; c < 3; ++c) inner[c] += weight * line[3 * i + c];
    }
    const float weight = triangle(down, down.first + j);
#pragma unroll
    for (int c = 0; c < 3; ++c) sum[c] += weight * to_level(inner[c] / across.total);
  }
#pragma unroll
  for (int c = 0; c < 3; ++c) level[c] = to_level(sum[c] / down.total);
}

__device__ __forceinline__ void nearest_two(int target, int in_size, int out_size, int& low, int& high, float& weight) {
  const float source = fmaxf((static_cast<float>(in_size) / out_size) * (target + 0.5f) - 0.5f, 0.0f);
  low = min(static_cast<int>(source), in_size - 1);
  high = min(low + 1, in_size - 1);
  weight = source - low;
}

__device__ void bilinear(const uint8_t* image, int height, int width, int row, int column, int rows, int columns,
                         float (&level)[3]) {
  int left, right, top, bottom;
  float across, down;
  nearest_two(column, width, columns, left, right, across);
  nearest_two(row, height, rows, top, bottom, down);
  const uint8_t* upper = image + static_cast<int64_t>(top) * width * 3;
  const uint8_t* lower = image + static_cast<int64_t>(bottom) * width * 3;
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    const float above = (1.0f - across) * upper[3 * left + c] + across * upper[3 * right + c];
    const float below = (1.0f - across) * lower[3 * left + c] + across * lower[3 * right + c];
    level[c] = (1.0f - down) * above + down * below;
  }
}

template <bool kLevels>
__global__ void __launch_bounds__(kThreads)
    camera_patches_kernel(const uint8_t* frames, const int64_t* views, void* out, int size, int patch, bool antialias) {
  dependency_wait();
  dependency_release();
  const int pixel = blockIdx.x * kThreads + threadIdx.x;
  if (pixel >= size * size) return;
  const int64_t* view = views + 3 * blockIdx.y;
  const uint8_t* image = frames + view[0];
  const int height = static_cast<int>(view[1]);
  const int width = static_cast<int>(view[2]);
  // the host computes the same in double: scaled to fit, rounded down
  const double ratio = fmax(static_cast<double>(width) / size, static_cast<double>(height) / size);
  const int rows = static_cast<int>(height / ratio);
  const int columns = static_cast<int>(width / ratio);
  const int row = pixel / size - (size - rows) / 2;
  const int column = pixel % size - (size - columns) / 2;

  float level[3] = {0.0f, 0.0f, 0.0f};
  if (row >= 0 && row < rows && column >= 0 && column < columns) {
    if (antialias) {
      antialiased(image, height, width, row, column, rows, columns, level);
    } else {
      bilinear(image, height, width, row, column, rows, columns, level);
    }
  }
  const int side = size / patch;
  const int y = pixel / size;
  const int x = pixel % size;
  const int64_t token = static_cast<int64_t>(blockIdx.y) * side * side + (y / patch) * side + x / patch;
  const int area = patch * patch, at = (y % patch) * patch + x % patch;
  if constexpr (kLevels) {
    const int padded = (3 * area + 7) / 8 * 8;
    __half* target = static_cast<__half*>(out) + token * padded;
#pragma unroll
    for (int c = 0; c < 3; ++c) target[c * area + at] = __float2half_rn(level[c] - 128.0f);
    if (at < padded - 3 * area) target[3 * area + at] = __float2half_rn(0.0f);
  } else {
    float* target = static_cast<float*>(out) + token * 3 * area + at;
#pragma unroll
    for (int c = 0; c < 3; ++c) target[c * area] = level[c] / 255.0f * 2.0f - 1.0f;
  }
}

}  // namespace

cudaError_t camera_patches(const uint8_t* frames, const int64_t* views, void* out, int count, int size, int patch,
                           bool antialias, bool levels, cudaStream_t stream) {
  if (count < 1 || size < 1 || patch < 1 || size % patch != 0) return cudaErrorInvalidValue;
  if (levels && (!antialias || patch * patch < 7)) return cudaErrorInvalidValue;  // whole numbers; all of the padding
  const dim3 grid((size * size + kThreads - 1) / kThreads, count);
  return launch_dependent(levels ? camera_patches_kernel<true> : camera_patches_kernel<false>, grid, kThreads, 0,
                          stream, frames, views, out, size, patch, antialias);
}

}  // namespace flashrt
