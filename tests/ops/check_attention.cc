// Paged attention (ops/native/attention.h) with each instruction set that runs here, against attention written out in
// double precision, over random batches: `check_attention [BATCHES] [SEED]`. `make sanitize` runs it under sanitizers.
//
// Pages that no query sees, and slots that nobody has written, hold NaN; what is behind the buffers is the sanitizer's.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>

#include "attention.h"
#include "check.h"

using rootcellar::Batch;
using Set = rootcellar::Vectors<rootcellar::Choose>;

namespace {

struct Case {
  int kv_heads, group, dim, page_size, tile, width;
  bool latents, is_bf16, sinks;
  int window, chunk;
  std::vector<int> lengths, fresh;  // of each row: tokens, and how many of them are in the batch
};

template <typename T>
T one_of(Random& random, std::initializer_list<T> choices) {
  return choices.begin()[below(random, static_cast<int>(choices.size()))];
}

Case draw(Random& random) {
  Case c{};
  c.latents = below(random, 4) == 0;
  c.kv_heads = c.latents ? 1 : 1 + below(random, 3);
  c.group = 1 + below(random, c.latents ? 20 : 8);
  c.dim = 16 * (1 + below(random, 9));
  c.page_size = one_of(random, {1, 3, 16, 64});
  c.tile = one_of(random, {1, 4, 16});
  c.is_bf16 = below(random, 2) == 0;
  c.sinks = !c.latents && below(random, 2) == 0;
  const int rule = below(random, 3);
  c.window = rule == 1 ? 1 + below(random, 300) : 0;
  c.chunk = rule == 2 ? 1 + below(random, 300) : 0;
  for (int rows = 1 + below(random, 4); rows > 0; rows--) {
    c.lengths.push_back(1 + below(random, one_of(random, {20, 200, 900})));
    c.fresh.push_back(c.tile == 1 ? 1 : 1 + below(random, std::min(c.lengths.back(), 150)));
    c.width = std::max(c.width, (c.lengths.back() + c.page_size - 1) / c.page_size);
  }
  return c;
}

float rounded(float x, bool is_bf16) {
  if (!is_bf16) return x;
  rootcellar::bf16 to;
  rootcellar::write_row(&to, &x, 1);
  const uint32_t bits = static_cast<uint32_t>(to.bits) << 16;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Queries, what is stored of every token of every row, and the batch as XLA hands it over.
struct Arrays {
  std::vector<float> q, k, v, sinks, out;
  std::vector<int32_t> tables, rows, positions, owners;  // owners: the row of each token of the batch, -1: padding
  std::vector<std::vector<float>> keys, values;          // [length, kv_heads, dim] of each row
  std::vector<float> floats;
  std::vector<rootcellar::bf16> halves;
};

template <typename T>
void fill(const Case& c, Arrays& a, std::vector<T>& pool, int64_t stride, Random& random, int64_t pages) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  pool.resize(pages * stride);
  for (T& x : pool) rootcellar::write_row(&x, &nan, 1);
  std::vector<int32_t> free(pages - 1);
  for (size_t i = 0; i < free.size(); i++) free[i] = static_cast<int32_t>(i + 1);
  std::shuffle(free.begin(), free.end(), random);
  for (size_t r = 0; r < c.lengths.size(); r++) {
    const int old = c.lengths[r] - c.fresh[r];
    const int first = c.window ? std::max(0, old - c.window + 1) : c.chunk ? old / c.chunk * c.chunk : 0;
    for (int page = 0; page * c.page_size < c.lengths[r]; page++) {
      if ((page + 1) * c.page_size <= first) continue;  // nobody sees it: page 0 stands there
      a.tables[(r + 1) * c.width + page] = free.back();
      free.pop_back();
    }
    for (int t = first; t < old; t++) {
      T* to = pool.data() + a.tables[(r + 1) * c.width + t / c.page_size] * stride + t % c.page_size * c.dim;
      for (int h = 0; h < c.kv_heads; h++, to += c.page_size * c.dim) {
        rootcellar::write_row(to, &a.keys[r][(t * c.kv_heads + h) * c.dim], c.dim);
        if (c.latents) continue;
        rootcellar::write_row(to + c.kv_heads * c.page_size * c.dim, &a.values[r][(t * c.kv_heads + h) * c.dim], c.dim);
      }
    }
  }
}

Arrays arrays(const Case& c, Random& random) {
  std::normal_distribution<float> normal;
  Arrays a;
  const int row = c.kv_heads * c.dim, heads = c.kv_heads * c.group, rows = static_cast<int>(c.lengths.size());
  int64_t pages = 3;
  a.tables.assign((rows + 1) * c.width, 0);
  for (int r = 0; r < rows; r++) {
    a.keys.emplace_back(c.lengths[r] * row);
    for (float& x : a.keys[r]) x = rounded(normal(random), c.is_bf16);
    a.values.push_back(a.keys[r]);
    if (!c.latents)
      for (float& x : a.values[r]) x = rounded(normal(random), c.is_bf16);
    pages += (c.lengths[r] + c.page_size - 1) / c.page_size;
    for (int t = c.lengths[r] - c.fresh[r]; t < c.lengths[r]; t += c.tile) {
      a.rows.push_back(r + 1);
      for (int j = t; j < t + c.tile; j++) {
        const bool real = j < c.lengths[r];
        a.positions.push_back(real ? j : -1);
        a.owners.push_back(real ? r : -1);
        for (int i = 0; i < row; i++) a.k.push_back(real ? a.keys[r][j * row + i] : 1.0f);
        for (int i = 0; i < row; i++) a.v.push_back(real ? a.values[r][j * row + i] : 1.0f);
      }
    }
  }
  a.q.resize(a.positions.size() * heads * c.dim);
  for (float& x : a.q) x = normal(random);
  for (int h = 0; h < heads; h++) a.sinks.push_back(c.sinks ? normal(random) : -INFINITY);
  a.out.assign(a.q.size(), NAN);
  const int64_t stride = (c.latents ? 1 : 2) * c.page_size * row;
  if (c.is_bf16) {
    fill(c, a, a.halves, stride, random, pages);
  } else {
    fill(c, a, a.floats, stride, random, pages);
  }
  return a;
}

// The greatest difference from attention of one token written out.
double difference(const Case& c, const Arrays& a, size_t token, double scale) {
  const int r = a.owners[token], at = a.positions[token], heads = c.kv_heads * c.group;
  const int first = c.window ? std::max(0, at - c.window + 1) : c.chunk ? at / c.chunk * c.chunk : 0;
  double worst = 0;
  for (int head = 0; head < heads; head++) {
    const float* q = &a.q[(token * heads + head) * c.dim];
    std::vector<double> weights, sum(c.dim);
    double total = 0, top = c.sinks ? a.sinks[head] : -INFINITY;
    const auto place = [&](int t) { return (t * c.kv_heads + head / c.group) * c.dim; };
    for (int t = first; t <= at; t++) {
      double dot = 0;
      for (int i = 0; i < c.dim; i++) dot += static_cast<double>(q[i]) * a.keys[r][place(t) + i];
      weights.push_back(dot * scale);
      top = std::max(top, dot * scale);
    }
    if (c.sinks) total = std::exp(a.sinks[head] - top);
    for (int t = first; t <= at; t++) {
      const double w = std::exp(weights[t - first] - top);
      total += w;
      for (int i = 0; i < c.dim; i++) sum[i] += w * a.values[r][place(t) + i];
    }
    for (int i = 0; i < c.dim; i++) {
      const double off = std::abs(sum[i] / total - a.out[(token * heads + head) * c.dim + i]);
      worst = std::isnan(off) ? INFINITY : std::max(worst, off);
    }
  }
  return worst;
}

bool holds(const Case& c, Random& random, const Set& set, int threads) {
  Arrays a = arrays(c, random);
  const float scale = 0.5f / std::sqrt(static_cast<float>(c.dim));
  const Batch b{a.q.data(),
                a.k.data(),
                c.latents ? nullptr : a.v.data(),
                c.latents ? nullptr : a.sinks.data(),
                a.tables.data(),
                a.rows.data(),
                a.positions.data(),
                c.is_bf16 ? static_cast<void*>(a.halves.data()) : a.floats.data(),
                a.out.data(),
                static_cast<int64_t>(a.positions.size()),
                c.kv_heads * c.group,
                c.kv_heads,
                c.dim,
                c.page_size,
                c.width,
                static_cast<int64_t>(a.rows.size()),
                scale,
                c.window,
                c.chunk,
                below(random, 2) == 1};
  if (c.is_bf16) {
    b.write<rootcellar::bf16>();
  } else {
    b.write<float>();
  }
  Threads pool{threads, {}};
  rootcellar::attend(pool, b, set.function(c.is_bf16));
  for (size_t token = 0; token < a.owners.size(); token++) {
    const double off = a.owners[token] < 0 ? 0 : difference(c, a, token, scale);
    if (off < 1e-5) continue;
    std::printf(
        "%s, %d threads: token %zu is off by %g: kv_heads %d, group %d, dim %d, page_size %d, tile %d, latents %d, "
        "bf16 %d, sinks %d, window %d, chunk %d\n",
        set.name, threads, token, off, c.kv_heads, c.group, c.dim, c.page_size, c.tile, c.latents, c.is_bf16, c.sinks,
        c.window, c.chunk);
    return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int batches = argc > 1 ? std::atoi(argv[1]) : 300;
  Random random(argc > 2 ? std::atoi(argv[2]) : 0);
  int seen = 0;
  for (const auto& set : rootcellar::kVectorSets) {
    if (!set.runs()) continue;
    for (int i = 0; i < batches; i++, seen++) {
      const Case c = draw(random);
      if (!holds(c, random, set, one_of(random, {1, 2, 5}))) return 1;
    }
    std::printf("attention, %s: %d batches\n", set.name, batches);
  }
  return seen == 0;
}
