// The largest score of each row, where it is, and what all of a row weigh beside it, for CPUs, in plain C++: a greedy
// choice and its logprob, in two passes of which the second finds the row in a near cache.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "targets.h"

namespace rootcellar {

// Scores x [rows, n], n at least 1; of each row the place of its first largest one, that score, and the sum of the
// exponentials of all less that one. A row with a score that is not a number, or with a largest that is not finite, has
// no such sum (NaN), and the first of these for its largest.
struct Peaks {
  const float* x;
  int64_t rows, n;
  int32_t* at;
  float *top, *mass;
};

#define ROOTCELLAR_KERNELS "peaks.inc"
#include "sets.inc"

constexpr Vectors<void (*)(const Peaks&, int64_t)> kPeakSets[] = {ROOTCELLAR_SETS(peak)};

template <typename Threads>
void find_peaks(Threads& threads, const Peaks& p, void (*peak)(const Peaks&, int64_t)) {
  parallel_for(threads, p.rows, [&](int64_t row) { peak(p, row); });
}

}  // namespace rootcellar
