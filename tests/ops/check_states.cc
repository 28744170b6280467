// Tokens through recurrent states and convolutions (ops/native/states.h, convolution.h) with each instruction set that runs here, against the rules
// written out in double precision over batches drawn at random: `check_states [BATCHES] [SEED]`. `make sanitize` runs it
// under sanitizers.

#include "states.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>

#include "check.h"

using rootcellar::bf16;
using rootcellar::States;

namespace {

using Doubles = std::vector<double>;

// One token of one head; `told` as in states.h.
void written_out(bool is_delta, Doubles& state, int64_t rows, int64_t columns, const float* const* told, Doubles& y) {
  const double decay = told[0][0];
  y.assign(is_delta ? columns : rows, 0);
  for (double& s : state) s *= decay;
  if (is_delta) {
    const float *q = told[1], *k = told[2], *v = told[3];
    for (int64_t j = 0; j < columns; j++) {
      double seen = 0;
      for (int64_t i = 0; i < rows; i++) seen += state[i * columns + j] * k[i];
      for (int64_t i = 0; i < rows; i++) {
        state[i * columns + j] += k[i] * (v[j] - seen) * told[0][1];
        y[j] += state[i * columns + j] * q[i];
      }
    }
    return;
  }
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j++) {
      state[i * columns + j] += static_cast<double>(told[1][i]) * told[2][j];
      y[i] += state[i * columns + j] * told[3][j];
    }
}

// A batch of n tokens over 2 n slots behind the first, of which some follow others and some are padding.
struct Batch {
  std::vector<int32_t> source, target, offset, count;
  std::unique_ptr<bool[]> fresh;
  rootcellar::Course way;

  Batch(Random& random, int64_t n)
      : source(n), target(n), offset(n), count(n, 1), fresh(new bool[n]{}),
        way{n, source.data(), target.data(), offset.data(), count.data(), fresh.get()} {
    std::vector<int32_t> order(2 * n);
    std::iota(order.begin(), order.end(), 1);
    std::shuffle(order.begin(), order.end(), random);
    for (int64_t t = 0; t < n; t++) {
      target[t] = order[t];
      if (t > 0 && count[t - 1] == 0) {
        count[t] = target[t] = 0;
        offset[t] = static_cast<int32_t>(t);
      } else if (t > 0 && below(random, 2)) {
        source[t] = target[t - 1];
        offset[t] = offset[t - 1] + 1;
      } else if (below(random, 6) == 0) {
        count[t] = target[t] = 0;
      } else {
        source[t] = below(random, 2) ? target[t] : order[n + t];
        fresh[t] = below(random, 4) == 0;
      }
    }
  }
};

template <typename Set>
bool holds(Random& random, const Set& set) {
  const bool is_delta = below(random, 2);
  const int64_t heads = 1 + below(random, 6), rows = 1 + below(random, 40), columns = 1 + below(random, 300);
  const int64_t n = 1 + below(random, 12), slots = 2 * n + 1, size = rows * columns;
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> part(0, 1);
  // Arrays of their own, so that what is read or written beside them is found.
  const auto floats = [&](int64_t count, bool parts) {
    std::unique_ptr<float[]> x(new float[count]);
    for (int64_t i = 0; i < count; i++) x[i] = parts ? part(random) : normal(random) / 4;
    return x;
  };
  auto pool = floats(slots * heads * size, false);
  const std::vector<float> before(pool.get(), pool.get() + slots * heads * size);
  const int64_t width = is_delta ? columns : rows;
  const auto y = floats(n * heads * width, false);
  const Batch batch(random, n);
  const rootcellar::Course& way = batch.way;
  const int64_t widths[] = {is_delta ? 2 : 1, rows, is_delta ? rows : columns, columns};
  std::vector<std::unique_ptr<float[]>> arrays;
  States s{way, pool.get(), heads, rows, columns, {}, y.get(), width};
  for (int i = 0; i < rootcellar::kToldOf; i++) {
    int64_t groups = 1 + below(random, static_cast<int>(heads));
    while (heads % groups != 0) groups--;
    arrays.push_back(floats(n * groups * widths[i], i == 0));
    s.told[i] = {arrays.back().get(), groups, widths[i]};
  }
  Threads threads{1 + below(random, 4), {}};
  rootcellar::through_states(threads, s, is_delta ? set.function.delta : set.function.ssd);
  std::vector<bool> written(slots * heads);
  double off = 0;
  Doubles state(size), out;
  for (int64_t head = 0; head < heads; head++)
    for (int64_t t = 0; t < n; t++) {
      float* given = s.out(t, head);
      if (way.is_padding(t)) {
        for (int64_t i = 0; i < width; i++) off = std::max<double>(off, std::abs(given[i]));
        continue;
      }
      const float* start = before.data() + (way.source[t] * heads + head) * size;
      if (!way.follows(t)) state.assign(start, start + size);
      if (way.fresh[t]) state.assign(size, 0);
      const float* told[rootcellar::kToldOf];
      for (int i = 0; i < rootcellar::kToldOf; i++)
        told[i] = s.told[i].data + (t * s.told[i].groups + head * s.told[i].groups / heads) * widths[i];
      written_out(is_delta, state, rows, columns, told, out);
      for (int64_t i = 0; i < width; i++) off = std::max(off, std::abs(out[i] - given[i]));
      for (int64_t i = 0; i < size; i++) off = std::max(off, std::abs(state[i] - s.state(way.target[t], head)[i]));
      written[way.target[t] * heads + head] = true;
    }
  for (int64_t i = 0; i < slots * heads; i++)
    if (!written[i] && !std::equal(&pool[i * size], &pool[i * size] + size, &before[i * size])) off = INFINITY;
  if (off < 1e-3) return true;
  std::printf("%s: %s, %d heads of %d x %d, %d tokens: %g off\n", set.name, is_delta ? "delta" : "ssd",
              static_cast<int>(heads), static_cast<int>(rows), static_cast<int>(columns), static_cast<int>(n), off);
  return false;
}

float wide(float x) { return x; }
float wide(bf16 x) { return rootcellar::float_of(static_cast<uint32_t>(x.bits) << 16); }
void narrow(float x, float& to) { to = x; }
void narrow(float x, bf16& to) { to.bits = rootcellar::bf16_of(x); }

// Inputs move from slot to slot as they are, and are weighted as they lie there.
template <typename T>
bool convolves(Random& random, const char* name, void (*kernel)(const rootcellar::Convolved<T>&)) {
  const int64_t n = 1 + below(random, 12), slots = 2 * n + 1, taps = 1 + below(random, 5);
  const int64_t channels = 1 + below(random, below(random, 2) ? 40 : 3000), size = (taps - 1) * channels;
  const Batch batch(random, n);
  std::normal_distribution<float> normal;
  const auto floats = [&](int64_t count) {
    std::unique_ptr<float[]> x(new float[count]);
    for (int64_t i = 0; i < count; i++) x[i] = normal(random);
    return x;
  };
  const auto x = floats(n * channels), weight = floats(taps * channels), bias = floats(channels),
             y = floats(n * channels);
  const std::unique_ptr<T[]> pool(new T[slots * size]);
  for (int64_t i = 0; i < slots * size; i++) narrow(normal(random), pool[i]);
  std::vector<T> expected(pool.get(), pool.get() + slots * size);
  double off = 0;
  std::vector<double> sums(n * channels);
  for (int64_t t = 0; t < n; t++)
    for (int64_t c = 0; c < channels && !batch.way.is_padding(t); c++) {
      double& sum = sums[t * channels + c];
      sum = bias[c] + static_cast<double>(x[t * channels + c]) * weight[(taps - 1) * channels + c];
      T* to = expected.data() + batch.target[t] * size + c;
      for (int64_t i = 0; i < taps - 1; i++) {
        const T was = batch.fresh[t] ? T{} : expected[batch.source[t] * size + i * channels + c];
        sum += static_cast<double>(wide(was)) * weight[i * channels + c];
        if (i > 0) to[(i - 1) * channels] = was;
      }
      if (taps > 1) narrow(x[t * channels + c], to[(taps - 2) * channels]);
    }
  Threads threads{1 + below(random, 4), {}};
  rootcellar::convolve(threads,
                       rootcellar::Convolution<T>{batch.way, pool.get(), channels, taps, x.get(), weight.get(),
                                                  bias.get(), y.get()},
                       kernel);
  for (int64_t i = 0; i < n * channels; i++) off = std::max(off, std::abs(sums[i] - y[i]));
  for (int64_t i = 0; i < slots * size; i++)
    if (wide(pool[i]) != wide(expected[i])) off = INFINITY;
  if (off < 1e-4) return true;
  std::printf("%s: convolution, %d taps of %d channels, %d tokens: %g off\n", name, static_cast<int>(taps),
              static_cast<int>(channels), static_cast<int>(n), off);
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 300;
  Random random(argc > 2 ? std::atoi(argv[2]) : 0);
  int seen = 0;
  for (const auto& set : rootcellar::kStateSets) {
    if (!set.runs()) continue;
    for (int i = 0; i < count; i++, seen++)
      if (!holds(random, set) || !convolves(random, set.name, set.function.convolved) ||
          !convolves(random, set.name, set.function.convolved_bf16))
        return 1;
    std::printf("states, %s: %d\n", set.name, count);
  }
  return seen == 0;
}
