// The area resize of frames: uint8, three channels, pixels side by side. It takes AVX2; AVX-512
// gained 5 % and is left out.
//
// The sums are those of OpenCV's INTER_AREA, in its order, so that every pixel comes out the same:
// along a row from left to right, then down the rows, each product and each sum rounded to float.
// So nothing may be contracted to a fused multiply-add (-ffp-contract=off).
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__FAST_MATH__)
#error "compile without -ffast-math"
#endif
#ifndef SOURCE_HASH
#error "compile with -DSOURCE_HASH: the hash of this file"
#endif
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)
#define AVX2 __attribute__((target("avx2")))
#define INLINE AVX2 inline __attribute__((always_inline))

namespace {

constexpr int ROWS = 4;    // of the input that are shrunk side by side, in pairs
constexpr int WINDOW = 5;  // pixels that one load of 16 bytes holds

// How one axis shrinks: out[i] = sum over k of weights[i * taps + k] x in[first[i] + k].
struct Axis {
  int in = 0, out = 0;
  bool whole = false;      // cells are whole pixels
  int pixels = 0;          // if whole: of a cell
  int taps = 0;            // the most of any cell; the weights of the others end with zeros
  std::vector<int> first, counts;
  std::vector<float> weights;

  // Bytes behind the start of a row that are read.
  int64_t reach() const {
    return 3 * int64_t(first.back()) + 3 * WINDOW * ((taps + WINDOW - 1) / WINDOW) + 1;
  }
};

// As OpenCV does (computeResizeAreaTab and its callers in resize.cpp), in double precision: cells
// of 1 / (out / in) pixels, weights the share of each pixel in its cell.
void set_size(Axis& axis, int in, int out) {
  if (axis.in == in && axis.out == out) return;
  const double scale = 1.0 / (double(out) / in), least = 1e-3;
  axis.in = in, axis.out = out;
  axis.pixels = int(std::lrint(scale));
  axis.whole = std::abs(scale - axis.pixels) < 2.220446049250313e-16;
  axis.first.resize(out), axis.counts.resize(out);
  std::vector<float> found;
  for (int i = 0; i < out; i++) {
    const double from = i * scale, to = from + scale, width = std::min(scale, in - from);
    const int right = std::min(int(std::floor(to)), in - 1);
    const int left = std::min(int(std::ceil(from)), right);
    const bool before = left - from > least;
    const size_t start = found.size();
    if (before) found.push_back(float((left - from) / width));
    found.insert(found.end(), right - left, float(1.0 / width));
    if (to - right > least)
      found.push_back(float(std::min(std::min(to - right, 1.0), width) / width));
    axis.first[i] = left - before;
    axis.counts[i] = int(found.size() - start);
  }
  axis.taps = *std::max_element(axis.counts.begin(), axis.counts.end());
  axis.weights.assign(size_t(out) * axis.taps, 0.0f);
  const float* next = found.data();
  for (int i = 0; i < out; next += axis.counts[i++])
    std::copy(next, next + axis.counts[i], &axis.weights[size_t(i) * axis.taps]);
}

// The window at the same place of two rows, and its pixel k: blue, green, red and 0, as floats.
INLINE __m256i load(const uint8_t* a, const uint8_t* b, int64_t at) {
  const __m256i low = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)(a + at)));
  return _mm256_inserti128_si256(low, _mm_loadu_si128((const __m128i*)(b + at)), 1);
}
INLINE __m256 pixel(__m256i window, int k) {
  const int p = 3 * k, zeros = int(0xffffff00);
  const __m128i lanes = _mm_setr_epi32(zeros | p, zeros | (p + 1), zeros | (p + 2), -1);
  return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(window, _mm256_broadcastsi128_si256(lanes)));
}

// Adds the first K pixels of a window, weighted.
template <int K>
INLINE void add(__m256* sums, const uint8_t* const* rows, int64_t at, const float* weights) {
  const __m256i upper = load(rows[0], rows[1], at), lower = load(rows[2], rows[3], at);
#pragma GCC unroll 5
  for (int k = 0; k < K; k++) {
    const __m256 weight = _mm256_broadcast_ss(weights + k);
    sums[0] = _mm256_add_ps(sums[0], _mm256_mul_ps(pixel(upper, k), weight));
    sums[1] = _mm256_add_ps(sums[1], _mm256_mul_ps(pixel(lower, k), weight));
  }
}

// Shrinks ROWS rows: out[row * length + 4 * i + channel]. K: pixels of the last window.
template <int K>
AVX2 void shrink(const Axis& x, const float* weights, const uint8_t* const* in, float* out,
                 int64_t length) {
  const uint8_t* const rows[ROWS] = {in[0], in[1], in[2], in[3]};
  const int full = (x.taps - K) / WINDOW;
  for (int i = 0; i < x.out; i++, out += 4) {
    int64_t at = 3 * int64_t(x.first[i]);
    __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int w = 0; w < full; w++, at += 3 * WINDOW, weights += WINDOW)
      add<WINDOW>(sums, rows, at, weights);
    add<K>(sums, rows, at, weights);
    weights += K;
    for (int pair = 0; pair < 2; pair++) {
      _mm_store_ps(out + 2 * pair * length, _mm256_castps256_ps128(sums[pair]));
      _mm_store_ps(out + (2 * pair + 1) * length, _mm256_extractf128_ps(sums[pair], 1));
    }
  }
}
using Shrink = decltype(&shrink<1>);
constexpr Shrink SHRINK[WINDOW] = {shrink<5>, shrink<1>, shrink<2>, shrink<3>, shrink<4>};

// A row that comes out: round(scale x weights @ rows), halves to even, channels and pixels in the
// order wanted. The rows are as `shrink` leaves them, padded to whole groups of eight pixels.
AVX2 void finish(const float* const* rows, const float* weights, int count, float scale, int width,
                 bool swap, bool flip, uint8_t* out) {
  // Packing leaves the pixels as 0 2 4 6 1 3 5 7.
  const __m256i order = flip ? _mm256_setr_epi32(7, 3, 6, 2, 5, 1, 4, 0)
                             : _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const char a = swap ? 2 : 0, c = swap ? 0 : 2;
  const __m256i channels = _mm256_broadcastsi128_si256(_mm_setr_epi8(
      a, 1, c, a + 4, 5, c + 4, a + 8, 9, c + 8, a + 12, 13, c + 12, -1, -1, -1, -1));
  for (int i = 0; i < width; i += 8) {
    __m256 sums[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) sums[j] = _mm256_setzero_ps();
    for (int k = 0; k < count; k++) {
      const __m256 weight = _mm256_broadcast_ss(weights + k);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const __m256 pair = _mm256_load_ps(rows[k] + 4 * i + 8 * j);
        sums[j] = _mm256_add_ps(sums[j], _mm256_mul_ps(pair, weight));
      }
    }
    __m256i rounded[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
      rounded[j] = _mm256_cvtps_epi32(_mm256_mul_ps(sums[j], _mm256_set1_ps(scale)));
    const __m256i packed = _mm256_packus_epi16(_mm256_packs_epi32(rounded[0], rounded[1]),
                                               _mm256_packs_epi32(rounded[2], rounded[3]));
    const __m256i sorted =
        _mm256_shuffle_epi8(_mm256_permutevar8x32_epi32(packed, order), channels);
    const __m128i low = _mm256_castsi256_si128(sorted), high = _mm256_extracti128_si256(sorted, 1);
    if (i + 8 <= width) {
      uint8_t* to = out + 3 * (flip ? width - i - 8 : i);
      std::memcpy(to, &low, 12);
      std::memcpy(to + 12, &high, 12);
    } else {  // turned round, what counts is at the end
      const int left = width - i;
      uint8_t last[24];
      std::memcpy(last, &low, 12);
      std::memcpy(last + 12, &high, 12);
      std::memcpy(out + 3 * (flip ? 0 : i), last + (flip ? 3 * (8 - left) : 0), 3 * left);
    }
  }
}

// Memory of a thread, aligned to 32 bytes, that grows.
struct Memory {
  void* data = nullptr;
  size_t size = 0;

  ~Memory() { std::free(data); }
  void* get(size_t bytes) {
    if (bytes > size) {
      std::free(data);
      data = std::aligned_alloc(32, (bytes + 31) / 32 * 32);
      size = data ? bytes : 0;
    }
    return data;
  }
};

}  // namespace

extern "C" {
const char* stretchysnake_source_hash() { return TEXT(SOURCE_HASH); }
bool stretchysnake_usable() { return __builtin_cpu_supports("avx2"); }

// Rows are `stride` bytes apart; swap turns the order of the channels round, flip left and right.
// The caller checks the arguments. Returns false, nothing done, if memory is short.
bool stretchysnake_area_resize(const uint8_t* in, int64_t in_stride, int in_height, int in_width,
                               uint8_t* out, int64_t out_stride, int height, int width, bool swap,
                               bool flip) {
  thread_local Axis x, y;  // kept for the next frame of the same size
  thread_local Memory memory;
  thread_local std::vector<float> ones;
  thread_local std::vector<const float*> cell;
  set_size(x, in_width, width);
  set_size(y, in_height, height);
  // OpenCV sums cells of whole pixels as integers, then multiplies. Floats are as exact up to 2^24.
  const bool whole = x.whole && y.whole;
  const float scale = whole ? 1.0f / (x.pixels * y.pixels) : 1.0f;
  if (whole) ones.assign(std::max(x.weights.size(), y.weights.size()), 1.0f);
  const float* x_weights = whole ? ones.data() : x.weights.data();
  const float* y_weights = whole ? ones.data() : y.weights.data();

  // Rows that are shrunk, kept in a ring as long as a cell may need them; and copies of the last
  // rows of the frame, since loads reach beyond their ends.
  const int64_t length = (int64_t(width) + 7) / 8 * 32, reach = x.reach();
  const int64_t padded = (reach + 31) / 32 * 32;
  const int ring = (y.taps + 2 * ROWS - 2) / ROWS * ROWS;
  float* shrunk = (float*)memory.get(ring * length * sizeof(float) + ROWS * padded);
  if (!shrunk) return false;
  uint8_t* ends = (uint8_t*)(shrunk + ring * length);
  cell.resize(y.taps);
  const int64_t size = (in_height - 1) * in_stride + 3 * int64_t(in_width);
  int next = 0;  // the row that comes out next
  for (int top = 0; top < in_height; top += ROWS) {
    const uint8_t* rows[ROWS];
    for (int k = 0; k < ROWS; k++) {
      const int64_t at = std::min(top + k, in_height - 1) * in_stride;
      rows[k] = in + at;
      if (at + reach > size) {
        rows[k] = ends + k * padded;
        std::memcpy(ends + k * padded, in + at, 3 * in_width);
      }
    }
    SHRINK[x.taps % WINDOW](x, x_weights, rows, shrunk + top % ring * length, length);
    for (; next < height && y.first[next] + y.counts[next] <= top + ROWS; next++) {
      const int count = y.counts[next];
      for (int k = 0; k < count; k++) cell[k] = shrunk + (y.first[next] + k) % ring * length;
      finish(cell.data(), y_weights + int64_t(next) * y.taps, count, scale, width, swap, flip,
             out + next * out_stride);
    }
  }
  return true;
}
}
