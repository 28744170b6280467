// Names of pages: SHA-256 chained through pairs of pages. digest.py defines the scheme; this computes the same values.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace rootcellar {

using Digest = std::array<std::uint8_t, 32>;

// The parent of a key's first page.
Digest seed_digest(const std::string& fingerprint, const std::string& name, std::int64_t page_size);

// What a processor may offer: nothing, instructions for SHA-256, and registers for four of its states at a time.
enum class Means { portable, sha, wide };

// Digests of `pages` pages of `page_size` tokens. They begin with a pair of pages; the page before it has the digest
// `parent`. `most`: what is used at the most.
void chain(const Digest& parent, const std::int64_t* tokens, std::int64_t pages, std::int64_t page_size, Digest* into,
           Means most = Means::wide);

}  // namespace rootcellar
