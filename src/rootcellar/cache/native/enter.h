// How Python enters the verbs that every request or every step needs.
//
// nanobind's way in goes through the names and defaults of all arguments, which takes 30 ns: as long as a short verb.
// These methods are plain C functions for the usual call, positional arguments and none left to choose. Any other call
// goes on to nanobind's method of the same name with an underscore; so does an error, which nanobind translates.
#pragma once

#include <exception>

#include "core.h"

namespace rootcellar {

// What the usual call of a verb does with its arguments.
using Usual = nb::object (*)(Core& core, PyObject* const* given);

struct Entrance {
    const char* name;
    Py_ssize_t count;  // of arguments, in the usual call
    Usual usual;
};

inline PyObject* on_to(PyObject* self, const std::string& method, PyObject* const* given, Py_ssize_t count,
                       PyObject* names) {
    const nb::object known = nb::steal(PyObject_GetAttrString(self, method.c_str()));
    return known.is_valid() ? PyObject_Vectorcall(known.ptr(), given, static_cast<std::size_t>(count), names) : nullptr;
}

template <const Entrance& entrance>
PyObject* enter(PyObject* self, PyObject* const* given, Py_ssize_t count, PyObject* names) {
    if (count != entrance.count || names != nullptr || !nb::inst_ready(self))
        return on_to(self, std::string("_") + entrance.name, given, count, names);
    Core& core = *nb::inst_ptr<Core>(self);
    try {
        return entrance.usual(core, given).release().ptr();
    } catch (...) {
        core.failure = std::current_exception();
    }
    return on_to(self, "_rethrow", nullptr, 0, nullptr);
}

template <const Entrance& entrance>
PyMethodDef method(const char* doc) {
    auto* function = reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(enter<entrance>));
    return {entrance.name, function, METH_FASTCALL | METH_KEYWORDS, doc};
}

inline constexpr Entrance MATCH = {"match", 1,
                                   [](Core& core, PyObject* const* given) { return nb::cast(core.match(given[0])); }};
inline constexpr Entrance OPEN = {
    "open", 1, [](Core& core, PyObject* const* given) { return core.open(hit_of(given[0]), DEVICE, 0, nb::none()); }};
inline constexpr Entrance GROW = {"grow", 2, [](Core& core, PyObject* const* given) -> nb::object {
                                      return nb::bool_(core.grow(given[0], given[1]));
                                  }};
inline constexpr Entrance COMMIT = {"commit", 2, [](Core& core, PyObject* const* given) -> nb::object {
                                        core.commit(given[0], given[1], true);
                                        return nb::none();
                                    }};
inline constexpr Entrance CLOSE = {"close", 1, [](Core& core, PyObject* const* given) -> nb::object {
                                       core.close(given[0], true);
                                       return nb::none();
                                   }};

// The signatures are for `help` and `inspect`.
inline PyMethodDef METHODS[] = {
    method<MATCH>("match($self, key)\n--\n\n"),
    method<OPEN>("open($self, hit, tier=0, *, priority=0, room=None)\n--\n\n"),
    method<GROW>("grow($self, lease, tokens, *, step=True)\n--\n\n"),
    method<COMMIT>("commit($self, lease, key, *, snapshot=True)\n--\n\n"),
    method<CLOSE>("close($self, lease, keep=True)\n--\n\n"),
    {},
};
inline PyType_Slot ENTRANCES[] = {{Py_tp_methods, METHODS}, {}};

}  // namespace rootcellar
