// Copies of camera images into pinned memory past the caches: the GPU reads them next, and what a processor core has in
// its caches (the interpreter that prepares the rest of the observation) stays there.
#include "host_copy.h"

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace flashrt {

void copy_past_caches(void* target, const void* source, size_t bytes) {
  auto* to = static_cast<unsigned char*>(target);
  const auto* from = static_cast<const unsigned char*>(source);
#if defined(__SSE2__)
  const size_t head = (16 - reinterpret_cast<uintptr_t>(to) % 16) % 16;
  if (bytes >= 256 + head) {
    std::memcpy(to, from, head);
    to += head, from += head, bytes -= head;
    for (; bytes >= 64; to += 64, from += 64, bytes -= 64) {
      _mm_prefetch(reinterpret_cast<const char*>(from) + 1024, _MM_HINT_NTA);
      for (int i = 0; i < 64; i += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    }
    _mm_sfence();
  }
#endif
  std::memcpy(to, from, bytes);
}

}  // namespace flashrt
