// The selective scan of Mamba-1 as fast as this CPU runs it: the floor of the benchmark.
//
// float32, 16 states per channel, channels a multiple of the vector width; bidirectional models
// walk both ways, the time is the same. One vector register holds one state of `W` channels, so the
// 16 states of W channels stay in registers while a loop walks a chunk of tokens. The gradient
// recomputes a chunk from the state at its start. Both passes are divided into (video, range of
// channels) tasks.
//
// y = (<h, C> + D x) silu(z), h_t = exp(dt A) h_{t-1} + dt x B, dt = softplus(delta + bias).
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int N = 16;      // states
constexpr int CHUNK = 32;  // tokens between checkpoints
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LN_2 = 0.69314718055994531f;

typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t Int __attribute__((vector_size(4 * W)));
typedef float Loose __attribute__((vector_size(4 * W), aligned(4), may_alias));
#define INLINE inline __attribute__((always_inline))

INLINE Vec load(const float* p) { return (Vec) * (const Loose*)p; }
INLINE void store(float* p, Vec v) { *(Loose*)p = (Loose)v; }
INLINE Vec fill(float v) { return Vec{} + v; }
INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// 2^v for v <= 127: a polynomial on [-1/2, 1/2], exactly 1 at 0, times a power of two.
INLINE Vec polynomial(Vec f) {
  const float taylor[] = {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, LN_2, 1.0f};
  Vec p = fill(1.5403530e-4f);
  for (float c : taylor) p = p * f + c;
  return p;
}
#if defined(__AVX512F__)
INLINE Vec exp2v(Vec v) {
  __m512 whole = _mm512_roundscale_ps((__m512)v, 0);
  return (Vec)_mm512_scalef_ps((__m512)polynomial(v - (Vec)whole), whole);
}
#else
INLINE Vec exp2v(Vec v) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded value in the low bits
  v = larger(v, fill(-126.0f));
  Vec shifted = v + magic;
  return (Vec)((Int)polynomial(v - (shifted - magic)) + ((Int)shifted << 23));
}
#endif

INLINE Vec sigmoid(Vec v) { return 1.0f / (1.0f + exp2v(larger(-v, fill(-80.0f)) * LOG2_E)); }

// log(1 + e^v); log1p as its odd series in e / (e + 2).
INLINE Vec softplus(Vec v) {
  Vec e = exp2v((v > 0.0f ? -v : v) * LOG2_E), s = e / (e + 2.0f), square = s * s;
  Vec p = fill(2.0f / 13);
  for (float k : {11.0f, 9.0f, 7.0f, 5.0f, 3.0f, 1.0f}) p = p * square + 2.0f / k;
  return larger(v, fill(0.0f)) + p * s;
}

INLINE float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < W; i++) total += v[i];
  return total;
}

struct Problem {
  int64_t batch, length, channels;
  const float *x, *delta, *A, *B, *C, *D, *z, *bias;
  int64_t chunks() const { return (length + CHUNK - 1) / CHUNK; }
};

// A (channels, N) -> (N, channels), times log2(e).
std::vector<float> log2_decay(const Problem& p) {
  std::vector<float> out(N * p.channels);
  for (int64_t d = 0; d < p.channels; d++)
    for (int n = 0; n < N; n++) out[n * p.channels + d] = p.A[d * N + n] * LOG2_E;
  return out;
}

// Ranges of channels per video, so that every thread finds two tasks.
int64_t ranges(const Problem& p, int threads) {
  int64_t count = 1;
  while (p.batch * count < 2 * threads && p.channels % (2 * count * W) == 0) count *= 2;
  return threads == 1 ? 1 : count;
}

void walk(const Problem& p, const float* decay, int64_t b, int64_t from, int64_t to, float* y,
          float* checkpoints) {
  const int64_t D = p.channels;
  std::vector<float> state(N * (to - from), 0.0f);
  for (int64_t c = 0; c < p.chunks(); c++) {
    const int64_t end = std::min(p.length, (c + 1) * CHUNK);
    for (int64_t d = from; d < to; d += W) {
      float* own = state.data() + N * (d - from);
      Vec h[N], a[N];
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) h[n] = load(own + n * W), a[n] = load(decay + n * D + d);
      if (checkpoints)
        for (int n = 0; n < N; n++) store(checkpoints + ((b * p.chunks() + c) * N + n) * D + d, h[n]);
      const Vec skip = load(p.D + d), bias = load(p.bias + d);
      for (int64_t t = c * CHUNK; t < end; t++) {
        const int64_t at = (b * p.length + t) * D + d;
        const float *B = p.B + (b * p.length + t) * N, *C = p.C + (b * p.length + t) * N;
        const Vec x = load(p.x + at), z = load(p.z + at);
        const Vec dt = softplus(load(p.delta + at) + bias), inflow = dt * x;
        Vec even = skip * x, odd = fill(0);
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) {
          h[n] = exp2v(dt * a[n]) * h[n] + inflow * B[n];
          if (n & 1) odd += h[n] * C[n]; else even += h[n] * C[n];
        }
        store(y + at, (even + odd) * z * sigmoid(z));
      }
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) store(own + n * W, h[n]);
    }
  }
}

struct Gradients {
  float *x, *delta, *z;           // (batch, length, channels)
  float *B, *C;                   // (batch, length, N) of this range of channels
  float *A, *D, *bias;            // (N, channels), (channels), (channels) of this video
};

void walk_back(const Problem& p, const float* decay, int64_t b, int64_t from, int64_t to,
               const float* checkpoints, const float* d_y, const Gradients& out) {
  const int64_t D = p.channels, tile = CHUNK * N * W;
  std::vector<float> g_of(N * (to - from), 0.0f), scratch(4 * tile + 2 * CHUNK * W);
  float *kept = scratch.data(), *decays = kept + tile, *sum_B = decays + tile, *sum_C = sum_B + tile;
  float *steps = sum_C + tile, *slopes = steps + CHUNK * W;
  for (int64_t c = p.chunks() - 1; c >= 0; c--) {
    const int64_t begin = c * CHUNK, end = std::min(p.length, begin + CHUNK);
    memset(sum_B, 0, 2 * tile * sizeof(float));
    for (int64_t d = from; d < to; d += W) {
      const Vec skip = load(p.D + d), bias = load(p.bias + d);
      Vec a[N];
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) a[n] = load(decay + n * D + d);
      {  // Recompute the chunk: kept = exp(dt A) h_{t-1}, and what needs h itself.
        Vec h[N], d_skip = load(out.D + d);
#pragma GCC unroll 16
        for (int n = 0; n < N; n++)
          h[n] = load(checkpoints + ((b * p.chunks() + c) * N + n) * D + d);
        for (int64_t t = begin; t < end; t++) {
          const int64_t at = (b * p.length + t) * D + d, i = t - begin;
          const float *B = p.B + (b * p.length + t) * N, *C = p.C + (b * p.length + t) * N;
          const Vec x = load(p.x + at), z = load(p.z + at), gate = sigmoid(z), up = load(d_y + at);
          const Vec dt = softplus(load(p.delta + at) + bias), inflow = dt * x, dy = up * z * gate;
          Vec even = skip * x, odd = fill(0);
#pragma GCC unroll 16
          for (int n = 0; n < N; n++) {
            float* slot = sum_C + (i * N + n) * W;
            const Vec e = exp2v(dt * a[n]), k = e * h[n];
            store(decays + (i * N + n) * W, e);
            store(kept + (i * N + n) * W, k);
            h[n] = k + inflow * B[n];
            store(slot, load(slot) + dy * h[n]);
            if (n & 1) odd += h[n] * C[n]; else even += h[n] * C[n];
          }
          store(steps + i * W, dt);
          store(slopes + i * W, dy);
          store(out.z + at, up * (even + odd) * gate * (1.0f + z * (1.0f - gate)));
          d_skip += dy * x;
        }
        store(out.D + d, d_skip);
      }
      Vec g[N], d_A[N], d_bias = load(out.bias + d);
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) g[n] = load(g_of.data() + N * (d - from) + n * W), d_A[n] = fill(0);
      for (int64_t t = end - 1; t >= begin; t--) {
        const int64_t at = (b * p.length + t) * D + d, i = t - begin;
        const float *B = p.B + (b * p.length + t) * N, *C = p.C + (b * p.length + t) * N;
        const Vec x = load(p.x + at), dt = load(steps + i * W), dy = load(slopes + i * W);
        const Vec inflow = dt * x;
        Vec along_A = fill(0), along_B = fill(0);
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) {
          float* slot = sum_B + (i * N + n) * W;
          g[n] += dy * C[n];
          store(slot, load(slot) + g[n] * inflow);
          const Vec q = g[n] * load(kept + (i * N + n) * W);
          d_A[n] += q * dt;
          along_A += q * load(decay + n * D + d);
          along_B += g[n] * B[n];
          g[n] *= load(decays + (i * N + n) * W);
        }
        const Vec slope = 1.0f - exp2v(dt * -LOG2_E);  // sigmoid(delta + bias)
        const Vec d_delta = (along_A * LN_2 + along_B * x) * slope;
        store(out.delta + at, d_delta);
        store(out.x + at, along_B * dt + dy * skip);
        d_bias += d_delta;
      }
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) {
        float* total = out.A + n * D + d;
        store(total, load(total) + d_A[n]);
        store(g_of.data() + N * (d - from) + n * W, g[n]);
      }
      store(out.bias + d, d_bias);
    }
    for (int64_t t = begin; t < end; t++)
      for (int n = 0; n < N; n++) {
        const int64_t at = (b * p.length + t) * N + n, slot = ((t - begin) * N + n) * W;
        out.B[at] = sum(load(sum_B + slot));
        out.C[at] = sum(load(sum_C + slot));
      }
  }
}

}  // namespace

extern "C" {

int floor_vector_width() { return W; }

// inputs: x, delta, A, B, C, D, z, bias. checkpoints: (batch, chunks of 32, 16, channels) or null.
void floor_forward(int64_t batch, int64_t length, int64_t channels, const float* const* inputs,
                   float* y, float* checkpoints, int threads) {
  const float* const* in = inputs;
  const Problem p{batch, length, channels, in[0], in[1], in[2], in[3], in[4], in[5], in[6], in[7]};
  const std::vector<float> decay = log2_decay(p);
  const int64_t count = ranges(p, threads), width = channels / count;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < batch * count; task++) {
    const int64_t from = task % count * width;
    walk(p, decay.data(), task / count, from, from + width, y, checkpoints);
  }
}

// gradients: of the inputs, in their order and shapes.
void floor_backward(int64_t batch, int64_t length, int64_t channels, const float* const* inputs,
                    const float* checkpoints, const float* d_y, float* const* gradients,
                    int threads) {
  const float* const* in = inputs;
  const Problem p{batch, length, channels, in[0], in[1], in[2], in[3], in[4], in[5], in[6], in[7]};
  const std::vector<float> decay = log2_decay(p);
  const int64_t count = ranges(p, threads), width = channels / count, tokens = batch * length * N;
  // Sums over videos (A, D, bias) and over ranges of channels (B, C) are added up at the end.
  std::vector<float> d_A(batch * N * channels, 0.0f), d_D(batch * channels, 0.0f), d_bias(d_D);
  std::unique_ptr<float[]> d_BC(new float[2 * count * tokens]);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < batch * count; task++) {
    const int64_t b = task / count, range = task % count;
    float* B = d_BC.get() + 2 * range * tokens;
    const Gradients out{gradients[0], gradients[1], gradients[6], B, B + tokens,
                        &d_A[b * N * channels], &d_D[b * channels], &d_bias[b * channels]};
    walk_back(p, decay.data(), b, range * width, (range + 1) * width, checkpoints, d_y, out);
  }
  for (int which : {0, 1}) {
    float* total = gradients[3 + which];
    memcpy(total, d_BC.get() + which * tokens, tokens * sizeof(float));
    for (int64_t range = 1; range < count; range++)
      for (int64_t i = 0; i < tokens; i++) total[i] += d_BC[(2 * range + which) * tokens + i];
  }
  for (int64_t d = 0; d < channels; d++) {
    float D = 0, bias = 0, A[N] = {};
    for (int64_t b = 0; b < batch; b++) {
      D += d_D[b * channels + d], bias += d_bias[b * channels + d];
      for (int n = 0; n < N; n++) A[n] += d_A[(b * N + n) * channels + d];
    }
    gradients[5][d] = D, gradients[7][d] = bias;
    memcpy(gradients[2] + d * N, A, sizeof A);
  }
}
}
