// The causal convolution of recurrent layers in a decode step, for CPUs, in plain C++: each channel's last inputs,
// weighted. Those before a token are in the slot that its row reads, and go one place further in the row's own.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "course.h"

namespace rootcellar {

constexpr int64_t kStretch = 512;  // channels that a thread goes through at a time, in the nearest cache

template <typename T>
struct Convolution {
  Course way;
  T* pool;  // [slots, taps - 1, channels]
  int64_t channels, taps;
  const float *x, *weight, *bias;  // [n, channels], [taps, channels], [channels]
  float* y;                        // [n, channels]
};

// One token through some channels: inputs `from` [before, ...] become those of the next token, `to`, which may be the
// same. Rows of inputs are `ahead` apart, and so are those of weights.
template <typename T>
struct Convolved {
  const T* from;
  T* to;
  int64_t before, ahead, channels;
  const float *x, *weight, *bias;
  float* y;
};

// Fills y, with zeros where tokens are padding, and writes the inputs.
template <typename Threads, typename T>
void convolve(Threads& threads, const Convolution<T>& c, void (*kernel)(const Convolved<T>&)) {
  const int64_t n = c.way.n, before = c.taps - 1;
  for (int64_t token = 0; token < n; token++)
    if (c.way.is_padding(token)) std::memset(c.y + token * c.channels, 0, c.channels * sizeof(float));
  const int64_t parts = (c.channels + kStretch - 1) / kStretch;
  each_part(threads, c.way, parts, n * c.channels < 1 << 14, [&](int64_t token, int64_t part) {
    const int64_t at = part * kStretch, some = std::min(kStretch, c.channels - at);
    const auto inputs = [&](int32_t slot) { return c.pool + slot * before * c.channels + at; };
    Convolved<T> one{inputs(c.way.source[token]), inputs(c.way.target[token]), before, c.channels, some,
                     c.x + token * c.channels + at, c.weight + at, c.bias + at, c.y + token * c.channels + at};
    if (c.way.fresh[token]) {
      for (int64_t i = 0; i < before; i++) std::memset(one.to + i * c.channels, 0, some * sizeof(T));
      one.from = one.to;
    }
    kernel(one);
  });
}

}  // namespace rootcellar
