// Recurrent states through a decode step, where they lie in their pool, for CPUs, in plain C++.
//
// A state is read once from the slot that its row reads, and what the row's token makes of it is written once to the
// row's own. A row that follows another (a guessed token) goes on from what that one left, while it is in a near cache.
// Threads share rows and heads: what a head gets depends on nothing else in the batch.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "targets.h"

namespace rootcellar {

constexpr int kToldOf = 4;  // what a rule tells a head of its token, in so many arrays

// float32 [n, groups, width]; head h of H is told the row of group h / (H / groups).
struct Told {
  const float* data;
  int64_t groups, width;
};

// A batch of n tokens, each of a row of its own: what course() in ops/recurrent.py says of them.
struct States {
  float* pool;  // [slots, heads, rows, columns]
  int64_t heads, rows, columns;
  int64_t n;
  const int32_t *source, *target, *offset, *count;
  const bool* fresh;
  Told told[kToldOf];
  float* y;  // [n, heads, width]
  int64_t width;

  float* state(int32_t slot, int64_t head) const { return pool + (slot * heads + head) * rows * columns; }
  float* out(int64_t token, int64_t head) const { return y + (token * heads + head) * width; }
  bool is_padding(int64_t token) const { return count[token] == 0; }
  // Whether its state is what the token before it in the batch leaves.
  bool follows(int64_t token) const { return count[token] > 0 && offset[token] > 0; }
};

// The token of a head: from a state [rows, columns], which `to` may be, to the next. `y` as long as the rule has it.
struct HeadStep {
  const float* from;
  float* to;
  int64_t rows, columns;
  const float* told[kToldOf];
  float* y;
};

// By rule. `delta`: told decay and rate [2], q and k [rows], v [columns]; y [columns]. `ssd`: told its decay [1], x
// [rows], b and c [columns]; y [rows].
struct StateKernels {
  void (*delta)(const HeadStep&);
  void (*ssd)(const HeadStep&);
};

#define ROOTCELLAR_KERNELS "states.inc"
#include "sets.inc"

constexpr Vectors<StateKernels> kStateSets[] = {ROOTCELLAR_SETS(states)};

// One head through a token and those that follow it.
inline void through_states(const States& s, int64_t token, int64_t head, void (*kernel)(const HeadStep&)) {
  const size_t bytes = s.rows * s.columns * sizeof(float);
  do {
    HeadStep step{s.state(s.source[token], head), s.state(s.target[token], head), s.rows, s.columns, {}, nullptr};
    if (s.fresh[token]) {
      std::memset(step.to, 0, bytes);
      step.from = step.to;
    }
    for (int i = 0; i < kToldOf; i++) {
      const Told& told = s.told[i];
      step.told[i] = told.data + (token * told.groups + head / (s.heads / told.groups)) * told.width;
    }
    step.y = s.out(token, head);
    kernel(step);
  } while (++token < s.n && s.follows(token));
}

// Fills y, with zeros where tokens are padding, and writes the states.
template <typename Threads>
void through_states(Threads& threads, const States& s, void (*kernel)(const HeadStep&)) {
  std::vector<int64_t> first;  // tokens that follow none
  for (int64_t token = 0; token < s.n; token++) {
    if (s.is_padding(token)) {
      std::memset(s.out(token, 0), 0, s.heads * s.width * sizeof(float));
    } else if (!s.follows(token)) {
      first.push_back(token);
    }
  }
  // What takes some microseconds is not worth waking another thread for.
  const bool small = s.n * s.heads * s.rows * s.columns < 1 << 15;
  const int64_t all = static_cast<int64_t>(first.size()) * s.heads;
  const int64_t together = std::max<int64_t>(1, small ? all : all / (4 * std::max<int64_t>(1, threads.num_threads())));
  parallel_for(threads, (all + together - 1) / together, [&](int64_t item) {
    for (int64_t i = item * together; i < std::min(all, (item + 1) * together); i++)
      through_states(s, first[i / s.heads], i % s.heads, kernel);
  });
}

}  // namespace rootcellar
