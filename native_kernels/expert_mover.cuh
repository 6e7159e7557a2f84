// The warp of the persistent expert that moves the weights and the prefix's keys and values: all others only compute,
// as asking for a copy and fencing take a warp thousands of cycles while the memory is busy.
#pragma once

#include "expert_stream.cuh"

namespace flashrt {
namespace expert {

constexpr int kHeadRowBytes = kHeadDim * 2;
constexpr int kKeyStride = kHeadRowBytes + 64;    // bytes: 64 of two rows at once fall into different banks
constexpr int kValueStride = kHeadRowBytes + 16;  // ldmatrix rows fall into different banks

// Where the prefix's keys and values of this block lie, and where they go.
struct PrefixRows {
  const unsigned char *k, *v;  // of layer 0
  int64_t layer_bytes;
  int rows;
  unsigned char *k_target, *v_target;
};

constexpr unsigned kInFlight = 3;  // chunks asked for that have not come

// Where there are more tiles the blocks wait for so much that one chunk at a time is enough, and stands least in the
// way of their words; and keys and values can wait for the end of the visit before. Bf16 weights are twice the bytes.
template <bool Fp8, bool One>
__device__ __forceinline__ bool at_leisure(int rows) {
  return !One && (Fp8 || rows > 2 * kTileRows);
}

template <bool Fp8, bool One>
struct Mover {
  const ExpertSteps& p;
  const Ring& ring;
  uint64_t *full, *arrivals;
  const Source* sources;
  PrefixRows prefix;

  static constexpr int kRowsAtOnce = 8;

  static __device__ __forceinline__ unsigned of_first_lane(unsigned value) {
    return __shfl_sync(0xffffffffu, value, 0);
  }

  // By the whole warp. It asks for a chunk as soon as its place is free, but never for much at once: requests that wait
  // for DRAM stand in the way of the words that the blocks exchange, and those are what everybody waits for. It tells
  // when a chunk has come; copies the keys and values of the next visit, and orders what the block has blanked, when
  // that has been asked for.
  __device__ __forceinline__ void run() const {
    Counters& counters = *ring.counters;
    const bool leader = thread_id() == kMoverThread;
    const int visit_sources = sources_of_visit<Fp8, One>();
    const unsigned visits = p.steps * p.layers;
    const unsigned chunks = visits * visit_sources + (p.mix_weights != nullptr ? p.steps : 0);
    const uint64_t policy = evict_first_policy();
    const bool leisure = at_leisure<Fp8, One>(p.rows);
    const unsigned in_flight = leisure ? 1 : kInFlight;
    unsigned asked = 0, come = 0, fenced = 0, phase = 0;
    int next = 0, slot = 0;                                    // slots: that comes next, that is asked for next
    int layer = 0, index = p.mix_weights == nullptr ? 0 : -1;  // of the chunk asked for next; index -1 is the mix
    int prefix_layer = 0, kind = 0, row = 0;                   // of the rows asked for next; kind: keys, then values
    unsigned prefixes = 0;                                     // visits whose rows have been asked for
#pragma unroll 1
    while (come < chunks || fenced < visits) {
      // what a lane sees all must see: one that looks later could miss a phase of a barrier, and with it a copy
      if (asked < chunks && asked - come < in_flight &&
          static_cast<int>(asked - of_first_lane(peek(&counters.used))) < ring.slots) {
        const Source& from = sources[index < 0 ? visit_sources : index];
        if (leader) {
          barrier_expect(full + slot, kChunkBytes);
          const unsigned char* chunk = from.base + layer * from.layer_bytes;
          const int bytes = !One && from.second != 0 ? kChunkBytes / 2 : kChunkBytes;
          bulk_copy_once(ring.chunks + slot * kChunkBytes, chunk, bytes, full + slot, policy);
          if (!One && from.second != 0)
            bulk_copy_once(ring.chunks + slot * kChunkBytes + bytes, chunk + from.second, bytes, full + slot, policy);
        }
        ++asked;
        if (++slot == ring.slots) slot = 0;
        if (++index == visit_sources) {
          index = 0;
          if (++layer == p.layers) {
            layer = 0;
            if (p.mix_weights != nullptr) index = -1;
          }
        }
      }
      if (come < asked && __any_sync(0xffffffffu, barrier_test(full + next, phase))) {
        ++come;
        if (leader) poke(&counters.come, come);
        if (++next == ring.slots) next = 0, phase ^= 1;
      }
      const unsigned ordered = of_first_lane(peek(&counters.ordered));
      if (ordered != fenced) {
        if (leader) exchange_fence();
        ++fenced;
        if (leader) poke(&counters.fenced, fenced);
      } else if (prefixes < visits && prefixes <= ordered &&
                 (!leisure || static_cast<int>(of_first_lane(peek(&counters.used)) - prefixes * visit_sources) >= 0)) {
        ask_rows(kind, prefix_layer, row);
        row += kRowsAtOnce;
        if (row >= prefix.rows) {
          row = 0, prefixes += kind, prefix_layer += kind, kind ^= 1;
          if (prefix_layer == p.layers) prefix_layer = 0;
        }
      }
    }
  }

  // Some rows of keys or of values from `first` on, 16 bytes a lane: the copy engine takes rows of 512 bytes one after
  // the other, and behind the weights.
  __device__ __forceinline__ void ask_rows(int kind, int layer, int first) const {
    const int lane = thread_id() % kWarpSize, stride = kind ? kValueStride : kKeyStride;
    unsigned char* target = (kind ? prefix.v_target : prefix.k_target) + first * stride + lane * 16;
    const unsigned char* from =
        (kind ? prefix.v : prefix.k) + layer * prefix.layer_bytes + first * kHeadRowBytes + lane * 16;
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i)
      if (first + i < prefix.rows) async_copy16(target + i * stride, from + i * kHeadRowBytes);
    if (first + kRowsAtOnce >= prefix.rows) async_copy_arrive(arrivals + kKeysCome + kind);
  }
};

}  // namespace expert
}  // namespace flashrt
