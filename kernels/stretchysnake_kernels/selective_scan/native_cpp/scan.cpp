// The selective scan on one core, forward and backward; compiled once per set of instructions.
//
// One vector register holds one state of `W` channels, and all states of W channels stay in
// registers while a loop walks a chunk of tokens. The backward pass recomputes a chunk from the
// state at its start, then walks it in the opposite order.
//   y = (<h, C> + D x) silu(z), h_t = exp(dt A) h_{t-1} + dt x B, dt = softplus(delta + bias)
//
// Nothing of the standard library is used here: a template of it, compiled for one processor, might
// be linked into the code for another.
#include "scan.hpp"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#ifndef ISA
#error "compile with -DISA=plain, avx2 or avx512"
#endif
#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)

namespace stretchysnake {
namespace PASTE(of_, ISA) {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LN_2 = 0.69314718055994531f;

typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t Int __attribute__((vector_size(4 * W)));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));
typedef uint16_t Half __attribute__((vector_size(2 * W)));
typedef float LooseVec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t LooseHalf __attribute__((vector_size(2 * W), aligned(2), may_alias));
struct BFloat16 {
  uint16_t bits;
};
#define INLINE inline __attribute__((always_inline))

INLINE Vec load(const float* p) { return (Vec) * (const LooseVec*)p; }
INLINE void store(float* p, Vec v) { *(LooseVec*)p = (LooseVec)v; }
INLINE Vec load(const BFloat16* p) {
  const Half half = (Half) * (const LooseHalf*)p;
  return (Vec)(__builtin_convertvector(half, Bits) << 16);
}
INLINE void store(BFloat16* p, Vec v) {  // rounds to nearest, ties to even
  Bits bits = (Bits)v;
  bits += 0x7fff + ((bits >> 16) & 1);
  bits = v == v ? bits : Bits{} + 0x7fc00000;
  *(LooseHalf*)p = (LooseHalf)__builtin_convertvector(bits >> 16, Half);
}
INLINE Vec fill(float v) { return Vec{} + v; }

// 2^v: a polynomial on [-1/2, 1/2] times a power of two. Taylor's coefficients ln(2)^k / k!; the
// last is exactly 1, because a decay close to one is raised to the length's power. Not-a-number
// stays what it is, large arguments give infinity, small ones 0.
INLINE Vec polynomial(Vec f) {
  const float taylor[] = {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, LN_2, 1.0f};
  Vec p = fill(1.5403530e-4f);
#pragma GCC unroll 6
  for (int k = 0; k < 6; k++) p = p * f + taylor[k];
  return p;
}
#if defined(__AVX512F__)
INLINE Vec exp2v(Vec v) {
  __m512 whole = _mm512_roundscale_ps((__m512)v, 0);
  return (Vec)_mm512_scalef_ps((__m512)polynomial(v - (Vec)whole), whole);
}
#else
INLINE Vec exp2v(Vec v) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: its sum with v has round(v) in the low bits
  v = v < -127.0f ? fill(-127.0f) : v > 128.0f ? fill(128.0f) : v;
  const Vec shifted = v + magic;
  return (Vec)((Int)polynomial(v - (shifted - magic)) + ((Int)shifted << 23));
}
#endif

INLINE Vec sigmoid(Vec v) { return 1.0f / (1.0f + exp2v(v * -LOG2_E)); }

struct Step {
  Vec dt, slope;  // softplus and its derivative
};
// log(1 + e^v), log1p as its odd series in s = e / (e + 2), e = e^-|v|.
INLINE Step softplus(Vec v) {
  const Vec e = exp2v((v > 0.0f ? -v : v) * LOG2_E), s = e / (e + 2.0f), square = s * s;
  Vec p = fill(2.0f / 13);
#pragma GCC unroll 6
  for (int k = 11; k > 0; k -= 2) p = p * square + 2.0f / k;
  return {(v < 0.0f ? fill(0) : v) + p * s, (v > 0.0f ? fill(1) : e) / (1.0f + e)};
}

INLINE float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < W; i++) total += v[i];
  return total;
}

// The arrays of a task, moved to its direction and video.
template <int N, typename T>
struct Views {
  int64_t channels, length, chunks;
  bool reverse;
  const T *x, *delta, *z;
  const float *decay, *B, *C, *D, *bias;
  int64_t tokens, states, weights;  // where the task's arrays of each kind begin

  INLINE Views(const Call& call, const Task& task) {
    const int64_t pair = task.direction * call.batch + task.video;
    channels = call.channels, length = call.length, chunks = call.chunks();
    reverse = call.reverse[task.direction];
    tokens = pair * length, states = pair * N * channels, weights = pair * channels;
    x = (const T*)call.x + tokens * channels;
    delta = (const T*)call.delta + tokens * channels;
    z = call.z ? (const T*)call.z + task.video * length * channels : nullptr;
    decay = call.decay + task.direction * N * channels;
    B = call.B + tokens * N, C = call.C + tokens * N;
    D = call.D + task.direction * channels, bias = call.bias + task.direction * channels;
  }
  INLINE int64_t token(int64_t i) const { return reverse ? length - 1 - i : i; }
};

template <int N, typename T>
void walk(const Call& call, const Task& task, const Forward& out, float* state) {
  const Views<N, T> in(call, task);
  const int64_t D = in.channels;
  T* const y = (T*)out.y + in.tokens * D;
  for (int64_t c = 0; c < in.chunks; c++) {
    const int64_t begin = c * CHUNK, end = begin + CHUNK < in.length ? begin + CHUNK : in.length;
    for (int64_t d = task.from; d < task.to; d += W) {
      float* own = state + N * (d - task.from);
      const float* first = c ? own : call.start + in.states + d;
      const int64_t stride = c ? W : D;
      Vec h[N], a[N];
#pragma GCC unroll 32
      for (int n = 0; n < N; n++) h[n] = load(first + n * stride), a[n] = load(in.decay + n * D + d);
      if (out.checkpoints) {
        float* kept = out.checkpoints + in.states * in.chunks + c * N * D + d;
#pragma GCC unroll 32
        for (int n = 0; n < N; n++) store(kept + n * D, h[n]);
      }
      const Vec skip = load(in.D + d), bias = load(in.bias + d);
      for (int64_t i = begin; i < end; i++) {
        const int64_t t = in.token(i), at = t * D + d;
        const float *B = in.B + t * N, *C = in.C + t * N;
        const Vec x = load(in.x + at), v = load(in.delta + at) + bias;
        const Vec dt = call.softplus ? softplus(v).dt : v, inflow = dt * x;
        Vec even = skip * x, odd = fill(0);
#pragma GCC unroll 32
        for (int n = 0; n < N; n++) {
          h[n] = exp2v(dt * a[n]) * h[n] + inflow * B[n];
          if (n & 1) odd += h[n] * C[n]; else even += h[n] * C[n];
        }
        Vec total = even + odd;
        if (in.z) {
          const Vec z = load(in.z + at);
          total = total * z * sigmoid(z);
        }
        store(y + at, total);
      }
      float* last = end == in.length ? out.last + in.states + d : own;
      const int64_t last_stride = end == in.length ? D : W;
#pragma GCC unroll 32
      for (int n = 0; n < N; n++) store(last + n * last_stride, h[n]);
    }
  }
}

template <int N, typename T>
void walk_back(const Call& call, const Task& task, const Backward& out, float* scratch) {
  const Views<N, T> in(call, task);
  const int64_t D = in.channels, tile = CHUNK * N * W;
  float *kept = scratch, *decays = kept + tile, *sum_B = decays + tile, *sum_C = sum_B + tile;
  float *steps = sum_C + tile, *slopes = steps + CHUNK * W, *ups = slopes + CHUNK * W;
  float *g_of = ups + CHUNK * W;
  const T* const d_y = (const T*)out.d_y + in.tokens * D;
  T *const d_x = (T*)out.d_x + in.tokens * D, *const d_delta = (T*)out.d_delta + in.tokens * D;
  T* const d_z = in.z ? (T*)out.d_z + in.tokens * D : nullptr;
  float *const d_A = out.d_A + in.states, *const d_D = out.d_D + in.weights;
  float* const d_bias = out.d_bias + in.weights;
  for (int64_t c = in.chunks - 1; c >= 0; c--) {
    const int64_t begin = c * CHUNK, end = begin + CHUNK < in.length ? begin + CHUNK : in.length;
    const bool newest = c == in.chunks - 1;
    for (int64_t i = 0; i < 2 * tile; i += W) store(sum_B + i, fill(0));
    for (int64_t d = task.from; d < task.to; d += W) {
      const Vec skip = load(in.D + d), bias = load(in.bias + d);
      const float* const decay = in.decay + d;
      {  // Recompute the chunk: kept = exp(dt A) h_{t-1}, and what needs h itself.
        const float* first = out.checkpoints + in.states * in.chunks + c * N * D + d;
        Vec h[N], a[N], d_skip = newest ? fill(0) : load(d_D + d);
#pragma GCC unroll 32
        for (int n = 0; n < N; n++) h[n] = load(first + n * D), a[n] = load(decay + n * D);
        for (int64_t i = begin; i < end; i++) {
          const int64_t t = in.token(i), at = t * D + d, row = (i - begin) * W;
          const float *B = in.B + t * N, *C = in.C + t * N;
          const Vec x = load(in.x + at), v = load(in.delta + at) + bias;
          Vec up = load(d_y + at), gate = fill(1), z = fill(1), total = skip * x;
          const Step step = call.softplus ? softplus(v) : Step{v, fill(1)};
          const Vec inflow = step.dt * x;
          if (in.z) z = load(in.z + at), gate = sigmoid(z);
          const Vec dy = up * z * gate;
          float *k_of = kept + row * N, *e_of = decays + row * N, *C_of = sum_C + row * N;
#pragma GCC unroll 32
          for (int n = 0; n < N; n++) {
            const Vec e = exp2v(step.dt * a[n]), k = e * h[n];
            store(e_of + n * W, e);
            store(k_of + n * W, k);
            h[n] = k + inflow * B[n];
            store(C_of + n * W, load(C_of + n * W) + dy * h[n]);
            total += h[n] * C[n];
          }
          store(steps + row, step.dt);
          store(slopes + row, step.slope);
          store(ups + row, dy);
          if (in.z) store(d_z + at, up * total * gate * (1.0f + z * (1.0f - gate)));
          d_skip += dy * x;
        }
        store(d_D + d, d_skip);
      }
      float* own = g_of + N * (d - task.from);
      const float* first = newest ? out.d_last + in.states + d : own;
      const int64_t stride = newest ? D : W;
      Vec g[N], total_A[N], total_bias = newest ? fill(0) : load(d_bias + d);
#pragma GCC unroll 32
      for (int n = 0; n < N; n++) g[n] = load(first + n * stride), total_A[n] = fill(0);
      for (int64_t i = end - 1; i >= begin; i--) {
        const int64_t t = in.token(i), at = t * D + d, row = (i - begin) * W;
        const float *B = in.B + t * N, *C = in.C + t * N;
        const Vec x = load(in.x + at), dt = load(steps + row), dy = load(ups + row);
        const Vec inflow = dt * x;
        const float *k_of = kept + row * N, *e_of = decays + row * N;
        float* B_of = sum_B + row * N;
        Vec along_A = fill(0), along_B = fill(0);
#pragma GCC unroll 32
        for (int n = 0; n < N; n++) {
          g[n] += dy * C[n];
          store(B_of + n * W, load(B_of + n * W) + g[n] * inflow);
          const Vec q = g[n] * load(k_of + n * W);
          total_A[n] += q * dt;
          along_A += q * load(decay + n * D);
          along_B += g[n] * B[n];
          g[n] *= load(e_of + n * W);
        }
        const Vec slope = (along_A * LN_2 + along_B * x) * load(slopes + row);
        store(d_delta + at, slope);
        store(d_x + at, along_B * dt + dy * skip);
        total_bias += slope;
      }
      float* next = c ? own : out.d_start + in.states + d;
      const int64_t next_stride = c ? W : D;
#pragma GCC unroll 32
      for (int n = 0; n < N; n++) {
        float* total = d_A + n * D + d;
        store(total, newest ? total_A[n] : load(total) + total_A[n]);
        store(next + n * next_stride, g[n]);
      }
      store(d_bias + d, total_bias);
    }
    for (int64_t i = begin; i < end; i++) {
      const int64_t at = (in.tokens + in.token(i)) * N, row = (i - begin) * N * W;
      for (int n = 0; n < N; n++) {
        out.d_B[at + n] = sum(load(sum_B + row + n * W));
        out.d_C[at + n] = sum(load(sum_C + row + n * W));
      }
    }
  }
}

int64_t walk_scratch(const Call& call, const Task& task) {
  return call.states * (task.to - task.from);
}

int64_t walk_back_scratch(const Call& call, const Task& task) {
  return 4 * CHUNK * call.states * W + 3 * CHUNK * W + call.states * (task.to - task.from);
}

template <int N>
void choose_walk(const Call& call, const Task& task, const Forward& out, float* scratch) {
  call.bfloat16 ? walk<N, BFloat16>(call, task, out, scratch)
                : walk<N, float>(call, task, out, scratch);
}

template <int N>
void choose_walk_back(const Call& call, const Task& task, const Backward& out, float* scratch) {
  call.bfloat16 ? walk_back<N, BFloat16>(call, task, out, scratch)
                : walk_back<N, float>(call, task, out, scratch);
}

void any_walk(const Call& call, const Task& task, const Forward& out, float* scratch) {
  if (call.states == 8) choose_walk<8>(call, task, out, scratch);
  if (call.states == 16) choose_walk<16>(call, task, out, scratch);
  if (call.states == 32) choose_walk<32>(call, task, out, scratch);
}

void any_walk_back(const Call& call, const Task& task, const Backward& out, float* scratch) {
  if (call.states == 8) choose_walk_back<8>(call, task, out, scratch);
  if (call.states == 16) choose_walk_back<16>(call, task, out, scratch);
  if (call.states == 32) choose_walk_back<32>(call, task, out, scratch);
}

}  // namespace PASTE(of_, ISA)

const Kernels PASTE(kernels_, ISA) = {
    PASTE(of_, ISA)::W,        PASTE(of_, ISA)::walk_scratch, PASTE(of_, ISA)::walk_back_scratch,
    PASTE(of_, ISA)::any_walk, PASTE(of_, ISA)::any_walk_back};

}  // namespace stretchysnake
