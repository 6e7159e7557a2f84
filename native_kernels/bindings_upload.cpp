// Python binding of image_upload.h. The object keeps alive what it copies from and to.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "image_upload.h"

namespace py = pybind11;

namespace {

using Rows = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t>;

class Upload {
 public:
  Upload(py::object host, py::object device, uintptr_t host_address, uintptr_t device_address, int device_index)
      : buffers_(py::make_tuple(std::move(host), std::move(device))),
        used_(py::none()),
        upload_(std::make_unique<flashrt::ImageUpload>(pointer<uint8_t>(host_address), pointer<uint8_t>(device_address),
                                                       device_index)) {}

  // graph: of torch; raw_graph: its executable's address, 0 for none.
  void begin(py::object images, const std::vector<Rows>& rows, py::object graph, uintptr_t raw_graph,
             uintptr_t stream) {
    std::vector<flashrt::ImageRows> parts;
    for (const auto& [source, count, bytes, pitch, offset] : rows)
      parts.push_back({pointer<const uint8_t>(source), count, bytes, pitch, offset});
    {
      py::gil_scoped_release released;
      upload_->begin(std::move(parts), reinterpret_cast<cudaGraphExec_t>(raw_graph),
                     reinterpret_cast<cudaStream_t>(stream));
    }
    used_ = py::make_tuple(std::move(images), std::move(graph));  // those of the call before are through
  }

  void finish() {
    cudaError_t status;
    {
      py::gil_scoped_release released;
      status = upload_->finish();
    }
    used_ = py::none();
    check(status, "image upload");
  }

 private:
  py::object buffers_;  // outlive the thread, which is destroyed first
  py::object used_;     // images and graph that it may still read
  std::unique_ptr<flashrt::ImageUpload> upload_;
};

}  // namespace

void bind_upload(py::module_& module) {
  py::class_<Upload>(module, "ImageUpload")
      .def(py::init<py::object, py::object, uintptr_t, uintptr_t, int>(), py::arg("host"), py::arg("device"),
           py::arg("host_address"), py::arg("device_address"), py::arg("device_index"))
      .def("begin", &Upload::begin, py::arg("images"), py::arg("rows"), py::arg("graph"), py::arg("raw_graph"),
           py::arg("stream"))
      .def("finish", &Upload::finish);
}
