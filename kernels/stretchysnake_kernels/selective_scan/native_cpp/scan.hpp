// What the selective scan's kernels and the code that calls them agree on.
#pragma once
#include <cstdint>

namespace stretchysnake {

constexpr int CHUNK = 32;  // tokens between two states that the forward pass keeps

// One call. Arrays are dense, in the order of their axes; T is float or bfloat16.
struct Call {
  int64_t directions, batch, length, channels, states;
  const void *x, *delta, *z;       // T (directions, batch, length, channels); z (batch, ...) or null
  const float *decay;              // (directions, states, channels), A log2(e)
  const float *B, *C;              // (directions, batch, length, states)
  const float *D, *bias;           // (directions, channels)
  const float *start;              // (directions, batch, states, channels)
  bool bfloat16, softplus, reverse[2];
  int64_t chunks() const { return (length + CHUNK - 1) / CHUNK; }
};

// A task: one direction of one video, channels [from, to), a multiple of the vector width.
struct Task {
  int64_t direction, video, from, to;
};

struct Forward {
  void *y;             // T, like x
  float *last;         // like start
  float *checkpoints;  // (directions, batch, chunks, states, channels), or null
};

struct Backward {
  const float *checkpoints;
  const void *d_y;              // T, like x
  const float *d_last;          // like start
  void *d_x, *d_delta, *d_z;    // T, like x; d_z is null without a gate
  float *d_B, *d_C;             // (directions, batch, length, states), sums over the task's channels
  float *d_A;                   // (directions, batch, states, channels)
  float *d_D, *d_bias;          // (directions, batch, channels)
  float *d_start;               // like start
};

// One set of machine instructions. `scratch` is the task's own memory, aligned to 64 bytes.
struct Kernels {
  int width;  // channels in a vector
  int64_t (*walk_scratch)(const Call&, const Task&);  // in floats
  int64_t (*walk_back_scratch)(const Call&, const Task&);
  void (*walk)(const Call&, const Task&, const Forward&, float* scratch);
  void (*walk_back)(const Call&, const Task&, const Backward&, float* scratch);
};

extern const Kernels kernels_plain, kernels_avx2, kernels_avx512;

}  // namespace stretchysnake
