// Products with packed weights (ops/native/products.h) with each instruction set that runs here, against sums in double
// precision over weights drawn at random: `check_products [PRODUCTS] [SEED]`. `make sanitize` runs it under sanitizers.

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "check.h"
#include "products.h"

using rootcellar::bf16;
using rootcellar::Form;
using rootcellar::kColumns;
using rootcellar::Product;

namespace {

float value(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

float least_value(const Product& p, int64_t panel, int64_t input, int column) {
  return value(p.least[(panel * (p.inputs / p.group) + input / p.group) * kColumns + column]);
}

// The weight of an input in a panel's column, from the words.
float weight(const Product& p, int64_t panel, int64_t input, int column) {
  const int each = rootcellar::inputs_of_word(p.form), at = static_cast<int>(input % each);
  const uint32_t word = p.words(panel, input)[column];
  if (p.form == Form::bf16) return value({static_cast<uint16_t>(word >> (16 * at))});
  if (p.form == Form::f32) {
    float v;
    std::memcpy(&v, &word, 4);
    return v;
  }
  const int64_t group = (panel * (p.inputs / p.group) + input / p.group) * kColumns + column;
  const int place = at % 2 * (each / 2) + at / 2;  // even ones first
  if (p.form == Form::w8) return value(p.scales[group]) * static_cast<int8_t>(word >> (8 * place));
  return value(p.scales[group]) * ((word >> (4 * place)) & 15) + least_value(p, panel, input, column);
}

// What meets the sum of a group's inputs, which is not rounded.
float middle(const Product& p, int64_t panel, int64_t input, int column) {
  if (p.form != Form::w4) return 0;
  return least_value(p, panel, input, column) +
         8 * value(p.scales[(panel * (p.inputs / p.group) + input / p.group) * kColumns + column]);
}

bool holds(Random& random, const rootcellar::Vectors<rootcellar::ProductKernels>& set) {
  const Form form = static_cast<Form>(below(random, 4));
  const bool grouped = form == Form::w8 || form == Form::w4;
  const int group = grouped ? 8 << below(random, 3) : 1;
  const int64_t inputs = grouped ? group * (1 + below(random, 20)) : 2 * (1 + below(random, 300));
  const int64_t leads = 1 + below(random, 3), length = 1 + below(random, 100), rows = 1 + below(random, 150);
  const int64_t panels = leads * ((length + kColumns - 1) / kColumns);
  std::uniform_real_distribution<float> small(-1, 1);
  std::vector<float> x(rows * inputs), y(rows * leads * length, NAN);
  for (float& v : x) v = small(random);
  std::vector<uint32_t> words(panels * inputs / rootcellar::inputs_of_word(form) * kColumns);
  for (uint32_t& word : words) {
    if (grouped) {
      word = static_cast<uint32_t>(random());
    } else if (form == Form::f32) {
      const float v = small(random);
      std::memcpy(&word, &v, 4);
    } else {  // between 0.5 and 2, of either sign
      word = (static_cast<uint32_t>(random()) & 0x80ff80ffu) | 0x3f003f00u;
    }
  }
  std::vector<bf16> scales(grouped ? panels * (inputs / group) * kColumns : 0), least(form == Form::w4 ? scales.size() : 0);
  for (bf16& scale : scales) scale.bits = static_cast<uint16_t>(0x3c00 + below(random, 128));
  for (bf16& low : least) low.bits = static_cast<uint16_t>(0xbd00 + below(random, 128));
  const Product p{x.data(),   words.data(), grouped ? scales.data() : nullptr, least.empty() ? nullptr : least.data(),
                  y.data(),   rows,         inputs,                            leads,
                  length,     group,        form,                              below(random, 2) == 1};
  Threads threads{1 + below(random, 4), {}};
  rootcellar::multiply(threads, p, set.function);
  for (int64_t row = 0; row < rows; row += 1 + below(random, 5)) {
    for (int64_t panel = 0; panel < panels; panel++) {
      for (int column = 0; column < p.columns(panel); column++) {
        double sum = 0, most = 0, rounded = 0;  // by half a step of 16 bits, where weights are integers
        for (int64_t k = 0; k < inputs; k++) {
          const float w = weight(p, panel, k, column);
          const double term = static_cast<double>(x[row * inputs + k]) * w;
          sum += term;
          most += std::abs(term);
          const float* of = x.data() + row * inputs + k / group * group;
          float largest = 0;
          for (int i = 0; grouped && i < group; i++) largest = std::max(largest, std::abs(of[i]));
          rounded += 0.5001 * largest / 32767 * std::abs(w - middle(p, panel, k, column));
        }
        const double off = std::abs(sum - p.out(row, panel)[column]);
        if (off <= 1e-5 * most + rounded + 1e-6) continue;
        std::printf("%s: row %d, panel %d, column %d is off by %g: form %d, group %d, %d x (%d x %d), %d rows\n", set.name,
                    static_cast<int>(row), static_cast<int>(panel), column, off, static_cast<int>(form), group,
                    static_cast<int>(inputs), static_cast<int>(leads), static_cast<int>(length), static_cast<int>(rows));
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int products = argc > 1 ? std::atoi(argv[1]) : 300;
  Random random(argc > 2 ? std::atoi(argv[2]) : 0);
  int seen = 0;
  for (const auto& set : rootcellar::kProductSets) {
    if (!set.runs()) continue;
    for (int i = 0; i < products; i++, seen++)
      if (!holds(random, set)) return 1;
    std::printf("products, %s: %d\n", set.name, products);
  }
  return seen == 0;
}
