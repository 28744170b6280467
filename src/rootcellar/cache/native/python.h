// What the binding needs of Python beside nanobind: numpy arrays as memory, keys as int64 buffers.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <string>
#include <utility>

#include "cache.h"

namespace rootcellar {

namespace nb = nanobind;

// The memory of an object with a C-contiguous buffer, held as long as this lives.
class Buffer {
  public:
    Buffer() = default;
    Buffer(nb::handle object, bool writable) {
        const int flags = PyBUF_ND | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
        if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw nb::python_error();
        held_ = true;
    }
    Buffer(Buffer&& other) noexcept : view_(other.view_), held_(std::exchange(other.held_, false)) {}
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(view_, other.view_);
        std::swap(held_, other.held_);
        return *this;
    }
    ~Buffer() {
        if (held_) PyBuffer_Release(&view_);
    }

    // As `dimensions`-dimensional signed integers of T's size; TypeError otherwise.
    template <class T>
    T* as(int dimensions) const {
        const char* format = view_.format == nullptr ? "B" : view_.format;
        while (*format == '@' || *format == '=' || *format == '<') ++format;
        const bool integers = format[0] == 'i' || format[0] == 'l' || format[0] == 'q';
        if (view_.ndim != dimensions || view_.itemsize != sizeof(T) || !integers || format[1] != '\0')
            throw nb::type_error(sizeof(T) == 8 ? "give a contiguous int64 array" : "give a contiguous int32 array");
        return static_cast<T*>(view_.buf);
    }
    std::int64_t extent(int dimension) const { return view_.shape[dimension]; }

  private:
    Py_buffer view_{};
    bool held_ = false;
};

// A key of the caller: its tokens where they lie, and its namespace.
struct KeyView {
    Buffer buffer;
    Key key;
};

inline nb::object numpy_empty(std::int64_t count, const char* type) {
    static PyObject* empty = nb::object(nb::module_::import_("numpy").attr("empty")).release().ptr();
    return nb::handle(empty)(count, type);
}

// An int32 array of its own.
inline nb::object numpy_pages(const std::int32_t* pages, std::int64_t count) {
    nb::object array = numpy_empty(count, "i4");
    if (count != 0) std::memcpy(Buffer(array, true).as<std::int32_t>(1), pages, count * sizeof *pages);
    return array;
}

inline nb::object python_name(const std::string& text) {
    PyObject* name = PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "surrogatepass");
    if (name == nullptr) throw nb::python_error();
    return nb::steal(name);
}

inline nb::bytes python_digest(const Digest& digest) {
    return nb::bytes(digest.data(), digest.size());
}

template <class Values, class Make>
nb::object python_tuple(const Values& values, Make make) {
    nb::list list;
    for (const auto& value : values) list.append(make(value));
    return nb::tuple(list);
}

// state.cc: everything, as plain Python values that equal those that glimpse.py makes of the twin.
nb::tuple state_of(Cache& cache);
nb::list nodes_of(Cache& cache, std::int64_t limit);
nb::list nodes_along(Cache& cache, const Key& key);

}  // namespace rootcellar
