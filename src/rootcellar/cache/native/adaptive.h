// The shadow of the adaptive policy. adaptive.py explains it; every number here equals the twin's, bit for bit, so sums
// run in the same order and nothing is contracted into fused multiply-adds (see CMakeLists.txt).
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "run.h"

namespace rootcellar {

constexpr int FRESH = 0, CONTINUES = 1, POPULAR = 4, CLASSES = 9, BUCKETS = 96;

using Edges = std::array<std::int64_t, BUCKETS>;  // ages at which a bucket begins
using Histogram = std::array<std::array<double, BUCKETS>, CLASSES>;

std::uint64_t mix(std::uint64_t value);
std::uint32_t crc32(const std::string& bytes);

// Prefixes by hash, the oldest use first.
class Seen {
  public:
    struct Known {
        std::uint64_t prefix;
        std::int64_t volume;   // at the last use
        std::int64_t history;  // FRESH, CONTINUES, or 1 + how often it returned
        std::int32_t older, newer;
    };

    Seen();
    std::size_t size() const { return count_; }
    // When the prefix was last used before which so many others were; null: there are not so many.
    const Known* newest_but(std::int64_t others) const;
    const Known* oldest() const { return oldest_ < 0 ? nullptr : &known_[oldest_]; }
    std::optional<Known> take(std::uint64_t prefix);
    void add(std::uint64_t prefix, std::int64_t volume, std::int64_t history);  // not there before; the newest
    std::size_t bytes() const;
    template <class Visit>
    void each(Visit visit) const {  // the oldest first
        for (std::int32_t i = oldest_; i >= 0; i = known_[i].newer) visit(known_[i]);
    }

  private:
    std::size_t slot_of(std::uint64_t prefix) const;
    void grow();

    std::vector<Known> known_;
    std::vector<std::int32_t> table_;  // open addressing; -1: empty
    std::int32_t oldest_ = -1, newest_ = -1, free_ = -1;
    std::size_t count_ = 0;
};

class Shadow {
  public:
    Shadow(std::int64_t capacity, std::int64_t page_size, const Edges& edges);

    int bucket(std::int64_t age) const;
    // Hashes of the prefixes that end with each whole stride of the tokens, after the one of hash `prefix`.
    void hashes(std::uint64_t prefix, const std::int64_t* tokens, std::int64_t count,
                std::vector<std::uint64_t>& into) const;
    // A request used these prefixes; gives the class of each now and moves `above` to the last that was known.
    void observe(const std::vector<std::uint64_t>& prefixes, bool resident, std::int32_t& above,
                 std::vector<std::int32_t>& classes);
    void advance(std::int64_t tokens);
    std::size_t bytes() const { return sizeof(Shadow) + seen.bytes(); }

    std::int64_t stride;
    std::int64_t window;
    std::int64_t volume = 0;
    Histogram worth{};
    Histogram returns{};
    Histogram gone{};
    Seen seen;
    std::uint64_t last_sampled = ~std::uint64_t{0};  // prefixes up to this hash are sampled
    std::int64_t news = 0;
    std::int64_t faded = 0;
    std::int64_t fits = 0;  // how often `worth` changed
    bool resting = false;
    std::int64_t turned = 0, failures = 0, watched = 0, gap = 0, lost = 0, noise = 0;
    std::int64_t reach = std::int64_t{1} << 62;

  private:
    void thin();
    void compare();
    void turn();
    void fit();
    void halve();

    std::vector<std::uint64_t> weights_;
    std::int64_t capacity_, before_ = 0;
    int halvings_ = 0;
    bool watching_ = false;
    Edges edges_;
    std::array<double, BUCKETS> widths_;
};

}  // namespace rootcellar
