#include "image_upload.h"

#include <cstring>
#include <utility>

namespace flashrt {

ImageUpload::ImageUpload(uint8_t* host, uint8_t* device, int device_index)
    : host_(host), device_(device), device_index_(device_index), thread_([this] { work(); }) {}

ImageUpload::~ImageUpload() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  thread_.join();
  if (stream_ != nullptr) cudaStreamSynchronize(stream_);  // copies under way still read and write the buffers
}

void ImageUpload::begin(std::vector<ImageRows> images, cudaGraphExec_t graph, cudaStream_t stream) {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return !busy_; });
    images_ = std::move(images);
    graph_ = graph;
    stream_ = stream;
    status_ = cudaSuccess;
    busy_ = true;
  }
  changed_.notify_all();
}

cudaError_t ImageUpload::finish() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return !busy_; });
  return std::exchange(status_, cudaSuccess);
}

void ImageUpload::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return busy_ || ending_; });
    if (!busy_) return;
    lock.unlock();  // nobody else touches images_, graph_ and stream_ while busy
    const cudaError_t status = copy();
    lock.lock();
    status_ = status;
    busy_ = false;
    changed_.notify_all();
  }
}

cudaError_t ImageUpload::copy() const {
  cudaError_t status = cudaSetDevice(device_index_);
  int64_t copied = 0;
  for (const ImageRows& image : images_) {
    if (status != cudaSuccess) return status;
    uint8_t* target = host_ + image.offset;
    const int64_t bytes = image.rows * image.row_bytes;
    if (image.pitch == image.row_bytes) {
      std::memcpy(target, image.source, bytes);
    } else {
      for (int64_t row = 0; row < image.rows; ++row)
        std::memcpy(target + row * image.row_bytes, image.source + row * image.pitch, image.row_bytes);
    }
    const int64_t end = image.offset + bytes;
    status = cudaMemcpyAsync(device_ + copied, host_ + copied, end - copied, cudaMemcpyHostToDevice, stream_);
    copied = end;
  }
  if (status == cudaSuccess && graph_ != nullptr) status = cudaGraphLaunch(graph_, stream_);
  return status;
}

}  // namespace flashrt
