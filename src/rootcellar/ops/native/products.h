// Products of rows with weights that were packed once, for CPUs, in plain C++.
//
// A weight [inputs, ...outputs] is packed in *panels* of kColumns outputs, so that a panel is read from its beginning to
// its end, and a row of it is what some registers hold (the packed operand of Goto and van de Geijn, 2008). Words of 32
// bits hold an input's float32 weight with one output, two bfloat16 ones of inputs that follow each other, four integers
// of 8 bits, or eight of 4 bits: [panels, inputs / those of a word, kColumns]. So each form is read in whole registers.
// Floats lie with the first in the lowest bits; of integers those with even places come first, so that each half of a word
// has one of two inputs that follow each other, where products of 16 bits want them. Integers come in groups of inputs,
// with a scale, and for 4 bits a least value, for each group and output.
//
// Arithmetic is in float32. Rows that meet integers are written as such first, with 16 bits and a scale for each group of
// inputs (twice the bits that others give them): their products are summed exactly within a group, and one instruction
// makes two of them for each element, twice what it makes of floats.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "targets.h"

namespace rootcellar {

constexpr int kColumns = 16;    // outputs of a panel
constexpr int kDeep = 256;      // inputs that are decoded at a time, for more rows than a register tile has
constexpr int kSpan = 16;       // inputs that are summed one after the other where the order is fixed; divides kDeep
constexpr int64_t kBand = 120;  // rows that an item of work has, at most: their inputs stay in the second cache

enum class Form { f32, bf16, w8, w4 };

constexpr int inputs_of_word(Form form) {
  return form == Form::f32 ? 1 : form == Form::bf16 ? 2 : form == Form::w8 ? 4 : 8;
}

// y [rows, leads * length] of x [rows, inputs]. The outputs are `leads` runs of `length`, each packed in panels of its
// own, the last of which may be filled up.
struct Product {
  const float* x;
  const uint32_t* data;        // words of all panels
  const bf16 *scales, *least;  // [panels, inputs / group, kColumns]; null where the form has none
  float* y;
  int64_t rows, inputs, leads, length, group;
  Form form;
  bool fixed = false;  // each sum is made in one order, however many rows there are
  // Of integers: x in 16 bits [rows, inputs], what one stands for [rows, inputs / group], and sums of x [rows, inputs /
  // group], null where there is no least value.
  const int16_t* codes = nullptr;
  const float *units = nullptr, *given = nullptr;

  // The words of a panel from the one that has this input on.
  const uint32_t* words(int64_t panel, int64_t input) const {
    return data + (panel * inputs + input) / inputs_of_word(form) * kColumns;
  }
  int64_t ahead() const { return inputs / inputs_of_word(form) * kColumns; }  // words from a panel to the next
  int64_t each() const { return (length + kColumns - 1) / kColumns; }  // panels of a run
  int64_t panels() const { return leads * each(); }
  int64_t width() const { return leads * length; }
  int columns(int64_t panel) const {
    return static_cast<int>(std::min<int64_t>(kColumns, length - panel % each() * kColumns));
  }
  float* out(int64_t row, int64_t panel) const {
    return y + row * width() + panel / each() * length + panel % each() * kColumns;
  }
};

// `multiply`: rows [row, row + rows) of a product, its panels [begin, end). `code`: what x is as integers, in those rows.
struct ProductKernels {
  void (*multiply)(const Product&, int64_t row, int64_t rows, int64_t begin, int64_t end);
  void (*code)(const Product&, int64_t row, int64_t rows, int16_t* codes, float* units, float* given);
};

#define ROOTCELLAR_KERNELS "product.inc"
#define ROOTCELLAR_INTEGERS
#include "sets.inc"

constexpr Vectors<ProductKernels> kProductSets[] = {ROOTCELLAR_SETS(products)};

// A band of rows, and the panels [begin, end) that they meet.
struct Piece {
  int64_t band, begin, end;
};

// What threads share: pieces in order, each as large as what is left has for every thread, so that most panels are followed
// by the next and all threads end at nearly the same time (guided self-scheduling: Polychronopoulos and Kuck, 1987).
inline std::vector<Piece> pieces(int64_t bands, int64_t panels, int64_t threads) {
  std::vector<Piece> all;
  const int64_t total = bands * panels;
  for (int64_t at = 0; at < total;) {
    const int64_t band = at / panels, share = (total - at + threads - 1) / threads;
    const int64_t end = std::min(at + share, (band + 1) * panels);
    all.push_back({band, at - band * panels, end - band * panels});
    at = end;
  }
  return all;
}

// Fills y. A sum does not depend on how many threads there are.
template <typename Threads>
void multiply(Threads& threads, Product p, const ProductKernels& kernels) {
  const int64_t bands = (p.rows + kBand - 1) / kBand, panels = p.panels();
  const int64_t count = std::max<int64_t>(threads.num_threads(), 1);
  // What takes some microseconds is not worth waking another thread for.
  const bool small = p.rows * panels * p.inputs * kColumns < 1 << 17;
  const std::vector<Piece> shared = pieces(bands, panels, small ? 1 : count);
  const auto first = [&](int64_t band) { return p.rows * band / bands; };
  const auto all = [&](int64_t n, auto&& work) {
    if (small || n == 1) {
      for (int64_t i = 0; i < n; i++) work(i);
    } else {
      parallel_for(threads, n, work);
    }
  };
  std::unique_ptr<int16_t[]> codes;
  std::unique_ptr<float[]> units, given;
  if (p.scales != nullptr) {
    const int64_t scales = p.rows * (p.inputs / p.group);
    codes.reset(new int16_t[p.rows * p.inputs]);
    units.reset(new float[scales]);
    if (p.least != nullptr) given.reset(new float[scales]);
    all(bands, [&](int64_t band) {
      kernels.code(p, first(band), first(band + 1) - first(band), codes.get(), units.get(), given.get());
    });
    p.codes = codes.get(), p.units = units.get(), p.given = given.get();
  }
  all(static_cast<int64_t>(shared.size()), [&](int64_t i) {
    const auto [band, begin, end] = shared[i];
    kernels.multiply(p, first(band), first(band + 1) - first(band), begin, end);
  });
}

}  // namespace rootcellar
