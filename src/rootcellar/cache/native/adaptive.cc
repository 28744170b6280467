#include "adaptive.h"

#include <algorithm>
#include <bit>

namespace rootcellar {

namespace {

constexpr std::int64_t LOOK_BACK = 32, STRIDE = 512, SETTLE = 2, TRIAL = 4, REST = 8, LONGEST_REST = 5;
constexpr std::size_t MAX_SHADOW = std::size_t{1} << 15;
constexpr std::uint64_t ODD = 0x9E3779B97F4A7C15;

int group_of(std::int64_t history) {
    if (history <= CONTINUES) return static_cast<int>(history);
    return std::min(CLASSES - 1, 1 + static_cast<int>(std::bit_width(static_cast<std::uint64_t>(history - 1))));
}

}  // namespace

std::uint64_t mix(std::uint64_t value) {
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
    return value ^ (value >> 31);
}

std::uint32_t crc32(const std::string& bytes) {
    std::uint32_t sum = ~std::uint32_t{0};
    for (const char byte : bytes) {
        sum ^= static_cast<unsigned char>(byte);
        for (int bit = 0; bit < 8; ++bit) sum = (sum >> 1) ^ (sum & 1 ? 0xEDB88320 : 0);
    }
    return ~sum;
}

// ---- what was seen -----------------------------------------------------------------------------------------------

Seen::Seen() : table_(64, -1) {}

std::size_t Seen::bytes() const {
    return known_.capacity() * sizeof(Known) + table_.capacity() * sizeof(std::int32_t);
}

std::size_t Seen::slot_of(std::uint64_t prefix) const {
    const std::size_t mask = table_.size() - 1;
    std::size_t slot = (prefix * ODD) >> 32 & mask;
    while (table_[slot] >= 0 && known_[table_[slot]].prefix != prefix) slot = (slot + 1) & mask;
    return slot;
}

std::optional<Seen::Known> Seen::take(std::uint64_t prefix) {
    std::size_t hole = slot_of(prefix);
    const std::int32_t index = table_[hole];
    if (index < 0) return std::nullopt;
    const Known known = known_[index];
    (known.older < 0 ? oldest_ : known_[known.older].newer) = known.newer;
    (known.newer < 0 ? newest_ : known_[known.newer].older) = known.older;
    known_[index].newer = free_;
    free_ = index;
    --count_;
    // Close the gap: whatever was pushed past it moves back.
    const std::size_t mask = table_.size() - 1;
    for (std::size_t slot = (hole + 1) & mask; table_[slot] >= 0; slot = (slot + 1) & mask) {
        const std::size_t home = (known_[table_[slot]].prefix * ODD) >> 32 & mask;
        if (((slot - home) & mask) >= ((slot - hole) & mask)) {
            table_[hole] = table_[slot];
            hole = slot;
        }
    }
    table_[hole] = -1;
    return known;
}

void Seen::add(std::uint64_t prefix, std::int64_t volume, std::int64_t history) {
    if (2 * (count_ + 1) > table_.size()) grow();
    std::int32_t index = free_;
    if (index < 0) {
        index = static_cast<std::int32_t>(known_.size());
        known_.emplace_back();
    } else {
        free_ = known_[index].newer;
    }
    known_[index] = Known{prefix, volume, history, newest_, -1};
    (newest_ < 0 ? oldest_ : known_[newest_].newer) = index;
    newest_ = index;
    table_[slot_of(prefix)] = index;
    ++count_;
}

const Seen::Known* Seen::newest_but(std::int64_t others) const {
    if (static_cast<std::int64_t>(count_) <= others) return nullptr;
    std::int32_t index = newest_;
    for (; others > 0; --others) index = known_[index].older;
    return &known_[index];
}

void Seen::grow() {
    table_.assign(table_.size() * 2, -1);
    for (std::int32_t i = oldest_; i >= 0; i = known_[i].newer) table_[slot_of(known_[i].prefix)] = i;
}

// ---- the shadow --------------------------------------------------------------------------------------------------

Shadow::Shadow(std::int64_t capacity, std::int64_t page_size, const Edges& edges)
    : capacity_(capacity), edges_(edges) {
    stride = std::max(page_size, std::min(STRIDE, capacity / 64) / page_size * page_size);
    window = std::max(LOOK_BACK * capacity, stride);
    std::uint64_t weight = 1;
    for (std::int64_t i = 0; i < stride; ++i) weights_.push_back(weight *= ODD);
    for (int i = 0; i + 1 < BUCKETS; ++i) widths_[i] = static_cast<double>(edges_[i + 1] - edges_[i]);
    widths_[BUCKETS - 1] = static_cast<double>(2 * edges_[BUCKETS - 2] - edges_[BUCKETS - 1]);
}

int Shadow::bucket(std::int64_t age) const {
    return static_cast<int>(std::upper_bound(edges_.begin(), edges_.end(), age) - edges_.begin()) - 1;
}

void Shadow::hashes(std::uint64_t prefix, const std::int64_t* tokens, std::int64_t count,
                    std::vector<std::uint64_t>& into) const {
    into.clear();
    for (std::int64_t at = 0; at + stride <= count; at += stride) {
        std::uint64_t block = 0;
        for (std::int64_t i = 0; i < stride; ++i) block += static_cast<std::uint64_t>(tokens[at + i]) * weights_[i];
        prefix = mix(prefix * ODD + block + 1);
        into.push_back(prefix);
    }
}

void Shadow::observe(const std::vector<std::uint64_t>& prefixes, bool resident, std::int32_t& above,
                     std::vector<std::int32_t>& classes) {
    classes.clear();
    std::int32_t now = -1;
    news += static_cast<std::int64_t>(prefixes.size());
    for (const std::uint64_t prefix : prefixes) {
        if (prefix <= last_sampled) {
            const std::optional<Seen::Known> known = seen.take(prefix);
            std::int64_t history;
            if (!known) {
                now = -1 < above && above < POPULAR ? CONTINUES : FRESH;
                history = now;
            } else {
                returns[group_of(known->history)][bucket(volume - known->volume)] += 1;
                if (watching_) gap += (before_ - known->volume < reach) - resident;
                history = std::max<std::int64_t>(CONTINUES, known->history) + 1;
                now = above = group_of(history);
            }
            seen.add(prefix, volume, history);
            if (!classes.empty() && classes[0] < 0) std::fill(classes.begin(), classes.end(), now);
        }
        classes.push_back(now);
    }
    if (!classes.empty() && classes[0] < 0) std::fill(classes.begin(), classes.end(), FRESH);
}

void Shadow::advance(std::int64_t tokens) {
    lost += gap;
    noise += gap * gap;
    gap = 0;
    before_ = volume;
    volume += tokens;
    watching_ = !resting && volume - turned > SETTLE * capacity_;
    if (watching_) watched += tokens;
    const std::int64_t oldest = volume - window;
    while (const Seen::Known* known = seen.oldest()) {
        if (known->volume >= oldest) break;
        const Seen::Known left = *seen.take(known->prefix);
        gone[group_of(left.history)][bucket(volume - left.volume)] += 1;
    }
    if (seen.size() > MAX_SHADOW) thin();
    if (news >= 256 + static_cast<std::int64_t>(seen.size() / 8)) {
        news = 0;
        compare();
        fit();
    }
}

void Shadow::halve() {
    for (Histogram* histogram : {&returns, &gone})
        for (auto& row : *histogram)
            for (double& value : row) value /= 2;
}

void Shadow::thin() {
    last_sampled >>= 1;
    ++halvings_;
    std::vector<std::uint64_t> dropped;
    seen.each([&](const Seen::Known& known) {
        if (known.prefix > last_sampled) dropped.push_back(known.prefix);
    });
    for (const std::uint64_t prefix : dropped) seen.take(prefix);
    halve();
}

void Shadow::compare() {
    const Seen::Known* last = seen.newest_but((capacity_ / stride) >> halvings_);
    reach = last == nullptr ? std::int64_t{1} << 62 : volume - last->volume;
    if (resting) {
        if (volume - turned > (REST * capacity_) << std::min(failures - 1, LONGEST_REST)) turn();
    } else if (watched > TRIAL * capacity_) {
        if (lost > 0 && lost * lost > noise) {
            ++failures;
            turn();
        } else if (watched > 8 * TRIAL * capacity_) {
            failures = std::max<std::int64_t>(0, failures - 1);
            watched /= 2;
            lost >>= 1;
            noise >>= 1;
        }
    }
}

void Shadow::turn() {
    resting = !resting;
    turned = volume;
    watched = lost = noise = 0;
}

void Shadow::fit() {
    ++fits;
    Histogram waiting{};
    seen.each([&](const Seen::Known& known) { waiting[group_of(known.history)][bucket(volume - known.volume)] += 1; });
    for (int group = 0; group < CLASSES; ++group) {
        std::array<double, BUCKETS> hazard, left;
        for (int b = 0; b < BUCKETS; ++b) left[b] = returns[group][b] + gone[group][b] + waiting[group][b];
        double behind = 0;
        for (int b = BUCKETS - 1; b >= 0; --b) {
            behind = b == BUCKETS - 1 ? left[b] : behind + left[b];
            const double at_risk = behind - (gone[group][b] + waiting[group][b]) / 2;
            hazard[b] = at_risk >= 1 ? std::min(1.0, std::max(0.0, returns[group][b] / at_risk)) : 0.0;
        }
        // Gittins' index of each age: the best ratio of returns to time over all times to give up.
        for (int age = 0; age < BUCKETS; ++age) {
            double alive = 1, reward = 0, room = 0, best = 0;
            for (int b = age; b < BUCKETS; ++b) {
                reward += alive * hazard[b];
                room += alive * widths_[b] * (1 - hazard[b] / 2);
                if (room > 0) best = std::max(best, reward / room);
                alive *= 1 - hazard[b];
            }
            worth[group][age] = resting ? 0 : best;
        }
    }
    if (volume - faded >= window) {
        faded = volume;
        halve();
    }
}

}  // namespace rootcellar
