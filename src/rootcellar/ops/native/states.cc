// Recurrent states through a decode step (states.h) as XLA calls it, through its foreign-function interface.

#include "states.h"

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Floats = ffi::Buffer<ffi::F32, 3>;
using Pool = ffi::Buffer<ffi::F32, 4>;
using Numbers = ffi::Buffer<ffi::S32, 1>;
using Marks = ffi::Buffer<ffi::PRED, 1>;

ffi::Error wrong(const char* what) { return ffi::Error::InvalidArgument(std::string("states: ") + what); }

// Of each of n tokens the slots that it reads and writes, whether it begins from zeros, its offset and count; what heads
// are told, [n, groups, width] each; pool [slots, heads, rows, columns], updated in place; y [n, heads, width]. `rule`: a
// kernel's name (states.h). `vectors` by name, "": the best.
ffi::Error step(ffi::ThreadPool threads, Numbers source, Numbers target, Marks fresh, Numbers offset, Numbers count,
                Floats a, Floats b, Floats c, Floats d, Pool pool, std::string_view rule, std::string_view vectors,
                ffi::Result<Pool> pool_out, ffi::Result<Floats> y) {
  if (pool.typed_data() != pool_out->typed_data())
    return ffi::Error::Internal("states: the pool was copied; donate it to the step");
  const auto* set = rootcellar::find_vectors(rootcellar::kStateSets, std::string(vectors));
  if (set == nullptr) return wrong("this processor lacks those vectors");
  const bool delta = rule == "delta";
  if (!delta && rule != "ssd") return wrong("there is no such rule");
  const auto pd = pool.dimensions(), yd = y->dimensions();
  const int64_t n = yd[0], heads = pd[1], rows = pd[2], columns = pd[3];
  rootcellar::States s{pool.typed_data(), heads, rows, columns, n, source.typed_data(), target.typed_data(),
                       offset.typed_data(), count.typed_data(), fresh.typed_data(), {}, y->typed_data(), yd[2]};
  for (const auto* numbers : {&source, &target, &offset, &count})
    if (numbers->dimensions()[0] != n) return wrong("each token has a number");
  const int64_t widths[] = {delta ? 2 : 1, rows, delta ? rows : columns, columns};
  const Floats* told[] = {&a, &b, &c, &d};
  for (int i = 0; i < rootcellar::kToldOf; i++) {
    const auto dims = told[i]->dimensions();
    if (dims[0] != n || dims[1] < 1 || heads % dims[1] != 0 || dims[2] != widths[i])
      return wrong("what heads are told does not fit");
    s.told[i] = {told[i]->typed_data(), dims[1], dims[2]};
  }
  if (fresh.dimensions()[0] != n || yd[1] != heads || yd[2] != (delta ? columns : rows))
    return wrong("shapes do not fit");
  rootcellar::through_states(threads, s, delta ? set->function.delta : set->function.ssd);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(RootcellarStates, step,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Arg<Marks>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Pool>()
                                  .Attr<std::string_view>("rule")
                                  .Attr<std::string_view>("vectors")
                                  .Ret<Pool>()
                                  .Ret<Floats>());
