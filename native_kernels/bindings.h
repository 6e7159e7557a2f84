// What the binding files share: launch statuses as Python exceptions, integers as device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

inline void check(cudaError_t status, const char* operation) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // said here; or the next launch of anybody would report it
  throw std::runtime_error(std::string(operation) + ": " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status));
}

template <typename T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}
