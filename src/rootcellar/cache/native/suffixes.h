// The index of what went through the cache; suffixes.py says what it is.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace rootcellar {

using Owner16 = std::array<std::uint64_t, 2>;

class Suffixes {
  public:
    Suffixes(std::int64_t capacity, std::int64_t longest, std::int64_t tries);

    void add(const Owner16& owner, const std::int64_t* tokens, std::int64_t count);
    // How many of the last tokens stand at the best place; `said` gets up to `most` tokens that followed there.
    std::int64_t find(const Owner16& owner, const std::int64_t* tokens, std::int64_t count, std::int64_t most,
                      std::vector<std::int64_t>& said) const;
    void clear();
    std::int64_t capacity() const { return static_cast<std::int64_t>(tokens_.size()); }
    std::size_t bytes() const;

  private:
    // Tokens written since this one was, it included.
    std::int64_t age(std::int64_t place) const { return place < next_ ? next_ - place : next_ - place + capacity(); }
    std::int64_t moved(std::int64_t place, std::int64_t by) const { return (place + by + capacity()) % capacity(); }
    std::int32_t at(std::int64_t place) const { return tokens_[place]; }
    std::size_t head_of(const Owner16& owner, std::uint64_t first, std::uint64_t second) const;

    std::int64_t longest_, tries_;
    std::int64_t next_ = 0;              // the place of the next token
    std::vector<std::int32_t> tokens_;   // END where there is none
    std::vector<std::uint32_t> before_;  // of each place, the place filed before it under the same head
    std::vector<std::uint32_t> heads_;
    std::vector<Owner16> owners_;  // by block
};

}  // namespace rootcellar
