// A decode step of recurrent layers, states (states.h) and convolution, as XLA calls them, through its foreign-function
// interface.

#include "states.h"

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Row = ffi::Buffer<ffi::F32, 1>;
using Rows = ffi::Buffer<ffi::F32, 2>;
using Floats = ffi::Buffer<ffi::F32, 3>;
using Pool = ffi::Buffer<ffi::F32, 4>;
using Numbers = ffi::Buffer<ffi::S32, 1>;
using Marks = ffi::Buffer<ffi::PRED, 1>;

ffi::Error wrong(const char* what) { return ffi::Error::InvalidArgument(std::string("states: ") + what); }

// What all handlers are told of each of n tokens (course.h).
struct Told {
  Numbers source, target;
  Marks fresh;
  Numbers offset, count;
};

// Says what is wrong, if anything is.
ffi::Error fill(rootcellar::Course& way, const Told& told, int64_t n) {
  for (const auto* numbers : {&told.source, &told.target, &told.offset, &told.count})
    if (numbers->dimensions()[0] != n) return wrong("each token has a number");
  if (told.fresh.dimensions()[0] != n) return wrong("each token is marked");
  way = {n, told.source.typed_data(), told.target.typed_data(), told.offset.typed_data(), told.count.typed_data(),
         told.fresh.typed_data()};
  return ffi::Error::Success();
}

ffi::Error copied() { return ffi::Error::Internal("states: the pool was copied; donate it to the step"); }

// What heads are told, [n, groups, width] each; pool [slots, heads, rows, columns], updated in place; y [n, heads, width].
// `rule`: a kernel's name (states.h). `vectors` by name, "": the best.
ffi::Error step(ffi::ThreadPool threads, Numbers source, Numbers target, Marks fresh, Numbers offset, Numbers count,
                Floats a, Floats b, Floats c, Floats d, Pool pool, std::string_view rule, std::string_view vectors,
                ffi::Result<Pool> pool_out, ffi::Result<Floats> y) {
  if (pool.typed_data() != pool_out->typed_data()) return copied();
  const auto* set = rootcellar::find_vectors(rootcellar::kStateSets, std::string(vectors));
  if (set == nullptr) return wrong("this processor lacks those vectors");
  const bool delta = rule == "delta";
  if (!delta && rule != "ssd") return wrong("there is no such rule");
  const auto pd = pool.dimensions(), yd = y->dimensions();
  const int64_t n = yd[0], heads = pd[1], rows = pd[2], columns = pd[3];
  rootcellar::States s{{}, pool.typed_data(), heads, rows, columns, {}, y->typed_data(), yd[2]};
  ffi::Error error = fill(s.way, {source, target, fresh, offset, count}, n);
  if (error.failure()) return error;
  const int64_t widths[] = {delta ? 2 : 1, rows, delta ? rows : columns, columns};
  const Floats* told[] = {&a, &b, &c, &d};
  for (int i = 0; i < rootcellar::kToldOf; i++) {
    const auto dims = told[i]->dimensions();
    if (dims[0] != n || dims[1] < 1 || heads % dims[1] != 0 || dims[2] != widths[i])
      return wrong("what heads are told does not fit");
    s.told[i] = {told[i]->typed_data(), dims[1], dims[2]};
  }
  if (yd[1] != heads || yd[2] != (delta ? columns : rows)) return wrong("shapes do not fit");
  rootcellar::through_states(threads, s, delta ? set->function.delta : set->function.ssd);
  return ffi::Error::Success();
}

// x [n, channels], weight [taps, channels], bias [channels]; pool [slots, taps - 1, channels] float32 or bfloat16,
// updated in place; y [n, channels].
ffi::Error convolution(ffi::ThreadPool threads, Numbers source, Numbers target, Marks fresh, Numbers offset,
                       Numbers count, Rows x, Rows weight, Row bias, ffi::AnyBuffer pool, std::string_view vectors,
                       ffi::Result<ffi::AnyBuffer> pool_out, ffi::Result<Rows> y) {
  if (pool.untyped_data() != pool_out->untyped_data()) return copied();
  const auto* set = rootcellar::find_vectors(rootcellar::kStateSets, std::string(vectors));
  if (set == nullptr) return wrong("this processor lacks those vectors");
  const auto xd = x.dimensions(), wd = weight.dimensions(), pd = pool.dimensions(), yd = y->dimensions();
  const int64_t n = xd[0], channels = xd[1], taps = wd[0];
  if (yd[0] != n || yd[1] != channels || wd[1] != channels || bias.dimensions()[0] != channels || taps < 1 ||
      pd.size() != 3 || pd[1] != taps - 1 || pd[2] != channels)
    return wrong("shapes do not fit");
  rootcellar::Course way{};
  ffi::Error error = fill(way, {source, target, fresh, offset, count}, n);
  if (error.failure()) return error;
  const auto run = [&](auto* inputs, auto* kernel) {
    using T = std::remove_pointer_t<decltype(inputs)>;
    rootcellar::convolve(threads,
                         rootcellar::Convolution<T>{way, inputs, channels, taps, x.typed_data(), weight.typed_data(),
                                                    bias.typed_data(), y->typed_data()},
                         kernel);
  };
  if (pool.element_type() == ffi::DataType::F32) {
    run(static_cast<float*>(pool.untyped_data()), set->function.convolved);
  } else if (pool.element_type() == ffi::DataType::BF16) {
    run(static_cast<rootcellar::bf16*>(pool.untyped_data()), set->function.convolved_bf16);
  } else {
    return wrong("inputs are float32 or bfloat16");
  }
  return ffi::Error::Success();
}

// The part that the handlers' signatures share.
auto tokens() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Numbers>()
      .Arg<Numbers>()
      .Arg<Marks>()
      .Arg<Numbers>()
      .Arg<Numbers>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(RootcellarStates, step,
                              tokens()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Pool>()
                                  .Attr<std::string_view>("rule")
                                  .Attr<std::string_view>("vectors")
                                  .Ret<Pool>()
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(RootcellarConvolution, convolution,
                              tokens()
                                  .Arg<Rows>()
                                  .Arg<Rows>()
                                  .Arg<Row>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<std::string_view>("vectors")
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<Rows>());
