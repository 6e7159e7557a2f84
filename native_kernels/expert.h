// Launchers of the action expert's latency-bound kernels. Like those of flashrt_native.h they only enqueue work.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace flashrt {

// skinny_gemm.cu
constexpr int kSkinnyMaxRows = 64, kSkinnyMaxNormRows = 16;

enum class SkinnyEpilogue : int { kStore = 0, kResidual = 1, kGeglu = 2, kRope = 3 };

struct SkinnyGemm {
  bool fp8;   // weights (and plain activations) e4m3, else bf16
  bool wide;  // kGeglu, kRope, fp8, without norm: activations fp16
  SkinnyEpilogue epilogue;
  int rows, n, k;           // activations (rows, k), weights (n, k)
  const void* x;            // bf16 when norm_scale is set (up to 16 rows), else the weights' type, or fp16 (`wide`)
  const void* weights;      // packed tiles
  const float* norm_scale;  // (k): x * rsqrt(mean(x^2) + eps) * (1 + norm_scale) + norm_shift; null: no norm
  const float* norm_shift;  // (k) or null
  float eps;
  const float* x_scale;  // fp8: real value of one quantised step of x, and of the weights
  const float* w_scale;
  const float* out_scale;  // kGeglu, fp8: scale of the output
  const float* bias;       // kStore: (n) or null
  const float* gate;       // kResidual: (n) or null for 1
  void* out;               // kStore, kResidual: bf16 (rows, n); kGeglu: (rows, n / 2); kRope: q, bf16
  const float* rope_cos;   // kRope: (positions, head_dim / 2)
  const float* rope_sin;
  const int* prefix_length;  // kRope: slot and position of row 0, on the device
  void* k_cache;             // kRope: bf16 (slots, kv_heads, head_dim)
  void* v_cache;
  int heads, kv_heads, head_dim;
};

cudaError_t skinny_gemm(const SkinnyGemm& problem, cudaStream_t stream);

// expert_attention.cu
struct ExpertAttention {
  bool fp8_out;
  int rows, heads, kv_heads;  // rows: queries a head; head_dim is 256
  const void* q;              // bf16 (rows, heads, 256)
  const void* k_cache;        // bf16 (slots, kv_heads, 256)
  const void* v_cache;
  const int* prefix_length;  // keys [0, prefix_length + rows) are attended
  int capacity;              // slots of the cache: an upper bound of the keys
  const float* out_scale;    // fp8_out: scale of the output
  void* out;                 // bf16 or e4m3 (rows, heads * 256)
  void* scratch;  // expert_attention_bytes, zero at first, left for the next call: without clusters; or null: with them
};

int64_t expert_attention_bytes(int rows, int heads, int capacity);

// Whether the current device has clusters, and room for the keys of so many slots in a block's shared memory.
bool expert_attention_in_clusters(int rows, int capacity);

// Without scratch cudaErrorNotSupported where the device has no clusters, or no room for the keys of its eighth.
cudaError_t expert_attention(const ExpertAttention& problem, cudaStream_t stream);

// action_step.cu
struct ActionStep {
  int rows, width, action_dim;  // (horizon, expert width, 32)
  const void* hidden;           // bf16 (rows, width) or null: no output half
  const float* norm_scale;      // (width)
  const float* norm_shift;      // (width) or null
  float eps;
  const float* out_weight;  // float32 (action_dim, width)
  const float* out_bias;
  float dt;
  const float* guide_gain;    // one float, on the device
  const float* guide_weight;  // (rows), or null for no guide
  const float* guide_target;  // (rows, action_dim)
  float time;                 // of the flow, for the guide
  float* x;                   // float32 (rows, action_dim), updated in place
  const float* in_weight;     // float32 (width, action_dim) or null: no input half
  const float* in_bias;       // float32 (width)
  bool silu;                  // pi0: silu after the input projection
  void* next;                 // bf16 (rows, width)
};

cudaError_t action_step(const ActionStep& problem, cudaStream_t stream);

// guide_velocity.cu
cudaError_t guide_velocity(const float* velocity, const float* x, const float* target, const float* weight,
                           const float* gain, float time, float* out, int rows, int width, cudaStream_t stream);

// expert_steps.cu
enum ExpertProduct : int { kQkv = 0, kOut = 1, kGateUp = 2, kDown = 3, kProducts = 4 };

constexpr int kExpertBarrierWords = 2;
constexpr int kExpertMaxRows = 64;

struct ExpertSteps {
  bool fp8;
  bool fill;      // one step that leaves the rows' keys and values behind the prefix in the cache, and x as it is
  bool unpaired;  // blocks share nothing in pairs, as where the device cannot hold all pairs at once: for tests of that
  int rows, layers, steps, action_dim;  // width 1024, mlp 4096, 8 heads of 256, 1 kv head
  const void* weights[kProducts];       // packed chunks, layer after layer
  const float* weight_scale;            // fp8: (layers, kProducts)
  const float* input_scale;             // fp8: (layers, 2): inputs of out and of down
  const float* norm_scale;              // (steps, 2 * layers + 1, 1024), by the strides below, in floats
  const float* norm_shift;              // the same, or null
  const float* gate;                    // the same, or null for 1
  int64_t step_stride, norm_stride;
  const float* shift_products;  // (steps, layers, 2560 + 8192): norm_shift times W_qkv, W_gate_up; or null
  float eps;
  const float* rope_cos;  // (positions, 128)
  const float* rope_sin;
  const int* prefix_length;  // on the device: slot and position of the first action
  void* k_cache;             // bf16 (layers, capacity, 1, 256)
  void* v_cache;
  int capacity;
  float* x;                // float32 (rows, action_dim): noise in, actions out
  const float* in_weight;  // float32 (1024, action_dim)
  const float* in_bias;    // float32 (steps or 1, 1024), `in_bias_stride` floats apart
  int64_t in_bias_stride;
  const float* out_weight;  // float32 (action_dim, 1024)
  const float* out_bias;
  const void* mix_weights;    // pi0, else null: bf16 packed chunks of (1024, 1024), h = W_mix silu(W_in x + b) + b_mix
  const float* mix_bias;      // float32 (1024)
  const float* guide_gain;    // (steps) g, or null for no guidance: x += D + g_k/n * weight * (target - x - t_k n D)
  const float* guide_weight;  // (rows, action_dim), with D the Euler step, n the steps and t_k = 1 - k/n
  const float* guide_target;
  void* exchange;     // scratch of expert_exchange_bytes(rows), whatever it holds
  unsigned* barrier;  // kExpertBarrierWords, zero before the first launch; left zero
};

int64_t expert_exchange_bytes(int rows);

// cudaErrorNotSupported where the device cannot hold the whole grid at once: use the single kernels there.
// cudaErrorInvalidValue where weights, caches, x, exchange or a float32 array read as vectors is not aligned to 16
// bytes (input_scale: to 8). A prefix and rows that exceed the capacity end the launch with an error.
cudaError_t expert_steps(const ExpertSteps& problem, cudaStream_t stream);

}  // namespace flashrt
