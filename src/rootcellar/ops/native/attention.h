// Paged attention for CPUs, over keys and values by head and over latents, in plain C++.
//
// One call writes the new tokens of a packed batch into the pool, in place and on its grid, and lets every query attend
// to its row's pages. The batch is cut into tiles: equally many consecutive tokens of one row (1 when decoding), padding
// last. Tiles that follow each other in a row are joined and cut into *units* of as many queries as share a packed block
// of keys well. An item of work is a unit and one KV head; when there are fewer than threads need, the context is split
// as well and the parts merged (the flash-decoding scheme of Dao et al., 2023). Softmax is online (Milakov and
// Gimelshein, 2018). Page 0 is never read or written.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "targets.h"

namespace rootcellar {

constexpr float kMasked = -3.0e38f;
constexpr int kBlock = 64;   // positions whose scores are computed before they become weights
constexpr int kRows = 6;     // queries that a register tile of a product of matrices has
constexpr int kNarrow = 16;  // as many queries are too few to pack keys for

// Keys, or values, of few bits: codes and scales, each in a row of bytes [pages, kv_heads, page_size, row].
struct Coded {
  const uint8_t *codes, *scales;
};

// Half of scales of 8 bits: a float16 without its sign and without the last 7 bits.
struct HalfScales {
  float of[256];
  constexpr HalfScales() : of{} {
    for (int byte = 0; byte < 256; byte++) {
      const int exponent = byte >> 3, mantissa = exponent == 0 ? byte & 7 : 8 + (byte & 7);
      float power = 1.0f / (1 << 18);  // of the last bit where there is no exponent
      for (int e = 1; e < exponent; e++) power *= 2;
      of[byte] = exponent == 31 ? __builtin_nanf("") : static_cast<float>(mantissa) * power;
    }
  }
};
inline constexpr HalfScales kHalfScales;

// Where the cached positions [begin, end) of one row and KV head lie.
struct Span {
  const void* pool;
  const int32_t* pages;
  int begin, end;
  int page_size;
  int64_t page_stride, value_offset, head_offset;  // in elements
  int dim;
  Coded keys, values;  // of pools of few bits
  int kv_heads, head;

  int seen = 0;  // nobody sees what is before it, and it may not be there: this position stands in its place

  // Pointers to the keys and values of n positions from t0 on.
  template <typename T>
  void locate(int t0, int n, const T** keys, const T** values) const {
    const T* base = static_cast<const T*>(pool) + head_offset;
    int page = t0 / page_size, at = t0 % page_size;
    for (int t = 0; t < n;) {
      const T* start = base + pages[page] * page_stride;
      for (; at < page_size && t < n; at++, t++) {
        keys[t] = start + static_cast<int64_t>(at) * dim;
        values[t] = keys[t] + value_offset;
      }
      page++;
      at = 0;
    }
    for (int t = 0; t < n && t0 + t < seen; t++) {
      keys[t] = keys[seen - t0];
      values[t] = values[seen - t0];
    }
  }
};

// `rows` queries [rows, dim], already scaled (log2(e) included); query r sees the positions from first[r] to last[r].
// Scores are squashed to within `cap` (log2(e) included) by tanh; 0: they are not.
struct Query {
  const float* data;
  const int32_t *first, *last;
  int rows;
  float cap;
};

// Lets queries attend to a span: m is the running maximum of each row (in units of log2), l the running sum, o the
// unnormalised output. `room` for what is packed: room_for(dim, rows) floats.
using Kernel = void (*)(const Span&, const Query&, float* room, float* m, float* l, float* o);

// The kernel for a pool's type.
using Choose = Kernel (*)(bool is_bf16);

// A kernel over codes; how a key and a value of `dim` elements become codes and scales, and rows [n, dim] are turned; the
// bytes of a token's row in each pool: codes of keys and of values, the scales of each.
constexpr int kArraysOfCodes = 4;
struct CodesKernel {
  std::string_view keys, values;
  Kernel kernel;
  void (*encode[2])(const float* x, int64_t dim, uint8_t* codes, uint8_t* scales);
  void (*turn)(float* x, int64_t n, int64_t dim);
  int64_t (*rows[kArraysOfCodes])(int64_t dim);
};

// The kernel for the grids of keys and of values; null where there is none.
using ChooseOfCodes = const CodesKernel* (*)(std::string_view keys, std::string_view values);

inline int64_t room_for(int64_t dim, int64_t rows) { return 3 * dim * kBlock + kRows * kBlock + rows * dim; }

#define ROOTCELLAR_KERNELS "kernel.inc"
#include "sets.inc"

constexpr Vectors<Choose> kVectorSets[] = {ROOTCELLAR_SETS(kernel)};
constexpr Vectors<ChooseOfCodes> kCodeSets[] = {ROOTCELLAR_SETS(kernel_of_codes)};

template <typename T>
void write_row(T* to, const float* from, int64_t n);

template <>
inline void write_row<float>(float* to, const float* from, int64_t n) {
  std::memcpy(to, from, n * sizeof(float));
}

template <>
inline void write_row<bf16>(bf16* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i].bits = bf16_of(from[i]);
}

// What a thread keeps from one item to the next, cut into pieces that begin with a cache line.
struct Scratch {
  std::vector<float> floats;
  std::vector<int32_t> first, last;
  float* next = nullptr;

  void begin(int64_t n) {
    floats.resize(std::max<size_t>(floats.size(), n + 16));
    const auto at = reinterpret_cast<uintptr_t>(floats.data());
    next = floats.data() + (64 - at % 64) % 64 / sizeof(float);
  }
  float* take(int64_t n) {
    float* at = next;
    next += (n + 15) / 16 * 16;
    return at;
  }
};

// Queries of one row at consecutive positions: tokens [begin, begin + count) of the batch.
struct Unit {
  int64_t begin, count;
};

// Codes or scales of keys or values, and the bytes of a token and head.
struct Rows {
  uint8_t* pool;
  int64_t row;
};

// A packed batch over a pool of pages [pages, 2, kv_heads, page_size, dim], K first, or, with v null, of latents,
// [pages, page_size, dim], which all heads share and which are their own values (kv_heads is 1).
struct Batch {
  const float *q, *k, *v;  // [tokens, heads, dim], [tokens, kv_heads, dim] twice
  const float* sinks;      // [heads]: scores that have no value; null: none
  const int32_t *tables, *rows, *positions;
  void* pool;
  float* out;
  int64_t tokens, heads, kv_heads, dim, page_size, width, tiles;
  float scale, softcap;   // softcap 0: none
  int64_t window, chunk;  // 0: none
  bool fixed = false;     // each sum is made in one order, whatever else is in the batch
  const CodesKernel* codes = nullptr;  // of pools of few bits, which stand in place of `pool`: see CodesKernel
  Rows rows_of[kArraysOfCodes] = {};
  bool turned = false;  // keys and values are turned before they become codes

  int64_t tile() const { return tokens / tiles; }
  int64_t group() const { return heads / kv_heads; }
  int64_t page_stride() const { return (v == nullptr ? 1 : 2) * kv_heads * page_size * dim; }
  int64_t value_offset() const { return v == nullptr ? 0 : kv_heads * page_size * dim; }
  const int32_t* pages(int64_t token) const { return tables + rows[token / tile()] * width; }

  template <typename T>
  void write() const {
    for (int64_t j = 0; j < tokens; j++) {
      const int32_t at = positions[j];
      if (at < 0) continue;
      T* to = static_cast<T*>(pool) + pages(j)[at / page_size] * page_stride() + (at % page_size) * dim;
      for (int64_t h = 0; h < kv_heads; h++, to += page_size * dim) {
        write_row(to, k + (j * kv_heads + h) * dim, dim);
        if (v != nullptr) write_row(to + value_offset(), v + (j * kv_heads + h) * dim, dim);
      }
    }
  }

  template <typename Threads>
  void write_codes(Threads& threads) const {
    parallel_for(threads, tokens, [this](int64_t j) {
      const int32_t at = positions[j];
      if (at < 0) return;
      const int64_t place = pages(j)[at / page_size] * kv_heads * page_size + at % page_size;
      thread_local Scratch scratch;
      scratch.begin(dim);
      float* row = scratch.take(dim);
      for (int64_t i = 0; i < 2 * kv_heads; i++) {
        const int64_t h = i / 2, which = i % 2, slot = place + h * page_size;
        const float* from = (which == 0 ? k : v) + (j * kv_heads + h) * dim;
        const Rows &to = rows_of[which], &scales = rows_of[2 + which];
        if (turned) {
          std::memcpy(row, from, dim * sizeof(float));
          codes->turn(row, 1, dim);
          from = row;
        }
        codes->encode[which](from, dim, to.pool + slot * to.row, scales.pool + slot * scales.row);
      }
    });
  }

  // The first position that a query at `position` sees.
  int64_t first(int64_t position) const {
    if (window > 0) return std::max<int64_t>(0, position - window + 1);
    return chunk > 0 ? position / chunk * chunk : 0;
  }

  // Of a unit: the first position that any of its queries sees, and the end of what they see.
  int64_t begin(const Unit& u) const { return first(positions[u.begin]); }
  // Where the blocks of keys begin that a unit meets.
  int64_t start(const Unit& u) const { return fixed ? begin(u) / kBlock * kBlock : begin(u); }
  int64_t end(const Unit& u) const { return positions[u.begin + u.count - 1] + 1; }

  // Units of at most `most` tokens.
  std::vector<Unit> units(int64_t most) const {
    std::vector<Unit> found;
    for (int64_t j = 0; j < tokens; j++) {
      if (positions[j] < 0) continue;
      if (!found.empty()) {
        Unit& u = found.back();
        const bool follows = u.begin + u.count == j && rows[(j - 1) / tile()] == rows[j / tile()] &&
                             positions[j - 1] + 1 == positions[j];
        if (follows && u.count < most) {
          u.count++;
          continue;
        }
      }
      found.push_back({j, 1});
    }
    return found;
  }
};

// Rows of o become the output of a unit's tokens.
inline void finish(const Batch& b, const Unit& u, int64_t h, const float* l, float* o) {
  const int64_t group = b.group();
  if (b.turned) b.codes->turn(o, u.count * group, b.dim);
  for (int64_t r = 0; r < u.count * group; r++) {
    float* to = b.out + ((u.begin + r / group) * b.heads + h * group + r % group) * b.dim;
    const float scale = 1.0f / l[r];
    for (int64_t d = 0; d < b.dim; d++) to[d] = o[r * b.dim + d] * scale;
  }
}

// The parts of a unit's context, each [m, l, o] of `padded` rows, become one: always in the same order, so that the sum
// does not depend on which ended last. `part`: elements of a part.
inline void merge(const float* parts, int64_t splits, int64_t part, int64_t rows, int64_t padded, int64_t dim, float* l,
                  float* o) {
  for (int64_t r = 0; r < rows; r++) {
    float top = kMasked, total = 0.0f;
    for (int64_t s = 0; s < splits; s++) top = std::max(top, parts[s * part + r]);
    float* to = o + r * dim;
    std::fill(to, to + dim, 0.0f);
    for (int64_t s = 0; s < splits; s++) {
      const float* from = parts + s * part;
      const float w = from[r] == kMasked ? 0.0f : __builtin_exp2f(from[r] - top);
      total += w * from[padded + r];
      for (int64_t i = 0; i < dim; i++) to[i] += w * from[2 * padded + r * dim + i];
    }
    l[r] = total;
  }
}

template <typename Threads>
void attend(Threads& threads, const Batch& b, Kernel kernel) {
  const int64_t group = b.group(), d = b.dim, wanted = 4 * std::max<int64_t>(threads.num_threads(), 1);
  std::memset(b.out, 0, b.tokens * b.heads * d * sizeof(float));
  // Many queries to a packed block, but their sums should stay in the processor's second cache.
  int64_t most = std::max<int64_t>(1, std::clamp<int64_t>(32768 / d, 96, 256) / group);
  if (b.fixed && group <= kNarrow) most = kNarrow / group;  // all by the kernel that decoding has
  std::vector<Unit> units = b.units(most);
  while (!b.fixed && most > 1 && most * group > 96 && static_cast<int64_t>(units.size()) * b.kv_heads < wanted) {
    most = (most + 1) / 2;
    units = b.units(most);
  }
  if (units.empty()) return;
  int64_t longest = 0, widest = 0;
  for (const Unit& u : units) {
    longest = std::max(longest, b.end(u) - b.start(u));
    widest = std::max(widest, u.count * group);
  }
  const auto padded_to = [](int64_t rows) { return rows > kNarrow ? (rows + kRows - 1) / kRows * kRows : rows; };
  const int64_t padded = padded_to(widest), items = static_cast<int64_t>(units.size()) * b.kv_heads;
  // Split the context when there are too few items to keep the threads evenly busy, into parts of 256 and more. (Nine of
  // them on two threads would leave one idle for a tenth of the time.)
  const int64_t most_splits = b.fixed || items >= wanted ? 1 : (2 * wanted + items - 1) / items;
  const int64_t splits = std::clamp<int64_t>(longest / 256, 1, most_splits);
  const int64_t part = padded * (d + 2);
  std::vector<float> parts(splits > 1 ? items * splits * part : 0);
  std::vector<std::atomic<int32_t>> left(splits > 1 ? items : 0);
  for (auto& x : left) x.store(static_cast<int32_t>(splits), std::memory_order_relaxed);
  const float scale = kLog2e * b.scale;

  parallel_for(threads, items * splits, [&](int64_t i) {
    const int64_t item = items - 1 - i / splits, s = i % splits;  // later units of a prompt see more: they go first
    const int64_t h = item % b.kv_heads;
    const Unit& u = units[item / b.kv_heads];
    const int64_t rows = u.count * group, rounded = padded_to(rows), begin = b.start(u), length = b.end(u) - begin;
    thread_local Scratch scratch;
    scratch.begin(rounded * d + part + room_for(d, rounded) + 64);
    scratch.first.assign(rounded, 0);
    scratch.last.assign(rounded, -1);
    float *x = scratch.take(rounded * d), *room = scratch.take(room_for(d, rounded)), *own = scratch.take(part);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t token = u.begin + r / group;
      const float* from = b.q + (token * b.heads + h * group + r % group) * d;
      for (int64_t j = 0; j < d; j++) x[r * d + j] = from[j] * scale;
      scratch.last[r] = b.positions[token];
      scratch.first[r] = static_cast<int32_t>(b.first(b.positions[token]));
    }
    if (b.turned) b.codes->turn(x, rows, d);
    std::fill(x + rows * d, x + rounded * d, 0.0f);
    float* m = splits > 1 ? parts.data() + (item * splits + s) * part : own;
    float *l = m + padded, *o = l + padded;
    std::fill(m, m + padded, kMasked);
    std::fill(l, l + padded + rounded * d, 0.0f);
    for (int64_t r = 0; r < rows && s == 0 && b.sinks != nullptr; r++) {
      const float sink = b.sinks[h * group + r % group];
      if (sink > kMasked) {
        m[r] = sink * kLog2e;
        l[r] = 1.0f;
      }
    }
    // Where parts meet: between blocks, which so begin with a page where the context does.
    const auto cut = [&](int64_t at) { return begin + (at == splits ? length : length * at / splits / kBlock * kBlock); };
    const Span span{b.pool,
                    b.pages(u.begin),
                    static_cast<int>(cut(s)),
                    static_cast<int>(cut(s + 1)),
                    static_cast<int>(b.page_size),
                    b.page_stride(),
                    b.value_offset(),
                    h * b.page_size * d,
                    static_cast<int>(d),
                    {b.rows_of[0].pool, b.rows_of[2].pool},
                    {b.rows_of[1].pool, b.rows_of[3].pool},
                    static_cast<int>(b.kv_heads),
                    static_cast<int>(h),
                    static_cast<int>(b.begin(u))};
    const Query query{x, scratch.first.data(), scratch.last.data(), static_cast<int>(rounded), kLog2e * b.softcap};
    kernel(span, query, room, m, l, o);
    if (splits == 1) {
      finish(b, u, h, l, o);
    } else if (left[item].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      float *all_l = own, *all_o = own + padded;
      merge(parts.data() + item * splits * part, splits, part, rows, padded, d, all_l, all_o);
      finish(b, u, h, all_l, all_o);
    }
  });
}

}  // namespace rootcellar
