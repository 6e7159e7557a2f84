// Camera images to the device by threads that need no interpreter: into pinned memory, from there as one asynchronous
// copy an image, and a graph that computes on them. Their caller prepares the rest of the observation meanwhile.
//
// One thread copies 10 GB/s out of main memory, 0.25 ms for three views of 640 x 480: a few share the images, in
// pieces.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace flashrt {

// One image, or some of its rows: rows of row_bytes at every pitch bytes, which go to `offset` without padding.
struct ImageRows {
  const uint8_t* source;
  int64_t rows;
  int64_t row_bytes;
  int64_t pitch;
  int64_t offset;
};

class ImageUpload {
 public:
  // host: pinned; device: of the same size. threads: that copy; 0 for half of the processors and at most four.
  ImageUpload(uint8_t* host, uint8_t* device, int device_index, int threads);
  ~ImageUpload();
  ImageUpload(const ImageUpload&) = delete;
  ImageUpload& operator=(const ImageUpload&) = delete;

  // Images are about to come: the threads wake up, which takes as long as a copy does, and look out for them for a
  // while.
  void expect();

  // Starts on the images, after those of the last call are through. They must stay where they are until `finish`. What
  // lies in front of an image, up to the image before or the start, goes along. graph: launched behind the copies; null
  // for none.
  void begin(std::vector<ImageRows> images, cudaGraphExec_t graph, cudaStream_t stream);

  // Waits until all of the last `begin` is queued on its stream. Returns the first failure's status.
  cudaError_t finish();

 private:
  struct Piece {
    ImageRows rows;
    size_t image;
  };

  using Clock = std::chrono::steady_clock;

  void lead();
  void help();
  template <typename Work>
  bool await_work(Work work);
  void divide();
  bool copy_next();
  cudaError_t upload();

  uint8_t* const host_;
  uint8_t* const device_;
  const int device_index_;
  std::mutex mutex_;
  std::condition_variable begun_;                    // there is work, or some to look out for, or an end
  std::condition_variable changed_;                  // all is queued
  std::atomic<bool> come_{true};                     // images that were expected
  std::atomic<size_t> open_{0};                      // pieces that nobody has taken: so many from the first on
  std::vector<Piece> pieces_;                        // the last image's first; constant while busy, as all to graph_
  std::unique_ptr<std::atomic<int64_t>[]> to_copy_;  // pieces of each image that are not copied yet
  std::vector<ImageRows> images_;
  cudaGraphExec_t graph_ = nullptr;
  cudaStream_t stream_ = nullptr;
  Clock::time_point look_until_{};  // for images that are expected; guarded by mutex_, as all below
  cudaError_t status_ = cudaSuccess;
  bool busy_ = false;
  bool ending_ = false;
  std::vector<std::thread> threads_;  // the first of them leads
};

}  // namespace flashrt
