// Python bindings of the kernels: tensors come as device addresses, the stream as an integer, dtypes as codes.
// No torch headers, so one build serves every torch release. Shapes and dtypes are checked in ops/native.py.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "flashrt_native.h"

namespace py = pybind11;

namespace {

void check(cudaError_t status, const char* operation) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(operation) + ": " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status));
}

template <typename T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void add_rms_norm(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t out, uintptr_t residual_out,
                  int64_t rows, int64_t width, float eps, int dtype, int weight_dtype, uintptr_t stream) {
  check(flashrt::add_rms_norm(pointer(x), pointer(residual), pointer(weight), pointer(out), pointer(residual_out), rows,
                              width, eps, static_cast<flashrt::DType>(dtype), static_cast<flashrt::DType>(weight_dtype),
                              reinterpret_cast<cudaStream_t>(stream)),
        "add_rms_norm");
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "CUDA kernels of flashrt_runtime; use flashrt_runtime.ops.native";
  module.attr("interface_version") = flashrt::kInterfaceVersion;
  module.def("check_device", [] { check(flashrt::device_supported(), "native kernels"); });
  module.def("add_rms_norm", &add_rms_norm, py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("out"),
             py::arg("residual_out"), py::arg("rows"), py::arg("width"), py::arg("eps"), py::arg("dtype"),
             py::arg("weight_dtype"), py::arg("stream"));
}
