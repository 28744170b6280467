// What kernels of several instruction sets share: how a namespace is compiled for one, which of them this processor has,
// and threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>

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
#define ROOTCELLAR_AVX2 "avx2,fma"

namespace rootcellar {

struct bf16 {
  uint16_t bits;
};

#if defined(__x86_64__)
inline bool has_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

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
#define ROOTCELLAR_SETS(function)                                               \
  {"avx512", has_avx512, avx512::function}, {"avx2", has_avx2, avx2::function}, \
      {"baseline", [] { return true; }, baseline::function}
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

// Run work(0..n-1) on the pool and on this thread. Helpers that start late find nothing left to do; `state` outlives
// them, so nobody waits for a thread that never came. Threads: num_threads(), Schedule(function).
template <typename Threads, typename Work>
void parallel_for(Threads& threads, int64_t n, Work&& work) {
  const int64_t helpers = std::min<int64_t>(threads.num_threads(), n) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < n; i++) work(i);
    return;
  }
  struct State {
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
  auto state = std::make_shared<State>();
  state->work = std::ref(work);
  state->n = n;
  for (int64_t i = 0; i < helpers; i++) threads.Schedule([state] { state->drain(); });
  state->drain();
  while (state->done.load(std::memory_order_acquire) < n) std::this_thread::yield();
}

}  // namespace rootcellar
