#include "pages.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define ROOTCELLAR_AVX2 1
#endif

namespace rootcellar {

namespace {

// The compiler makes vector code of these, as wide as the function that they are inlined into allows.
__attribute__((always_inline)) inline void write_counting(std::int32_t* into, std::int32_t first, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) into[i] = first + static_cast<std::int32_t>(i);
}

__attribute__((always_inline)) inline std::int32_t count_counting(const std::int32_t* pages, std::int32_t count) {
    constexpr std::int32_t STEP = 64;
    const std::int32_t first = pages[0];
    std::int32_t i = 0;
    for (; i + STEP <= count; i += STEP) {
        std::int32_t differ = 0;
        for (std::int32_t j = 0; j < STEP; ++j) differ |= pages[i + j] ^ (first + i + j);
        if (differ != 0) break;
    }
    while (i < count && pages[i] == first + i) ++i;
    return i;
}

#ifdef ROOTCELLAR_AVX2
const bool AVX2 = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") != 0;
}();

__attribute__((target("avx2"))) void write_counting_avx2(std::int32_t* into, std::int32_t first, std::int64_t count) {
    write_counting(into, first, count);
}

__attribute__((target("avx2"))) std::int32_t count_counting_avx2(const std::int32_t* pages, std::int32_t count) {
    return count_counting(pages, count);
}
#endif

}  // namespace

void count_up_many(std::int32_t* into, std::int32_t first, std::int64_t count) {
#ifdef ROOTCELLAR_AVX2
    if (AVX2) return write_counting_avx2(into, first, count);
#endif
    write_counting(into, first, count);
}

std::int32_t consecutive_of_many(const std::int32_t* pages, std::int32_t count) {
#ifdef ROOTCELLAR_AVX2
    if (AVX2) return count_counting_avx2(pages, count);
#endif
    return count_counting(pages, count);
}

}  // namespace rootcellar
