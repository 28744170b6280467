// How the tokens of a decode step follow each other through states in a pool, for CPUs: what course() in ops/recurrent.py
// says of a batch whose tiles are one token.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "targets.h"

namespace rootcellar {

// Of each of n tokens: the slots that it reads and writes, whether it begins from zeros instead, how many it comes behind,
// and whether it is one (0: padding).
struct Course {
  int64_t n;
  const int32_t *source, *target, *offset, *count;
  const bool* fresh;

  bool is_padding(int64_t token) const { return count[token] == 0; }
  // Whether its state is what the token before it in the batch leaves.
  bool follows(int64_t token) const { return count[token] > 0 && offset[token] > 0; }
};

// Call step(token, part) for each token and each part of a state, on several threads but where `small`: what takes some
// microseconds is not worth waking one for. Those of a token and of all that follow it go in order, a part at a time, so
// that what one leaves is near when the next reads it.
template <typename Threads, typename Step>
void each_part(Threads& threads, const Course& way, int64_t parts, bool small, Step&& step) {
  std::vector<int64_t> first;  // tokens that follow none
  for (int64_t token = 0; token < way.n; token++)
    if (!way.is_padding(token) && !way.follows(token)) first.push_back(token);
  const int64_t all = static_cast<int64_t>(first.size()) * parts;
  const int64_t together = std::max<int64_t>(1, small ? all : all / (4 * std::max<int64_t>(1, threads.num_threads())));
  parallel_for(threads, (all + together - 1) / together, [&](int64_t item) {
    for (int64_t i = item * together; i < std::min(all, (item + 1) * together); i++) {
      int64_t token = first[i / parts];
      do {
        step(token, i % parts);
      } while (++token < way.n && way.follows(token));
    }
  });
}

}  // namespace rootcellar
