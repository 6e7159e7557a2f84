// Python bindings of the kernels: tensors come as device addresses, the stream as an integer, dtypes as codes.
// No torch headers, so one build serves every torch release. Shapes and dtypes are checked in ops/native.py.
#include "bindings.h"

#include <pybind11/pybind11.h>

#include "expert.h"
#include "flashrt_native.h"

namespace py = pybind11;

void bind_prefix(py::module_& module);  // bindings_prefix.cpp
void bind_upload(py::module_& module);  // bindings_upload.cpp

namespace {

void add_rms_norm(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t out, uintptr_t residual_out,
                  int64_t rows, int64_t width, float eps, int dtype, int weight_dtype, uintptr_t stream) {
  check(flashrt::add_rms_norm(pointer(x), pointer(residual), pointer(weight), pointer(out), pointer(residual_out), rows,
                              width, eps, static_cast<flashrt::DType>(dtype), static_cast<flashrt::DType>(weight_dtype),
                              reinterpret_cast<cudaStream_t>(stream)),
        "add_rms_norm");
}

void skinny_gemm(bool fp8, bool wide, int epilogue, int rows, int n, int k, uintptr_t x, uintptr_t weights,
                 uintptr_t norm_scale, uintptr_t norm_shift, float eps, uintptr_t x_scale, uintptr_t w_scale,
                 uintptr_t out_scale, uintptr_t bias, uintptr_t gate, uintptr_t out, uintptr_t rope_cos,
                 uintptr_t rope_sin, uintptr_t prefix_length, uintptr_t k_cache, uintptr_t v_cache, int heads,
                 int kv_heads, int head_dim, uintptr_t stream) {
  flashrt::SkinnyGemm problem = {};
  problem.fp8 = fp8;
  problem.wide = wide;
  problem.epilogue = static_cast<flashrt::SkinnyEpilogue>(epilogue);
  problem.rows = rows;
  problem.n = n;
  problem.k = k;
  problem.x = pointer(x);
  problem.weights = pointer(weights);
  problem.norm_scale = pointer<float>(norm_scale);
  problem.norm_shift = pointer<float>(norm_shift);
  problem.eps = eps;
  problem.x_scale = pointer<float>(x_scale);
  problem.w_scale = pointer<float>(w_scale);
  problem.out_scale = pointer<float>(out_scale);
  problem.bias = pointer<float>(bias);
  problem.gate = pointer<float>(gate);
  problem.out = pointer(out);
  problem.rope_cos = pointer<float>(rope_cos);
  problem.rope_sin = pointer<float>(rope_sin);
  problem.prefix_length = pointer<int>(prefix_length);
  problem.k_cache = pointer(k_cache);
  problem.v_cache = pointer(v_cache);
  problem.heads = heads;
  problem.kv_heads = kv_heads;
  problem.head_dim = head_dim;
  check(flashrt::skinny_gemm(problem, reinterpret_cast<cudaStream_t>(stream)), "skinny_gemm");
}

void expert_attention(bool fp8_out, int rows, int heads, int kv_heads, uintptr_t q, uintptr_t k_cache,
                      uintptr_t v_cache, uintptr_t prefix_length, int capacity, uintptr_t out_scale, uintptr_t out,
                      uintptr_t scratch, uintptr_t stream) {
  flashrt::ExpertAttention problem = {};
  problem.fp8_out = fp8_out;
  problem.rows = rows;
  problem.heads = heads;
  problem.kv_heads = kv_heads;
  problem.q = pointer(q);
  problem.k_cache = pointer(k_cache);
  problem.v_cache = pointer(v_cache);
  problem.prefix_length = pointer<int>(prefix_length);
  problem.capacity = capacity;
  problem.out_scale = pointer<float>(out_scale);
  problem.out = pointer(out);
  problem.scratch = pointer(scratch);
  check(flashrt::expert_attention(problem, reinterpret_cast<cudaStream_t>(stream)), "expert_attention");
}

void action_step(int rows, int width, int action_dim, uintptr_t hidden, uintptr_t norm_scale, uintptr_t norm_shift,
                 float eps, uintptr_t out_weight, uintptr_t out_bias, float dt, uintptr_t guide_gain,
                 uintptr_t guide_weight, uintptr_t guide_target, float time, uintptr_t x, uintptr_t in_weight,
                 uintptr_t in_bias, bool silu, uintptr_t next, uintptr_t stream) {
  flashrt::ActionStep problem = {};
  problem.rows = rows;
  problem.width = width;
  problem.action_dim = action_dim;
  problem.hidden = pointer(hidden);
  problem.norm_scale = pointer<float>(norm_scale);
  problem.norm_shift = pointer<float>(norm_shift);
  problem.eps = eps;
  problem.out_weight = pointer<float>(out_weight);
  problem.out_bias = pointer<float>(out_bias);
  problem.dt = dt;
  problem.guide_gain = pointer<float>(guide_gain);
  problem.guide_weight = pointer<float>(guide_weight);
  problem.guide_target = pointer<float>(guide_target);
  problem.time = time;
  problem.x = pointer<float>(x);
  problem.in_weight = pointer<float>(in_weight);
  problem.in_bias = pointer<float>(in_bias);
  problem.silu = silu;
  problem.next = pointer(next);
  check(flashrt::action_step(problem, reinterpret_cast<cudaStream_t>(stream)), "action_step");
}

void guide_velocity(uintptr_t velocity, uintptr_t x, uintptr_t target, uintptr_t weight, uintptr_t gain, float time,
                    uintptr_t out, int rows, int width, uintptr_t stream) {
  check(flashrt::guide_velocity(pointer<float>(velocity), pointer<float>(x), pointer<float>(target),
                                pointer<float>(weight), pointer<float>(gain), time, pointer<float>(out), rows, width,
                                reinterpret_cast<cudaStream_t>(stream)),
        "guide_velocity");
}

void expert_steps(bool fp8, bool fill, bool unpaired, int rows, int layers, int steps, int action_dim, uintptr_t qkv,
                  uintptr_t out, uintptr_t gate_up, uintptr_t down, uintptr_t weight_scale, uintptr_t input_scale,
                  uintptr_t norm_scale, uintptr_t norm_shift, uintptr_t gate, int64_t step_stride, int64_t norm_stride,
                  uintptr_t shift_products, float eps, uintptr_t rope_cos, uintptr_t rope_sin, uintptr_t prefix_length,
                  uintptr_t k_cache, uintptr_t v_cache, int capacity, uintptr_t x, uintptr_t in_weight,
                  uintptr_t in_bias, int64_t in_bias_stride, uintptr_t out_weight, uintptr_t out_bias,
                  uintptr_t mix_weights, uintptr_t mix_bias, uintptr_t guide_gain, uintptr_t guide_weight,
                  uintptr_t guide_target, uintptr_t exchange, uintptr_t barrier, uintptr_t stream) {
  flashrt::ExpertSteps problem = {};
  problem.fp8 = fp8;
  problem.fill = fill;
  problem.unpaired = unpaired;
  problem.rows = rows;
  problem.layers = layers;
  problem.steps = steps;
  problem.action_dim = action_dim;
  problem.weights[flashrt::kQkv] = pointer(qkv);
  problem.weights[flashrt::kOut] = pointer(out);
  problem.weights[flashrt::kGateUp] = pointer(gate_up);
  problem.weights[flashrt::kDown] = pointer(down);
  problem.weight_scale = pointer<float>(weight_scale);
  problem.input_scale = pointer<float>(input_scale);
  problem.norm_scale = pointer<float>(norm_scale);
  problem.norm_shift = pointer<float>(norm_shift);
  problem.gate = pointer<float>(gate);
  problem.step_stride = step_stride;
  problem.norm_stride = norm_stride;
  problem.shift_products = pointer<float>(shift_products);
  problem.eps = eps;
  problem.rope_cos = pointer<float>(rope_cos);
  problem.rope_sin = pointer<float>(rope_sin);
  problem.prefix_length = pointer<int>(prefix_length);
  problem.k_cache = pointer(k_cache);
  problem.v_cache = pointer(v_cache);
  problem.capacity = capacity;
  problem.x = pointer<float>(x);
  problem.in_weight = pointer<float>(in_weight);
  problem.in_bias = pointer<float>(in_bias);
  problem.in_bias_stride = in_bias_stride;
  problem.out_weight = pointer<float>(out_weight);
  problem.out_bias = pointer<float>(out_bias);
  problem.mix_weights = pointer(mix_weights);
  problem.mix_bias = pointer<float>(mix_bias);
  problem.guide_gain = pointer<float>(guide_gain);
  problem.guide_weight = pointer<float>(guide_weight);
  problem.guide_target = pointer<float>(guide_target);
  problem.exchange = pointer(exchange);
  problem.barrier = pointer<unsigned>(barrier);
  check(flashrt::expert_steps(problem, reinterpret_cast<cudaStream_t>(stream)), "expert_steps");
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "CUDA kernels of flashrt_runtime; use flashrt_runtime.ops.native";
  module.attr("interface_version") = flashrt::kInterfaceVersion;
#ifdef FLASHRT_AS_SMALL_GPU
  module.attr("as_small_gpu") = true;
#else
  module.attr("as_small_gpu") = false;
#endif
  bind_prefix(module);
  bind_upload(module);
  module.def("check_device", [] { check(flashrt::device_supported(), "native kernels"); });
  module.def("add_rms_norm", &add_rms_norm, py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("out"),
             py::arg("residual_out"), py::arg("rows"), py::arg("width"), py::arg("eps"), py::arg("dtype"),
             py::arg("weight_dtype"), py::arg("stream"));
  module.def("skinny_gemm", &skinny_gemm, py::arg("fp8"), py::arg("wide"), py::arg("epilogue"), py::arg("rows"),
             py::arg("n"), py::arg("k"), py::arg("x"), py::arg("weights"), py::arg("norm_scale"), py::arg("norm_shift"),
             py::arg("eps"), py::arg("x_scale"), py::arg("w_scale"), py::arg("out_scale"), py::arg("bias"),
             py::arg("gate"), py::arg("out"), py::arg("rope_cos"), py::arg("rope_sin"), py::arg("prefix_length"),
             py::arg("k_cache"), py::arg("v_cache"), py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"),
             py::arg("stream"));
  module.def("expert_attention", &expert_attention, py::arg("fp8_out"), py::arg("rows"), py::arg("heads"),
             py::arg("kv_heads"), py::arg("q"), py::arg("k_cache"), py::arg("v_cache"), py::arg("prefix_length"),
             py::arg("capacity"), py::arg("out_scale"), py::arg("out"), py::arg("scratch"), py::arg("stream"));
  module.def("expert_attention_bytes", &flashrt::expert_attention_bytes, py::arg("rows"), py::arg("heads"),
             py::arg("capacity"));
  module.def("expert_attention_in_clusters", &flashrt::expert_attention_in_clusters, py::arg("rows"),
             py::arg("capacity"));
  module.def("action_step", &action_step, py::arg("rows"), py::arg("width"), py::arg("action_dim"), py::arg("hidden"),
             py::arg("norm_scale"), py::arg("norm_shift"), py::arg("eps"), py::arg("out_weight"), py::arg("out_bias"),
             py::arg("dt"), py::arg("guide_gain"), py::arg("guide_weight"), py::arg("guide_target"), py::arg("time"),
             py::arg("x"), py::arg("in_weight"), py::arg("in_bias"), py::arg("silu"), py::arg("next"),
             py::arg("stream"));
  module.def("guide_velocity", &guide_velocity, py::arg("velocity"), py::arg("x"), py::arg("target"), py::arg("weight"),
             py::arg("gain"), py::arg("time"), py::arg("out"), py::arg("rows"), py::arg("width"), py::arg("stream"));
  module.def(
      "expert_steps", &expert_steps, py::arg("fp8"), py::arg("fill"), py::arg("unpaired"), py::arg("rows"),
      py::arg("layers"), py::arg("steps"), py::arg("action_dim"), py::arg("qkv"), py::arg("out"), py::arg("gate_up"),
      py::arg("down"), py::arg("weight_scale"), py::arg("input_scale"), py::arg("norm_scale"), py::arg("norm_shift"),
      py::arg("gate"), py::arg("step_stride"), py::arg("norm_stride"), py::arg("shift_products"), py::arg("eps"),
      py::arg("rope_cos"), py::arg("rope_sin"), py::arg("prefix_length"), py::arg("k_cache"), py::arg("v_cache"),
      py::arg("capacity"), py::arg("x"), py::arg("in_weight"), py::arg("in_bias"), py::arg("in_bias_stride"),
      py::arg("out_weight"), py::arg("out_bias"), py::arg("mix_weights"), py::arg("mix_bias"), py::arg("guide_gain"),
      py::arg("guide_weight"), py::arg("guide_target"), py::arg("exchange"), py::arg("barrier"), py::arg("stream"));
  module.def("expert_exchange_bytes", &flashrt::expert_exchange_bytes, py::arg("rows"));
}
