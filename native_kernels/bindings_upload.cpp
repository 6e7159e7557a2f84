// Python binding of image_upload.h. The object keeps alive what it copies from and to.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bindings.h"
#include "image_upload.h"

namespace py = pybind11;

namespace {

// An array (rows, ...) of bytes, each row of which lies together.
flashrt::ImageRows rows_of(const py::handle& image, int64_t offset) {
  const py::buffer_info info = py::reinterpret_borrow<py::buffer>(image).request();
  int64_t row_bytes = info.itemsize;
  for (py::ssize_t axis = 1; axis < info.ndim; ++axis) row_bytes *= info.shape[axis];
  return {static_cast<const uint8_t*>(info.ptr), info.shape.at(0), row_bytes, info.strides.at(0), offset};
}

class Upload {
 public:
  Upload(py::object host, py::object device, uintptr_t host_address, uintptr_t device_address, int device_index,
         int threads)
      : buffers_(py::make_tuple(std::move(host), std::move(device))),
        used_(py::none()),
        upload_(std::make_unique<flashrt::ImageUpload>(pointer<uint8_t>(host_address), pointer<uint8_t>(device_address),
                                                       device_index, threads)) {}

  // A forked process has the object without its threads: nothing could be waited for.
  ~Upload() {
    if (forked()) upload_.release();
  }

  void expect() {
    check_process();
    upload_->expect();
  }

  // graph: of torch; raw_graph: its executable's address, 0 for none.
  void begin(py::sequence images, const std::vector<int64_t>& offsets, py::object graph, uintptr_t raw_graph,
             uintptr_t stream) {
    check_process();
    if (images.size() != offsets.size()) throw py::value_error("an offset for each image");
    std::vector<flashrt::ImageRows> parts;
    for (size_t index = 0; index < offsets.size(); ++index) parts.push_back(rows_of(images[index], offsets[index]));
    {
      py::gil_scoped_release released;
      upload_->begin(std::move(parts), reinterpret_cast<cudaGraphExec_t>(raw_graph),
                     reinterpret_cast<cudaStream_t>(stream));
    }
    used_ = py::make_tuple(std::move(images), std::move(graph));  // those of the call before are through
  }

  void finish() {
    check_process();
    cudaError_t status;
    {
      py::gil_scoped_release released;
      status = upload_->finish();
    }
    used_ = py::none();
    check(status, "image upload");
  }

 private:
  bool forked() const { return getpid() != process_; }
  void check_process() const {
    if (forked())
      throw std::runtime_error(
          "image upload: this process was forked from the one that loaded the policy, and CUDA "
          "does not go along: load it here, or start the process by spawn");
  }

  const pid_t process_ = getpid();
  py::object buffers_;  // outlive the threads, which are destroyed first
  py::object used_;     // images and graph that it may still read
  std::unique_ptr<flashrt::ImageUpload> upload_;
};

}  // namespace

void bind_upload(py::module_& module) {
  py::class_<Upload>(module, "ImageUpload")
      .def(py::init<py::object, py::object, uintptr_t, uintptr_t, int, int>(), py::arg("host"), py::arg("device"),
           py::arg("host_address"), py::arg("device_address"), py::arg("device_index"), py::arg("threads"))
      .def("expect", &Upload::expect)
      .def("begin", &Upload::begin, py::arg("images"), py::arg("offsets"), py::arg("graph"), py::arg("raw_graph"),
           py::arg("stream"))
      .def("finish", &Upload::finish);
}
