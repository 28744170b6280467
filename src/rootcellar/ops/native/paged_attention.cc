// Paged attention (attention.h) as XLA calls it, through its foreign-function interface.

#include "attention.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using rootcellar::Batch;

ffi::Error attend(ffi::ThreadPool& threads, Batch b, ffi::AnyBuffer pool, ffi::Result<ffi::AnyBuffer> pool_out,
                  std::string_view vectors) {
  if (pool.untyped_data() != pool_out->untyped_data())
    return ffi::Error::Internal("paged attention: the pool was copied; donate it to the step");
  const bool is_bf16 = pool.element_type() == ffi::DataType::BF16;
  if (!is_bf16 && pool.element_type() != ffi::DataType::F32)
    return ffi::Error::InvalidArgument("paged attention: the pool must be float32 or bfloat16");
  if (b.tiles == 0 || b.tokens % b.tiles != 0 || b.heads % b.kv_heads != 0)
    return ffi::Error::InvalidArgument("paged attention: tokens must be a multiple of tiles, heads of kv_heads");
  if (b.dim % 16 != 0) return ffi::Error::InvalidArgument("paged attention: there is no kernel for this head_dim");
  const auto* found = rootcellar::find_vectors(rootcellar::kVectorSets, std::string(vectors));
  if (found == nullptr) return ffi::Error::InvalidArgument("paged attention: this processor lacks those vectors");
  if (is_bf16) {
    b.write<rootcellar::bf16>();
  } else {
    b.write<float>();
  }
  rootcellar::attend(threads, b, found->function(is_bf16));
  return ffi::Error::Success();
}

// q [T, heads, head_dim], k and v [T, kv_heads, head_dim], sinks [heads] float32 (-inf: none); tables [rows, width],
// rows [tiles], positions [T] int32 (-1: padding); pool [pages, 2, kv_heads, page_size, head_dim] float32 or bfloat16,
// updated in place. `scale` of the scores; `window` or `chunk` in tokens, 0 for none; `vectors` by name, "": the best.
ffi::Error by_head(ffi::ThreadPool threads, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer sinks,
                   ffi::AnyBuffer tables, ffi::AnyBuffer rows, ffi::AnyBuffer positions, ffi::AnyBuffer pool,
                   float scale, int64_t window, int64_t chunk, bool fixed, std::string_view vectors,
                   ffi::Result<ffi::AnyBuffer> pool_out, ffi::Result<ffi::AnyBuffer> out) {
  const auto qd = q.dimensions(), kd = k.dimensions(), pd = pool.dimensions(), td = tables.dimensions();
  if (qd.size() != 3 || kd.size() != 3 || pd.size() != 5 || td.size() != 2 || rows.dimensions().size() != 1)
    return ffi::Error::InvalidArgument("paged attention: wrong number of dimensions");
  if (sinks.element_count() != static_cast<size_t>(qd[1]))
    return ffi::Error::InvalidArgument("paged attention: one sink for each head");
  const Batch b{q.typed_data<float>(),
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
                scale,
                window,
                chunk,
                fixed};
  return attend(threads, b, pool, pool_out, vectors);
}

// As by_head, over pools of few bits: what a token has in each, codes of keys and of values and the scales of each, as
// [T, kv_heads, ...], and the pools [pages, kv_heads, page_size, ...], updated in place. `keys` and `values` name grids.
ffi::Error over_codes(ffi::ThreadPool threads, ffi::AnyBuffer q, ffi::AnyBuffer sinks, ffi::AnyBuffer tables,
                      ffi::AnyBuffer rows, ffi::AnyBuffer positions, ffi::RemainingArgs arrays, float scale,
                      int64_t window, int64_t chunk, std::string_view keys, std::string_view values,
                      std::string_view vectors, ffi::Result<ffi::AnyBuffer> out, ffi::RemainingRets pools) {
  constexpr size_t kArrays = 4;
  if (arrays.size() != 2 * kArrays || pools.size() != kArrays)
    return ffi::Error::InvalidArgument("paged attention: codes and scales of keys and values, and four pools");
  Batch b{};
  for (size_t i = 0; i < kArrays; i++) {
    const auto fresh = arrays.get<ffi::AnyBuffer>(i), pool = arrays.get<ffi::AnyBuffer>(kArrays + i);
    auto after = pools.get<ffi::AnyBuffer>(i);
    if (fresh.has_error() || pool.has_error() || after.has_error())
      return ffi::Error::InvalidArgument("paged attention: an array is missing");
    if (pool->untyped_data() != (*after)->untyped_data())
      return ffi::Error::Internal("paged attention: the pool was copied; donate it to the step");
    const auto fd = fresh->dimensions(), pd = pool->dimensions();
    if (fd.size() < 2 || pd.size() < 3 || fd[1] != pd[1])
      return ffi::Error::InvalidArgument("paged attention: wrong number of dimensions");
    b.kv_heads = pd[1];
    b.page_size = pd[2];
    b.rows_of[i] = {static_cast<const uint8_t*>(fresh->untyped_data()), static_cast<uint8_t*>(pool->untyped_data()),
                    static_cast<int64_t>(fresh->size_bytes()) / (fd[0] * fd[1])};
  }
  const auto qd = q.dimensions(), td = tables.dimensions();
  if (qd.size() != 3 || td.size() != 2 || rows.dimensions().size() != 1 || qd[1] % b.kv_heads != 0 || qd[2] % 16 != 0)
    return ffi::Error::InvalidArgument("paged attention: wrong dimensions");
  if (rows.dimensions()[0] == 0 || qd[0] % rows.dimensions()[0] != 0)
    return ffi::Error::InvalidArgument("paged attention: tokens must be a multiple of tiles");
  b.q = q.typed_data<float>();
  b.sinks = sinks.typed_data<float>();
  b.tables = tables.typed_data<int32_t>();
  b.rows = rows.typed_data<int32_t>();
  b.positions = positions.typed_data<int32_t>();
  b.out = (*out).typed_data<float>();
  b.tokens = qd[0];
  b.heads = qd[1];
  b.dim = qd[2];
  b.width = td[1];
  b.tiles = rows.dimensions()[0];
  b.scale = scale;
  b.window = window;
  b.chunk = chunk;
  const auto* found = rootcellar::find_vectors(rootcellar::kCodeSets, std::string(vectors));
  const rootcellar::Kernel kernel = found == nullptr ? nullptr : found->function(keys, values);
  if (kernel == nullptr) return ffi::Error::InvalidArgument("paged attention: no kernel for these grids and vectors");
  b.write_codes();
  rootcellar::attend(threads, b, kernel);
  return ffi::Error::Success();
}

// q [T, heads, dim] and latents [T, dim] float32; pool [pages, page_size, dim]; the rest as above. There are no sinks.
ffi::Error over_latents(ffi::ThreadPool threads, ffi::AnyBuffer q, ffi::AnyBuffer latents, ffi::AnyBuffer tables,
                        ffi::AnyBuffer rows, ffi::AnyBuffer positions, ffi::AnyBuffer pool, float scale, int64_t window,
                        int64_t chunk, bool fixed, std::string_view vectors, ffi::Result<ffi::AnyBuffer> pool_out,
                        ffi::Result<ffi::AnyBuffer> out) {
  const auto qd = q.dimensions(), pd = pool.dimensions(), td = tables.dimensions();
  if (qd.size() != 3 || latents.dimensions().size() != 2 || pd.size() != 3 || td.size() != 2 ||
      rows.dimensions().size() != 1)
    return ffi::Error::InvalidArgument("paged attention: wrong number of dimensions");
  const Batch b{q.typed_data<float>(),
                latents.typed_data<float>(),
                nullptr,
                nullptr,
                tables.typed_data<int32_t>(),
                rows.typed_data<int32_t>(),
                positions.typed_data<int32_t>(),
                pool.untyped_data(),
                (*out).typed_data<float>(),
                qd[0],
                qd[1],
                1,
                qd[2],
                pd[1],
                td[1],
                rows.dimensions()[0],
                scale,
                window,
                chunk,
                fixed};
  return attend(threads, b, pool, pool_out, vectors);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(RootcellarAttentionByHead, by_head,
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
                                  .Attr<bool>("fixed")
                                  .Attr<std::string_view>("vectors")
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(RootcellarAttentionOverCodes, over_codes,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("chunk")
                                  .Attr<std::string_view>("keys")
                                  .Attr<std::string_view>("values")
                                  .Attr<std::string_view>("vectors")
                                  .Ret<ffi::AnyBuffer>()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(RootcellarAttentionOverLatents, over_latents,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("chunk")
                                  .Attr<bool>("fixed")
                                  .Attr<std::string_view>("vectors")
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

// 1 when there are kernels of vectors of this name that run here, so that Python can tell before it compiles a step.
extern "C" int rootcellar_runs_vectors(const char* name) {
  return rootcellar::find_vectors(rootcellar::kVectorSets, name) != nullptr;
}
