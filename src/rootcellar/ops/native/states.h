// Recurrent states through a decode step, where they lie in their pool, for CPUs, in plain C++.
//
// A state is read once from the slot that its row reads, and what the row's token makes of it is written once to the
// row's own. A row that follows another (a guessed token) goes on from what that one left, while it is in a near cache.
// Threads share rows and heads: what a head gets depends on nothing else in the batch.

#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "convolution.h"
#include "course.h"

namespace rootcellar {

constexpr int kToldOf = 4;  // what a rule tells a head of its token, in so many arrays

// float32 [n, groups, width]; head h of H is told the row of group h / (H / groups).
struct Told {
  const float* data;
  int64_t groups, width;
};

struct States {
  Course way;
  float* pool;  // [slots, heads, rows, columns]
  int64_t heads, rows, columns;
  Told told[kToldOf];
  float* y;  // [n, heads, width]
  int64_t width;

  float* state(int32_t slot, int64_t head) const { return pool + (slot * heads + head) * rows * columns; }
  float* out(int64_t token, int64_t head) const { return y + (token * heads + head) * width; }
};

// The token of a head: from a state [rows, columns], which `to` may be, to the next. `y` as long as the rule has it.
struct HeadStep {
  const float* from;
  float* to;
  int64_t rows, columns;
  const float* told[kToldOf];
  float* y;
};

// Heads by rule. `delta`: told decay and rate [2], q and k [rows], v [columns]; y [columns]. `ssd`: told its decay [1], x
// [rows], b and c [columns]; y [rows]. And the convolution over inputs of either type.
struct StateKernels {
  void (*delta)(const HeadStep&);
  void (*ssd)(const HeadStep&);
  void (*convolved)(const Convolved<float>&);
  void (*convolved_bf16)(const Convolved<bf16>&);
};

#define ROOTCELLAR_KERNELS "states.inc"
#include "sets.inc"

constexpr Vectors<StateKernels> kStateSets[] = {ROOTCELLAR_SETS(states)};

// Fills y, with zeros where tokens are padding, and writes the states.
template <typename Threads>
void through_states(Threads& threads, const States& s, void (*kernel)(const HeadStep&)) {
  const int64_t n = s.way.n, size = s.rows * s.columns;
  for (int64_t token = 0; token < n; token++)
    if (s.way.is_padding(token)) std::memset(s.out(token, 0), 0, s.heads * s.width * sizeof(float));
  each_part(threads, s.way, s.heads, n * s.heads * size < 1 << 15, [&](int64_t token, int64_t head) {
    HeadStep step{s.state(s.way.source[token], head), s.state(s.way.target[token], head), s.rows, s.columns, {},
                  s.out(token, head)};
    if (s.way.fresh[token]) {
      std::memset(step.to, 0, size * sizeof(float));
      step.from = step.to;
    }
    for (int i = 0; i < kToldOf; i++) {
      const Told& told = s.told[i];
      step.told[i] = told.data + (token * told.groups + head / (s.heads / told.groups)) * told.width;
    }
    kernel(step);
  });
}

}  // namespace rootcellar
