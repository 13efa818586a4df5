// The selective scan as XLA custom calls: picks the processor's kernels and shares out the work.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "scan.hpp"
#include "xla/ffi/api/ffi.h"

#ifndef SOURCE_HASH
#error "compile with -DSOURCE_HASH: the hash of the sources"
#endif
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

namespace stretchysnake {
namespace {

namespace ffi = xla::ffi;

// The fastest kernels that this processor and this build have. The environment's
// STRETCHYSNAKE_NATIVE (plain, avx2, avx512) asks for slower ones: for tests.
struct Choice {
  const char* name;
  const Kernels* kernels;
};

Choice choose() {
  std::vector<Choice> usable = {{"plain", &kernels_plain}};
#ifdef HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    usable.push_back({"avx2", &kernels_avx2});
#endif
#ifdef HAS_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
    usable.push_back({"avx512", &kernels_avx512});
#endif
  if (const char* wanted = std::getenv("STRETCHYSNAKE_NATIVE"))
    for (const Choice& one : usable)
      if (!std::strcmp(one.name, wanted)) return one;
  return usable.back();
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float[], Free>;

Floats aligned(int64_t count) {
  const size_t bytes = (count * sizeof(float) + 63) / 64 * 64;
  return Floats(static_cast<float*>(std::aligned_alloc(64, bytes)));
}

// Runs body(0) ... body(count - 1) on XLA's pool and on this thread. This thread waits only for
// what others have begun, so a busy pool delays the call but cannot lock it up.
template <typename Body>
void parallel(ffi::ThreadPool& pool, int64_t count, const Body& body) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
  };
  auto shared = std::make_shared<Shared>();
  auto work = [shared, count, &body] {
    for (int64_t i; (i = shared->next++) < count;) {
      body(i);
      if (++shared->done == count) {
        std::lock_guard<std::mutex> lock(shared->mutex);
        shared->finished.notify_all();
      }
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; i++) pool.Schedule(decltype(work)(work));
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->finished.wait(lock, [&] { return shared->done == count; });
}

// Ranges of channels per video and direction, so that every thread finds two tasks.
int64_t ranges(const Call& call, int64_t threads) {
  const int64_t width = chosen().kernels->width, pairs = call.directions * call.batch;
  int64_t count = 1;
  while (threads > 1 && pairs * count < 2 * threads && call.channels % (2 * count * width) == 0)
    count *= 2;
  return count;
}

Task task_of(const Call& call, int64_t i, int64_t count) {
  const int64_t pair = i / count, width = call.channels / count, from = i % count * width;
  return {pair / call.batch, pair % call.batch, from, from + width};
}

using Any = ffi::AnyBuffer;
using F2 = ffi::BufferR2<ffi::F32>;
using F3 = ffi::BufferR3<ffi::F32>;
using F4 = ffi::BufferR4<ffi::F32>;
template <typename T>
using Out = ffi::Result<T>;

struct Inputs {
  Any x, delta;
  F3 decay;
  F4 B, C;
  F2 D;
  Any z;
  F2 bias;
  F4 start;
};

Call make_call(const Inputs& in, bool gated, bool softplus, bool first_reverse,
               bool second_reverse) {
  const auto size = in.x.dimensions();
  Call call;
  call.directions = size[0], call.batch = size[1], call.length = size[2], call.channels = size[3];
  call.states = in.decay.dimensions()[1];
  call.x = in.x.untyped_data(), call.delta = in.delta.untyped_data();
  call.z = gated ? in.z.untyped_data() : nullptr;
  call.decay = in.decay.typed_data();
  call.B = in.B.typed_data(), call.C = in.C.typed_data();
  call.D = in.D.typed_data(), call.bias = in.bias.typed_data();
  call.start = in.start.typed_data();
  call.bfloat16 = in.x.element_type() == ffi::BF16;
  call.softplus = softplus;
  call.reverse[0] = first_reverse, call.reverse[1] = second_reverse;
  return call;
}

// Python checks the arguments for the user; these would be mistakes of ours.
ffi::Error check(const Call& call, const Any& x) {
  if (call.states != 8 && call.states != 16 && call.states != 32)
    return ffi::Error::InvalidArgument("takes 8, 16 or 32 states");
  if (call.channels % 16) return ffi::Error::InvalidArgument("takes a multiple of 16 channels");
  if (x.element_type() != ffi::F32 && x.element_type() != ffi::BF16)
    return ffi::Error::InvalidArgument("takes float32 and bfloat16");
  return ffi::Error::Success();
}

ffi::Error forward(ffi::ThreadPool pool, Any x, Any delta, F3 decay, F4 B, F4 C, F2 D, Any z,
                   F2 bias, F4 start, Out<Any> y, Out<F4> last, Out<F4> kept,
                   bool gated, bool softplus, bool first_reverse, bool second_reverse, bool save) {
  const Call call = make_call({x, delta, decay, B, C, D, z, bias, start}, gated, softplus,
                              first_reverse, second_reverse);
  if (ffi::Error error = check(call, x); error.failure()) return error;
  const Kernels& kernels = *chosen().kernels;
  const Forward out{y->untyped_data(), last->typed_data(), save ? kept->typed_data() : nullptr};
  const int64_t count = ranges(call, pool.num_threads());
  parallel(pool, call.directions * call.batch * count, [&](int64_t i) {
    const Task task = task_of(call, i, count);
    const Floats scratch = aligned(kernels.walk_scratch(call, task));
    kernels.walk(call, task, out, scratch.get());
  });
  return ffi::Error::Success();
}

ffi::Error backward(ffi::ThreadPool pool, Any x, Any delta, F3 decay, F4 B, F4 C, F2 D, Any z,
                    F2 bias, F4 start, F4 kept, Any d_y, F4 d_last,
                    Out<Any> d_x, Out<Any> d_delta, Out<F4> d_A, Out<F4> d_B, Out<F4> d_C,
                    Out<F3> d_D, Out<Any> d_z, Out<F3> d_bias, Out<F4> d_start, bool gated,
                    bool softplus, bool first_reverse, bool second_reverse) {
  const Call call = make_call({x, delta, decay, B, C, D, z, bias, start}, gated, softplus,
                              first_reverse, second_reverse);
  if (ffi::Error error = check(call, x); error.failure()) return error;
  const Kernels& kernels = *chosen().kernels;
  const int64_t count = ranges(call, pool.num_threads());
  const int64_t size = call.directions * call.batch * call.length * call.states;
  // Every range of channels sums d_B and d_C for itself, the first one in place.
  const Floats others = aligned(2 * (count - 1) * size);
  parallel(pool, call.directions * call.batch * count, [&](int64_t i) {
    const Task task = task_of(call, i, count);
    const int64_t range = i % count;
    float* sums = range ? others.get() + 2 * (range - 1) * size : nullptr;
    const Backward out{kept.typed_data(),
                       d_y.untyped_data(),
                       d_last.typed_data(),
                       d_x->untyped_data(),
                       d_delta->untyped_data(),
                       d_z->untyped_data(),
                       range ? sums : d_B->typed_data(),
                       range ? sums + size : d_C->typed_data(),
                       d_A->typed_data(),
                       d_D->typed_data(),
                       d_bias->typed_data(),
                       d_start->typed_data()};
    const Floats scratch = aligned(kernels.walk_back_scratch(call, task));
    kernels.walk_back(call, task, out, scratch.get());
  });
  for (int64_t range = 1; range < count; range++) {
    const float* sums = others.get() + 2 * (range - 1) * size;
    for (int64_t i = 0; i < size; i++) d_B->typed_data()[i] += sums[i];
    for (int64_t i = 0; i < size; i++) d_C->typed_data()[i] += sums[size + i];
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace stretchysnake

#define INPUTS                                                                                    \
  .Ctx<xla::ffi::ThreadPool>().Arg<stretchysnake::Any>().Arg<stretchysnake::Any>()                \
      .Arg<stretchysnake::F3>().Arg<stretchysnake::F4>().Arg<stretchysnake::F4>()                 \
      .Arg<stretchysnake::F2>().Arg<stretchysnake::Any>().Arg<stretchysnake::F2>()                \
      .Arg<stretchysnake::F4>()
#define FLAGS                                                                                     \
  .Attr<bool>("gated").Attr<bool>("softplus").Attr<bool>("first_reverse")                         \
      .Attr<bool>("second_reverse")

XLA_FFI_DEFINE_HANDLER_SYMBOL(stretchysnake_scan_forward, stretchysnake::forward,
                              xla::ffi::Ffi::Bind() INPUTS.Ret<stretchysnake::Any>()
                                  .Ret<stretchysnake::F4>()
                                  .Ret<stretchysnake::F4>() FLAGS
                                  .Attr<bool>("save"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(stretchysnake_scan_backward, stretchysnake::backward,
                              xla::ffi::Ffi::Bind() INPUTS
                                  .Arg<stretchysnake::F4>()
                                  .Arg<stretchysnake::Any>()
                                  .Arg<stretchysnake::F4>()
                                  .Ret<stretchysnake::Any>()
                                  .Ret<stretchysnake::Any>()
                                  .Ret<stretchysnake::F4>()
                                  .Ret<stretchysnake::F4>()
                                  .Ret<stretchysnake::F4>()
                                  .Ret<stretchysnake::F3>()
                                  .Ret<stretchysnake::Any>()
                                  .Ret<stretchysnake::F3>()
                                  .Ret<stretchysnake::F4>() FLAGS);

extern "C" {
const char* stretchysnake_source_hash() { return TEXT(SOURCE_HASH); }
const char* stretchysnake_instructions() { return stretchysnake::chosen().name; }
int stretchysnake_chunk() { return stretchysnake::CHUNK; }
}
