#include "image_upload.h"

#include <algorithm>
#include <cstring>
#include <system_error>
#include <utility>

namespace flashrt {
namespace {

constexpr int64_t kPieceBytes = 128 << 10;
constexpr unsigned kMostThreads = 4;
constexpr std::chrono::microseconds kLookout{500};  // an observation is checked in less

void copy_rows(uint8_t* target, const ImageRows& part) {
  if (part.pitch == part.row_bytes) {
    std::memcpy(target, part.source, part.rows * part.row_bytes);
    return;
  }
  for (int64_t row = 0; row < part.rows; ++row)
    std::memcpy(target + row * part.row_bytes, part.source + row * part.pitch, part.row_bytes);
}

}  // namespace

ImageUpload::ImageUpload(uint8_t* host, uint8_t* device, int device_index, int threads)
    : host_(host), device_(device), device_index_(device_index) {
  if (threads <= 0) threads = std::clamp(std::thread::hardware_concurrency() / 2, 1u, kMostThreads);
  threads_.reserve(threads);
  threads_.emplace_back([this] { lead(); });
  try {
    while (static_cast<int>(threads_.size()) < threads) threads_.emplace_back([this] { help(); });
  } catch (const std::system_error&) {  // no more to be had: fewer copy
  }
}

ImageUpload::~ImageUpload() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ending_ = true;
    come_.store(true, std::memory_order_release);
  }
  begun_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  if (stream_ != nullptr) cudaStreamSynchronize(stream_);  // copies under way still read and write the buffers
}

void ImageUpload::expect() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (busy_) return;
    look_until_ = Clock::now() + kLookout;
    come_.store(false, std::memory_order_relaxed);
  }
  begun_.notify_all();
}

void ImageUpload::begin(std::vector<ImageRows> images, cudaGraphExec_t graph, cudaStream_t stream) {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return !busy_; });
    images_ = std::move(images);
    graph_ = graph;
    stream_ = stream;
    status_ = cudaSuccess;
    divide();
    busy_ = true;
    look_until_ = {};
  }
  come_.store(true, std::memory_order_release);  // who looks out must find the mutex free
  begun_.notify_all();
}

void ImageUpload::divide() {
  pieces_.clear();
  to_copy_.reset(new std::atomic<int64_t>[images_.size()]);
  for (size_t index = images_.size(); index-- > 0;) {
    const ImageRows& image = images_[index];
    const int64_t most = std::max<int64_t>(kPieceBytes / std::max<int64_t>(image.row_bytes, 1), 1);
    int64_t count = 0;
    for (int64_t row = 0; row < image.rows; row += most, ++count)
      pieces_.push_back({{image.source + row * image.pitch, std::min(most, image.rows - row), image.row_bytes,
                          image.pitch, image.offset + row * image.row_bytes},
                         index});
    to_copy_[index].store(count, std::memory_order_relaxed);
  }
  open_.store(pieces_.size(), std::memory_order_release);
}

cudaError_t ImageUpload::finish() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return !busy_; });
  return std::exchange(status_, cudaSuccess);
}

// Until there is work or an end; whether there is work. Looks out for it, with open eyes, while it is expected.
template <typename Work>
bool ImageUpload::await_work(Work work) {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    begun_.wait(lock, [&] { return work() || ending_ || Clock::now() < look_until_; });
    if (work() || ending_) return work();
    const Clock::time_point until = look_until_;
    lock.unlock();
    while (!come_.load(std::memory_order_acquire) && Clock::now() < until) std::this_thread::yield();
    lock.lock();
  }
}

void ImageUpload::lead() {
  while (await_work([this] { return busy_; })) {
    const cudaError_t status = upload();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      status_ = status;
      busy_ = false;
    }
    changed_.notify_all();
  }
}

void ImageUpload::help() {
  while (await_work([this] { return open_.load(std::memory_order_relaxed) > 0; }))
    while (copy_next()) {
    }
}

// A piece that nobody has taken; whether there was one.
bool ImageUpload::copy_next() {
  size_t open = open_.load(std::memory_order_acquire);
  do {
    if (open == 0) return false;
  } while (!open_.compare_exchange_weak(open, open - 1, std::memory_order_acquire));
  const Piece& piece = pieces_[open - 1];
  copy_rows(host_ + piece.rows.offset, piece.rows);
  to_copy_[piece.image].fetch_sub(1, std::memory_order_release);  // the last that is read of it
  return true;
}

// Copies beside the others and queues each image once it is complete. Every image is copied whatever fails: the caller
// may free it afterwards.
cudaError_t ImageUpload::upload() {
  cudaError_t status = cudaSetDevice(device_index_);
  int64_t queued = 0;
  for (size_t index = 0; index < images_.size(); ++index) {
    while (to_copy_[index].load(std::memory_order_acquire) > 0)
      if (!copy_next()) std::this_thread::yield();  // others are at its last pieces
    const int64_t end = images_[index].offset + images_[index].rows * images_[index].row_bytes;
    if (status == cudaSuccess)
      status = cudaMemcpyAsync(device_ + queued, host_ + queued, end - queued, cudaMemcpyHostToDevice, stream_);
    queued = end;
  }
  if (status == cudaSuccess && graph_ != nullptr) status = cudaGraphLaunch(graph_, stream_);
  return status;
}

}  // namespace flashrt
