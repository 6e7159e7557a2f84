// The persistent expert's frame: which block computes what, the ring its weights stream through, and how the blocks
// exchange activations.
#pragma once

#include "expert.h"
#include "product_tiles.cuh"

namespace flashrt {
namespace expert {

constexpr int kBlocks = 128;  // the grid, one block a multiprocessor
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kWidth = 1024, kMlp = 4096, kHeads = 8, kHeadDim = 256, kAttended = kHeads * kHeadDim;
constexpr int kQkvHeads = kHeads + 2;
constexpr int kTileRows = 16;  // of activations, as the tensor cores take them
constexpr int kChunkBytes = 16384;
constexpr int kMaxSlots = 8;
constexpr int kMoverThread = kThreads;  // the first of one more warp, which moves the weights
constexpr int kMaxActionDim = 64;
constexpr float kHeadroom = 1.0f / 16;  // of h (1 + scale) in fp16

// pi0 mixes the actions with the time through one more product a step; its weights are always bf16.
constexpr int kMix = kProducts;

struct Product {
  int k, n, tiles;  // tiles of 8 features that share an epilogue
};
__device__ constexpr Product kShapes[kProducts + 1] = {{kWidth, kQkvHeads * kHeadDim, 2},
                                                       {kAttended, kWidth, 1},
                                                       {kWidth, 2 * kMlp, 2},
                                                       {kMlp, kWidth, 1},
                                                       {kWidth, kWidth, 1}};

constexpr int kGroupOperands = 4;  // of activations, 16 bytes a lane each
constexpr int kHalfBlocks = kWidth / 2 / kBlockBytes;

// `Narrow`: products with e4m3 activations that in the other kernels have those of 16 bits.
template <bool Fp8, int P, bool Narrow = false>
struct Shape {
  static constexpr bool E4m3 = Fp8 && P != kMix;                 // the weights
  static constexpr bool Halved = E4m3 && kShapes[P].tiles == 2;  // halves of k apart: kHalfBlocks of each tile together
  static constexpr bool Wide = Halved && !Narrow;                // met by activations of 16 bits
  static constexpr int Tiles = kShapes[P].tiles;
  static constexpr int Units = kShapes[P].n / (Tiles * kTileFeatures);
  static constexpr int UnitBytes = Tiles * kTileFeatures * kShapes[P].k * (E4m3 ? 1 : 2);
  static constexpr int Chunks = UnitBytes / kChunkBytes;                   // a unit's
  static constexpr int Blocks = kChunkBytes / Tiles / kTileBytes;          // k blocks of a chunk
  static constexpr int UnitBlocks = Chunks * Blocks;                       // of a unit
  static constexpr int Operands = Wide ? 4 : 2;                            // of a k block of activations
  static constexpr int RowBytes = kShapes[P].k * (E4m3 && !Wide ? 1 : 2);  // of the activations
  static constexpr int GroupBlocks = kGroupOperands / Operands;  // k blocks a warp reads and multiplies at once
  static constexpr int Groups = UnitBlocks / GroupBlocks;
  static constexpr int TileStride = (Halved ? kHalfBlocks : Blocks) * kTileBytes;  // of a chunk
  static_assert(UnitBytes % kChunkBytes == 0 && Blocks % kWarps == 0 && (Narrow || Groups % kWarps == 0));
  static_assert(!Halved || UnitBlocks == 2 * kHalfBlocks);
};

// Asked for where they are used: what the compiler derives from them it would otherwise keep in registers through the
// whole kernel, and there are none to spare.
__device__ __forceinline__ unsigned thread_id() {
  unsigned id;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(id));
  return id;
}
__device__ __forceinline__ unsigned block_id() {
  unsigned id;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(id));
  return id;
}

// Where a product's unit of this block lies. Of the 160 units of qkv the first 128 are one a block. Those of k and v
// are one of every fourth block where there is one tile of rows; of more tiles, four blocks take one each.
template <bool One>
__device__ __forceinline__ int qkv_units() {
  return !One || block_id() % 4 == 3 ? 2 : 1;
}
// Of tile `tile`.
template <bool One>
__device__ __forceinline__ int qkv_units(int tile) {
  return One ? qkv_units<One>() : tile == static_cast<int>(block_id()) % 4 ? 2 : 1;
}
__device__ __forceinline__ int qkv_unit(int index) { return index == 0 ? block_id() : kBlocks + block_id() / 4; }
constexpr int kGateUpUnits = 4;
static_assert(kGateUpUnits * kBlocks == kMlp / kTileFeatures && kBlocks * kTileFeatures == kWidth);

// The block's computing warps.
__device__ __forceinline__ void block_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory"); }

// A place in the weight stream, advanced by one chunk at a time: no division on the way.
struct Cursor {
  int slot = 0;
  unsigned chunk = 0;  // of the whole stream

  __device__ __forceinline__ void advance(int slots) {
    ++chunk;
    if (++slot == slots) slot = 0;
  }
};

// Seconds: a launch that waits this long is broken, and an error beats a hang.
#ifndef FLASHRT_EXPERT_MAX_POLLS  // a build that looks for what is stuck sets others
#define FLASHRT_EXPERT_MAX_POLLS (1 << 22)
#define FLASHRT_EXPERT_MAX_PEEKS (1 << 26)
#endif
constexpr int kMaxPolls = FLASHRT_EXPERT_MAX_POLLS, kMaxPeeks = FLASHRT_EXPERT_MAX_PEEKS;  // of global, shared memory

__device__ __forceinline__ void count_peek(int& polls) {
  if (++polls > kMaxPeeks) __trap();
}

// Until a barrier in shared memory has completed its phase.
__device__ __forceinline__ void await_phase(uint64_t* barrier, uint32_t phase) {
  for (int polls = 0; !barrier_test(barrier, phase); count_peek(polls)) {
  }
}

// Barriers in shared memory of what a visit waits for; only pairs of blocks have those behind kSumsCome.
enum Arrival : int {
  kKeysCome,  // of the prefix
  kValuesCome,
  kSumsCome,     // from the other block of a pair: of out, then of down
  kMixCome,      // from it, once a step
  kOwnRowsCome,  // the actions' keys and values that are this block's
  kArrivals
};

// What the computing warps and the one that moves the weights tell each other, in shared memory: each counter has one
// writer.
struct Counters {
  unsigned come;     // chunks
  unsigned used;     // chunks that nobody reads any more
  unsigned ordered;  // visits whose blanks are to be fenced
  unsigned fenced;   // visits whose blanks are
};
__device__ __forceinline__ unsigned peek(const unsigned* counter) {
  unsigned value;
  asm volatile("ld.volatile.shared.u32 %0, [%1];" : "=r"(value) : "r"(shared_address(counter)) : "memory");
  return value;
}
__device__ __forceinline__ void poke(unsigned* counter, unsigned value) {
  asm volatile("st.volatile.shared.u32 [%0], %1;" ::"r"(shared_address(counter)), "r"(value) : "memory");
}

// The weight stream of one block: every chunk of its units, in the order of use, through a ring of shared memory.
struct Ring {
  unsigned char* chunks;
  Counters* counters;
  int slots;

  // Until `count` chunks from `cursor` on have come: all at once, so that the reads behind it can be interleaved.
  __device__ __forceinline__ void wait(const Cursor& cursor, int count) const {
    for (int polls = 0; static_cast<int>(peek(&counters->come) - cursor.chunk) < count; count_peek(polls)) {
    }
  }
  __device__ __forceinline__ const unsigned char* chunk(const Cursor& cursor) const {
    return chunks + cursor.slot * kChunkBytes;
  }
};

// Where the chunks of a layer visit come from, in the order of use: filled once, so that the code that asks is short.
struct Source {
  const unsigned char* base;  // of layer 0
  int64_t layer_bytes;
  int second;  // where the second half comes from, bytes behind the first; 0: one piece
};
constexpr int kMaxSources = 19;  // bf16: 4 + 2 + 8 + 4, and pi0's mix

template <bool Fp8, int P>
__device__ Source source_of(const ExpertSteps& p, int unit, int chunk) {
  using S = Shape<Fp8, P>;
  const void* weights = P == kMix ? p.mix_weights : p.weights[P % kProducts];
  return {static_cast<const unsigned char*>(weights) + int64_t(unit) * S::UnitBytes + chunk * kChunkBytes,
          P == kMix ? 0 : int64_t(S::Units) * S::UnitBytes, 0};
}

// Where there are more than two tiles of rows in bf16, four blocks share their units of the down projection: each takes
// a quarter of k of all four, a chunk of each, and reads a quarter of the hidden rows. e4m3 rows are half as long:
// there the exchange costs more than it saves.
constexpr int kQuarters = 4;
template <bool Fp8>
__device__ __forceinline__ bool quartered(int rows) {
  return !Fp8 && rows > 2 * kTileRows;
}
static_assert(Shape<false, kDown>::Chunks == kQuarters);

// A pair of blocks shares its units of e4m3 products with e4m3 activations: each takes half of k of both, which are
// then one operand: a chunk is a part of k of one and of the other.
template <int P>
__device__ Source source_of_pair(const ExpertSteps& p, int index) {
  Source source = source_of<true, P>(p, block_id() & ~1u, 0);
  source.base += block_id() % 2 * (Shape<true, P>::UnitBytes / 2) + index * (kChunkBytes / 2);
  source.second = Shape<true, P>::UnitBytes;
  return source;
}

// On the matrix unit a chunk of qkv is half of k of both units of the block, which are then one operand.
__device__ __forceinline__ Source source_of_half(const ExpertSteps& p, int index) {
  Source source = source_of<true, kQkv>(p, qkv_unit(0), 0);
  source.base += index * (kChunkBytes / 2);
  source.second = (qkv_unit(1) - qkv_unit(0)) * kChunkBytes;
  return source;
}

// Source `index` of this block; the mix, which comes ahead of a step's first layer, is the last.
template <bool Fp8, bool One, bool Halves>
__device__ Source source(const ExpertSteps& p, int index, bool paired) {
  constexpr int Qkv = Shape<Fp8, kQkv>::Chunks, Out = Shape<Fp8, kOut>::Chunks;
  constexpr int GateUp = kGateUpUnits * Shape<Fp8, kGateUp>::Chunks, Down = Shape<Fp8, kDown>::Chunks;
  if (Halves && index < qkv_units<One>() * Qkv) return source_of_half(p, index);
  if (index < qkv_units<One>() * Qkv) return source_of<Fp8, kQkv>(p, qkv_unit(index / Qkv), index % Qkv);
  index -= qkv_units<One>() * Qkv;
  if (Fp8 && !One && paired && index < Out) return source_of_pair<kOut>(p, index);
  if (index < Out) return source_of<Fp8, kOut>(p, block_id(), index);
  index -= Out;
  if (index < GateUp) return source_of<Fp8, kGateUp>(p, block_id() * kGateUpUnits, index);
  index -= GateUp;
  if (Fp8 && !One && paired && index < Down) return source_of_pair<kDown>(p, index);
  const int quarter = block_id() % kQuarters;
  if (index < Down && !One && quartered<Fp8>(p.rows))
    return source_of<Fp8, kDown>(p, block_id() - quarter + index, quarter);
  if (index < Down) return source_of<Fp8, kDown>(p, block_id(), index);
  return source_of<Fp8, kMix>(p, block_id(), 0);
}

template <bool Fp8, bool One>
__device__ __forceinline__ int sources_of_visit() {
  return qkv_units<One>() * Shape<Fp8, kQkv>::Chunks + Shape<Fp8, kOut>::Chunks +
         kGateUpUnits * Shape<Fp8, kGateUp>::Chunks + Shape<Fp8, kDown>::Chunks;
}

// The one barrier over the grid, behind the blanking of the exchange.
__device__ __forceinline__ void grid_barrier(unsigned* counter) {
  block_sync();
  if (thread_id() == 0) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
    unsigned seen;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (seen < kBlocks);
  }
  block_sync();
}

// Activations go from block to block through words that say themselves whether they have come: a word that is kAbsent
// has not. Nothing that is published has that value (as a number it is a NaN that no instruction produces), so there
// is no flag, no fence and no barrier between a store and the load that waits for it.
//
// Every buffer has three copies, used in turn; who publishes a word blanks the same word of the copy before. Nobody
// reads that copy any more: whoever publishes has seen, directly or through others, results that every block computed
// from it. And nobody takes what it held for new: before anyone looks there again, two visits later, he has seen
// results that this block published behind a fence that came behind the blanking (one fence a visit, by the warp that
// moves the weights, between the out projection and the end of the down projection).
//
// Letters of the attention, and queries of pairs of blocks, carry a mark that changes with each turn of their copy in
// place of being blanked (expert_letters.cuh).
constexpr uint32_t kAbsent = 0xffffffffu;

// Before the first look: no word comes sooner, and looks that fail take L2's bandwidth from the words.
constexpr unsigned kPatience = 300;  // cycles
__device__ __forceinline__ void be_patient() {
  const unsigned start = clock();
  while (clock() - start < kPatience) {
  }
}

__device__ __forceinline__ void exchange_fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

__device__ __forceinline__ uint4 look(const void* address) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}
__device__ __forceinline__ uint32_t look_word(const void* address) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(address));
  return v;
}
__device__ __forceinline__ uint2 look_pair(const void* address) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address));
  return v;
}
__device__ __forceinline__ bool absent(uint32_t v) { return v == kAbsent; }
__device__ __forceinline__ bool absent(const uint2& v) { return max(v.x, v.y) == kAbsent; }
__device__ __forceinline__ bool absent(const uint4& v) { return max(max(v.x, v.y), max(v.z, v.w)) == kAbsent; }

__device__ __forceinline__ void count_poll(int& polls) {
  if (++polls > kMaxPolls) __trap();
}

// One vector that another block publishes.
__device__ __forceinline__ uint4 await(const void* address) {
  uint4 v = look(address);
  for (int polls = 0; absent(v); v = look(address)) count_poll(polls);
  return v;
}

__device__ __forceinline__ void store(void* address, uint32_t word) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(word));
}
__device__ __forceinline__ void store(void* address, uint2 words) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(words.x), "r"(words.y));
}
__device__ __forceinline__ void store(void* address, uint4 words) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w));
}

// Eight bytes as a whole.
__device__ __forceinline__ void store_whole(void* address, uint32_t low, uint32_t high) {
  asm volatile("{\n.reg .b64 both;\nmov.b64 both, {%1, %2};\nst.relaxed.gpu.global.b64 [%0], both;\n}" ::"l"(address),
               "r"(low), "r"(high));
}
// Twice eight bytes, each as a whole.
__device__ __forceinline__ uint4 look_twice(const void* address) {
  uint4 v;
  asm volatile(
      "{\n.reg .b64 first, second;\nld.relaxed.gpu.global.v2.b64 {first, second}, [%4];\n"
      "mov.b64 {%0, %1}, first;\nmov.b64 {%2, %3}, second;\n}"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(address));
  return v;
}
// The lowest bit: whether one of them has not the mark that its first word's lowest bit should be.
__device__ __forceinline__ uint32_t unmarked(const uint4& twice, uint32_t mark) {
  return (twice.x ^ mark) | (twice.z ^ mark);
}

// Store a word for the other blocks, and blank it in the copy before, `other` bytes away.
__device__ __forceinline__ void publish(void* address, int64_t other, uint32_t word) {
  store(address, min(word, kAbsent - 1));
  store(static_cast<unsigned char*>(address) + other, kAbsent);
}
__device__ __forceinline__ void publish(void* address, int64_t other, uint2 words) {
  store(address, make_uint2(min(words.x, kAbsent - 1), min(words.y, kAbsent - 1)));
  store(static_cast<unsigned char*>(address) + other, make_uint2(kAbsent, kAbsent));
}

// The exchange in global memory: three copies of these buffers, for a multiple of 16 rows; bytes of a row.
enum Buffer : int {
  kNormedQkv,
  kNormedMlp,
  kSquaresQkv,
  kSquaresMlp,
  kQ,
  kKv,
  kAttendedRows,
  kHidden,
  kLast,
  kMixed,
  kActions,
  kInbox,
  kStats,
  kDownParts,
  kBuffers
};
constexpr int kSplits = 16;  // blocks of a head
constexpr int kSplitColumns = kHeadDim / kSplits;
__host__ __device__ constexpr int bytes_before(int buffer) {
  constexpr int bytes[kBuffers] = {kWidth * 2,           kWidth * 2,
                                   kBlocks * 4,          kBlocks * 4,
                                   kAttended * 2,        2 * kHeadDim * 2,
                                   kAttended * 2,        kMlp * 2,
                                   kWidth * 2,           kWidth * 2,
                                   kMaxActionDim * 4,    kHeads * kSplits * kSplits * kSplitColumns * 2,
                                   kHeads * kSplits * 4, kQuarters * kWidth * 4};
  int sum = 0;
  for (int i = 0; i < buffer; ++i) sum += bytes[i];
  return sum;
}
constexpr int kExchangeRowBytes = bytes_before(kBuffers);

constexpr int kCopies = 3;

template <bool One>
struct Exchange {
  unsigned char* base;  // of the copy
  int64_t other;        // from a word to the same word of the copy before
  int rows;

  __device__ __forceinline__ int padded_rows() const { return One ? kTileRows : rows; }
  template <int B>
  __device__ __forceinline__ unsigned char* buffer() const {
    constexpr int Before = bytes_before(B);
    return base + Before * padded_rows();
  }
};

}  // namespace expert
}  // namespace flashrt
