// Paged attention (ops/native/attention.h) with each instruction set that runs here, against attention written out in
// double precision, over random batches: `check_attention [BATCHES] [SEED]`. `make sanitize` runs it under sanitizers.
//
// Pages that no query sees, and slots that nobody has written, hold NaN; what is behind the buffers is the sanitizer's.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <string_view>
#include <tuple>

#include "attention.h"
#include "check.h"

using rootcellar::Batch;
using Set = rootcellar::Vectors<rootcellar::Choose>;
using CodeSet = rootcellar::Vectors<rootcellar::ChooseOfCodes>;

namespace {

struct Case {
  int kv_heads, group, dim, page_size, tile, width;
  bool latents, is_bf16, sinks;
  int window, chunk;
  std::vector<int> lengths, fresh;  // of each row: tokens, and how many of them are in the batch
  const char *k_grid, *v_grid;      // of pools of few bits; null: floats
  bool turned;                      // before they become codes
};

template <typename T>
T one_of(Random& random, std::initializer_list<T> choices) {
  return choices.begin()[below(random, static_cast<int>(choices.size()))];
}

constexpr std::pair<const char*, const char*> kGrids[] = {{"int8", "int8"},
                                                          {"fp8_e4m3", "fp8_e4m3"},
                                                          {"fp8_e5m2", "fp8_e5m2"},
                                                          {"int8", "fp4_e2m1"},
                                                          {"fp4_e2m1", "fp4_e2m1"}};

Case draw(Random& random, bool coded) {
  Case c{};
  if (coded) std::tie(c.k_grid, c.v_grid) = kGrids[below(random, std::size(kGrids))];
  c.turned = coded && below(random, 2) == 0;
  c.latents = !coded && below(random, 4) == 0;
  c.kv_heads = c.latents ? 1 : 1 + below(random, 3);
  c.group = 1 + below(random, c.latents ? 20 : 8);
  c.dim = 16 * (1 + below(random, 9));
  c.page_size = one_of(random, {1, 3, 16, 64});
  c.tile = one_of(random, {1, 4, 16});
  c.is_bf16 = !coded && below(random, 2) == 0;
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
  // Of few bits: codes of keys and of values, the scales of each.
  std::vector<std::vector<uint8_t>> rows_of[4];  // [length, kv_heads, bytes] of each row
  std::vector<uint8_t> pools[4];
};

// The first position of a row that the batch sees.
int first_seen(const Case& c, size_t r) {
  const int old = c.lengths[r] - c.fresh[r];
  return c.window ? std::max(0, old - c.window + 1) : c.chunk ? old / c.chunk * c.chunk : 0;
}

// Gives each row pages for what is seen.
void place(const Case& c, Arrays& a, Random& random, int64_t pages) {
  std::vector<int32_t> free(pages - 1);
  for (size_t i = 0; i < free.size(); i++) free[i] = static_cast<int32_t>(i + 1);
  std::shuffle(free.begin(), free.end(), random);
  for (size_t r = 0; r < c.lengths.size(); r++) {
    for (int page = 0; page * c.page_size < c.lengths[r]; page++) {
      if ((page + 1) * c.page_size <= first_seen(c, r)) continue;  // nobody sees it: page 0 stands there
      a.tables[(r + 1) * c.width + page] = free.back();
      free.pop_back();
    }
  }
}

template <typename T>
void fill(const Case& c, Arrays& a, std::vector<T>& pool, int64_t stride, int64_t pages) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  pool.resize(pages * stride);
  for (T& x : pool) rootcellar::write_row(&x, &nan, 1);
  for (size_t r = 0; r < c.lengths.size(); r++) {
    for (int t = first_seen(c, r); t < c.lengths[r] - c.fresh[r]; t++) {
      T* to = pool.data() + a.tables[(r + 1) * c.width + t / c.page_size] * stride + t % c.page_size * c.dim;
      for (int h = 0; h < c.kv_heads; h++, to += c.page_size * c.dim) {
        rootcellar::write_row(to, &a.keys[r][(t * c.kv_heads + h) * c.dim], c.dim);
        if (c.latents) continue;
        rootcellar::write_row(to + c.kv_heads * c.page_size * c.dim, &a.values[r][(t * c.kv_heads + h) * c.dim], c.dim);
      }
    }
  }
}

// What the codes and scales of a grid stand for, written out.
struct Grid {
  std::string_view name;

  bool in_blocks() const { return name == "fp4_e2m1"; }
  int row(int dim) const { return in_blocks() ? dim / 2 : dim; }
  int scale_row(int dim) const { return in_blocks() ? dim / 16 : 2; }

  uint8_t draw(Random& random) const {
    const int byte = below(random, 256), exponent = name == "fp8_e4m3" ? byte >> 3 & 15 : byte >> 2 & 31;
    if (name == "fp8_e4m3" && (exponent == 0 || (byte & 0x7f) == 0x7f)) return 0;  // as the encoder never does
    if (name == "fp8_e5m2" && (exponent == 0 || exponent == 31)) return 0;
    return static_cast<uint8_t>(byte);
  }

  void draw_scales(Random& random, int dim, uint8_t* to) const {
    if (in_blocks()) {
      for (int i = 0; i < dim / 16; i++) to[i] = static_cast<uint8_t>(below(random, 14 << 3));  // up to a half
      return;
    }
    const float top = name == "int8" ? 127 : name == "fp8_e4m3" ? 448 : 57344;
    const float scale = static_cast<float>(below(random, 200)) / 50 / top;
    rootcellar::bf16 narrow;
    rootcellar::write_row(&narrow, &scale, 1);
    std::memcpy(to, &narrow, sizeof narrow);
  }

  // The most that an element can be off, of a vector (or block, which is no larger) whose greatest is `most`.
  double coarse(double most, double x) const {
    if (in_blocks()) return most / 5;  // the least of float16's scales is beside what is drawn nothing
    return name == "int8" ? most / 127 : std::max(most / 200, std::abs(x) / (name == "fp8_e4m3" ? 15 : 7));
  }

  double value(const uint8_t* codes, const uint8_t* scales, int i) const {
    if (in_blocks()) {
      constexpr double kValues[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
      const int code = codes[i / 2] >> (i % 2 * 4) & 15, scale = scales[i / 16], e = scale >> 3, m = scale & 7;
      const double times = e ? std::ldexp(8 + m, e - 18) : std::ldexp(m, -17);
      return (code & 8 ? -1 : 1) * kValues[code & 7] * times;
    }
    uint16_t bits;
    std::memcpy(&bits, scales, sizeof bits);
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float scale;
    std::memcpy(&scale, &wide, sizeof scale);
    if (name == "int8") return static_cast<int8_t>(codes[i]) * static_cast<double>(scale);
    const int mantissa = name == "fp8_e4m3" ? 3 : 2, bias = name == "fp8_e4m3" ? 7 : 15;
    const int e = (codes[i] & 0x7f) >> mantissa, m = codes[i] & ((1 << mantissa) - 1);
    const double size = e ? std::ldexp((1 << mantissa) + m, e - bias - mantissa) : 0;
    return (codes[i] & 0x80 ? -size : size) * scale;
  }
};

// Draws the codes and scales of a row of tokens, `which`: 0 of keys, 1 of values; they stand for `wide`.
void draw_codes(const Case& c, Arrays& a, int which, std::vector<float>& wide, Random& random) {
  const Grid grid{which == 0 ? c.k_grid : c.v_grid};
  const size_t vectors = wide.size() / c.dim, row = grid.row(c.dim), scale_row = grid.scale_row(c.dim);
  std::vector<uint8_t> codes(vectors * row), scales(vectors * scale_row);
  for (uint8_t& code : codes) code = grid.draw(random);
  for (size_t v = 0; v < vectors; v++) {
    grid.draw_scales(random, c.dim, &scales[v * scale_row]);
    for (int i = 0; i < c.dim; i++)
      wide[v * c.dim + i] = static_cast<float>(grid.value(&codes[v * row], &scales[v * scale_row], i));
  }
  a.rows_of[which].push_back(std::move(codes));
  a.rows_of[2 + which].push_back(std::move(scales));
}

// Where a token and head lies in pool i of few bits.
uint8_t* place_of(const Case& c, Arrays& a, int i, size_t r, int t, int h) {
  const Grid grid{i % 2 == 0 ? c.k_grid : c.v_grid};
  const int64_t row = i < 2 ? grid.row(c.dim) : grid.scale_row(c.dim);
  const int64_t page = a.tables[(r + 1) * c.width + t / c.page_size];
  return &a.pools[i][((page * c.kv_heads + h) * c.page_size + t % c.page_size) * row];
}

// The pools of few bits.
void fill_codes(const Case& c, Arrays& a, int64_t pages) {
  for (int i = 0; i < 4; i++) {
    const Grid grid{i % 2 == 0 ? c.k_grid : c.v_grid};
    const int64_t row = i < 2 ? grid.row(c.dim) : grid.scale_row(c.dim), token = c.kv_heads * row;
    a.pools[i].assign(pages * c.page_size * token, 0xff);  // as a scale: NaN
    for (size_t r = 0; r < c.lengths.size(); r++)
      for (int t = first_seen(c, r); t < c.lengths[r] - c.fresh[r]; t++)
        for (int h = 0; h < c.kv_heads; h++)
          std::memcpy(place_of(c, a, i, r, t, h), &a.rows_of[i][r][t * token + h * row], row);
  }
}

// Every so many elements as the largest power of 2 that divides dim, times a Hadamard matrix.
void turn(float* x, int dim) {
  const int block = dim & -dim;
  std::vector<double> sums(dim);
  for (int i = 0; i < dim; i++)
    for (int j = i / block * block; j < i / block * block + block; j++)
      sums[i] += (__builtin_popcount(i & j & (block - 1)) % 2 ? -1.0 : 1.0) / std::sqrt(block) * x[j];
  for (int i = 0; i < dim; i++) x[i] = static_cast<float>(sums[i]);
}

// Takes what was made of the batch's keys, or values, out of the pools, as what queries see; whether it is near them.
bool read_fresh(const Case& c, Arrays& a, int which, const std::vector<float>& given) {
  const Grid grid{which == 0 ? c.k_grid : c.v_grid};
  for (size_t j = 0; j < a.owners.size(); j++) {
    for (int h = 0; h < c.kv_heads && a.owners[j] >= 0; h++) {
      const size_t r = a.owners[j];
      const float* from = &given[(j * c.kv_heads + h) * c.dim];
      std::vector<float> x(from, from + c.dim);
      if (c.turned) turn(x.data(), c.dim);
      double most = 0;
      for (float one : x) most = std::max(most, std::abs(static_cast<double>(one)));
      const uint8_t* codes = place_of(c, a, which, r, a.positions[j], h);
      const uint8_t* scales = place_of(c, a, 2 + which, r, a.positions[j], h);
      float* wide = &(which == 0 ? a.keys : a.values)[r][(a.positions[j] * c.kv_heads + h) * c.dim];
      for (int i = 0; i < c.dim; i++) {
        wide[i] = static_cast<float>(grid.value(codes, scales, i));
        if (!(std::abs(wide[i] - x[i]) <= grid.coarse(most, x[i]))) {
          std::printf("%s: %g of at most %g became %g\n", grid.name.data(), x[i], most, wide[i]);
          return false;
        }
      }
    }
  }
  if (c.turned)
    for (auto& wide : which == 0 ? a.keys : a.values)
      for (size_t i = 0; i < wide.size(); i += c.dim) turn(&wide[i], c.dim);
  return true;
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
    if (c.k_grid != nullptr) {
      draw_codes(c, a, 0, a.keys[r], random);
      draw_codes(c, a, 1, a.values[r], random);
    } else if (!c.latents) {
      for (float& x : a.values[r]) x = rounded(normal(random), c.is_bf16);
    }
    pages += (c.lengths[r] + c.page_size - 1) / c.page_size;
    for (int t = c.lengths[r] - c.fresh[r]; t < c.lengths[r]; t += c.tile) {
      a.rows.push_back(r + 1);
      for (int j = t; j < t + c.tile; j++) {
        const bool real = j < c.lengths[r];
        a.positions.push_back(real ? j : -1);
        a.owners.push_back(real ? r : -1);
        const bool known = real && c.k_grid == nullptr;  // codes are made of what is in the batch
        for (int i = 0; i < row; i++) a.k.push_back(known ? a.keys[r][j * row + i] : normal(random));
        for (int i = 0; i < row; i++) a.v.push_back(known ? a.values[r][j * row + i] : normal(random));
      }
    }
  }
  a.q.resize(a.positions.size() * heads * c.dim);
  for (float& x : a.q) x = normal(random);
  for (int h = 0; h < heads; h++) a.sinks.push_back(c.sinks ? normal(random) : -INFINITY);
  a.out.assign(a.q.size(), NAN);
  const int64_t stride = (c.latents ? 1 : 2) * c.page_size * row;
  place(c, a, random, pages);
  if (c.k_grid != nullptr) {
    fill_codes(c, a, pages);
  } else if (c.is_bf16) {
    fill(c, a, a.halves, stride, pages);
  } else {
    fill(c, a, a.floats, stride, pages);
  }
  return a;
}

// The greatest difference from attention of one token written out.
double difference(const Case& c, const Arrays& a, size_t token, double scale, double cap) {
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
      const double score = cap > 0 ? cap * std::tanh(dot * scale / cap) : dot * scale;
      weights.push_back(score);
      top = std::max(top, score);
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

// Attention over a pool of floats, and over pools of few bits; whether the latter hold what they were given.
bool run(const Case& c, Arrays&, Batch& b, const Set& set, Threads& threads) {
  if (c.is_bf16) {
    b.write<rootcellar::bf16>();
  } else {
    b.write<float>();
  }
  rootcellar::attend(threads, b, set.function(c.is_bf16));
  return true;
}

bool run(const Case& c, Arrays& a, Batch& b, const CodeSet& set, Threads& threads) {
  b.codes = set.function(c.k_grid, c.v_grid);
  for (int i = 0; i < rootcellar::kArraysOfCodes; i++) b.rows_of[i] = {a.pools[i].data(), b.codes->rows[i](c.dim)};
  b.fixed = false;
  b.turned = c.turned;
  b.write_codes(threads);
  rootcellar::attend(threads, b, b.codes->kernel);
  return read_fresh(c, a, 0, a.k) && read_fresh(c, a, 1, a.v);
}

template <typename AnySet>
bool holds(const Case& c, Random& random, const AnySet& set, int threads) {
  Arrays a = arrays(c, random);
  const float scale = 0.5f / std::sqrt(static_cast<float>(c.dim));
  const float cap = below(random, 3) == 0 ? 0.5f * static_cast<float>(1 + below(random, 20)) : 0;
  Batch b{a.q.data(),
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
                cap,
                c.window,
                c.chunk,
                below(random, 2) == 1};
  Threads pool{threads, {}};
  if (!run(c, a, b, set, pool)) return false;
  for (size_t token = 0; token < a.owners.size(); token++) {
    const double off = a.owners[token] < 0 ? 0 : difference(c, a, token, scale, cap);
    if (off < 1e-5) continue;
    std::printf(
        "%s, %d threads: token %zu is off by %g: kv_heads %d, group %d, dim %d, page_size %d, tile %d, latents %d, "
        "bf16 %d, sinks %d, window %d, chunk %d, cap %g, keys %s, values %s, turned %d\n",
        set.name, threads, token, off, c.kv_heads, c.group, c.dim, c.page_size, c.tile, c.latents, c.is_bf16, c.sinks,
        c.window, c.chunk, cap, c.k_grid ? c.k_grid : "floats", c.v_grid ? c.v_grid : "floats", c.turned);
    return false;
  }
  return true;
}

// How many batches came out right with each set; -1: one did not.
template <typename Sets>
int check(const Sets& sets, bool coded, int batches, Random& random) {
  int seen = 0;
  for (const auto& set : sets) {
    if (!set.runs()) continue;
    for (int i = 0; i < batches; i++, seen++) {
      const Case c = draw(random, coded);
      if (!holds(c, random, set, one_of(random, {1, 2, 5}))) return -1;
    }
    std::printf("attention%s, %s: %d batches\n", coded ? " over codes" : "", set.name, batches);
  }
  return seen;
}

}  // namespace

int main(int argc, char** argv) {
  const int batches = argc > 1 ? std::atoi(argv[1]) : 300;
  Random random(argc > 2 ? std::atoi(argv[2]) : 0);
  const bool right = check(rootcellar::kVectorSets, false, batches, random) > 0 &&
                     check(rootcellar::kCodeSets, true, batches, random) > 0;
  return right ? 0 : 1;
}
