// Hopper's asynchronous matrix instructions on bf16, fp16 and e4m3: descriptors, ordering, and the shapes that are
// used.
//
// Operands in shared memory are panels of 128-byte rows (64 bf16, 128 e4m3) in the 128-byte swizzle: the 16-byte piece
// c of row r lies at piece c ^ (r % 8). A panel starts on a multiple of 1024 bytes.
#pragma once

#include <cuda_bf16.h>

#include "hopper.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FLASHRT_DEVICE_HAS_WGMMA 1
#else
#define FLASHRT_DEVICE_HAS_WGMMA 0
#endif

namespace flashrt {

// By all threads of a warpgroup: registers go from those that copy to those that multiply.
template <int Registers>
__device__ __forceinline__ void take_registers() {
#if FLASHRT_DEVICE_HAS_WGMMA
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}

template <int Registers>
__device__ __forceinline__ void give_registers() {
#if FLASHRT_DEVICE_HAS_WGMMA
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}

namespace wgmma {

// Rows along the reduction (K-major): 8-row groups lie 1024 bytes apart, a step of 16 bf16 or 32 e4m3 is 32 bytes
// further.
// Rows across it (transposed operand): `panel_bytes` from one 64 columns to the next, a step of 16 rows is 2048 bytes.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t panel_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  return kSwizzle128 | (uint64_t(1024 >> 4) << 32) | (uint64_t(panel_bytes >> 4) << 16) | ((address & 0x3ffff) >> 4);
}

__device__ __forceinline__ void fence() {
#if FLASHRT_DEVICE_HAS_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void commit() {
#if FLASHRT_DEVICE_HAS_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits for every product that was committed.
__device__ __forceinline__ void wait() {
#if FLASHRT_DEVICE_HAS_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}

// Waits until at most `Pending` of the committed groups are under way: those before them have read their operands.
template <int Pending>
__device__ __forceinline__ void wait_all_but() {
#if FLASHRT_DEVICE_HAS_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
#endif
}

// Keeps the compiler from reading accumulators ahead of the wait in front of this.
template <int N>
__device__ __forceinline__ void settle(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// What this thread's stores or asynchronous copies left in shared memory, for the matrix unit to read.
__device__ __forceinline__ void operand_fence() {
#if FLASHRT_DEVICE_HAS_WGMMA
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#define FLASHRT_F4(d, i) "+f"((d)[i]), "+f"((d)[(i) + 1]), "+f"((d)[(i) + 2]), "+f"((d)[(i) + 3])
#define FLASHRT_F16(d, i) FLASHRT_F4(d, i), FLASHRT_F4(d, (i) + 4), FLASHRT_F4(d, (i) + 8), FLASHRT_F4(d, (i) + 12)

// D (64 x 64) = [D +] A (64 x 16) B (64 x 16)^T, both from shared memory, rows along the reduction.
__device__ __forceinline__ void multiply_64x64(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
#if FLASHRT_DEVICE_HAS_WGMMA
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, p, 1, 1, 0, 0;\n}"
      : FLASHRT_F16(d, 0), FLASHRT_F16(d, 16)
      : "l"(a), "l"(b), "r"(int(accumulate)));
#endif
}

// D (64 x 256) = [D +] A (64 x 16) B (256 x 16)^T, both from shared memory, rows along the reduction.
__device__ __forceinline__ void multiply_64x256(float (&d)[128], uint64_t a, uint64_t b, bool accumulate) {
#if FLASHRT_DEVICE_HAS_WGMMA
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
      "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
      "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
      "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"
      "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, %128, %129, p, 1, 1, 0, 0;\n}"
      : FLASHRT_F16(d, 0), FLASHRT_F16(d, 16), FLASHRT_F16(d, 32), FLASHRT_F16(d, 48), FLASHRT_F16(d, 64),
        FLASHRT_F16(d, 80), FLASHRT_F16(d, 96), FLASHRT_F16(d, 112)
      : "l"(a), "l"(b), "r"(int(accumulate)));
#endif
}

// D (64 x 72) = [D +] A (64 x 16) B (16 x 72): A in registers, B from shared memory with rows across the reduction.
__device__ __forceinline__ void multiply_64x72(float (&d)[36], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
#if FLASHRT_DEVICE_HAS_WGMMA
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %41, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n72k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35}, {%36,%37,%38,%39}, %40, p, 1, 1, 1;\n}"
      : FLASHRT_F16(d, 0), FLASHRT_F16(d, 16), FLASHRT_F4(d, 32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));
#endif
}

// D (64 x 128) += A (64 x 16) B (16 x 128): A in registers, B from shared memory with rows across the reduction.
__device__ __forceinline__ void multiply_64x128(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
#if FLASHRT_DEVICE_HAS_WGMMA
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
      : FLASHRT_F16(d, 0), FLASHRT_F16(d, 16), FLASHRT_F16(d, 32), FLASHRT_F16(d, 48)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
}

// D (64 x 8) += A (64 x 32) B (8 x 32)^T of e4m3: A in registers, B from shared memory, rows along the reduction.
__device__ __forceinline__ void multiply_e4m3(float (&d)[4], const uint4& a, uint64_t b) {
#if FLASHRT_DEVICE_HAS_WGMMA
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, 1, 1, 1;"
               : FLASHRT_F4(d, 0)
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b));
#endif
}

// The same of 16 columns.
__device__ __forceinline__ void multiply_e4m3(float (&d)[8], const uint4& a, uint64_t b) {
#if FLASHRT_DEVICE_HAS_WGMMA
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 "
      "{%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, 1, 1, 1;"
      : FLASHRT_F4(d, 0), FLASHRT_F4(d, 4)
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b));
#endif
}

// And of 32.
__device__ __forceinline__ void multiply_e4m3(float (&d)[16], const uint4& a, uint64_t b) {
#if FLASHRT_DEVICE_HAS_WGMMA
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, 1, 1, 1;"
      : FLASHRT_F16(d, 0)
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b));
#endif
}

// D (64 x Columns) = [D +] A (64 x 32 bytes) B (Columns x 32 bytes)^T of e4m3 or fp16, both from shared memory, rows
// along the reduction. A thread holds Columns / 2 sums, which name the shape.
#if FLASHRT_DEVICE_HAS_WGMMA
#define FLASHRT_MULTIPLY(name, kind, ends, columns, sums, registers, a_at, b_at, p_at, ...)                           \
  __device__ __forceinline__ void name(float (&d)[sums], uint64_t a, uint64_t b, bool accumulate) {                   \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p_at                                                             \
                 ", 0;\n"                                                                                             \
                 "wgmma.mma_async.sync.aligned.m64n" #columns kind " {" registers "}, " a_at ", " b_at ", p" ends "}" \
                 : __VA_ARGS__                                                                                        \
                 : "l"(a), "l"(b), "r"(int(accumulate)));                                                             \
  }
#else
#define FLASHRT_MULTIPLY(name, kind, ends, columns, sums, registers, a_at, b_at, p_at, ...) \
  __device__ __forceinline__ void name(float (&)[sums], uint64_t, uint64_t, bool) {}
#endif
#define FLASHRT_MULTIPLY_E4M3(...) FLASHRT_MULTIPLY(multiply_e4m3, "k32.f32.e4m3.e4m3", ", 1, 1;\n", __VA_ARGS__)
#define FLASHRT_MULTIPLY_F16(...) FLASHRT_MULTIPLY(multiply_f16, "k16.f32.f16.f16", ", 1, 1, 0, 0;\n", __VA_ARGS__)

// clang-format off
#define FLASHRT_R0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define FLASHRT_R1 "%8,%9,%10,%11,%12,%13,%14,%15"
#define FLASHRT_R2 "%16,%17,%18,%19,%20,%21,%22,%23"
#define FLASHRT_R3 "%24,%25,%26,%27,%28,%29,%30,%31"
#define FLASHRT_R4 "%32,%33,%34,%35,%36,%37,%38,%39"
#define FLASHRT_R5 "%40,%41,%42,%43,%44,%45,%46,%47"
#define FLASHRT_R6 "%48,%49,%50,%51,%52,%53,%54,%55"
#define FLASHRT_R7 "%56,%57,%58,%59,%60,%61,%62,%63"
#define FLASHRT_R8 "%64,%65,%66,%67,%68,%69,%70,%71"
#define FLASHRT_R9 "%72,%73,%74,%75,%76,%77,%78,%79"
#define FLASHRT_R10 "%80,%81,%82,%83,%84,%85,%86,%87"
#define FLASHRT_R11 "%88,%89,%90,%91,%92,%93,%94,%95"
#define FLASHRT_R12 "%96,%97,%98,%99,%100,%101,%102,%103"
#define FLASHRT_F8(d, i) FLASHRT_F4(d, i), FLASHRT_F4(d, (i) + 4)
FLASHRT_MULTIPLY_E4M3(80, 40, FLASHRT_R0 "," FLASHRT_R1 "," FLASHRT_R2 "," FLASHRT_R3 "," FLASHRT_R4, "%40", "%41", "%42", FLASHRT_F16(d, 0), FLASHRT_F16(d, 16), FLASHRT_F8(d, 32))
FLASHRT_MULTIPLY_E4M3(128, 64, FLASHRT_R0 "," FLASHRT_R1 "," FLASHRT_R2 "," FLASHRT_R3 "," FLASHRT_R4 "," FLASHRT_R5 "," FLASHRT_R6 "," FLASHRT_R7, "%64", "%65", "%66", FLASHRT_F16(d, 0), FLASHRT_F16(d, 16), FLASHRT_F16(d, 32), FLASHRT_F16(d, 48))
FLASHRT_MULTIPLY_E4M3(144, 72, FLASHRT_R0 "," FLASHRT_R1 "," FLASHRT_R2 "," FLASHRT_R3 "," FLASHRT_R4 "," FLASHRT_R5 "," FLASHRT_R6 "," FLASHRT_R7 "," FLASHRT_R8, "%72", "%73", "%74", FLASHRT_F16(d, 0), FLASHRT_F16(d, 16), FLASHRT_F16(d, 32), FLASHRT_F16(d, 48), FLASHRT_F8(d, 64))
FLASHRT_MULTIPLY_E4M3(152, 76, FLASHRT_R0 "," FLASHRT_R1 "," FLASHRT_R2 "," FLASHRT_R3 "," FLASHRT_R4 "," FLASHRT_R5 "," FLASHRT_R6 "," FLASHRT_R7 "," FLASHRT_R8 "," "%72,%73,%74,%75", "%76", "%77", "%78", FLASHRT_F16(d, 0), FLASHRT_F16(d, 16), FLASHRT_F16(d, 32), FLASHRT_F16(d, 48), FLASHRT_F8(d, 64), FLASHRT_F4(d, 72))
FLASHRT_MULTIPLY_E4M3(176, 88, FLASHRT_R0 "," FLASHRT_R1 "," FLASHRT_R2 "," FLASHRT_R3 "," FLASHRT_R4 "," FLASHRT_R5 "," FLASHRT_R6 "," FLASHRT_R7 "," FLASHRT_R8 "," FLASHRT_R9 "," FLASHRT_R10, "%88", "%89", "%90", FLASHRT_F16(d, 0), FLASHRT_F16(d, 16), FLASHRT_F16(d, 32), FLASHRT_F16(d, 48), FLASHRT_F16(d, 64), FLASHRT_F8(d, 80))
FLASHRT_MULTIPLY_E4M3(208, 104, FLASHRT_R0 "," FLASHRT_R1 "," FLASHRT_R2 "," FLASHRT_R3 "," FLASHRT_R4 "," FLASHRT_R5 "," FLASHRT_R6 "," FLASHRT_R7 "," FLASHRT_R8 "," FLASHRT_R9 "," FLASHRT_R10 "," FLASHRT_R11 "," FLASHRT_R12, "%104", "%105", "%106", FLASHRT_F16(d, 0), FLASHRT_F16(d, 16), FLASHRT_F16(d, 32), FLASHRT_F16(d, 48), FLASHRT_F16(d, 64), FLASHRT_F16(d, 80), FLASHRT_F8(d, 96))
FLASHRT_MULTIPLY_F16(80, 40, FLASHRT_R0 "," FLASHRT_R1 "," FLASHRT_R2 "," FLASHRT_R3 "," FLASHRT_R4, "%40", "%41", "%42", FLASHRT_F16(d, 0), FLASHRT_F16(d, 16), FLASHRT_F8(d, 32))
#undef FLASHRT_R0
#undef FLASHRT_R1
#undef FLASHRT_R2
#undef FLASHRT_R3
#undef FLASHRT_R4
#undef FLASHRT_R5
#undef FLASHRT_R6
#undef FLASHRT_R7
#undef FLASHRT_R8
#undef FLASHRT_R9
#undef FLASHRT_R10
#undef FLASHRT_R11
#undef FLASHRT_R12
#undef FLASHRT_F8
#undef FLASHRT_MULTIPLY_E4M3
#undef FLASHRT_MULTIPLY_F16
#undef FLASHRT_MULTIPLY
// clang-format on

#undef FLASHRT_F16
#undef FLASHRT_F4

}  // namespace wgmma
}  // namespace flashrt
