// What kernels of several instruction sets share: how a namespace is compiled for one, which of them this processor has,
// and threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define ROOTCELLAR_PRAGMA(x) _Pragma(#x)
#if defined(__x86_64__) && defined(__clang__)
#define ROOTCELLAR_TARGET_BEGIN(features) \
  ROOTCELLAR_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define ROOTCELLAR_TARGET_END ROOTCELLAR_PRAGMA(clang attribute pop)
#elif defined(__x86_64__)
#define ROOTCELLAR_TARGET_BEGIN(features) \
  ROOTCELLAR_PRAGMA(GCC push_options)     \
  ROOTCELLAR_PRAGMA(GCC target(features))
#define ROOTCELLAR_TARGET_END ROOTCELLAR_PRAGMA(GCC pop_options)
#endif
#define ROOTCELLAR_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#define ROOTCELLAR_AVX512_VNNI ROOTCELLAR_AVX512 ",avx512vnni"
#define ROOTCELLAR_AVX2 "avx2,fma"

namespace rootcellar {

constexpr float kLog2e = 1.4426950408889634f;

struct bf16 {
  uint16_t bits;
};

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// The bits of the nearest bfloat16, at a tie the even one.
inline uint16_t bf16_of(float x) {
  const uint32_t bits = bits_of(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return is_nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if defined(__x86_64__)
inline bool has_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

inline bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

inline bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif

// An instruction set, and what was compiled for it.
template <typename Function>
struct Vectors {
  const char* name;
  bool (*runs)();
  Function function;
};

// What the namespaces of sets.inc call `function`: those that are faster come first, the last runs wherever the library
// does.
#if defined(__x86_64__)
#define ROOTCELLAR_SETS(function)                                                                   \
  {"avx512vnni", has_avx512_vnni, avx512vnni::function}, {"avx512", has_avx512, avx512::function}, \
      {"avx2", has_avx2, avx2::function}, {"baseline", [] { return true; }, baseline::function}
#else
#define ROOTCELLAR_SETS(function) {"baseline", [] { return true; }, baseline::function}
#endif

// The set of this name, or the first (fastest) for ""; null where the processor does not have it.
template <typename Function, size_t N>
const Vectors<Function>* find_vectors(const Vectors<Function> (&sets)[N], const std::string& name) {
  for (const Vectors<Function>& set : sets)
    if ((name.empty() || name == set.name) && set.runs()) return &set;
  return nullptr;
}

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Items of work, done by whoever comes. It outlives all who hold it, so nobody waits for a thread that never came.
struct Items {
  std::atomic<int64_t> next{0}, done{0};
  std::function<void(int64_t)> work;
  int64_t n;
  void drain() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) {
      work(i);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

// Threads of a pool that stay awake for a moment after they helped. A step of decoding is some hundred short calls, and to
// wake a thread for each (50 us where it sleeps in a virtual machine) takes longer than what it would do.
class Crew {
 public:
  // Of `wanted` helpers, offer the items to those that are awake; how many are to be woken.
  int64_t offer(const std::shared_ptr<Items>& items, int64_t wanted) {
    if (awake_.load(std::memory_order_relaxed) == 0) return wanted;
    std::lock_guard<std::mutex> held(lock_);
    for (; wanted > 0 && open_.load(std::memory_order_relaxed) < awake_.load(std::memory_order_relaxed); wanted--) {
      offers_.push_back(items);
      open_.fetch_add(1, std::memory_order_release);
    }
    return wanted;
  }

  // Help with these items, then with what is offered, until nothing was for a while.
  void help(std::shared_ptr<Items> items) {
    while (items != nullptr) {
      items->drain();
      items = next();
    }
  }

 private:
  std::shared_ptr<Items> next() {
    awake_.fetch_add(1);
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
    for (bool over = false;;) {
      if (over || open_.load(std::memory_order_acquire) > 0) {
        std::lock_guard<std::mutex> held(lock_);
        if (over || !offers_.empty()) awake_.fetch_sub(1);
        if (!offers_.empty()) {
          auto items = std::move(offers_.back());
          offers_.pop_back();
          open_.fetch_sub(1, std::memory_order_relaxed);
          return items;
        }
        if (over) return nullptr;
      }
      for (int i = 0; i < 16; i++) pause();
      std::this_thread::yield();  // whoever has work goes first, where there are more threads than processors
      over = std::chrono::steady_clock::now() > until;
    }
  }

  std::mutex lock_;
  std::vector<std::shared_ptr<Items>> offers_;  // at most as many as are awake, so each is taken
  std::atomic<int64_t> open_{0}, awake_{0};
};

inline Crew& crew() {
  static Crew* one = new Crew;  // never ended: a thread may still look for work when the process ends
  return *one;
}

// Run work(0..n-1) on the pool and on this thread. Helpers that start late find nothing left to do. Threads:
// num_threads(), Schedule(function).
template <typename Threads, typename Work>
void parallel_for(Threads& threads, int64_t n, Work&& work) {
  const int64_t helpers = std::min<int64_t>(threads.num_threads(), n) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < n; i++) work(i);
    return;
  }
  auto items = std::make_shared<Items>();
  items->work = std::ref(work);
  items->n = n;
  for (int64_t i = crew().offer(items, helpers); i > 0; i--) threads.Schedule([items] { crew().help(items); });
  items->drain();
  for (int i = 0; items->done.load(std::memory_order_acquire) < n; i++) {
    if (i < 1000) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace rootcellar
