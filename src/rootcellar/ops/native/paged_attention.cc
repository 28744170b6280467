// Paged attention (attention.h) as XLA calls it, through its foreign-function interface.

#include "attention.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using rootcellar::Batch;
using Floats = ffi::Buffer<ffi::F32, 3>;
using Sinks = ffi::Buffer<ffi::F32, 1>;
using Tables = ffi::Buffer<ffi::S32, 2>;
using Numbers = ffi::Buffer<ffi::S32, 1>;

ffi::Error wrong(const char* what) {
  return ffi::Error::InvalidArgument(std::string("paged attention: ") + what);
}

template <typename Buffer>
bool has_shape(const Buffer& buffer, std::initializer_list<int64_t> shape) {
  const auto dims = buffer.dimensions();
  return std::equal(dims.begin(), dims.end(), shape.begin(), shape.end());
}

// What all handlers are told: where the batch's tokens lie, q [T, heads, dim], tables [rows, width], rows [tiles],
// positions [T] (-1: padding); and what queries see, `window` or `chunk` in tokens, 0 for none; `softcap` likewise.
struct Told {
  Tables tables;
  Numbers rows, positions;
  float scale, softcap;
  int64_t window, chunk;
};

// What follows from these. `kv_heads`, `page_size` and the rest are the handler's.
ffi::Error fill(Batch& b, const Floats& q, const Told& told, int64_t kv_heads, int64_t page_size,
                ffi::Result<Floats>& out) {
  const auto qd = q.dimensions();
  b.q = q.typed_data();
  b.tables = told.tables.typed_data();
  b.rows = told.rows.typed_data();
  b.positions = told.positions.typed_data();
  b.out = out->typed_data();
  b.tokens = qd[0];
  b.heads = qd[1];
  b.kv_heads = kv_heads;
  b.dim = qd[2];
  b.page_size = page_size;
  b.width = told.tables.dimensions()[1];
  b.tiles = told.rows.dimensions()[0];
  b.scale = told.scale;
  b.softcap = told.softcap;
  b.window = told.window;
  b.chunk = told.chunk;
  if (!has_shape(told.positions, {b.tokens}) || !has_shape(*out, {b.tokens, b.heads, b.dim}))
    return wrong("a position for each query, and what is given has their shape");
  if (b.tiles == 0 || b.tokens == 0 || b.tokens % b.tiles != 0) return wrong("tokens must be a multiple of tiles");
  if (b.kv_heads == 0 || b.heads % b.kv_heads != 0) return wrong("heads must be a multiple of kv_heads");
  if (b.page_size == 0) return wrong("a page has tokens");
  if (b.dim % 16 != 0) return wrong("there is no kernel for this head_dim");
  return ffi::Error::Success();
}

ffi::Error attend(ffi::ThreadPool& threads, const Batch& b, ffi::AnyBuffer pool, ffi::Result<ffi::AnyBuffer> pool_out,
                  std::string_view vectors) {
  if (pool.untyped_data() != pool_out->untyped_data())
    return ffi::Error::Internal("paged attention: the pool was copied; donate it to the step");
  const bool is_bf16 = pool.element_type() == ffi::DataType::BF16;
  if (!is_bf16 && pool.element_type() != ffi::DataType::F32) return wrong("the pool must be float32 or bfloat16");
  const auto* found = rootcellar::find_vectors(rootcellar::kVectorSets, std::string(vectors));
  if (found == nullptr) return wrong("this processor lacks those vectors");
  if (is_bf16) {
    b.write<rootcellar::bf16>();
  } else {
    b.write<float>();
  }
  rootcellar::attend(threads, b, found->function(is_bf16));
  return ffi::Error::Success();
}

// q [T, heads, head_dim], k and v [T, kv_heads, head_dim], sinks [heads] (-inf: none); pool [pages, 2, kv_heads,
// page_size, head_dim] float32 or bfloat16, updated in place. `scale` of the scores; `vectors` by name, "": the best.
ffi::Error by_head(ffi::ThreadPool threads, Floats q, Floats k, Floats v, Sinks sinks, Tables tables, Numbers rows,
                   Numbers positions, ffi::AnyBuffer pool, float scale, float softcap, int64_t window, int64_t chunk,
                   std::string_view vectors, bool fixed, ffi::Result<ffi::AnyBuffer> pool_out,
                   ffi::Result<Floats> out) {
  const auto pd = pool.dimensions();
  if (pd.size() != 5) return wrong("wrong number of dimensions");
  Batch b{};
  ffi::Error error = fill(b, q, {tables, rows, positions, scale, softcap, window, chunk}, pd[2], pd[3], out);
  if (error.failure()) return error;
  if (!has_shape(k, {b.tokens, b.kv_heads, b.dim}) || !has_shape(v, {b.tokens, b.kv_heads, b.dim}) ||
      !has_shape(pool, {pd[0], 2, b.kv_heads, b.page_size, b.dim}))
    return wrong("keys and values have the shape that the pool has");
  if (!has_shape(sinks, {b.heads})) return wrong("one sink for each head");
  b.k = k.typed_data();
  b.v = v.typed_data();
  b.sinks = sinks.typed_data();
  b.pool = pool.untyped_data();
  b.fixed = fixed;
  return attend(threads, b, pool, pool_out, vectors);
}

// One of the pools of codes or scales, [pages, kv_heads, page_size, ...], of `row` bytes for each token and head.
ffi::Error fill(rootcellar::Rows& to, const Batch& b, int64_t row, const ffi::AnyBuffer& pool,
                const ffi::AnyBuffer& after) {
  if (pool.untyped_data() != after.untyped_data())
    return ffi::Error::Internal("paged attention: the pool was copied; donate it to the step");
  const auto pd = pool.dimensions();
  if (pd.size() < 3 || pd[1] != b.kv_heads || pd[2] != b.page_size)
    return wrong("codes and scales have a row for each token and head");
  if (static_cast<int64_t>(pool.size_bytes()) != pd[0] * b.kv_heads * b.page_size * row)
    return wrong("codes and scales have the bytes that their grid says");
  to = {static_cast<uint8_t*>(pool.untyped_data()), row};
  return ffi::Error::Success();
}

// As by_head, over four pools of few bits, updated in place: codes of keys and of values and the scales of each. `keys`
// and `values` name grids; `turned`: queries, keys and values are turned first, and what comes out is turned back.
ffi::Error over_codes(ffi::ThreadPool threads, Floats q, Floats k, Floats v, Sinks sinks, Tables tables, Numbers rows,
                      Numbers positions, ffi::RemainingArgs pools, float scale, float softcap, int64_t window,
                      int64_t chunk, std::string_view vectors, std::string_view keys, std::string_view values,
                      bool turned, ffi::Result<Floats> out, ffi::RemainingRets pools_out) {
  constexpr size_t kArrays = rootcellar::kArraysOfCodes;
  if (pools.size() != kArrays || pools_out.size() != kArrays)
    return wrong("four pools: codes of keys and of values, the scales of each");
  const auto* found = rootcellar::find_vectors(rootcellar::kCodeSets, std::string(vectors));
  const rootcellar::CodesKernel* kernel = found == nullptr ? nullptr : found->function(keys, values);
  if (kernel == nullptr) return wrong("no kernel for these grids and vectors");
  Batch b{};
  for (size_t i = 0; i < kArrays; i++) {
    const auto pool = pools.get<ffi::AnyBuffer>(i);
    auto after = pools_out.get<ffi::AnyBuffer>(i);
    if (pool.has_error() || after.has_error()) return wrong("an array is missing");
    if (i == 0) {
      const auto pd = pool->dimensions();
      if (pd.size() != 4) return wrong("wrong number of dimensions");
      ffi::Error error = fill(b, q, {tables, rows, positions, scale, softcap, window, chunk}, pd[1], pd[2], out);
      if (error.failure()) return error;
    }
    ffi::Error error = fill(b.rows_of[i], b, kernel->rows[i](b.dim), *pool, **after);
    if (error.failure()) return error;
  }
  if (!has_shape(k, {b.tokens, b.kv_heads, b.dim}) || !has_shape(v, {b.tokens, b.kv_heads, b.dim}))
    return wrong("keys and values have the shape that the pool has");
  if (!has_shape(sinks, {b.heads})) return wrong("one sink for each head");
  b.k = k.typed_data();
  b.v = v.typed_data();
  b.sinks = sinks.typed_data();
  b.codes = kernel;
  b.turned = turned;
  b.write_codes(threads);
  rootcellar::attend(threads, b, kernel->kernel);
  return ffi::Error::Success();
}

// q [T, heads, dim] and latents [T, dim]; pool [pages, page_size, dim]; the rest as above. There are no sinks.
ffi::Error over_latents(ffi::ThreadPool threads, Floats q, ffi::Buffer<ffi::F32, 2> latents, Tables tables,
                        Numbers rows, Numbers positions, ffi::AnyBuffer pool, float scale, float softcap,
                        int64_t window, int64_t chunk, std::string_view vectors, bool fixed,
                        ffi::Result<ffi::AnyBuffer> pool_out, ffi::Result<Floats> out) {
  const auto pd = pool.dimensions();
  if (pd.size() != 3) return wrong("wrong number of dimensions");
  Batch b{};
  ffi::Error error = fill(b, q, {tables, rows, positions, scale, softcap, window, chunk}, 1, pd[1], out);
  if (error.failure()) return error;
  if (!has_shape(latents, {b.tokens, b.dim}) || pd[2] != b.dim) return wrong("latents have the pool's width");
  b.k = latents.typed_data();
  b.pool = pool.untyped_data();
  b.fixed = fixed;
  return attend(threads, b, pool, pool_out, vectors);
}

// The parts that the handlers' signatures share.
template <typename Binding>
auto with_places(Binding&& binding) {
  return std::move(binding).template Arg<Tables>().template Arg<Numbers>().template Arg<Numbers>();
}

template <typename Binding>
auto with_reach(Binding&& binding) {
  return std::move(binding)
      .template Attr<float>("scale")
      .template Attr<float>("softcap")
      .template Attr<int64_t>("window")
      .template Attr<int64_t>("chunk")
      .template Attr<std::string_view>("vectors");
}

// Over a pool of floats.
template <typename Binding>
auto with_pool(Binding&& binding) {
  return with_reach(with_places(std::move(binding)).template Arg<ffi::AnyBuffer>())
      .template Attr<bool>("fixed")
      .template Ret<ffi::AnyBuffer>()
      .template Ret<Floats>();
}

auto queries() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>(); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(RootcellarAttentionByHead, by_head,
                              with_pool(queries().Arg<Floats>().Arg<Floats>().Arg<Sinks>()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(RootcellarAttentionOverCodes, over_codes,
                              with_reach(
                                  with_places(queries().Arg<Floats>().Arg<Floats>().Arg<Sinks>()).RemainingArgs())
                                  .Attr<std::string_view>("keys")
                                  .Attr<std::string_view>("values")
                                  .Attr<bool>("turned")
                                  .Ret<Floats>()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(RootcellarAttentionOverLatents, over_latents,
                              with_pool(queries().Arg<ffi::Buffer<ffi::F32, 2>>()));

// 1 when there are kernels of vectors of this name that run here, so that Python can tell before it compiles a step.
extern "C" int rootcellar_runs_vectors(const char* name) {
  return rootcellar::find_vectors(rootcellar::kVectorSets, name) != nullptr;
}
