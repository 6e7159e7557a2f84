// What the blocks of a head send each other where there are more than two tiles of rows and what is merged is rounded
// to e4m3: letters of half the size.
#pragma once

#include "expert_letters.cuh"

namespace flashrt {
namespace expert {

// A letter as e4m3, 8 bytes a lane. What is merged is rounded by a calibrated scale; the parts of it, which may exceed
// it, by that times kPartHeadroom, and saturate beyond as it does. A lane's bytes come as a whole, so that one mark is
// enough: the last bit of its first value, which therefore has two bits of mantissa.
constexpr int kNarrowBytes = 8 * kWarpSize;
constexpr float kPartHeadroom = 16.0f;
static_assert(kNarrowBytes == kTileRows * kSplitColumns);
// Of a head and tile; they take half of the exchange's place for letters, and the other half holds the head's queries.
constexpr int kNarrowTileBytes = kSplits * kSplits * kNarrowBytes;
static_assert(2 * kNarrowTileBytes == kSplits * kSplits * kLetterBytes &&
              kTileRows * kHeadRowBytes <= kNarrowTileBytes);

struct NarrowLetters : Letters {
  const float* rounding;  // the scale of merged rows: read where it is used, as there are no registers to spare

  __device__ __forceinline__ float scale() const { return *rounding * kPartHeadroom; }
  __device__ __forceinline__ unsigned char* letter(int receiver, int tile, int sender) const {
    return letters + ((receiver * tiles + tile) * kSplits + sender) * kNarrowBytes;
  }
  // A lane's bytes of a letter: four columns of a row and of the next, whether that is there or not. `values` are by
  // the inverse of the scale.
  __device__ __forceinline__ void send(const float (&values)[2][4], int receiver, int tile, int rows) const {
    constexpr uint32_t kLast = 1 << 20;  // bit of a float that e4m3 has
    const int lane = thread_id() % kWarpSize, row = lane / 4 * 2;
    unsigned char* target = letter(receiver, tile, rank) + lane * 8;
    const float first = values[0][0];
    const float rounded = __uint_as_float((__float_as_uint(first) + kLast) & ~(2 * kLast - 1));
    const float second = fmaf(first, 0.0f, values[0][1]);  // NaN has no bit to spare: it goes on to this one
    const uint32_t even = pack_e4m3(rounded, second) | pack_e4m3(values[1][0], values[1][1]) << 16;
    const uint32_t odd = pack_e4m3(values[0][2], values[0][3]) | pack_e4m3(values[1][2], values[1][3]) << 16;
    if (row < rows) store_whole(target, marked(even), odd);
  }
};

// What a warp reads of the letters of its tile: four lanes a quarter of each, 16 bytes a lane, from two senders.
struct NarrowMail {
  static constexpr int Senders = 2;  // of a lane
  uint4 part[Senders];               // of each of two lanes of a letter, four columns of two rows
  uint4 sum;                         // of each sender both rows
  int word, sender, row, rows;       // word: in the letter; row: in the tile, the first of two

  __device__ __forceinline__ NarrowMail(const Team<false>& team, int all_rows) {
    const int lane = thread_id() % kWarpSize;
    word = team.part * 4 + lane % 4, sender = lane / 4 * Senders, row = word / 2 * 2;
    rows = all_rows - team.tile * kTileRows;
  }
  __device__ __forceinline__ void ask(const NarrowLetters& letters, const Team<false>& team, int i) {
    part[i] = look_twice(letters.letter(letters.rank, team.tile, sender + i) + word * 16);
  }
  __device__ __forceinline__ void ask_sums(const NarrowLetters& letters, const Team<false>& team) {
    sum = look(letters.sum(team.tile * kTileRows + row, sender));
  }
  __device__ __forceinline__ bool missing_sums(uint32_t mark) const {
    const uint32_t lower = row + 1 < rows ? (sum.y ^ mark) | (sum.w ^ mark) : 0;
    return (((sum.x ^ mark) | (sum.z ^ mark) | lower) & 1) != 0;
  }
  // Until all has come.
  __device__ __forceinline__ void collect(const NarrowLetters& letters, const Team<false>& team) {
    part[0] = part[1] = {}, sum = make_uint4(0xff800000u, 0xff800000u, 0xff800000u, 0xff800000u);  // -infinity
    const bool has = row < rows;
    if (has) {
      ask(letters, team, 0);
      ask_sums(letters, team);
      ask(letters, team, 1);
    }
    __syncwarp();
    for (int polls = 0;; count_poll(polls)) {
      bool any = false;
#pragma unroll
      for (int i = 0; i < Senders; ++i)
        if (has && (unmarked(part[i], letters.mark) & 1) != 0) any = true, ask(letters, team, i);
      if (has && missing_sums(letters.mark)) any = true, ask_sums(letters, team);
      if (!__any_sync(0xffffffffu, any)) break;
    }
  }
};

// What remains of a lane's mail: four columns of one row. Sums are pairs of fp16, whose rounding is far below e4m3's.
struct NarrowMerged {
  float value[4];
  int row, column;  // in the tile, in the letter
  bool sole;        // others have the same

  // `scale`: of the values as they were sent.
  __device__ __forceinline__ NarrowMerged(const NarrowMail& mail, float scale) {
    const int lane = thread_id() % kWarpSize;
    const float logarithm[2][2] = {{__uint_as_float(mail.sum.x), __uint_as_float(mail.sum.y)},
                                   {__uint_as_float(mail.sum.z), __uint_as_float(mail.sum.w)}};
    float maximum[2] = {fmaxf(logarithm[0][0], logarithm[1][0]), fmaxf(logarithm[0][1], logarithm[1][1])};
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 2; offset /= 2)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        maximum[half] = fmaxf(maximum[half], __shfl_xor_sync(0xffffffffu, maximum[half], offset));
    uint32_t sums[2][4] = {};  // of both rows: two pairs of neighbours, and those eight columns further
    float weights[2] = {};
#pragma unroll
    for (int i = 0; i < NarrowMail::Senders; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float weight = power_of_two(logarithm[i][half] - maximum[half]);
        weights[half] += weight;
        uint32_t pair[4];  // the first words without their marks
        e4m3_to_f16(half ? mail.part[i].y : mail.part[i].x & ~1u, pair[0], pair[2]);
        e4m3_to_f16(half ? mail.part[i].w : mail.part[i].z & ~1u, pair[1], pair[3]);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[half][j] = multiply_add_f16(pack_f16(weight, weight), pair[j], sums[half][j]);
      }
    // half of the lanes keep the first row, half of those the first columns
    const bool lower = lane & 16, right = lane & 8;
    uint32_t kept[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      kept[j] =
          add_f16(lower ? sums[1][j] : sums[0][j], __shfl_xor_sync(0xffffffffu, lower ? sums[0][j] : sums[1][j], 16));
    float total = (lower ? weights[1] : weights[0]) + __shfl_xor_sync(0xffffffffu, lower ? weights[0] : weights[1], 16);
    total += __shfl_xor_sync(0xffffffffu, total, 8);
    total += __shfl_xor_sync(0xffffffffu, total, 4);
    const float inverse = inverse_of(total) * scale;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t last =
          add_f16(right ? kept[2 + j] : kept[j], __shfl_xor_sync(0xffffffffu, right ? kept[j] : kept[2 + j], 8));
      last = add_f16(last, __shfl_xor_sync(0xffffffffu, last, 4));
      const float2 pair = unpack_f16(last);
      value[j * 2] = round_bf16(pair.x * inverse), value[j * 2 + 1] = round_bf16(pair.y * inverse);
    }
    row = mail.row + lower, column = (right ? 8 : 0) + mail.word % 2 * 4;
    sole = (lane & 4) == 0;
  }
  // As e4m3 of the values times `by`.
  __device__ __forceinline__ uint32_t word(float by) const {
    return pack_e4m3(value[0] * by, value[1] * by) | pack_e4m3(value[2] * by, value[3] * by) << 16;
  }
  // Pairs of fp16 as words: of `__half2` the compiler would choose by address, through memory.
  static __device__ __forceinline__ uint32_t add_f16(uint32_t a, uint32_t b) {
    uint32_t sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
  }
  static __device__ __forceinline__ uint32_t multiply_add_f16(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t sum;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
  }
};

}  // namespace expert
}  // namespace flashrt
