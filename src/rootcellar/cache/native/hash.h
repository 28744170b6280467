// What a place and what is there are filed under.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace rootcellar {

// Of a number and some bytes: 16 bytes a multiplication into both halves of its product, as wyhash does it (Wang Yi),
// in lanes whose multiplications overlap.
inline std::uint64_t hash_of(std::int64_t number, const void* bytes, std::size_t count) {
    constexpr std::uint64_t odd[4] = {0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB};
    const auto* at = static_cast<const char*>(bytes);
    const auto word = [](const char* from, std::size_t size = 8) {
        std::uint64_t value = 0;
        std::memcpy(&value, from, size);
        return value;
    };
    const auto fold = [](std::uint64_t a, std::uint64_t b) {
        const auto product = static_cast<unsigned __int128>(a) * b;
        return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
    };
    std::uint64_t sum = (static_cast<std::uint64_t>(number) + count) * odd[0];
    if (count >= 64) {
        std::uint64_t lanes[4] = {sum, sum, sum, sum};
        for (; count >= 64; count -= 64, at += 64)
            for (int i = 0; i < 4; ++i) lanes[i] = fold(word(at + 16 * i) ^ odd[i], word(at + 16 * i + 8) ^ lanes[i]);
        sum = fold(lanes[0] ^ odd[1], lanes[1]) ^ fold(lanes[2] ^ odd[2], lanes[3]);
    }
    for (; count >= 8; count -= 8, at += 8) sum = fold(word(at) ^ odd[1], sum ^ odd[2]);
    if (count != 0) sum = fold(word(at, count) ^ odd[1], sum ^ odd[2]);
    return fold(sum ^ odd[3], odd[1]);
}

}  // namespace rootcellar
