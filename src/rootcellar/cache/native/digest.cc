#include "digest.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define ROOTCELLAR_SHA_NI 1
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace rootcellar {

namespace {

using State = std::array<std::uint32_t, 8>;

constexpr State INITIAL = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                           0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

alignas(16) constexpr std::uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

std::uint32_t rotate(std::uint32_t value, int by) {
    return value >> by | value << (32 - by);
}

// FIPS 180-4, section 6.2.2: one block of 64 bytes into the state.
void compress_portable(State& state, const std::uint8_t* block) {
    std::uint32_t w[64];
    for (int t = 0; t < 16; ++t)
        w[t] = static_cast<std::uint32_t>(block[4 * t]) << 24 | static_cast<std::uint32_t>(block[4 * t + 1]) << 16 |
               static_cast<std::uint32_t>(block[4 * t + 2]) << 8 | block[4 * t + 3];
    for (int t = 16; t < 64; ++t) {
        const std::uint32_t s0 = rotate(w[t - 15], 7) ^ rotate(w[t - 15], 18) ^ w[t - 15] >> 3;
        const std::uint32_t s1 = rotate(w[t - 2], 17) ^ rotate(w[t - 2], 19) ^ w[t - 2] >> 10;
        w[t] = w[t - 16] + s0 + w[t - 7] + s1;
    }
    auto [a, b, c, d, e, f, g, h] = state;
    for (int t = 0; t < 64; ++t) {
        const std::uint32_t s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
        const std::uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + K[t] + w[t];
        const std::uint32_t s0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22);
        const std::uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    const State sums = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; ++i) state[i] += sums[i];
}

// Bytes that each token of a page is written with.
std::uint32_t width_of(const std::int64_t* tokens, std::int64_t count) {
    std::uint64_t all = 0;
    for (std::int64_t i = 0; i < count; ++i) all |= static_cast<std::uint64_t>(tokens[i]);
    return all >> 32 == 0 ? 4 : 8;
}

#ifdef ROOTCELLAR_SHA_NI

#define SHA_NI __attribute__((target("sha,avx"), always_inline)) inline

// A state in the two registers that the instructions work on: ABEF and CDGH.
struct Pair {
    __m128i abef, cdgh;
};

SHA_NI Pair load(const State& state) {
    const __m128i low = _mm_shuffle_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(&state[0])), 0xB1);
    const __m128i high = _mm_shuffle_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(&state[4])), 0x1B);
    return {_mm_alignr_epi8(low, high, 8), _mm_blend_epi16(high, low, 0xF0)};
}

// The state's words in order: the first and the last four.
struct Halves {
    __m128i low, high;
};

SHA_NI Halves halves(const Pair& pair) {
    const __m128i feba = _mm_shuffle_epi32(pair.abef, 0x1B), dchg = _mm_shuffle_epi32(pair.cdgh, 0xB1);
    return {_mm_blend_epi16(feba, dchg, 0xF0), _mm_alignr_epi8(dchg, feba, 8)};
}

SHA_NI void store(const Pair& pair, State& state) {
    const Halves words = halves(pair);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(&state[0]), words.low);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(&state[4]), words.high);
}

struct Words {
    __m128i w[4];
};

// Words of four bytes, each the other way round.
SHA_NI __m128i swapped(__m128i bytes) {
    return _mm_shuffle_epi8(bytes, _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL));
}

SHA_NI Words words(const void* block) {
    Words result;
    for (int i = 0; i < 4; ++i) result.w[i] = swapped(_mm_loadu_si128(static_cast<const __m128i*>(block) + i));
    return result;
}

SHA_NI void put(const Halves& words, Digest& into) {
    auto* bytes = reinterpret_cast<__m128i*>(into.data());
    _mm_storeu_si128(bytes, swapped(words.low));
    _mm_storeu_si128(bytes + 1, swapped(words.high));
}

// Rounds 4i to 4i + 3, and the message schedule four words ahead.
template <int I>
SHA_NI void rounds(Pair& pair, Words& words) {
    const __m128i with_k = _mm_add_epi32(words.w[I % 4], _mm_load_si128(reinterpret_cast<const __m128i*>(K) + I));
    pair.cdgh = _mm_sha256rnds2_epu32(pair.cdgh, pair.abef, with_k);
    pair.abef = _mm_sha256rnds2_epu32(pair.abef, pair.cdgh, _mm_shuffle_epi32(with_k, 0x0E));
    if constexpr (I < 12) {
        __m128i next = _mm_sha256msg1_epu32(words.w[I % 4], words.w[(I + 1) % 4]);
        next = _mm_add_epi32(next, _mm_alignr_epi8(words.w[(I + 3) % 4], words.w[(I + 2) % 4], 4));
        words.w[I % 4] = _mm_sha256msg2_epu32(next, words.w[(I + 3) % 4]);
    }
}

template <int I, int N>
SHA_NI void rounds_from(Pair* states, Words* blocks) {
    if constexpr (I < 16) {
        for (int i = 0; i < N; ++i) rounds<I>(states[i], blocks[i]);
        rounds_from<I + 1, N>(states, blocks);
    }
}

// N blocks into as many states at once: each hides the others' latency.
template <int N>
SHA_NI void compress(Pair* states, Words* blocks) {
    Pair before[N];
    for (int i = 0; i < N; ++i) before[i] = states[i];
    rounds_from<0, N>(states, blocks);
    for (int i = 0; i < N; ++i)
        states[i] = {_mm_add_epi32(states[i].abef, before[i].abef), _mm_add_epi32(states[i].cdgh, before[i].cdgh)};
}

__attribute__((target("sha,avx"))) void compress_native(State& state, const std::uint8_t* block) {
    Pair pair = load(state);
    Words its_words = words(block);
    compress<1>(&pair, &its_words);
    store(pair, state);
}

// 16 tokens as a block of 4 bytes each; what is above those 4 bytes goes into `rest`. Tokens further on are fetched
// meanwhile: two pages are read in turn, and the processor's own guesses end where 4096 bytes do.
SHA_NI Words words(const std::int64_t* tokens, __m128i& rest) {
    Words result;
    for (int line = 0; line < 2; ++line)
        _mm_prefetch(reinterpret_cast<const char*>(tokens + 8 * line) + 4096, _MM_HINT_T0);
    for (int i = 0; i < 4; ++i) {
        const auto* four = reinterpret_cast<const float*>(tokens + 4 * i);
        const __m128 low = _mm_loadu_ps(four), high = _mm_loadu_ps(four + 4);
        result.w[i] = swapped(_mm_castps_si128(_mm_shuffle_ps(low, high, _MM_SHUFFLE(2, 0, 2, 0))));
        rest = _mm_or_si128(rest, _mm_castps_si128(_mm_shuffle_ps(low, high, _MM_SHUFFLE(3, 1, 3, 1))));
    }
    return result;
}

// What a state is after so many blocks of tokens.
SHA_NI Pair absorbed(Pair state, const std::int64_t* tokens, std::int64_t blocks, __m128i& rest) {
    for (std::int64_t b = 0; b < blocks; ++b) {
        Words block = words(tokens + 16 * b, rest);
        compress<1>(&state, &block);
    }
    return state;
}

// The block behind so many blocks of tokens.
SHA_NI Words end(const Halves& parent, std::int64_t blocks, int widths) {
    return {{parent.low, parent.high, _mm_set_epi32(0, 0, 0, widths << 24 | 0x800000),
             _mm_set_epi32(static_cast<int>(8 * (64 * blocks + 33)), 0, 0, 0)}};
}

// `chain` for pairs of pages of so many blocks each, as long as no token needs more than 4 bytes; returns how many.
//
// Only the last block of a pair waits for the pair before. Four blocks that do not wait for each other keep the
// processor's unit busy: the last ones of a pair's two digests, the first page of a pair far ahead (by three) and the
// second page of one near (by two). Towards the end the pair itself stands in for those that do not exist. `single`: a
// page is one block, a loop less.
template <bool single>
SHA_NI std::int64_t chain_pairs(const Digest& parent, const std::int64_t* tokens, std::int64_t pairs,
                                std::int64_t blocks, Digest* into) {
    const auto* bytes = reinterpret_cast<const __m128i*>(parent.data());
    Halves above = {swapped(_mm_loadu_si128(bytes)), swapped(_mm_loadu_si128(bytes + 1))};
    __m128i rest = _mm_setzero_si128();
    // Of pair i at i % 4: when its first page is in it, and when both are. Stand-ins read what no pair has written.
    Pair firsts[4] = {}, seconds[4] = {};
    const auto page = [&](std::int64_t number) { return tokens + number * blocks * 16; };
    for (std::int64_t i = 0; i < std::min<std::int64_t>(pairs, 3); ++i) {
        firsts[i] = absorbed(load(INITIAL), page(2 * i), blocks, rest);
        if (i < 2) seconds[i] = absorbed(firsts[i], page(2 * i + 1), blocks, rest);
        if (_mm_testz_si128(rest, rest) == 0) return 0;
    }
    std::int64_t i = 0;
    for (; i < pairs && _mm_testz_si128(rest, rest) != 0; ++i) {
        const std::int64_t* far = page(2 * (i + 3 < pairs ? i + 3 : i));
        const std::int64_t* near = page(2 * (i + 2 < pairs ? i + 2 : i) + 1);
        Pair states[4] = {seconds[i % 4], firsts[i % 4], load(INITIAL), firsts[(i + 2) % 4]};
        if constexpr (!single) {
            for (std::int64_t b = 1; b < blocks; ++b, far += 16, near += 16) {
                Words ahead[2] = {words(far, rest), words(near, rest)};
                compress<2>(states + 2, ahead);
            }
        }
        Words last[4] = {end(above, 2 * blocks, 0x44), end(above, blocks, 4), words(far, rest), words(near, rest)};
        compress<4>(states, last);
        above = halves(states[0]);
        put(above, into[2 * i + 1]);
        put(halves(states[1]), into[2 * i]);
        firsts[(i + 3) % 4] = states[2];
        seconds[(i + 2) % 4] = states[3];
    }
    return i;
}

template <bool single>
__attribute__((target("sha,avx"))) std::int64_t chain_native(const Digest& parent, const std::int64_t* tokens,
                                                             std::int64_t pairs, std::int64_t blocks, Digest* into) {
    return chain_pairs<single>(parent, tokens, pairs, blocks, into);
}

// The same with 32 registers, which four states and their blocks need.
template <bool single>
__attribute__((target("sha,avx512vl,avx512bw"))) std::int64_t chain_wide(const Digest& parent,
                                                                         const std::int64_t* tokens, std::int64_t pairs,
                                                                         std::int64_t blocks, Digest* into) {
    return chain_pairs<single>(parent, tokens, pairs, blocks, into);
}

bool has_sha_ni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx") && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & 1u << 29) != 0;
}

bool has_wide_registers() {
    return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
}

auto chain_of(Means means, std::int64_t blocks) {
    if (blocks == 1) return means == Means::wide ? chain_wide<true> : chain_native<true>;
    return means == Means::wide ? chain_wide<false> : chain_native<false>;
}

#endif

// What this processor offers.
Means offered() {
#ifdef ROOTCELLAR_SHA_NI
    static const Means means = !has_sha_ni() ? Means::portable : has_wide_registers() ? Means::wide : Means::sha;
    return means;
#else
    return Means::portable;
#endif
}

void big_endian(std::uint64_t value, std::size_t size, std::uint8_t* into) {
    for (std::size_t i = size; i-- > 0; value >>= 8) into[i] = static_cast<std::uint8_t>(value);
}

Digest hash(const std::uint8_t* bytes, std::size_t count, Means means) {
    auto compress_one = compress_portable;
#ifdef ROOTCELLAR_SHA_NI
    if (means != Means::portable) compress_one = compress_native;
#endif
    State state = INITIAL;
    std::size_t left = count;
    for (; left >= 64; left -= 64, bytes += 64) compress_one(state, bytes);
    std::uint8_t tail[128] = {};
    std::memcpy(tail, bytes, left);
    tail[left] = 0x80;
    const std::size_t size = left < 56 ? 64 : 128;
    big_endian(8 * count, 8, tail + size - 8);
    for (std::size_t i = 0; i < size; i += 64) compress_one(state, tail + i);
    Digest digest;
    for (int i = 0; i < 8; ++i) big_endian(state[i], 4, digest.data() + 4 * i);
    return digest;
}

// The tokens' low bytes, little-endian.
template <class Word>
void put_tokens(const std::int64_t* tokens, std::int64_t count, std::uint8_t* into) {
    for (std::int64_t i = 0; i < count; ++i, into += sizeof(Word)) {
        auto word = static_cast<Word>(tokens[i]);
        if constexpr (std::endian::native == std::endian::little)
            std::memcpy(into, &word, sizeof word);
        else
            for (std::size_t byte = 0; byte < sizeof word; ++byte, word >>= 8)
                into[byte] = static_cast<std::uint8_t>(word);
    }
}

}  // namespace

Digest seed_digest(const std::string& fingerprint, const std::string& name, std::int64_t page_size) {
    std::string bytes = "rootcellar.page.v3";
    for (const std::uint64_t number : {static_cast<std::uint64_t>(page_size), std::uint64_t{fingerprint.size()}})
        for (int byte = 0; byte < 8; ++byte) bytes += static_cast<char>(number >> (8 * byte));
    bytes += fingerprint + name;
    return hash(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size(), offered());
}

void chain(const Digest& parent, const std::int64_t* tokens, std::int64_t pages, std::int64_t page_size, Digest* into,
           Means most) {
    const Means means = std::min(most, offered());
    std::vector<std::uint8_t> message;
    Digest above = parent;
    for (std::int64_t pair = 0; pair < pages; pair += 2) {
#ifdef ROOTCELLAR_SHA_NI
        if (means != Means::portable && page_size % 16 == 0) {
            const std::int64_t blocks = page_size / 16;
            pair +=
                2 * chain_of(means, blocks)(above, tokens + pair * page_size, (pages - pair) / 2, blocks, into + pair);
            if (pair >= pages) break;
            if (pair != 0) above = into[pair - 1];
        }
#endif
        message.resize(16 * page_size + sizeof(Digest) + 1);
        std::size_t size = 0;
        std::uint32_t widths = 0;
        for (std::int64_t i = 0; i < std::min<std::int64_t>(pages - pair, 2); ++i) {
            const std::int64_t* page = tokens + (pair + i) * page_size;
            const std::uint32_t width = width_of(page, page_size);
            if (width == 4)
                put_tokens<std::uint32_t>(page, page_size, message.data() + size);
            else
                put_tokens<std::uint64_t>(page, page_size, message.data() + size);
            size += page_size * width;
            widths |= width << (4 * i);
            std::memcpy(message.data() + size, above.data(), above.size());
            message[size + above.size()] = static_cast<std::uint8_t>(widths);
            into[pair + i] = hash(message.data(), size + above.size() + 1, means);
        }
        if (pair + 1 < pages) above = into[pair + 1];
    }
}

}  // namespace rootcellar
