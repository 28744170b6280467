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
    bool read_only() const { return view_.readonly != 0; }
    PyObject* object() const { return view_.obj; }
    const void* data() const { return view_.buf; }

  private:
    Py_buffer view_{};
    bool held_ = false;
};

// A key of the caller: its tokens where they lie, and its namespace.
struct KeyView {
    Buffer buffer;
    Key key;
};

// Lends numpy arrays. Only the memory of plain arrays is taken: holding, measuring and dropping it runs no other code.
class ArrayLender final : public Lender {
  public:
    explicit ArrayLender(KeyView& keys) : buffer_(keys.buffer) {
        if (buffer_.read_only()) keys.key.lender = this;
    }

    Loan<std::int64_t> lend() override {
        static PyObject* plain = nb::object(nb::module_::import_("numpy").attr("ndarray")).release().ptr();
        static PyObject* base_word = PyUnicode_InternFromString("base");
        nb::object array = nb::borrow(buffer_.object());
        while (Py_TYPE(array.ptr()) == reinterpret_cast<PyTypeObject*>(plain)) {
            const nb::object base = nb::steal(PyObject_GetAttr(array.ptr(), base_word));
            if (!base.is_valid()) throw nb::python_error();
            if (base.is_none()) return whole(array);
            array = base;
        }
        return {};
    }

  private:
    struct Whole final : Owner {
        Py_buffer view{};
        ~Whole() override { PyBuffer_Release(&view); }
    };

    Loan<std::int64_t> whole(nb::handle array) const {
        auto owner = std::make_unique<Whole>();
        if (PyObject_GetBuffer(array.ptr(), &owner->view, PyBUF_ANY_CONTIGUOUS) != 0) {
            PyErr_Clear();
            return {};
        }
        const auto* begin = static_cast<const char*>(owner->view.buf);
        const auto count = static_cast<std::size_t>(owner->view.len) / sizeof(std::int64_t);
        const bool aligned = (static_cast<const char*>(buffer_.data()) - begin) % sizeof(std::int64_t) == 0;
        if (!aligned || count > UINT32_MAX) return {};
        return {std::move(owner), reinterpret_cast<const std::int64_t*>(begin), count};
    }

    const Buffer& buffer_;
};

// Borrowed; faster than the stable interface's where that is not asked for.
inline nb::handle list_item(nb::handle list, std::size_t index) {
#ifdef Py_LIMITED_API
    return PyList_GetItem(list.ptr(), static_cast<Py_ssize_t>(index));
#else
    return PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(index));
#endif
}

inline nb::object numpy_empty(std::int64_t count, const char* type) {
    static PyObject* empty = nb::object(nb::module_::import_("numpy").attr("empty")).release().ptr();
    return nb::handle(empty)(count, type);
}

// An int32 array of its own.
inline nb::object numpy_pages(const std::vector<std::int32_t>& pages) {
    nb::object array = numpy_empty(static_cast<std::int64_t>(pages.size()), "i4");
    if (!pages.empty()) std::memcpy(Buffer(array, true).as<std::int32_t>(1), pages.data(), pages.size() * sizeof(int));
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

// freeze.cc: everything, as plain Python values that equal those that freeze.py makes of the twin.
nb::tuple frozen_of(Cache& cache);
nb::list nodes_of(Cache& cache, std::int64_t limit);
nb::list nodes_along(Cache& cache, const Key& key);

// views.cc
nb::list tree_of(Cache& cache, std::int64_t limit);
nb::tuple trail_of(Cache& cache, const Key& key);
const Eviction* last_eviction_of(Cache& cache, const Key& key);

}  // namespace rootcellar
