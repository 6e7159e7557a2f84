// Camera images to the device by a thread that needs no interpreter: into pinned memory, from there as one asynchronous
// copy an image, and a graph that computes on them. Its caller prepares the rest of the observation meanwhile.
#pragma once

#include <cuda_runtime_api.h>

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace flashrt {

// One image: rows of row_bytes at every pitch bytes, which go to `offset` without padding.
struct ImageRows {
  const uint8_t* source;
  int64_t rows;
  int64_t row_bytes;
  int64_t pitch;
  int64_t offset;
};

class ImageUpload {
 public:
  // host: pinned; device: of the same size.
  ImageUpload(uint8_t* host, uint8_t* device, int device_index);
  ~ImageUpload();
  ImageUpload(const ImageUpload&) = delete;
  ImageUpload& operator=(const ImageUpload&) = delete;

  // Starts on the images, after those of the last call are through. They must stay where they are until `finish`. What
  // lies in front of an image, up to the image before or the start, goes along. graph: launched behind the copies; null
  // for none.
  void begin(std::vector<ImageRows> images, cudaGraphExec_t graph, cudaStream_t stream);

  // Waits until all of the last `begin` is queued on its stream. Returns the first failure's status.
  cudaError_t finish();

 private:
  void work();
  cudaError_t copy() const;

  uint8_t* const host_;
  uint8_t* const device_;
  const int device_index_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<ImageRows> images_;  // guarded by mutex_, as all below
  cudaGraphExec_t graph_ = nullptr;
  cudaStream_t stream_ = nullptr;
  cudaError_t status_ = cudaSuccess;
  bool busy_ = false;
  bool ending_ = false;
  std::thread thread_;
};

}  // namespace flashrt
