// XXH3, 64 bits, as xxhash 0.8 defines it (github.com/Cyan4973/xxHash, doc/xxhash_spec.md), of what is longer than 240
// bytes and comes piece by piece, copied elsewhere while it is read: a pass over memory is what it costs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define ROOTCELLAR_AVX2 1
#endif

namespace rootcellar::xxh3 {

using Bytes = const unsigned char*;

constexpr std::size_t kStripe = 64, kSecret = 192, kStripes = (kSecret - kStripe) / 8;
constexpr std::size_t kBlock = kStripes * kStripe;  // 1,024 bytes: then the sums are scrambled
constexpr std::uint64_t kPrime32_1 = 0x9E3779B1, kPrime32_2 = 0x85EBCA77, kPrime32_3 = 0xC2B2AE3D;
constexpr std::uint64_t kPrime64_1 = 0x9E3779B185EBCA87, kPrime64_2 = 0xC2B2AE3D27D4EB4F;
constexpr std::uint64_t kPrime64_3 = 0x165667B19E3779F9, kPrime64_4 = 0x85EBCA77C2B2AE63;
constexpr std::uint64_t kPrime64_5 = 0x27D4EB2F165667C5;

alignas(64) inline constexpr unsigned char kDefaultSecret[] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4,
    0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e,
    0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43,
    0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb,
    0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19,
    0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7,
    0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78,
    0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16,
    0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};
static_assert(sizeof kDefaultSecret == kSecret);

inline std::uint64_t load(Bytes at) {
    std::uint64_t value;
    std::memcpy(&value, at, 8);
    return value;
}

inline std::uint64_t fold(std::uint64_t a, std::uint64_t b) {
    __extension__ using Wide = unsigned __int128;
    const Wide product = static_cast<Wide>(a) * b;
    return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

// Adds a stripe to the eight sums.
inline void add_stripe(std::uint64_t* sums, Bytes in, Bytes secret) {
    for (int i = 0; i < 8; ++i) {
        const std::uint64_t data = load(in + 8 * i), keyed = data ^ load(secret + 8 * i);
        sums[i ^ 1] += data;
        sums[i] += (keyed & 0xFFFFFFFF) * (keyed >> 32);
    }
}

// Adds whole blocks to the sums, and copies them to `out` unless that is null.
using AddBlocks = void (*)(std::uint64_t* sums, Bytes in, unsigned char* out, std::size_t blocks, Bytes secret);

inline void add_blocks_plain(std::uint64_t* sums, Bytes in, unsigned char* out, std::size_t blocks, Bytes secret) {
    if (out != nullptr) in = static_cast<Bytes>(std::memcpy(out, in, blocks * kBlock));  // what is there is summed up
    for (; blocks > 0; --blocks) {
        for (std::size_t n = 0; n < kStripes; ++n, in += kStripe) add_stripe(sums, in, secret + 8 * n);
        for (int i = 0; i < 8; ++i)
            sums[i] = (sums[i] ^ (sums[i] >> 47) ^ load(secret + kSecret - kStripe + 8 * i)) * kPrime32_1;
    }
}

#ifdef ROOTCELLAR_AVX2
#define ROOTCELLAR_FOR_AVX2 __attribute__((target("avx2")))

ROOTCELLAR_FOR_AVX2 inline __m256i load_256(Bytes at) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}

// Bytes that are fetched ahead: what the system just wrote elsewhere is in the processor's last cache.
constexpr std::size_t kAhead = 4096;

// What is copied goes past the caches: whoever asked for it reads it later, and what it replaces need not be fetched.
// `out` is a multiple of 16.
template <bool kCopies>
ROOTCELLAR_FOR_AVX2 void add_blocks_of(std::uint64_t* given, Bytes in, unsigned char* out, std::size_t blocks,
                                       Bytes secret) {
    auto* at = reinterpret_cast<__m256i*>(given);
    __m256i sums[2] = {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
    const __m256i prime = _mm256_set1_epi64x(static_cast<long long>(kPrime32_1));
    for (; blocks > 0; --blocks) {
        for (std::size_t n = 0; n < kStripes; ++n, in += kStripe, out += kCopies ? kStripe : 0) {
            if (!kCopies) _mm_prefetch(reinterpret_cast<const char*>(in) + kAhead, _MM_HINT_T0);
            for (int i = 0; i < 2; ++i) {
                const __m256i data = load_256(in + 32 * i);
                if (kCopies) {
                    auto* to = reinterpret_cast<__m128i*>(out) + 2 * i;
                    _mm_stream_si128(to, _mm256_castsi256_si128(data));
                    _mm_stream_si128(to + 1, _mm256_extracti128_si256(data, 1));
                }
                const __m256i keyed = _mm256_xor_si256(data, load_256(secret + 8 * n + 32 * i));
                const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
                const __m256i swapped = _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2));
                sums[i] = _mm256_add_epi64(sums[i], _mm256_add_epi64(product, swapped));
            }
        }
        for (int i = 0; i < 2; ++i) {
            __m256i sum = _mm256_xor_si256(sums[i], _mm256_srli_epi64(sums[i], 47));
            sum = _mm256_xor_si256(sum, load_256(secret + kSecret - kStripe + 32 * i));
            const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(sum, 32), prime);
            sums[i] = _mm256_add_epi64(_mm256_mul_epu32(sum, prime), _mm256_slli_epi64(high, 32));
        }
    }
    _mm256_storeu_si256(at, sums[0]);
    _mm256_storeu_si256(at + 1, sums[1]);
    if (kCopies) _mm_sfence();
}

inline void add_blocks_avx2(std::uint64_t* sums, Bytes in, unsigned char* out, std::size_t blocks, Bytes secret) {
    if (out == nullptr) return add_blocks_of<false>(sums, in, out, blocks, secret);
    if (reinterpret_cast<std::uintptr_t>(out) % 16 == 0) return add_blocks_of<true>(sums, in, out, blocks, secret);
    for (; blocks > 0; --blocks, in += kBlock, out += kBlock) {
        std::memcpy(out, in, kBlock);
        add_blocks_of<false>(sums, out, nullptr, 1, secret);
    }
}
#endif

// By name; null: this processor has no such vectors.
inline AddBlocks find_vectors(const char* name) {
#ifdef ROOTCELLAR_AVX2
    const bool any = *name == 0;
    if ((any || std::strcmp(name, "avx2") == 0) && __builtin_cpu_supports("avx2")) return add_blocks_avx2;
    if (!any && std::strcmp(name, "plain") != 0) return nullptr;
#else
    if (*name != 0 && std::strcmp(name, "plain") != 0) return nullptr;
#endif
    return add_blocks_plain;
}

// The hash of `length` bytes at `image`, more than 240.
class Hash {
  public:
    Hash(Bytes image, std::size_t length, std::uint64_t seed, AddBlocks add)
        : image_(image), length_(length), add_(add) {
        for (std::size_t i = 0; i < kSecret; i += 16) {
            const std::uint64_t words[2] = {load(kDefaultSecret + i) + seed, load(kDefaultSecret + i + 8) - seed};
            std::memcpy(secret_ + i, words, 16);
        }
    }

    // Its next `count` bytes, whole blocks unless they are the last. With `from` they are there, and are copied first.
    void add(std::size_t count, unsigned char* into = nullptr, Bytes from = nullptr) {
        const std::size_t end = begun_ + count, most = (length_ - 1) / kBlock * kBlock;
        const std::size_t blocks = ((end < most ? end : most) - begun_) / kBlock, whole = blocks * kBlock;
        add_(sums_, from != nullptr ? from : image_ + begun_, into, blocks, secret_);
        if (from != nullptr) std::memcpy(into + whole, from + whole, count - whole);
        begun_ += whole;
    }

    // All of it has been added, and is where it belongs.
    std::uint64_t digest() {
        Bytes at = image_ + begun_;
        const std::size_t stripes = (length_ - 1 - begun_) / kStripe;
        for (std::size_t n = 0; n < stripes; ++n) add_stripe(sums_, at + n * kStripe, secret_ + 8 * n);
        add_stripe(sums_, image_ + length_ - kStripe, secret_ + kSecret - kStripe - 7);
        std::uint64_t hash = length_ * kPrime64_1;
        for (int i = 0; i < 4; ++i) {
            Bytes secret = secret_ + 11 + 16 * i;
            hash += fold(sums_[2 * i] ^ load(secret), sums_[2 * i + 1] ^ load(secret + 8));
        }
        hash = (hash ^ (hash >> 37)) * 0x165667919E3779F9;
        return hash ^ (hash >> 32);
    }

  private:
    Bytes image_;
    std::size_t length_, begun_ = 0;
    AddBlocks add_;
    alignas(64) unsigned char secret_[kSecret];
    alignas(64) std::uint64_t sums_[8] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
                                          kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};
};

}  // namespace rootcellar::xxh3
