// PTX wrappers used by the latency-bound kernels: programmatic dependent launch, bulk copies, tensor-core MMA.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace flashrt {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FLASHRT_DEVICE_HAS_BULK 1
#else
#define FLASHRT_DEVICE_HAS_BULK 0
#endif

// Wait until the previous kernel of the stream has completed and its writes are visible.
__device__ __forceinline__ void dependency_wait() {
#if FLASHRT_DEVICE_HAS_BULK
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Let the next kernel start its prologue. Called after dependency_wait(), so that at most two kernels overlap and a
// prologue may read anything written two or more kernels ago.
__device__ __forceinline__ void dependency_release() {
#if FLASHRT_DEVICE_HAS_BULK
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Asks for the cache line at an address of global memory; nobody waits.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
#if FLASHRT_DEVICE_HAS_BULK
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

__device__ __forceinline__ void barrier_init_fence() {
#if FLASHRT_DEVICE_HAS_BULK
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
#if FLASHRT_DEVICE_HAS_BULK
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
#if FLASHRT_DEVICE_HAS_BULK
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t phase) {
#if FLASHRT_DEVICE_HAS_BULK
  asm volatile(
      "{\n.reg .pred done;\nretry:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\nbra retry;\nfinished:\n}\n" ::"r"(shared_address(barrier)),
      "r"(phase)
      : "memory");
#endif
}

// Whether it has completed, without waiting.
__device__ __forceinline__ bool barrier_test(uint64_t* barrier, uint32_t phase) {
  uint32_t done = 0;
#if FLASHRT_DEVICE_HAS_BULK
  asm volatile(
      "{\n.reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n}\n"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(phase)
      : "memory");
#endif
  return done != 0;
}

// Copy `bytes` (a multiple of 16) from global to shared memory through the copy engine; completes on `barrier`.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
#if FLASHRT_DEVICE_HAS_BULK
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#endif
}

// The same for bytes that are not read again soon: they leave L2 first.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy = 0;
#if FLASHRT_DEVICE_HAS_BULK
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}

__device__ __forceinline__ void bulk_copy_once(void* shared, const void* global, uint32_t bytes, uint64_t* barrier,
                                               uint64_t policy) {
#if FLASHRT_DEVICE_HAS_BULK
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
      :
      : "r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
#endif
}

// The address in the shared memory of block `rank` of the cluster that `address` has in this one's.
__device__ __forceinline__ uint32_t address_in(uint32_t address, int rank) {
  uint32_t there = 0;
#if FLASHRT_DEVICE_HAS_BULK
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
#endif
  return there;
}

// Stores that count on a barrier of the block that they go to: no fence, which would be over the whole GPU.
__device__ __forceinline__ void give(uint32_t address, uint4 words, uint32_t barrier) {
#if FLASHRT_DEVICE_HAS_BULK
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
      "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w), "r"(barrier)
      : "memory");
#endif
}
__device__ __forceinline__ void give(uint32_t address, float value, uint32_t barrier) {
#if FLASHRT_DEVICE_HAS_BULK
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address),
               "r"(__float_as_uint(value)), "r"(barrier)
               : "memory");
#endif
}
__device__ __forceinline__ void give(uint32_t address, float2 pair, uint32_t barrier) {
#if FLASHRT_DEVICE_HAS_BULK
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(address),
               "r"(__float_as_uint(pair.x)), "r"(__float_as_uint(pair.y)), "r"(barrier)
               : "memory");
#endif
}

// Four floats to `address`, or to the same address of block `rank` of the cluster, counted there on `barrier`. Two
// instructions under a predicate: of a branch the compiler makes more registers.
__device__ __forceinline__ void keep_or_give(bool keep, uint32_t address, int rank, const float* values,
                                             uint32_t barrier) {
#if FLASHRT_DEVICE_HAS_BULK
  asm volatile(
      "{\n.reg .pred keep;\n.reg .b32 there;\nsetp.ne.b32 keep, %0, 0;\nmapa.shared::cluster.u32 there, %1, %2;\n"
      "@keep st.shared.v4.f32 [%1], {%4, %5, %6, %7};\n"
      "@!keep st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%4, %5, %6, %7}, [%3];\n}" ::"r"(
          static_cast<int>(keep)),
      "r"(address), "r"(rank), "r"(barrier), "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3])
      : "memory");
#endif
}

__device__ __forceinline__ void cluster_arrive() {
#if FLASHRT_DEVICE_HAS_BULK
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if FLASHRT_DEVICE_HAS_BULK
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// 16-byte asynchronous copy of one thread, for devices without the bulk copy engine.
__device__ __forceinline__ void async_copy16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

__device__ __forceinline__ void async_copy8(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

__device__ __forceinline__ void async_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until this thread's committed copies have come.
__device__ __forceinline__ void async_copy_wait_committed() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// Arrive at a barrier when this thread's copies so far have come.
__device__ __forceinline__ void async_copy_arrive(uint64_t* barrier) {
#if FLASHRT_DEVICE_HAS_BULK
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

__device__ __forceinline__ void async_copy_wait() {
  async_copy_commit();
  async_copy_wait_committed();
}

// D += A(16x16) B(16x8), bf16 in, float32 out.
__device__ __forceinline__ void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// D += A(16x16) B(16x8), fp16 in, float32 out.
__device__ __forceinline__ void mma_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four e4m3 values as two pairs of fp16: exact.
__device__ __forceinline__ void e4m3_to_f16(uint32_t packed, uint32_t& low, uint32_t& high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  asm("{\n.reg .b16 first, second;\nmov.b32 {first, second}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, first;\ncvt.rn.f16x2.e4m3x2 %1, second;\n}"
      : "=r"(low), "=r"(high)
      : "r"(packed));
#endif
}

// D += A(16x32) B(32x8), fp8 e4m3 in, float32 out.
__device__ __forceinline__ void mma_e4m3(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

__device__ __forceinline__ void load_matrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

__device__ __forceinline__ void load_matrix_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

// Round to e4m3, saturating: NaN stays NaN, so a broken activation is not hidden.
__device__ __forceinline__ uint8_t to_e4m3(float value) {
  return __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
}

__device__ __forceinline__ float gelu_tanh(float x) {
  const float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  // tanh(u) = 1 - 2 / (1 + exp(2u)): exact to float rounding, where the fast tanh instruction is not
  return x * (1.0f - 1.0f / (1.0f + __expf(2.0f * inner)));
}

// One instruction; what is below 2^-126 is zero.
__device__ __forceinline__ float power_of_two(float exponent) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(exponent));
  return result;
}
__device__ __forceinline__ float binary_logarithm(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace flashrt
