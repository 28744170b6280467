// The peaks of rows of scores (peaks.h) as XLA calls them, through its foreign-function interface.

#include "peaks.h"

#include <limits>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Scores = ffi::Buffer<ffi::F32, 2>;
using Places = ffi::Buffer<ffi::S32, 1>;
using Floats = ffi::Buffer<ffi::F32, 1>;

// x [rows, n]; of each row where its largest is, that, and what all weigh beside it. `vectors` by name, "": the best.
ffi::Error peaks(ffi::ThreadPool threads, Scores x, std::string_view vectors, ffi::Result<Places> at,
                 ffi::Result<Floats> top, ffi::Result<Floats> mass) {
  const int64_t rows = x.dimensions()[0], n = x.dimensions()[1];
  if (n < 1 || n > std::numeric_limits<int32_t>::max() || at->dimensions()[0] != rows || top->dimensions()[0] != rows ||
      mass->dimensions()[0] != rows)
    return ffi::Error::InvalidArgument("peaks: shapes do not fit");
  const auto* set = rootcellar::find_vectors(rootcellar::kPeakSets, std::string(vectors));
  if (set == nullptr) return ffi::Error::InvalidArgument("peaks: this processor lacks those vectors");
  rootcellar::find_peaks(threads,
                         {x.typed_data(), rows, n, at->typed_data(), top->typed_data(), mass->typed_data()},
                         set->function);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(RootcellarPeaks, peaks,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Scores>()
                                  .Attr<std::string_view>("vectors")
                                  .Ret<Places>()
                                  .Ret<Floats>()
                                  .Ret<Floats>());
