// Python bindings of the vision tower's and the prefix's kernels; see bindings.cpp for the conventions.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "prefix.h"

namespace py = pybind11;

namespace {

cudaStream_t stream_of(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

flashrt::DType dtype_of(int code) { return static_cast<flashrt::DType>(code); }

void row_norm(int kind, uintptr_t x, uintptr_t residual, uintptr_t gate, uintptr_t weight, uintptr_t bias,
              uintptr_t scale, uintptr_t out, uintptr_t total, int64_t style_stride, int64_t rows, int64_t width,
              float eps, int dtype, bool half, uintptr_t stream) {
  check(flashrt::row_norm(static_cast<flashrt::RowNorm>(kind), pointer(x), pointer(residual), pointer<float>(gate),
                          pointer<float>(weight), pointer<float>(bias), pointer<float>(scale), pointer(out),
                          pointer(total), style_stride, rows, width, eps, dtype_of(dtype), half, stream_of(stream)),
        "row_norm");
}

void activation(int kind, uintptr_t x, uintptr_t out, uintptr_t scale, int64_t rows, int64_t width, int dtype,
                uintptr_t stream) {
  check(flashrt::activation(static_cast<flashrt::Activation>(kind), pointer(x), pointer(out), pointer<float>(scale),
                            rows, width, dtype_of(dtype), stream_of(stream)),
        "activation");
}

void geglu_product(uintptr_t x, uintptr_t w, uintptr_t x_scale, uintptr_t w_scale, uintptr_t scale, uintptr_t out,
                   int64_t rows, int64_t width, int64_t depth, uintptr_t stream) {
  check(flashrt::geglu_product(pointer(x), pointer(w), pointer<float>(x_scale), pointer<float>(w_scale),
                               pointer<float>(scale), pointer(out), rows, width, depth, stream_of(stream)),
        "geglu_product");
}

void linear_product(uintptr_t x, uintptr_t w, uintptr_t bias, uintptr_t x_scale, uintptr_t w_scale, uintptr_t scale,
                    uintptr_t out, int64_t rows, int64_t width, int64_t depth, uintptr_t stream) {
  check(flashrt::linear_product(pointer(x), pointer(w), pointer(bias), pointer<float>(x_scale), pointer<float>(w_scale),
                                pointer<float>(scale), pointer(out), rows, width, depth, stream_of(stream)),
        "linear_product");
}

void qkv_rope(uintptr_t qkv, uintptr_t cos, uintptr_t sin, uintptr_t slots, int64_t start, uintptr_t q,
              uintptr_t k_cache, uintptr_t v_cache, int64_t capacity, int64_t tokens, int heads, int kv_heads,
              int head_dim, int dtype, uintptr_t stream) {
  check(flashrt::qkv_rope(pointer(qkv), pointer<float>(cos), pointer<float>(sin), pointer<int64_t>(slots), start,
                          pointer(q), pointer(k_cache), pointer(v_cache), capacity, tokens, heads, kv_heads, head_dim,
                          dtype_of(dtype), stream_of(stream)),
        "qkv_rope");
}

void prefix_attention(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t valid, uintptr_t scale, uintptr_t out,
                      int64_t rows, int64_t keys, uintptr_t stream) {
  check(flashrt::prefix_attention(pointer(q), pointer(k), pointer(v), pointer<int>(valid), pointer<float>(scale),
                                  pointer(out), rows, keys, stream_of(stream)),
        "prefix_attention");
}

void vision_attention(uintptr_t qkv, uintptr_t scale, uintptr_t out, int64_t views, int64_t heads, uintptr_t stream) {
  check(flashrt::vision_attention(pointer(qkv), pointer<float>(scale), pointer(out), views, heads, stream_of(stream)),
        "vision_attention");
}

void camera_patches(uintptr_t frames, uintptr_t views, uintptr_t out, int count, int size, int patch, bool antialias,
                    bool levels, uintptr_t stream) {
  check(flashrt::camera_patches(pointer<uint8_t>(frames), pointer<int64_t>(views), pointer(out), count, size, patch,
                                antialias, levels, stream_of(stream)),
        "camera_patches");
}

void patch_product(uintptr_t x, uintptr_t w, uintptr_t table, float factor, uintptr_t out, int64_t rows, int64_t width,
                   int64_t depth, int64_t tokens, uintptr_t stream) {
  check(flashrt::patch_product(pointer(x), pointer(w), pointer<float>(table), factor, pointer(out), rows, width, depth,
                               tokens, stream_of(stream)),
        "patch_product");
}

void embed_tokens(uintptr_t table, uintptr_t ids, uintptr_t out, int64_t tokens, int64_t vocabulary, int width,
                  float factor, int dtype, uintptr_t stream) {
  check(flashrt::embed_tokens(pointer(table), pointer<int64_t>(ids), pointer(out), tokens, vocabulary, width, factor,
                              dtype_of(dtype), stream_of(stream)),
        "embed_tokens");
}

}  // namespace

void bind_prefix(py::module_& module) {
  module.def("row_norm", &row_norm);
  module.def("activation", &activation);
  module.def("geglu_product", &geglu_product);
  module.def("linear_product", &linear_product);
  module.def("qkv_rope", &qkv_rope);
  module.def("prefix_attention", &prefix_attention);
  module.def("vision_attention", &vision_attention);
  module.def("camera_patches", &camera_patches);
  module.def("patch_product", &patch_product);
  module.def("embed_tokens", &embed_tokens);
}
