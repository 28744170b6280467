// Peaks of rows (ops/native/peaks.h) with each instruction set that runs here, against the same written out in double
// precision over scores drawn at random: `check_peaks [ROWS] [SEED]`. `make sanitize` runs it under sanitizers.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "check.h"
#include "peaks.h"

using rootcellar::Peaks;

namespace {

bool same(float a, float b) { return a == b || (a != a && b != b); }

template <typename Set>
bool holds(Random& random, const Set& set) {
  const int64_t rows = 1 + below(random, 20), n = 1 + below(random, below(random, 2) ? 70 : 5000);
  std::normal_distribution<float> score(0, 5);
  std::vector<float> x(rows * n);
  for (float& v : x) v = std::round(score(random) * 64) / 64;  // so that some are the same
  for (int i = below(random, 4); i > 0; i--) {
    constexpr float kStrange[] = {NAN, INFINITY, -INFINITY, -1e30f, 3e38f, -3e38f};
    x[below(random, static_cast<int>(rows * n))] = kStrange[below(random, 6)];
  }
  std::vector<int32_t> at(rows);
  std::vector<float> top(rows), mass(rows);
  Threads threads{1 + below(random, 4), {}};
  rootcellar::find_peaks(threads, {x.data(), rows, n, at.data(), top.data(), mass.data()}, set.function);
  for (int64_t row = 0; row < rows; row++) {
    const float *begin = x.data() + row * n, *end = begin + n;
    const float* none = std::find_if(begin, end, [](float v) { return v != v; });
    const float* first = none != end ? none : std::max_element(begin, end);
    double sum = 0;
    for (const float* v = begin; v != end; v++) sum += std::exp(static_cast<double>(*v) - *first);
    const bool right = std::isfinite(*first) ? std::abs(mass[row] - sum) <= 1e-6 * sum : mass[row] != mass[row];
    if (at[row] == first - begin && same(top[row], *first) && right) continue;
    std::printf("%s: row %d of %d scores: %d, %g, %.9g, not %d, %g, %.9g\n", set.name, static_cast<int>(row),
                static_cast<int>(n), at[row], top[row], mass[row], static_cast<int>(first - begin), *first, sum);
    return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 300;
  Random random(argc > 2 ? std::atoi(argv[2]) : 0);
  int seen = 0;
  for (const auto& set : rootcellar::kPeakSets) {
    if (!set.runs()) continue;
    for (int i = 0; i < count; i++, seen++)
      if (!holds(random, set)) return 1;
    std::printf("peaks, %s: %d\n", set.name, count);
  }
  return seen == 0;
}
