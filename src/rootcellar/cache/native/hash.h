// What a place and what is there are filed under.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace rootcellar {

// Of a number and some bytes: four lanes, so that their multiplications overlap.
inline std::uint64_t hash_of(std::int64_t number, const void* bytes, std::size_t count) {
    constexpr std::uint64_t odd = 0x9E3779B97F4A7C15;
    const auto* at = static_cast<const char*>(bytes);
    const auto step = [](std::uint64_t lane, std::uint64_t word) {
        lane = (lane ^ word) * 0xD6E8FEB86659FD93;
        return lane ^ lane >> 31;
    };
    const auto word = [](const char* from, std::size_t size = 8) {
        std::uint64_t value = 0;
        std::memcpy(&value, from, size);
        return value;
    };
    std::uint64_t lanes[4] = {static_cast<std::uint64_t>(number) * odd, 1, 2, 3};
    for (; count >= 32; count -= 32, at += 32)
        for (int lane = 0; lane < 4; ++lane) lanes[lane] = step(lanes[lane], word(at + 8 * lane));
    for (; count >= 8; count -= 8, at += 8) lanes[0] = step(lanes[0], word(at));
    if (count != 0) lanes[0] = step(lanes[0], word(at, count));
    std::uint64_t sum = lanes[0] ^ lanes[1] * odd;
    sum = (sum ^ sum >> 32) * 0xBF58476D1CE4E5B9;
    sum ^= lanes[2] + lanes[3] * odd;
    sum = (sum ^ sum >> 29) * 0x94D049BB133111EB;
    return sum ^ sum >> 32;
}

}  // namespace rootcellar
