// What the programs that check kernels share.

#pragma once

#include <cstdint>
#include <random>
#include <thread>
#include <utility>
#include <vector>

namespace {

// As XLA's pool of threads behaves: whoever asks does not wait, and a helper may come late.
struct Threads {
  int count;
  std::vector<std::thread> running;
  int64_t num_threads() const { return count; }
  template <typename F>
  void Schedule(F&& work) {
    running.emplace_back(std::forward<F>(work));
  }
  ~Threads() {
    for (std::thread& thread : running) thread.join();
  }
};

using Random = std::mt19937_64;

int below(Random& random, int n) { return static_cast<int>(random() % n); }

}  // namespace
