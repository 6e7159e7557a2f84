// FP8 products through cuBLASLt, with what torch's front end does not offer: the choice among algorithms by
// measurement, and bias + GELU + quantisation to e4m3 in the product's epilogue.
//   out = epilogue(x_scale * w_scale * x @ weight^T + bias)       x (m, k) and weight (n, k) e4m3, row-major
// Bytes moved: m * k + n * k + m * n * sizeof(out); 512 x 4304 x 1152 to e4m3 is 7.8 MB and 5.1 GFLOP: 3.2 us at
// 1.58 PFLOP/s.
//
// The library is the one that torch has loaded into the process, so no second copy is linked or shipped.
#include <cublasLt.h>
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "prefix.h"

namespace py = pybind11;

namespace {

#define FLASHRT_STRING(x) #x
#define FLASHRT_SONAME(major) "libcublasLt.so." FLASHRT_STRING(major)

// The entry points used, resolved once.
struct Library {
  decltype(&cublasLtCreate) create;
  decltype(&cublasLtGetVersion) version;
  decltype(&cublasLtMatmulDescCreate) desc_create;
  decltype(&cublasLtMatmulDescDestroy) desc_destroy;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set;
  decltype(&cublasLtMatrixLayoutCreate) layout_create;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
  decltype(&cublasLtMatmul) matmul;
  cublasLtHandle_t handle;
};

void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS) {
    throw std::runtime_error(std::string("cuBLASLt ") + what + ": status " + std::to_string(static_cast<int>(status)));
  }
}

const Library& library() {
  static const Library loaded = [] {
    const char* name = FLASHRT_SONAME(CUBLAS_VER_MAJOR);
    void* module = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
    if (module == nullptr) module = dlopen(name, RTLD_LAZY);
    if (module == nullptr) throw std::runtime_error(std::string("cannot load ") + name);
    Library found = {};
    const auto resolve = [&](auto& entry, const char* symbol) {
      entry = reinterpret_cast<std::decay_t<decltype(entry)>>(dlsym(module, symbol));
      if (entry == nullptr) throw std::runtime_error(std::string(name) + " has no " + symbol);
    };
    resolve(found.create, "cublasLtCreate");
    resolve(found.version, "cublasLtGetVersion");
    resolve(found.desc_create, "cublasLtMatmulDescCreate");
    resolve(found.desc_destroy, "cublasLtMatmulDescDestroy");
    resolve(found.desc_set, "cublasLtMatmulDescSetAttribute");
    resolve(found.layout_create, "cublasLtMatrixLayoutCreate");
    resolve(found.layout_destroy, "cublasLtMatrixLayoutDestroy");
    resolve(found.preference_create, "cublasLtMatmulPreferenceCreate");
    resolve(found.preference_destroy, "cublasLtMatmulPreferenceDestroy");
    resolve(found.preference_set, "cublasLtMatmulPreferenceSetAttribute");
    resolve(found.heuristic, "cublasLtMatmulAlgoGetHeuristic");
    resolve(found.matmul, "cublasLtMatmul");
    check(found.create(&found.handle), "create");
    return found;
  }();
  return loaded;
}

// One shape with one epilogue, and the algorithms that the library proposes for it. cuBLASLt is column-major: the
// product is computed as out^T = weight x^T, whose "rows" are our columns.
class LtMatmul {
 public:
  LtMatmul(int m, int n, int k, bool bias, bool gelu, bool quantised, size_t workspace) : quantised_(quantised) {
    const Library& lt = library();
    const cudaDataType_t out_type = quantised ? CUDA_R_8F_E4M3 : CUDA_R_16BF;
    check(lt.desc_create(&desc_, CUBLAS_COMPUTE_32F, CUDA_R_32F), "descriptor");
    set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
    set(CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, static_cast<int8_t>(1));
    const cublasLtEpilogue_t epilogue = gelu   ? (bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU)
                                        : bias ? CUBLASLT_EPILOGUE_BIAS
                                               : CUBLASLT_EPILOGUE_DEFAULT;
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
    if (bias) set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, CUDA_R_16BF);
    // the heuristic looks at whether pointers are set, not at where they point
    set_pointers(16, 16, bias ? 16 : 0, 16);
    check(lt.layout_create(&weight_, CUDA_R_8F_E4M3, k, n, k), "layout");
    check(lt.layout_create(&x_, CUDA_R_8F_E4M3, k, m, k), "layout");
    check(lt.layout_create(&c_, CUDA_R_16BF, n, m, n), "layout");
    check(lt.layout_create(&out_, out_type, n, m, n), "layout");
    cublasLtMatmulPreference_t preference;
    check(lt.preference_create(&preference), "preference");
    check(lt.preference_set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof(workspace)),
          "workspace");
    algorithms_.resize(kProposals);
    int found = 0;
    const cublasStatus_t status =
        lt.heuristic(lt.handle, desc_, weight_, x_, c_, out_, preference, kProposals, algorithms_.data(), &found);
    lt.preference_destroy(preference);
    algorithms_.resize(status == CUBLAS_STATUS_SUCCESS ? found : 0);  // a shape or epilogue it does not have
  }

  ~LtMatmul() {
    const Library& lt = library();
    for (cublasLtMatrixLayout_t layout : {weight_, x_, c_, out_}) lt.layout_destroy(layout);
    lt.desc_destroy(desc_);
  }

  LtMatmul(const LtMatmul&) = delete;
  LtMatmul& operator=(const LtMatmul&) = delete;

  size_t count() const { return algorithms_.size(); }

  void run(size_t algorithm, uintptr_t x, uintptr_t weight, uintptr_t x_scale, uintptr_t w_scale, uintptr_t bias,
           uintptr_t inverse_out_scale, uintptr_t out, uintptr_t workspace, size_t workspace_bytes, uintptr_t stream) {
    set_pointers(x_scale, w_scale, bias, inverse_out_scale);
    const float one = 1.0f;
    const float zero = 0.0f;
    void* result = reinterpret_cast<void*>(out);
    // beta is 0 and C is never read, but C and out in one place would have to have one type
    const void* c = quantised_ ? reinterpret_cast<const void*>(workspace) : result;
    check(library().matmul(library().handle, desc_, &one, reinterpret_cast<void*>(weight), weight_,
                           reinterpret_cast<void*>(x), x_, &zero, c, quantised_ ? c_ : out_, result, out_,
                           &algorithms_.at(algorithm).algo, reinterpret_cast<void*>(workspace), workspace_bytes,
                           reinterpret_cast<cudaStream_t>(stream)),
          "matmul");
  }

 private:
  static constexpr int kProposals = 24;

  template <typename T>
  void set(cublasLtMatmulDescAttributes_t attribute, T value) {
    check(library().desc_set(desc_, attribute, &value, sizeof(value)), "attribute");
  }

  void set_pointers(uintptr_t x_scale, uintptr_t w_scale, uintptr_t bias, uintptr_t inverse_out_scale) {
    set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, reinterpret_cast<void*>(w_scale));
    set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, reinterpret_cast<void*>(x_scale));
    if (quantised_) set(CUBLASLT_MATMUL_DESC_D_SCALE_POINTER, reinterpret_cast<void*>(inverse_out_scale));
    if (bias != 0) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, reinterpret_cast<void*>(bias));
  }

  bool quantised_;
  cublasLtMatmulDesc_t desc_;
  cublasLtMatrixLayout_t weight_, x_, c_, out_;
  std::vector<cublasLtMatmulHeuristicResult_t> algorithms_;
};

}  // namespace

void bind_lt_matmul(py::module_& module) {
  module.def("lt_version", [] { return library().version(); });
  py::class_<LtMatmul>(module, "LtMatmul")
      .def(py::init<int, int, int, bool, bool, bool, size_t>())
      .def("count", &LtMatmul::count)
      .def("run", &LtMatmul::run);
}
