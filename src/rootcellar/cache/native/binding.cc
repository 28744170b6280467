// The native core as a Python module.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "enter.h"
#include "suffixes.h"

using namespace nanobind::literals;

namespace rootcellar {

namespace {

// Errors are worded in one place for both cores, words.py.
void translate(const std::exception_ptr& pointer, void*) {
    try {
        std::rethrow_exception(pointer);
    } catch (const Refusal& refusal) {
        nb::list values;
        for (const Refusal::Value& value : refusal.values) {
            if (const auto* number = std::get_if<std::int64_t>(&value)) values.append(*number);
            if (const auto* name = std::get_if<std::string>(&value)) values.append(python_name(*name));
            if (const auto* lease = std::get_if<const Lease*>(&value)) values.append(lease_words(**lease));
        }
        const nb::object error = nb::module_::import_("rootcellar.cache.words").attr(refusal.word)(*values);
        PyErr_SetObject(error.type().ptr(), error.ptr());
    }
}

// ---- settings, read by name --------------------------------------------------------------------------------------

template <std::size_t N>
int index_of(const char* const (&names)[N], nb::handle name) {
    const auto word = nb::cast<std::string>(name);
    const auto* found = std::find(std::begin(names), std::end(names), word);
    if (found == std::end(names)) throw nb::value_error((word + " is not known to this core").c_str());
    return static_cast<int>(found - std::begin(names));
}

template <class T>
void read(nb::handle value, T& into) {
    into = nb::cast<T>(value);
}

void read(nb::handle value, std::string& into) {
    const auto bytes = nb::cast<nb::bytes>(value);
    into.assign(bytes.c_str(), bytes.size());
}

void read(nb::handle value, Policy& into) {
    into = static_cast<Policy>(index_of(POLICIES, value));
}

void read(nb::handle value, std::vector<Kind>& into) {
    for (const nb::handle kind : value)
        into.push_back({nb::cast<std::string>(kind.attr("name")), static_cast<Rule>(index_of(RULES, kind.attr("rule"))),
                        nb::cast<std::int64_t>(kind.attr("span"))});
}

void construct(Core* self, nb::handle given, const std::vector<std::tuple<int, int, int>>& shelves,
               const std::vector<std::pair<std::string, std::int32_t>>& arenas, const std::vector<std::int64_t>& edges,
               nb::list tables, std::int64_t least_shared) {
    Settings settings;
#define HAS(type, name) read(given.attr(#name), settings.name);
    ROOTCELLAR_SETTINGS(HAS)
#undef HAS
    if (edges.size() != BUCKETS || settings.loads.size() != TIERS || nb::len(tables) != settings.kinds.size())
        throw nb::value_error("edges, loads or tables have another length than this core was built for");
    Sizes sizes{.shelves = {}, .arenas = arenas, .edges = {}};
    for (const auto& [k, tier, arena] : shelves) sizes.shelves.push_back({k, static_cast<Tier>(tier), arena});
    std::copy(edges.begin(), edges.end(), sizes.edges.begin());
    std::vector<Buffer> buffers;
    std::vector<Table> pointers;
    for (const nb::handle table : tables) {
        Buffer buffer(table, true);
        auto* pages = buffer.as<std::int32_t>(2);
        if (buffer.extent(0) != settings.max_leases + 1)
            throw nb::value_error("a page table has another number of rows");
        pointers.push_back({pages, buffer.extent(1)});
        buffers.push_back(std::move(buffer));
    }
    new (self) Core(settings, sizes, std::move(pointers), std::move(buffers), least_shared);
}

Owner16 owner_of(nb::bytes name) {
    Owner16 owner;
    if (name.size() != sizeof(owner)) throw nb::value_error("an owner has 16 bytes");
    std::memcpy(owner.data(), name.c_str(), sizeof(owner));
    return owner;
}

nb::list chain_of(nb::bytes parent, nb::handle tokens, std::int64_t page_size, int most) {
    const Buffer buffer(tokens, false);
    const auto* at = buffer.as<std::int64_t>(1);
    Digest above;
    if (parent.size() != above.size() || page_size < 1)
        throw nb::value_error("a parent has 32 bytes, a page 1 token or more");
    if (most < 0 || most > static_cast<int>(Means::wide)) throw nb::value_error("give 0, 1 or 2 for most");
    std::memcpy(above.data(), parent.c_str(), above.size());
    std::vector<Digest> names(buffer.extent(0) / page_size);
    chain(above, at, static_cast<std::int64_t>(names.size()), page_size, names.data(), static_cast<Means>(most));
    nb::list list;
    for (const Digest& name : names) list.append(python_digest(name));
    return list;
}

}  // namespace

NB_MODULE(_core, module) {
#ifndef __SANITIZE_ADDRESS__
    // A user's daemon thread that waits for an answer when the program ends is frozen with all that its frames refer
    // to: nothing leaks that anybody could have freed, and a page of warnings would follow the program's own last
    // words.
    nb::set_leak_warnings(false);
#endif
    module.doc() = "The native twin of the cache core; use it through rootcellar.cache.";
    nb::register_exception_translator(translate);

    nb::class_<PyHit>(module, "Hit", "What the cache holds of a key, in tokens; see rootcellar.cache.match.Hit.")
        .def_prop_ro("key", [](const PyHit& hit) { return hit.key; })
        .def_prop_ro("version", [](const PyHit& hit) { return hit.hit.version; })
        .def_prop_ro("branch", [](const PyHit& hit) { return hit.hit.branch; })
        .def_prop_ro("length", [](const PyHit& hit) { return hit.hit.reaches[DEVICE]; })
        .def_prop_ro("reaches",
                     [](const PyHit& hit) {
                         const auto& reaches = hit.hit.reaches;
                         return nb::make_tuple(reaches[0], reaches[1], reaches[2], reaches[3]);
                     })
        .def("reach", [](const PyHit& hit, nb::handle tier) { return hit.hit.reaches[tier_of(tier)]; })
        .def("__repr__", [](const PyHit& hit) {
            const auto& reaches = hit.hit.reaches;
            return nb::module_::import_("rootcellar.cache.words")
                .attr("hit")(hit.key, nb::make_tuple(reaches[0], reaches[1], reaches[2], reaches[3]), hit.hit.branch);
        });

    nb::class_<PyLease>(module, "Lease", "A running request's hold on the cache; see rootcellar.cache.lease.Lease.")
        .def_prop_ro("row", [](const PyLease& self) { return self.lease->row; })
        .def_prop_ro("serial", [](const PyLease& self) { return self.lease->serial; })
        .def_prop_ro("namespace", [](const PyLease& self) { return python_name(self.lease->name->text); })
        .def_prop_ro("cached", [](const PyLease& self) { return self.lease->cached; })
        .def_prop_ro("length", [](const PyLease& self) { return self.lease->length; })
        .def_prop_ro("committed", [](const PyLease& self) { return self.lease->committed; })
        .def_prop_ro("priority", [](const PyLease& self) { return self.lease->priority; })
        .def_prop_ro("lost", [](const PyLease& self) { return self.lease->lost; })
        .def_prop_ro("ready", [](const PyLease& self) { return self.lease->waits.empty() && !self.lease->lost; })
        .def_prop_ro("waits",
                     [](const PyLease& self) {
                         nb::set set;
                         for (const std::int64_t id : self.lease->waits) set.add(nb::int_(id));
                         return set;
                     })
        .def("__repr__", [](const PyLease& self) { return lease_words(*self.lease); });

    nb::class_<Core>(module, "Core", nb::type_slots(ENTRANCES))
        .def("__init__", construct)
        .def("_match", &Core::match, "key"_a)
        .def(
            "_open",
            [](Core& core, nb::handle hit, nb::handle tier, nb::handle priority, nb::handle room) {
                return core.open(hit_of(hit), tier_of(tier), integer(priority), room);
            },
            "hit"_a, "tier"_a = 0, nb::kw_only(), "priority"_a = 0, "room"_a.none() = nb::none())
        .def("_grow", &Core::grow, "lease"_a, "tokens"_a, nb::kw_only(), "step"_a = true)
        .def("grow_many", &Core::grow_many, "leases"_a, "tokens"_a = 1)
        .def("_commit", &Core::commit, "lease"_a, "key"_a, nb::kw_only(), "snapshot"_a = true)
        .def("_close", &Core::close, "lease"_a, "keep"_a = true)
        .def("_rethrow", &Core::rethrow)
        .def("commit_many", &Core::commit_many, "leases"_a, "keys"_a, nb::kw_only(), "snapshot"_a = true)
        .def("close_many", &Core::close_many, "leases"_a, "keep"_a = true)
        .def("slots", &Core::slots, "hit"_a, "kind"_a)
        .def("_moves", &Core::moves)
        .def("_done", &Core::done)
        .def("_failed", &Core::failed)
        .def("_found", &Core::found, nb::arg(), nb::arg(), nb::arg(), nb::arg().none())
        .def("_lost", &Core::lost)
        .def("_ask", &Core::ask)
        .def("_offer", &Core::offer)
        .def("_settle", &Core::settle)
        .def("save", &Core::save, "tier"_a = 1)
        .def("write_down", &Core::write_down, "key"_a)
        .def("_forget_tier", &Core::forget_tier)
        .def("write_to", &Core::write_to, "tier"_a, "on"_a)
        .def("_busy", &Core::busy, nb::arg().none())
        .def("_prefetch", &Core::prefetch)
        .def("_flies", &Core::flies)
        .def("pin", &Core::pin, "key"_a, "ttl"_a)
        .def("unpin", &Core::unpin, "key"_a)
        .def("expect", &Core::expect, "key"_a, "when"_a)
        .def("foresee", &Core::foresee, "keys"_a)
        .def("drop_namespace", &Core::drop_namespace, "namespace"_a)
        .def("_flush", &Core::flush)
        .def("make_room", &Core::make_room, "kind"_a, "tokens"_a, "tier"_a = 0)
        .def("available_tokens", &Core::available_tokens)
        .def("_free_pages", &Core::free_pages)
        .def("_counts", &Core::counts)
        .def("_take_events", &Core::take_events)
        .def("_find_eviction", &Core::find_eviction)
        .def("_take_evictions", &Core::take_evictions)
        .def_prop_ro("tick", &Core::tick)
        .def("_top_nodes", &Core::tree)
        .def("trail", &Core::trail, "key"_a)
        .def("_last_eviction", &Core::last_eviction)
        .def("_frozen", &Core::frozen)
        .def("_nodes", &Core::nodes)
        .def("_nodes_on_the_way", &Core::nodes_on_the_way)
        .def("memory_bytes", &Core::memory_bytes)
        .def("_ledger_bytes", &Core::ledger_bytes)
        .def("_node_bytes", &Core::node_bytes);

    nb::class_<Suffixes>(module, "Suffixes", "What went through the cache, by what stands before; see suffixes.py.")
        .def(nb::init<std::int64_t, std::int64_t, std::int64_t>(), "capacity"_a, "longest"_a, "tries"_a)
        .def_prop_ro("capacity", &Suffixes::capacity)
        .def("add", [](Suffixes& self, nb::bytes owner, nb::handle tokens) {
            const Buffer buffer(tokens, false);
            self.add(owner_of(owner), buffer.as<std::int64_t>(1), buffer.extent(0));
        })
        .def("find", [](const Suffixes& self, nb::bytes owner, nb::handle tokens, std::int64_t most) {
            const Buffer buffer(tokens, false);
            std::vector<std::int64_t> said;
            const auto* at = buffer.as<std::int64_t>(1);
            const std::int64_t matched = self.find(owner_of(owner), at, buffer.extent(0), most, said);
            return nb::make_tuple(matched, python_tuple(said, [](std::int64_t token) { return nb::int_(token); }));
        })
        .def("clear", &Suffixes::clear)
        .def("memory_bytes", &Suffixes::bytes);

    module.def("chain", &chain_of, "parent"_a, "tokens"_a, "page_size"_a, "most"_a = static_cast<int>(Means::wide));
}

}  // namespace rootcellar
