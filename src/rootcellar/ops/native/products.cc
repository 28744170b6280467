// Products with packed weights (products.h) as XLA calls them, through its foreign-function interface.

#include "products.h"

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using rootcellar::bf16;
using rootcellar::Form;
using rootcellar::kColumns;

struct Named {
  const char* name;
  Form form;
  ffi::DataType type;
  size_t arrays;  // its words, scales and least values, as far as it has them
};

constexpr Named kForms[] = {{"float32", Form::f32, ffi::DataType::F32, 1},
                            {"bfloat16", Form::bf16, ffi::DataType::U16, 1},
                            {"w8", Form::w8, ffi::DataType::S8, 2},
                            {"w4", Form::w4, ffi::DataType::U8, 3}};

// x [rows, inputs] float32, then a weight's arrays (products.h); y [rows, leads * length]. `vectors` by name, "": the best.
ffi::Error multiply(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::RemainingArgs arrays, std::string_view form,
                    int64_t leads, int64_t length, int64_t group, std::string_view vectors, bool fixed,
                    ffi::Result<ffi::AnyBuffer> y) {
  const Named* named = nullptr;
  for (const Named& one : kForms)
    if (form == one.name) named = &one;
  if (named == nullptr || arrays.size() != named->arrays)
    return ffi::Error::InvalidArgument("product: there is no such form of weights");
  const auto xd = x.dimensions(), yd = y->dimensions();
  if (xd.size() != 2 || yd.size() != 2 || x.element_type() != ffi::DataType::F32 ||
      y->element_type() != ffi::DataType::F32)
    return ffi::Error::InvalidArgument("product: rows in, rows out, in float32");
  const int64_t inputs = xd[1], panels = leads * ((length + kColumns - 1) / kColumns);
  if (yd[0] != xd[0] || yd[1] != leads * length || group < 1 || inputs % group != 0 ||
      (named->arrays > 1 ? group : inputs) % rootcellar::inputs_of_word(named->form) != 0)
    return ffi::Error::InvalidArgument("product: shapes do not fit");
  const void* held[3] = {};
  for (size_t i = 0; i < arrays.size(); i++) {
    const auto array = arrays.get<ffi::AnyBuffer>(i);
    if (!array.has_value()) return array.error();
    const int64_t rows = i > 0 ? inputs / group : named->form == Form::w4 ? inputs / 2 : inputs;
    if (array->element_type() != (i == 0 ? named->type : ffi::DataType::BF16) ||
        static_cast<int64_t>(array->element_count()) != panels * rows * kColumns)
      return ffi::Error::InvalidArgument("product: a weight's array does not fit");
    held[i] = array->untyped_data();
  }
  const auto* set = rootcellar::find_vectors(rootcellar::kProductSets, std::string(vectors));
  if (set == nullptr) return ffi::Error::InvalidArgument("product: this processor lacks those vectors");
  const rootcellar::Product p{x.typed_data<float>(),
                              static_cast<const uint32_t*>(held[0]),
                              static_cast<const bf16*>(held[1]),
                              static_cast<const bf16*>(held[2]),
                              y->typed_data<float>(),
                              xd[0],
                              inputs,
                              leads,
                              length,
                              group,
                              named->form,
                              fixed};
  rootcellar::multiply(threads, p, set->function);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(RootcellarProduct, multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Attr<std::string_view>("form")
                                  .Attr<int64_t>("leads")
                                  .Attr<int64_t>("length")
                                  .Attr<int64_t>("group")
                                  .Attr<std::string_view>("vectors")
                                  .Attr<bool>("fixed")
                                  .Ret<ffi::AnyBuffer>());
