// Paged attention for CPUs, called by XLA through its foreign-function interface.
//
// One call writes the new keys and values of a packed batch into the pool, in place, and lets every query attend to
// its row's pages. The batch is cut into tiles: `tile` consecutive tokens of one row (1 when decoding). A unit of work
// is one tile and one KV head; when there are fewer units than threads need, the context is split as well and the
// parts merged (the flash-decoding scheme of Dao et al., 2023). Softmax is online (Milakov and Gimelshein, 2018).
//
// Pool layout: [pages, 2, kv_heads, page_size, head_dim], K first. Page 0 is never read or written here.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

struct bf16 {
  uint16_t bits;
};

constexpr float kMasked = -3.0e38f;
constexpr float kLog2e = 1.4426950408889634f;

// Where the cached positions [begin, end) of one row and KV head lie.
struct Span {
  const void* pool;
  const int32_t* pages;
  int begin, end;
  int page_size;
  int64_t page_stride, value_offset, head_offset;  // in elements
  int head_dim;

  // Pointers to the keys and values of n positions from t0 on.
  template <typename T>
  void locate(int t0, int n, const T** keys, const T** values) const {
    const T* base = static_cast<const T*>(pool) + head_offset;
    int page = t0 / page_size, at = t0 % page_size;
    for (int t = 0; t < n;) {
      const T* start = base + pages[page] * page_stride;
      for (; at < page_size && t < n; at++, t++) {
        keys[t] = start + static_cast<int64_t>(at) * head_dim;
        values[t] = keys[t] + value_offset;
      }
      page++;
      at = 0;
    }
  }
};

// `rows` queries, already scaled (log2(e) included); query r sees the positions from first[r] to last[r].
struct Query {
  const float* data;
  const int32_t *first, *last;
  int rows;
};

using Kernel = void (*)(const Span&, const Query&, float* m, float* l, float* o);

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

#if defined(__x86_64__)
ROOTCELLAR_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512 {
#define ROOTCELLAR_LANES 16
#include "kernel.inc"
}
ROOTCELLAR_TARGET_END
ROOTCELLAR_TARGET_BEGIN("avx2,fma")
namespace avx2 {
#define ROOTCELLAR_LANES 8
#include "kernel.inc"
}
ROOTCELLAR_TARGET_END
#else
namespace baseline {
#define ROOTCELLAR_LANES 8
#include "kernel.inc"
}
#endif

Kernel choose_kernel(bool is_bf16, int head_dim) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return avx512::kernel(is_bf16, head_dim);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kernel(is_bf16, head_dim);
  return nullptr;  // older than 2013: XLA does it
#else
  return baseline::kernel(is_bf16, head_dim);
#endif
}

// Run work(0..n-1) on the pool and on this thread. Helpers that start late find nothing left to do; `state` outlives
// them, so nobody waits for a thread that never came.
template <typename Work>
void parallel_for(ffi::ThreadPool& threads, int64_t n, Work&& work) {
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

template <typename T>
void write_row(T* to, const float* from, int n);

template <>
void write_row<float>(float* to, const float* from, int n) {
  std::memcpy(to, from, n * sizeof(float));
}

template <>
void write_row<bf16>(bf16* to, const float* from, int n) {
  for (int i = 0; i < n; i++) {  // round to nearest even
    uint32_t u;
    std::memcpy(&u, from + i, 4);
    const bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;
    to[i].bits = is_nan ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
}

struct Batch {
  const float *q, *k, *v, *sinks;
  const int32_t *tables, *rows, *positions;
  void* pool;
  float* out;
  int64_t tokens, heads, kv_heads, head_dim, page_size, width, tiles, tile;
  float scale;
  int64_t window, chunk;  // 0: none

  int64_t page_stride() const { return 2 * kv_heads * page_size * head_dim; }

  template <typename T>
  void write(int64_t n) const {
    T* base = static_cast<T*>(pool);
    for (int64_t j = n * tile; j < (n + 1) * tile; j++) {
      const int32_t at = positions[j];
      if (at < 0) continue;
      const int64_t page = tables[rows[n] * width + at / page_size];
      T* to = base + page * page_stride() + (at % page_size) * head_dim;
      for (int64_t h = 0; h < kv_heads; h++) {
        write_row(to + h * page_size * head_dim, k + (j * kv_heads + h) * head_dim, head_dim);
        write_row(to + (kv_heads + h) * page_size * head_dim, v + (j * kv_heads + h) * head_dim, head_dim);
      }
    }
  }

  // The first position that a query at `position` sees.
  int64_t first(int64_t position) const {
    if (window > 0) return std::max<int64_t>(0, position - window + 1);
    return chunk > 0 ? position / chunk * chunk : 0;
  }

  // The tokens of a tile are consecutive positions of one row, padding (-1) last.
  int64_t count(int64_t n) const {
    int64_t c = 0;
    while (c < tile && positions[n * tile + c] >= 0) c++;
    return c;
  }
};

void finish(const Batch& b, int64_t n, int64_t h, int64_t count, const float* l, const float* o) {
  const int64_t group = b.heads / b.kv_heads;
  for (int64_t j = 0; j < count; j++) {
    for (int64_t g = 0; g < group; g++) {
      const int64_t r = j * group + g;
      float* to = b.out + ((n * b.tile + j) * b.heads + h * group + g) * b.head_dim;
      const float scale = 1.0f / l[r];
      for (int64_t d = 0; d < b.head_dim; d++) to[d] = o[r * b.head_dim + d] * scale;
    }
  }
}

void attend(ffi::ThreadPool& threads, const Batch& b, Kernel kernel) {
  const int64_t group = b.heads / b.kv_heads, d = b.head_dim;
  const int64_t padded = b.tile * group > 16 ? (b.tile * group + 3) / 4 * 4 : b.tile * group;
  int64_t live = 0, longest = 0;
  for (int64_t n = 0; n < b.tiles; n++) {
    const int64_t c = b.count(n);
    if (c == 0) continue;
    live++;
    longest = std::max<int64_t>(longest, b.positions[n * b.tile + c - 1] + 1 - b.first(b.positions[n * b.tile]));
  }
  std::memset(b.out, 0, b.tokens * b.heads * d * sizeof(float));
  if (live == 0) return;
  // Split the context when there are too few units to keep the threads evenly busy, into parts of 256 and more.
  const int64_t want = 4 * std::max<int64_t>(threads.num_threads(), 1), units = live * b.kv_heads;
  const int64_t splits = std::max<int64_t>(1, std::min((want + units - 1) / units, longest / 256));
  const int64_t state = padded * (d + 2);
  std::vector<float> parts(splits > 1 ? b.tiles * b.kv_heads * splits * state : 0);
  std::vector<std::atomic<int32_t>> left(splits > 1 ? b.tiles * b.kv_heads : 0);
  for (auto& x : left) x.store(static_cast<int32_t>(splits), std::memory_order_relaxed);
  const float scale = kLog2e * b.scale;

  parallel_for(threads, b.tiles * b.kv_heads * splits, [&](int64_t item) {
    const int64_t part = item % splits, h = item / splits % b.kv_heads, n = item / splits / b.kv_heads;
    const int64_t count = b.count(n);
    if (count == 0) return;
    const int64_t rows = count * group, begin = b.first(b.positions[n * b.tile]);
    const int64_t length = b.positions[n * b.tile + count - 1] + 1 - begin;
    const int64_t rounded = rows > 16 ? (rows + 3) / 4 * 4 : rows;
    thread_local std::vector<float> scratch;
    thread_local std::vector<int32_t> first, last;
    scratch.assign(rounded * d + state, 0.0f);
    first.assign(rounded, 0);
    last.assign(rounded, -1);
    float* x = scratch.data();
    for (int64_t j = 0; j < count; j++) {
      for (int64_t g = 0; g < group; g++) {
        const float* from = b.q + ((n * b.tile + j) * b.heads + h * group + g) * d;
        for (int64_t i = 0; i < d; i++) x[(j * group + g) * d + i] = from[i] * scale;
        last[j * group + g] = b.positions[n * b.tile + j];
        first[j * group + g] = static_cast<int32_t>(b.first(b.positions[n * b.tile + j]));
      }
    }
    float* m = splits > 1 ? parts.data() + item * state : x + rounded * d;
    float *l = m + padded, *o = l + padded;
    std::fill(m, m + padded, kMasked);
    for (int64_t r = 0; r < rows && part == 0; r++) {  // a sink is a score without a value
      const float sink = b.sinks[h * group + r % group];
      if (sink > kMasked) {
        m[r] = sink * kLog2e;
        l[r] = 1.0f;
      }
    }
    Span span{b.pool,
              b.tables + b.rows[n] * b.width,
              static_cast<int>(begin + length * part / splits),
              static_cast<int>(begin + length * (part + 1) / splits),
              static_cast<int>(b.page_size),
              b.page_stride(),
              b.kv_heads * b.page_size * d,
              h * b.page_size * d,
              static_cast<int>(d)};
    kernel(span, Query{x, first.data(), last.data(), static_cast<int>(rounded)}, m, l, o);
    if (splits == 1) {
      finish(b, n, h, count, l, o);
    } else if (left[n * b.kv_heads + h].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      // The last part to end merges all of them, always in the same order: the sum does not depend on the schedule.
      float* first = parts.data() + (item - part) * state;
      for (int64_t r = 0; r < rows; r++) {
        float top = kMasked, total = 0.0f;
        for (int64_t s = 0; s < splits; s++) top = std::max(top, first[s * state + r]);
        float* to = x + rounded * d + 2 * padded + r * d;
        std::fill(to, to + d, 0.0f);
        for (int64_t s = 0; s < splits; s++) {
          const float* from = first + s * state;
          const float w = from[r] == kMasked ? 0.0f : __builtin_exp2f(from[r] - top);
          total += w * from[padded + r];
          for (int64_t i = 0; i < d; i++) to[i] += w * from[2 * padded + r * d + i];
        }
        x[rounded * d + padded + r] = total;
      }
      finish(b, n, h, count, x + rounded * d + padded, x + rounded * d + 2 * padded);
    }
  });
}

// q [T, heads, head_dim], k and v [T, kv_heads, head_dim], sinks [heads] float32 (-inf: none); tables [rows, width],
// rows [tiles], positions [T] int32 (-1: padding); pool [pages, 2, kv_heads, page_size, head_dim] float32 or bfloat16,
// updated in place. `scale` of the scores; `window` or `chunk` in tokens, 0 for none.
ffi::Error paged_attention(ffi::ThreadPool threads, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                           ffi::AnyBuffer sinks, ffi::AnyBuffer tables, ffi::AnyBuffer rows, ffi::AnyBuffer positions,
                           ffi::AnyBuffer pool, float scale, int64_t window, int64_t chunk,
                           ffi::Result<ffi::AnyBuffer> pool_out, ffi::Result<ffi::AnyBuffer> out) {
  const auto qd = q.dimensions(), kd = k.dimensions(), pd = pool.dimensions(), td = tables.dimensions();
  if (qd.size() != 3 || kd.size() != 3 || pd.size() != 5 || td.size() != 2 || rows.dimensions().size() != 1)
    return ffi::Error::InvalidArgument("paged_attention: wrong number of dimensions");
  if (pool.untyped_data() != pool_out->untyped_data())
    return ffi::Error::Internal("paged_attention: the pool was copied; donate it to the step");
  const bool is_bf16 = pool.element_type() == ffi::DataType::BF16;
  if (!is_bf16 && pool.element_type() != ffi::DataType::F32)
    return ffi::Error::InvalidArgument("paged_attention: the pool must be float32 or bfloat16");
  Batch b{q.typed_data<float>(),
          k.typed_data<float>(),
          v.typed_data<float>(),
          sinks.typed_data<float>(),
          tables.typed_data<int32_t>(),
          rows.typed_data<int32_t>(),
          positions.typed_data<int32_t>(),
          pool.untyped_data(),
          (*out).typed_data<float>(),
          qd[0],
          qd[1],
          kd[1],
          qd[2],
          pd[3],
          td[1],
          rows.dimensions()[0],
          0,
          scale,
          window,
          chunk};
  if (b.tiles == 0 || b.tokens % b.tiles != 0 || b.heads % b.kv_heads != 0)
    return ffi::Error::InvalidArgument("paged_attention: tokens must be a multiple of tiles, heads of kv_heads");
  if (sinks.element_count() != static_cast<size_t>(b.heads))
    return ffi::Error::InvalidArgument("paged_attention: one sink for each head");
  b.tile = b.tokens / b.tiles;
  const Kernel kernel = choose_kernel(is_bf16, static_cast<int>(b.head_dim));
  if (kernel == nullptr) return ffi::Error::InvalidArgument("paged_attention: head_dim has no kernel");
  if (is_bf16) {
    for (int64_t n = 0; n < b.tiles; n++) b.write<bf16>(n);
  } else {
    for (int64_t n = 0; n < b.tiles; n++) b.write<float>(n);
  }
  attend(threads, b, kernel);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(RootcellarPagedAttention, paged_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("chunk")
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

// 1 when a kernel exists for this head_dim, so that Python can choose a backend before compiling a step.
extern "C" int rootcellar_has_kernel(int head_dim) { return choose_kernel(false, head_dim) != nullptr; }
