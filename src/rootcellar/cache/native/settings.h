// The settings that C++ reads, by name: settings.py has the whole list, says what they mean and gives the defaults.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "node.h"

namespace rootcellar {

enum class Policy { lru, lfu, fifo, filo, mru, slru, priority, adaptive };
constexpr const char* POLICIES[] = {"lru", "lfu", "fifo", "filo", "mru", "slru", "priority", "adaptive"};
constexpr const char* RULES[] = {"full", "sliding_window", "chunked_local", "recurrent"};  // as in Rule

#define ROOTCELLAR_SETTINGS(HAS)            \
    HAS(std::vector<Kind>, kinds)           \
    HAS(std::int64_t, page_size)            \
    HAS(std::int64_t, device_size)          \
    HAS(std::int64_t, max_length)           \
    HAS(std::int32_t, max_leases)           \
    HAS(Policy, policy)                     \
    HAS(bool, reuse)                        \
    HAS(std::int64_t, write_after)          \
    HAS(std::vector<std::int64_t>, written) \
    HAS(bool, write_back)                   \
    HAS(std::vector<std::int64_t>, loads)   \
    HAS(std::string, fingerprint)           \
    HAS(bool, events)                       \
    HAS(bool, digests)

struct Settings {
#define HAS(type, name) type name{};
    ROOTCELLAR_SETTINGS(HAS)
#undef HAS
};

}  // namespace rootcellar
