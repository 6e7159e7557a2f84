// See host_copy.cpp.
#pragma once

#include <cstddef>

namespace flashrt {

void copy_past_caches(void* target, const void* source, size_t bytes);

}  // namespace flashrt
