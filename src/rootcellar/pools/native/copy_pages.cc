// Pages of pools to images in host memory and back, in one pass, behind XLA's foreign function interface on CPUs.
//
// As a program over the pools it is ordered by dataflow like any step: what it reads is read before a later step writes,
// and what it writes is there before a later step reads. The host's memory is named by addresses, so nothing is
// allocated between the two.

#include <cstdint>
#include <cstring>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// The pages [N] and, of each, the address of its image: low and high half. Address 0: padding.
struct Wanted {
  const int32_t* pages;
  const uint32_t* addresses;
  int64_t count;

  char* image(int64_t i) const {
    const uint64_t address = addresses[2 * i] | static_cast<uint64_t>(addresses[2 * i + 1]) << 32;
    return reinterpret_cast<char*>(static_cast<uintptr_t>(address));
  }
};

// Calls copy(page in the array, its place in the image, bytes) for each page of one array.
template <typename Copy>
ffi::Error each_page(const Wanted& wanted, const ffi::AnyBuffer& array, int64_t offset, Copy copy) {
  const int64_t pages = array.dimensions()[0];
  const int64_t bytes = static_cast<int64_t>(array.size_bytes()) / pages;
  char* base = static_cast<char*>(array.untyped_data());
  for (int64_t i = 0; i < wanted.count; i++) {
    char* image = wanted.image(i);
    if (image == nullptr) continue;
    if (wanted.pages[i] < 0 || wanted.pages[i] >= pages)
      return ffi::Error::InvalidArgument("copy_pages: a page is not in the pool");
    copy(base + wanted.pages[i] * bytes, image + offset, static_cast<size_t>(bytes));
  }
  return ffi::Error::Success();
}

ffi::Error check(const ffi::Buffer<ffi::S32>& pages, const ffi::Buffer<ffi::U32>& addresses, size_t arrays,
                 size_t offsets) {
  if (addresses.element_count() != 2 * pages.element_count() || arrays != offsets)
    return ffi::Error::InvalidArgument("copy_pages: give an address for each page and an offset for each array");
  return ffi::Error::Success();
}

// Pages [N] of `arrays` (pages in their first axis) to images: array k of a page lies at offsets[k] of its image.
ffi::Error read_pages(ffi::Buffer<ffi::S32> pages, ffi::Buffer<ffi::U32> addresses, ffi::RemainingArgs arrays,
                      ffi::Span<const int64_t> offsets, ffi::ResultBuffer<ffi::U32> done) {
  if (ffi::Error error = check(pages, addresses, arrays.size(), offsets.size()); error.failure()) return error;
  const Wanted wanted{pages.typed_data(), addresses.typed_data(), static_cast<int64_t>(pages.element_count())};
  for (size_t k = 0; k < arrays.size(); k++) {
    const auto array = arrays.get<ffi::AnyBuffer>(k);
    if (array.has_error()) return array.error();
    const ffi::Error error = each_page(wanted, *array, offsets[k],
                                       [](char* page, char* image, size_t n) { std::memcpy(image, page, n); });
    if (error.failure()) return error;
  }
  done->typed_data()[0] = 1;
  return ffi::Error::Success();
}

// The way back, in place: `results` are the arrays, donated.
ffi::Error write_pages(ffi::Buffer<ffi::S32> pages, ffi::Buffer<ffi::U32> addresses, ffi::RemainingArgs arrays,
                       ffi::Span<const int64_t> offsets, ffi::ResultBuffer<ffi::U32> done,
                       ffi::RemainingRets results) {
  if (ffi::Error error = check(pages, addresses, arrays.size(), offsets.size()); error.failure()) return error;
  const Wanted wanted{pages.typed_data(), addresses.typed_data(), static_cast<int64_t>(pages.element_count())};
  for (size_t k = 0; k < arrays.size(); k++) {
    const auto array = arrays.get<ffi::AnyBuffer>(k);
    auto result = results.get<ffi::AnyBuffer>(k);
    if (array.has_error()) return array.error();
    if (result.has_error()) return result.error();
    if (array->untyped_data() != (*result)->untyped_data())
      return ffi::Error::Internal("copy_pages: a pool was copied; donate it");
    const ffi::Error error = each_page(wanted, *array, offsets[k],
                                       [](char* page, char* image, size_t n) { std::memcpy(page, image, n); });
    if (error.failure()) return error;
  }
  done->typed_data()[0] = 1;
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(RootcellarReadPages, read_pages,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .RemainingArgs()
                                  .Attr<ffi::Span<const int64_t>>("offsets")
                                  .Ret<ffi::Buffer<ffi::U32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(RootcellarWritePages, write_pages,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .RemainingArgs()
                                  .Attr<ffi::Span<const int64_t>>("offsets")
                                  .Ret<ffi::Buffer<ffi::U32>>()
                                  .RemainingRets());
