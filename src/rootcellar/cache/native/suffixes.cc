#include "suffixes.h"

#include <algorithm>
#include <bit>

#include "adaptive.h"

namespace rootcellar {

namespace {

constexpr std::int64_t ANCHOR = 4, BLOCK = 64;
constexpr std::int64_t VISITS = 16;  // places of other anchors that share a head are passed over, so many a try
constexpr std::int32_t END = -1;

std::uint64_t bigram(const std::int64_t* tokens) {
    return static_cast<std::uint64_t>(tokens[0]) << 32 | static_cast<std::uint64_t>(tokens[1]);
}

bool said(const std::int64_t* tokens, std::int64_t count) {  // tokens that somebody may say
    return std::all_of(tokens, tokens + count, [](std::int64_t token) { return token >= 0 && token <= INT32_MAX; });
}

}  // namespace

Suffixes::Suffixes(std::int64_t capacity, std::int64_t longest, std::int64_t tries)
    : longest_(std::max(longest, ANCHOR)), tries_(tries) {
    const std::int64_t size = std::max<std::int64_t>(1, (capacity + BLOCK - 1) / BLOCK) * BLOCK;
    tokens_.assign(size, END);
    before_.assign(size, 0);
    heads_.assign(std::bit_ceil(static_cast<std::uint64_t>(size)), 0);
    owners_.assign(size / BLOCK, Owner16{});
}

std::size_t Suffixes::head_of(const Owner16& owner, std::uint64_t first, std::uint64_t second) const {
    return mix(mix(first ^ owner[0]) + (second ^ owner[1])) & (heads_.size() - 1);
}

void Suffixes::add(const Owner16& owner, const std::int64_t* tokens, std::int64_t count) {
    const std::int64_t most = capacity() - 1;
    if (count > most) {
        tokens += count - most;
        count = most;
    }
    if (!said(tokens, count)) return;
    const std::int64_t start = next_;
    for (std::int64_t at = 0; at < count + 1; at += BLOCK) {
        std::fill_n(tokens_.begin() + next_, BLOCK, END);
        owners_[next_ / BLOCK] = owner;
        next_ = moved(next_, BLOCK);
    }
    for (std::int64_t i = 0; i < count; ++i) tokens_[moved(start, i)] = static_cast<std::int32_t>(tokens[i]);
    for (std::int64_t i = ANCHOR - 1; i < count; ++i) {
        const auto place = static_cast<std::uint32_t>(moved(start, i));
        std::uint32_t& head = heads_[head_of(owner, bigram(tokens + i - 3), bigram(tokens + i - 1))];
        before_[place] = head;
        head = place;
    }
}

std::int64_t Suffixes::find(const Owner16& owner, const std::int64_t* tokens, std::int64_t count, std::int64_t most,
                            std::vector<std::int64_t>& found) const {
    found.clear();
    const std::int64_t length = std::min(count, longest_);
    const std::int64_t* last = tokens + count - 1;
    if (length < ANCHOR || !said(last + 1 - length, length)) return 0;
    std::int64_t place = heads_[head_of(owner, bigram(last - 3), bigram(last - 1))];
    std::int64_t best = 0, tries = 0, older = 0, where = 0;
    for (std::int64_t visits = VISITS * tries_; tries < tries_ && visits > 0; --visits) {
        const std::int64_t old = age(place);
        if (old <= older || old + (ANCHOR - 1) > capacity()) break;  // written over: what it links to is newer
        older = old;
        std::int64_t matched = 0;
        if (owners_[place / BLOCK] == owner)
            while (matched < length && old + matched <= capacity() && at(moved(place, -matched)) == last[-matched])
                ++matched;
        if (matched >= ANCHOR && old > 1 && at(moved(place, 1)) != END) {
            ++tries;
            if (matched > best) {
                best = matched;
                where = place;
            }
        }
        place = before_[place];
    }
    if (best == 0) return 0;
    for (std::int64_t i = 1; i <= most && i < age(where) && at(moved(where, i)) != END; ++i)
        found.push_back(at(moved(where, i)));
    return best;
}

void Suffixes::clear() {
    std::fill(tokens_.begin(), tokens_.end(), END);
}

std::size_t Suffixes::bytes() const {
    return sizeof(Suffixes) + tokens_.capacity() * sizeof(std::int32_t) + before_.capacity() * sizeof(std::uint32_t) +
           heads_.capacity() * sizeof(std::uint32_t) + owners_.capacity() * sizeof(Owner16);
}

}  // namespace rootcellar
