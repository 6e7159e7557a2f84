// What the blocks of a head send each other where there is more than one tile of rows, and the merge of it: most of
// what the blocks write there. Pairs of blocks send what is in expert_narrow_letters.cuh.
#pragma once

#include "expert_attend_tiles.cuh"

namespace flashrt {
namespace expert {

// A letter is a tile of rows of 16 columns from one block to another: as fp16, normalised by the sender's own sum, 16
// bytes a lane as the tensor cores leave them, of two neighbouring rows. The logarithms of the sums go once to all
// (pair of rows, sender, row).
//
// The words need no blanking: the lowest bit of each is its mark, which changes whenever the turn of its copy comes
// again.
constexpr int kLetterBytes = kTileRows * kSplitColumns * 2;
static_assert(kLetterBytes == 16 * kWarpSize);

struct Letters {
  unsigned char *letters, *sums;  // of this head
  int tiles, rank;
  uint32_t mark;  // of this visit's words

  __device__ __forceinline__ unsigned char* letter(int receiver, int tile, int sender) const {
    return letters + ((receiver * tiles + tile) * kSplits + sender) * kLetterBytes;
  }
  __device__ __forceinline__ unsigned char* sum(int row, int sender) const {
    return sums + ((row / 2 * kSplits + sender) * 2 + row % 2) * 4;
  }
  __device__ __forceinline__ uint32_t marked(uint32_t word) const { return (word & ~1u) | mark; }

  // The row of a tile that is row `slot` of P V.
  static __device__ __forceinline__ int row(int slot) { return row_of_slot(slot); }
  // A lane's words of a letter: four columns of a row and, if there is one, of the next.
  __device__ __forceinline__ void send(const float (&values)[2][4], const float (&factor)[2], int receiver, int tile,
                                       int rows) const {
    const int lane = thread_id() % kWarpSize, row = lane / 4 * 2;
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int half = i / 2 * 2;
      const float by = factor[i / 2];
      word[i] = marked(pack_f16(values[i % 2][half] * by, values[i % 2][half + 1] * by));
    }
    unsigned char* target = letter(receiver, tile, rank) + lane * 16;
    if (row + 1 < rows) {
      store(target, make_uint4(word[0], word[1], word[2], word[3]));
    } else if (row < rows) {
      store(target, make_uint2(word[0], word[1]));
    }
  }
  __device__ __forceinline__ void send_sum(int row, float value) const {
    store(sum(row, rank), marked(__float_as_uint(value)));
  }
};

// The mark of a visit; its copies hold ones at first.
__device__ __forceinline__ uint32_t mark_of(int visit) { return visit / kCopies & 1; }

// What a warp of a team reads of the letters of its tile: its part of each, 16 bytes a lane, by groups of lanes from
// different senders.
struct Mail {
  static constexpr int Most = 4;  // senders of a lane
  uint4 part[Most];
  uint2 sum[Most];                       // of both rows
  int word, sender, senders, row, rows;  // word: the lane in the letter; row: in the tile, the first of two

  __device__ __forceinline__ Mail(const Team<false>& team, int all_rows) {
    const int lane = thread_id() % kWarpSize, lanes = kWarpSize >> team.shift;
    senders = kSplits >> team.shift;
    word = team.part * lanes + lane % lanes, sender = (lane >> (5 - team.shift)) * senders, row = word / 4 * 2;
    rows = all_rows - team.tile * kTileRows;
  }
  __device__ __forceinline__ void ask(const Letters& letters, const Team<false>& team, int i) {
    const int first = team.tile * kTileRows + row;
    part[i] = look(letters.letter(letters.rank, team.tile, sender + i) + word * 16);
    sum[i] = look_pair(letters.sum(first, sender + i));
  }
  __device__ __forceinline__ bool missing(const Letters& letters, int i) const {
    const uint32_t mark = letters.mark;
    const uint32_t upper = (part[i].x ^ mark) | (part[i].y ^ mark) | (sum[i].x ^ mark);
    const uint32_t lower = (part[i].z ^ mark) | (part[i].w ^ mark) | (sum[i].y ^ mark);
    return ((upper | (row + 1 < rows ? lower : 0)) & 1) != 0;
  }
  // Until all has come.
  __device__ __forceinline__ void collect(const Letters& letters, const Team<false>& team) {
#pragma unroll
    for (int i = 0; i < Most; ++i)
      part[i] = make_uint4(0, 0, 0, 0), sum[i] = make_uint2(0xff800000u, 0xff800000u);  // -infinity
    if (row < rows) {
      ask(letters, team, 0);
#pragma unroll
      for (int i = 1; i < Most; ++i)
        if (i < senders) ask(letters, team, i);
    }
    __syncwarp();
    for (int polls = 0;; count_poll(polls)) {
      bool any = false;
#pragma unroll
      for (int i = 0; i < Most; ++i) {
        if (i >= senders || row >= rows || !missing(letters, i)) continue;
        any = true;
        ask(letters, team, i);
      }
      if (!__any_sync(0xffffffffu, any)) break;
    }
  }
};

// What remains of a lane's mail: two columns of one row.
struct Merged {
  float value[2];
  int row, column;  // in the tile, in the letter
  bool sole;        // others have the same

  __device__ __forceinline__ Merged(const Mail& mail, const Team<false>& team) {
    const int lane = thread_id() % kWarpSize, lanes = kWarpSize >> team.shift;
    const float maximum[2] = {highest(mail, 0, lanes), highest(mail, 1, lanes)};
    float sums[2][5] = {};  // of both rows: four columns and the weights
#pragma unroll
    for (int i = 0; i < Mail::Most; ++i) {
      const uint32_t words[4] = {mail.part[i].x, mail.part[i].y, mail.part[i].z, mail.part[i].w};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float weight = __expf(__uint_as_float(half ? mail.sum[i].y : mail.sum[i].x) - maximum[half]);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float2 pair = unpack_f16(words[half * 2 + j]);
          sums[half][j * 2] += weight * pair.x, sums[half][j * 2 + 1] += weight * pair.y;
        }
        sums[half][4] += weight;
      }
    }
    // half of the lanes keep the first row, half of those the first two columns
    const bool lower = lane & 16, right = lane & 8;
    float kept[5];
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      const float mine = lower ? sums[1][i] : sums[0][i], theirs = lower ? sums[0][i] : sums[1][i];
      kept[i] = mine + __shfl_xor_sync(0xffffffffu, theirs, 16);
    }
    float total = kept[4] + __shfl_xor_sync(0xffffffffu, kept[4], 8);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float mine = right ? kept[2 + i] : kept[i], theirs = right ? kept[i] : kept[2 + i];
      value[i] = mine + __shfl_xor_sync(0xffffffffu, theirs, 8);
    }
#pragma unroll
    for (int offset = 4; offset > 1; offset /= 2) {
      if (offset < lanes) continue;
      total += __shfl_xor_sync(0xffffffffu, total, offset);
#pragma unroll
      for (int i = 0; i < 2; ++i) value[i] += __shfl_xor_sync(0xffffffffu, value[i], offset);
    }
    const float inverse = inverse_of(total);
#pragma unroll
    for (int i = 0; i < 2; ++i) value[i] = round_bf16(value[i] * inverse);
    row = mail.row + lower, column = (right ? 8 : 0) + mail.word % 4 * 2;
    sole = lane % 8 < lanes;
  }

  // Of the logarithms of a row.
  static __device__ __forceinline__ float highest(const Mail& mail, int half, int lanes) {
    float maximum = -INFINITY;
#pragma unroll
    for (int i = 0; i < Mail::Most; ++i)
      maximum = fmaxf(maximum, __uint_as_float(half ? mail.sum[i].y : mail.sum[i].x));
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 2; offset /= 2)
      if (offset >= lanes) maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, offset));
    return maximum;
  }
};

}  // namespace expert
}  // namespace flashrt
