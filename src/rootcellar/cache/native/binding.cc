// The native core as Python sees it: one object, entered once for each verb. The GIL is held throughout: a verb takes
// microseconds, and the cache belongs to one thread.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>

#include "python.h"

using namespace nanobind::literals;

namespace rootcellar {

namespace {

struct PyHit {
    Hit hit;
    KeyView view;
    nb::object key;
};

struct PyLease {
    Ref<Lease> lease;
};

// Frees what a verb threw away, when the verb is over.
struct Verb {
    Tree& tree;
    explicit Verb(Tree& its_tree) : tree(its_tree) {}
    ~Verb() { tree.bury(); }
};

nb::object lease_words(const Lease& lease) {
    return nb::module_::import_("rootcellar.cache.words")
        .attr("lease")(lease.row, lease.cached, lease.length, lease.lost, lease.waits.size());
}

void raise(const char* word, nb::args arguments) {
    const nb::object error = nb::module_::import_("rootcellar.cache.words").attr(word)(*arguments);
    PyErr_SetObject(error.type().ptr(), error.ptr());
}

// Errors are worded in one place for both cores, words.py.
void translate(const std::exception_ptr& pointer, void*) {
    try {
        std::rethrow_exception(pointer);
    } catch (const Refusal& refusal) {
        const auto args = [](auto&&... values) { return nb::cast<nb::args>(nb::make_tuple(values...)); };
        switch (refusal.why) {
            case Refusal::Why::key_too_long: return raise("key_too_long", args(refusal.first, refusal.second));
            case Refusal::Why::only_grows: return raise("only_grows", args(refusal.first));
            case Refusal::Why::row_full: return raise("row_full", args(refusal.first, refusal.second, refusal.third));
            case Refusal::Why::commit_too_long:
                return raise("commit_too_long", args(refusal.first, python_name(refusal.name), refusal.lease->length,
                                                     python_name(refusal.lease->name->text)));
            case Refusal::Why::closed: return raise("closed", args(lease_words(*refusal.lease)));
        }
    } catch (const NothingFiled& nothing) {
        raise("nothing_filed", nb::cast<nb::args>(nb::make_tuple(nothing.arena, nothing.evictable)));
    }
}

std::int64_t integer(nb::handle value) {
    const long long number = PyLong_AsLongLong(value.ptr());
    if (number == -1 && PyErr_Occurred() != nullptr) throw nb::python_error();
    return number;
}

Tier tier_of(nb::handle value) {
    const std::int64_t tier = integer(value);
    if (tier < 0 || tier >= TIERS) throw nb::value_error("a tier is one of 0 (DEVICE) to 3 (PEER)");
    return static_cast<Tier>(tier);
}

Lease& lease_of(nb::handle object) {
    static PyObject* type = nb::type<PyLease>().ptr();
    if (Py_TYPE(object.ptr()) != reinterpret_cast<PyTypeObject*>(type))
        throw nb::type_error("give a Lease that this cache opened");
    return *nb::inst_ptr<PyLease>(object)->lease;
}

class Core {
  public:
    Core(const TreeOptions& tree_options, const CacheOptions& options, std::vector<Table> tables,
         std::vector<Buffer> buffers, const std::string& fingerprint, bool events)
        : cache_(tree_options, options, std::move(tables)), buffers_(std::move(buffers)) {
        cache_.tree.fingerprint = fingerprint;
        if (events) cache_.tree.journal = std::make_unique<Journal>(cache_.tree);
    }

    // ---- the verbs

    PyHit match(nb::handle key) {
        PyHit hit{{}, view(key), nb::borrow(key)};
        cache_.tree.find(hit.view.key, hit.hit);
        cache_.tree.touch(hit.hit);
        return hit;
    }

    nb::object open(const PyHit& hit, nb::handle tier, nb::handle priority) {
        const Verb verb(cache_.tree);
        Ref<Lease> lease = cache_.open(key_of(hit), hit.hit, tier_of(tier), integer(priority));
        if (!lease) return nb::none();
        return nb::cast(PyLease{std::move(lease)});
    }

    bool grow(nb::handle lease, nb::handle tokens) {
        const Verb verb(cache_.tree);
        return cache_.grow(lease_of(lease), integer(tokens));
    }

    nb::list grow_many(nb::handle leases, nb::handle tokens) {
        const Verb verb(cache_.tree);
        take_batch(leases);
        const std::size_t count = batch_.size();
        if (PyLong_Check(tokens.ptr())) {
            counts_.assign(count, integer(tokens));
        } else {
            counts_.clear();
            for (const nb::handle item : nb::iter(tokens)) counts_.push_back(integer(item));
            if (counts_.size() != count) throw nb::value_error("give as many numbers of tokens as leases");
        }
        answers_.assign(count, 0);
        cache_.grow_many(batch_, counts_.data(), reinterpret_cast<bool*>(answers_.data()));
        PyObject* list = PyList_New(static_cast<Py_ssize_t>(count));
        if (list == nullptr) throw nb::python_error();
        for (std::size_t i = 0; i < count; ++i)
            PyList_SetItem(list, static_cast<Py_ssize_t>(i), PyBool_FromLong(answers_[i]));
        return nb::steal<nb::list>(list);
    }

    void commit(nb::handle lease, nb::handle key, bool snapshot) {
        const Verb verb(cache_.tree);
        const KeyView keys = view(key);
        cache_.commit(lease_of(lease), keys.key, snapshot);
    }

    void commit_many(nb::handle leases, nb::handle keys, bool snapshot) {
        take_batch(leases);
        std::size_t i = 0;
        if (nb::len(keys) != batch_.size()) throw nb::value_error("give as many keys as leases");
        // Each commit is complete before the next: what one throws away no other can name.
        for (const nb::handle key : nb::iter(keys)) {
            const Verb verb(cache_.tree);
            const KeyView tokens = view(key);
            cache_.commit(*batch_[i++], tokens.key, snapshot);
        }
    }

    void close(nb::handle lease, bool keep) {
        const Verb verb(cache_.tree);
        cache_.close(lease_of(lease), keep);
    }

    void close_many(nb::handle leases, bool keep) {
        take_batch(leases);
        for (Lease* lease : batch_) {
            const Verb verb(cache_.tree);
            cache_.close(*lease, keep);
        }
    }

    nb::object slots(const PyHit& hit, const std::string& kind) {
        const int k = paged_kind(kind);
        Hit again;
        const Hit* fresh = &hit.hit;
        if (!cache_.tree.is_fresh(hit.hit)) {
            cache_.tree.find(key_of(hit), again);
            fresh = &again;
        }
        const std::int64_t length = fresh->reaches[DEVICE], size = cache_.tree.page_size;
        nb::object array = numpy_empty(length, "i4");
        if (length == 0) return array;
        const Buffer memory(array, true);
        auto* into = memory.as<std::int32_t>(1);
        const Shelf& shelf = *cache_.tree.shelf(DEVICE, k);
        for (const Node* node : fresh->path) {
            if (node->start * size >= length) break;
            const Entry& entry = node->entry(shelf.index);
            const std::int64_t end = std::min<std::int64_t>(node->end(), length / size);
            const std::int64_t begin = entry.present() ? std::min<std::int64_t>(node->start + entry.lo, end) : end;
            for (std::int64_t page = node->start; page < begin; ++page) into = expand(into, 0, size);
            if (!entry.present()) continue;
            const std::int32_t* pages = entry.pages.data();
            if (size == 1) {
                std::memcpy(into, pages, (end - begin) * sizeof *into);
                into += end - begin;
            } else {
                for (std::int64_t i = 0; i < end - begin; ++i) into = expand(into, pages[i], size);
            }
        }
        return array;
    }

    // ---- tiers

    nb::list moves() {
        nb::list list;
        for (const Move& move : cache_.outbox)
            list.append(nb::make_tuple(move.id, move.k, static_cast<int>(move.src), static_cast<int>(move.dst),
                                       numpy_pages(move.src_slots.data(), static_cast<std::int64_t>(move.src_slots.size())),
                                       numpy_pages(move.dst_slots.data(), static_cast<std::int64_t>(move.dst_slots.size())),
                                       move.first, python_tuple(move.digests, python_digest)));
        cache_.outbox.clear();
        return list;
    }

    void done(std::int64_t move) {
        const Verb verb(cache_.tree);
        cache_.done(move);
    }

    void failed(std::int64_t move) {
        const Verb verb(cache_.tree);
        cache_.failed(move);
    }

    void found(nb::handle key, nb::handle tier, const std::string& kind, std::optional<std::int64_t> start) {
        const Verb verb(cache_.tree);
        const KeyView keys = view(key);
        cache_.found(keys.key, tier_of(tier), kind_index(kind), start);
    }

    void lost(nb::handle key, nb::handle tier, const std::string& kind, std::int64_t start) {
        const Verb verb(cache_.tree);
        const KeyView keys = view(key);
        cache_.lost(keys.key, tier_of(tier), kind_index(kind), start);
    }

    nb::object send(nb::handle key, nb::handle tier) {
        const Verb verb(cache_.tree);
        const KeyView keys = view(key);
        Hit hit;
        cache_.tree.find(keys.key, hit);
        return identities(cache_.copy(keys.key, hit, hit.reaches[DEVICE], tier_of(tier)));
    }

    std::int64_t save(nb::handle tier) {
        const Verb verb(cache_.tree);
        return cache_.save(tier_of(tier));
    }

    void forget_tier(nb::handle tier) {
        const Verb verb(cache_.tree);
        cache_.forget_tier(tier_of(tier));
    }

    nb::object prefetch(const PyHit& hit, nb::handle tier) {
        const Verb verb(cache_.tree);
        const std::int64_t reach = cache_.boundary(hit.hit, tier_of(tier));
        if (reach <= hit.hit.reaches[HOST]) return nb::none();
        return nb::make_tuple(identities(cache_.copy(key_of(hit), hit.hit, reach, HOST)), reach);
    }

    bool flies(std::int64_t move) const { return cache_.flights.contains(move); }

    // ---- control

    std::int64_t pin(nb::handle key, std::int64_t ttl) {
        const Verb verb(cache_.tree);
        const KeyView keys = view(key);
        return cache_.pin(keys.key, ttl);
    }

    std::int64_t unpin(nb::handle key) {
        const Verb verb(cache_.tree);
        const KeyView keys = view(key);
        return cache_.unpin(keys.key);
    }

    std::int64_t drop_namespace(nb::handle name) {
        const Verb verb(cache_.tree);
        return cache_.drop_namespace(name_of(name));
    }

    void flush() {
        const Verb verb(cache_.tree);
        cache_.flush();
    }

    bool make_room(const std::string& kind, std::int64_t tokens, nb::handle tier) {
        const Verb verb(cache_.tree);
        const int k = kind_index(kind);
        Shelf* shelf = k < 0 ? nullptr : cache_.tree.shelf(tier_of(tier), k);
        if (shelf == nullptr) throw nb::key_error((kind + ": no such kind on this tier").c_str());
        const std::int64_t size = shelf->recurrent() ? 1 : cache_.tree.page_size;
        return cache_.tree.make_room(*shelf->arena, tokens / size + (tokens % size > 0));
    }

    // ---- sight

    std::int64_t available_tokens() const {
        std::int64_t least = -1;
        for (const Shelf* shelf : cache_.paged) {
            const auto sharers = std::count_if(cache_.paged.begin(), cache_.paged.end(),
                                               [shelf](const Shelf* other) { return other->arena == shelf->arena; });
            const std::int64_t pages = shelf->arena->room() / sharers;
            least = least < 0 ? pages : std::min(least, pages);
        }
        return std::max<std::int64_t>(least, 0) * cache_.tree.page_size;
    }

    nb::object free_pages(int shelf) const {
        const Slots& slots = cache_.tree.shelves.at(shelf).arena->slots;
        return numpy_pages(slots.free_list(), slots.free_pages());
    }

    nb::tuple counts() const {
        nb::list shelves, hits;
        for (const Shelf& shelf : cache_.tree.shelves)
            shelves.append(nb::make_tuple(shelf.arena->slots.pages(), shelf.arena->slots.free_pages(), shelf.used,
                                          shelf.cached, shelf.evictable, shelf.in_flight, shelf.evicted));
        for (const Tier tier : cache_.tree.tiers) hits.append(cache_.hit_tokens[tier]);
        return nb::make_tuple(shelves, cache_.live, cache_.tree.nodes, cache_.tree.tick, cache_.requests,
                              cache_.input_tokens, hits, cache_.flights.size());
    }

    nb::list take_events() {
        nb::list list;
        if (!cache_.tree.journal) return list;
        for (const KVEvent& event : cache_.tree.journal->events) {
            nb::object parent = nb::none(), tokens = nb::none(), name = nb::none();
            if (event.has_parent) parent = python_digest(event.parent);
            if (event.what == KVEvent::What::stored) {
                tokens = python_tuple(event.tokens, [](std::int64_t token) { return nb::int_(token); });
                name = python_name(event.name->text);
            }
            list.append(nb::make_tuple(static_cast<int>(event.what), python_tuple(event.digests, python_digest), parent,
                                       tokens, static_cast<int>(event.medium), name));
        }
        cache_.tree.journal->events.clear();
        return list;
    }

    nb::object find_eviction(std::int64_t where, nb::bytes what) const {
        const Eviction* eviction = cache_.tree.evictions.find(where, {what.c_str(), what.size()});
        if (eviction == nullptr) return nb::none();
        return nb::make_tuple(eviction->tick, eviction->k, static_cast<int>(eviction->tier), eviction->tokens);
    }

    nb::tuple state() { return state_of(cache_); }
    nb::list nodes(std::int64_t limit) { return nodes_of(cache_, limit); }
    nb::list nodes_on_the_way(nb::handle key) {
        const KeyView keys = view(key);
        return nodes_along(cache_, keys.key);
    }
    std::size_t memory_bytes() const { return cache_.tree.bytes(); }
    std::size_t node_bytes() const { return cache_.tree.node_bytes(); }

  private:
    Ref<Name> name_of(nb::handle name) {
        if (name.ptr() == last_name_.ptr()) return last_;
        Ref<Name> found;
        Py_ssize_t size = 0;
        if (const char* text = PyUnicode_AsUTF8AndSize(name.ptr(), &size)) {
            found = cache_.tree.name({text, static_cast<std::size_t>(size)});
        } else {  // lone surrogates
            PyErr_Clear();
            PyObject* bytes = PyUnicode_AsEncodedString(name.ptr(), "utf-8", "surrogatepass");
            if (bytes == nullptr) throw nb::python_error();
            const nb::bytes encoded = nb::steal<nb::bytes>(bytes);
            found = cache_.tree.name({encoded.c_str(), encoded.size()});
        }
        last_name_ = nb::borrow(name);
        last_ = found;
        return found;
    }

    KeyView view(nb::handle key) {
        static PyObject* tokens_word = PyUnicode_InternFromString("tokens");
        static PyObject* namespace_word = PyUnicode_InternFromString("namespace");
        PyObject* tokens = PyObject_GetAttr(key.ptr(), tokens_word);
        if (tokens == nullptr) throw nb::python_error();
        KeyView result{Buffer(nb::steal(tokens), false), {}};
        result.key.tokens = result.buffer.as<std::int64_t>(1);
        result.key.count = result.buffer.extent(0);
        PyObject* name = PyObject_GetAttr(key.ptr(), namespace_word);
        if (name == nullptr) throw nb::python_error();
        result.key.name = name_of(nb::steal(name));
        return result;
    }

    // A hit of another cache names its namespace there.
    Key key_of(const PyHit& hit) {
        if (hit.hit.tree == &cache_.tree) return hit.view.key;
        return Key{hit.view.key.tokens, hit.view.key.count, cache_.tree.name(hit.view.key.name->text)};
    }

    void take_batch(nb::handle leases) {
        batch_.clear();
        if (PyList_Check(leases.ptr())) {
            const Py_ssize_t count = PyList_Size(leases.ptr());
            for (Py_ssize_t i = 0; i < count; ++i) batch_.push_back(&lease_of(PyList_GetItem(leases.ptr(), i)));
        } else {
            for (const nb::handle item : nb::iter(leases)) batch_.push_back(&lease_of(item));
        }
        for (const Lease* lease : batch_) cache_.must_be_open(*lease);
    }

    int kind_index(const std::string& name) const {
        if (name.empty()) return ALL;
        for (std::size_t k = 0; k < cache_.tree.kinds.size(); ++k)
            if (cache_.tree.kinds[k].name == name) return static_cast<int>(k);
        return ALL - 1;
    }

    int paged_kind(const std::string& name) const {
        for (const Shelf* shelf : cache_.paged)
            if (cache_.tree.kinds[shelf->k].name == name) return shelf->k;
        throw nb::key_error((name + ": no paged kind has this name").c_str());
    }

    static std::int32_t* expand(std::int32_t* into, std::int32_t page, std::int64_t size) {
        for (std::int64_t i = 0; i < size; ++i) into[i] = static_cast<std::int32_t>(page * size + i);
        return into + size;
    }

    static nb::object identities(const std::set<std::int64_t>& ids) {
        nb::set set;
        for (const std::int64_t id : ids) set.add(nb::int_(id));
        return set;
    }

    Cache cache_;
    std::vector<Buffer> buffers_;  // of the page tables, held as long as the cache writes them
    nb::object last_name_;         // the namespace looked up last, and what it was
    Ref<Name> last_;
    std::vector<Lease*> batch_;
    std::vector<std::int64_t> counts_;
    std::vector<char> answers_;
};

void construct(Core* self, const std::vector<std::tuple<std::string, int, std::int64_t>>& kinds,
               const std::vector<std::tuple<int, int, int>>& shelves,
               const std::vector<std::pair<std::string, std::int32_t>>& arenas, std::int64_t page_size,
               std::int64_t capacity, int policy, const std::vector<std::int64_t>& edges, std::int64_t max_length,
               std::int32_t max_leases, bool reuse, bool digests, std::int64_t write_hits, bool write_back,
               const std::vector<std::int64_t>& min_load, nb::bytes fingerprint, bool events, nb::list tables) {
    if (edges.size() != BUCKETS || min_load.size() != TIERS || nb::len(tables) != kinds.size())
        throw nb::value_error("edges, min_load or tables have another length than this core was built for");
    TreeOptions tree;
    for (const auto& [name, rule, span] : kinds) tree.kinds.push_back({name, static_cast<Rule>(rule), span});
    for (const auto& [k, tier, arena] : shelves) tree.shelves.push_back({k, static_cast<Tier>(tier), arena});
    tree.arenas = arenas;
    tree.page_size = page_size;
    tree.capacity = capacity;
    tree.policy = static_cast<Policy>(policy);
    std::copy(edges.begin(), edges.end(), tree.edges.begin());
    CacheOptions options{max_length, max_leases, reuse, digests, write_hits, write_back, {}};
    std::copy(min_load.begin(), min_load.end(), options.min_load);
    std::vector<Buffer> buffers;
    std::vector<Table> pointers;
    for (const nb::handle table : tables) {
        Buffer buffer(table, true);
        auto* pages = buffer.as<std::int32_t>(2);
        if (buffer.extent(0) != max_leases + 1) throw nb::value_error("a page table has another number of rows");
        pointers.push_back({pages, buffer.extent(1)});
        buffers.push_back(std::move(buffer));
    }
    new (self) Core(tree, options, std::move(pointers), std::move(buffers), {fingerprint.c_str(), fingerprint.size()},
                    events);
}

nb::list chain_of(nb::bytes parent, nb::handle tokens, std::int64_t page_size) {
    const Buffer buffer(tokens, false);
    const auto* at = buffer.as<std::int64_t>(1);
    Digest above;
    if (parent.size() != above.size() || page_size < 1) throw nb::value_error("a parent has 32 bytes, a page 1 token or more");
    std::memcpy(above.data(), parent.c_str(), above.size());
    std::vector<Digest> names(buffer.extent(0) / page_size);
    chain(above, at, static_cast<std::int64_t>(names.size()), page_size, names.data());
    nb::list list;
    for (const Digest& name : names) list.append(python_digest(name));
    return list;
}

}  // namespace

NB_MODULE(_core, module) {
    module.doc() = "The native twin of the cache core; use it through rootcellar.cache.";
    nb::register_exception_translator(translate);

    nb::class_<PyHit>(module, "Hit", "What the cache holds of a key, in tokens; see rootcellar.cache.match.Hit.")
        .def_prop_ro("key", [](const PyHit& hit) { return hit.key; })
        .def_prop_ro("version", [](const PyHit& hit) { return hit.hit.version; })
        .def_prop_ro("branch", [](const PyHit& hit) { return hit.hit.branch; })
        .def_prop_ro("length", [](const PyHit& hit) { return hit.hit.reaches[DEVICE]; })
        .def_prop_ro("reaches", [](const PyHit& hit) {
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
        .def_prop_ro("waits", [](const PyLease& self) {
            nb::set set;
            for (const std::int64_t id : self.lease->waits) set.add(nb::int_(id));
            return set;
        })
        .def("__repr__", [](const PyLease& self) { return lease_words(*self.lease); });

    nb::class_<Core>(module, "Core")
        .def("__init__", construct)
        .def("match", &Core::match, "key"_a)
        .def("open", &Core::open, "hit"_a, "tier"_a = 0, nb::kw_only(), "priority"_a = 0)
        .def("grow", &Core::grow, "lease"_a, "tokens"_a)
        .def("grow_many", &Core::grow_many, "leases"_a, "tokens"_a = 1)
        .def("commit", &Core::commit, "lease"_a, "key"_a, nb::kw_only(), "snapshot"_a = true)
        .def("commit_many", &Core::commit_many, "leases"_a, "keys"_a, nb::kw_only(), "snapshot"_a = true)
        .def("close", &Core::close, "lease"_a, "keep"_a = true)
        .def("close_many", &Core::close_many, "leases"_a, "keep"_a = true)
        .def("slots", &Core::slots, "hit"_a, "kind"_a)
        .def("_moves", &Core::moves)
        .def("_done", &Core::done)
        .def("_failed", &Core::failed)
        .def("_found", &Core::found, nb::arg(), nb::arg(), nb::arg(), nb::arg().none())
        .def("_lost", &Core::lost)
        .def("send", &Core::send, "key"_a, "dst"_a)
        .def("save", &Core::save, "dst"_a = 1)
        .def("_forget_tier", &Core::forget_tier)
        .def("_prefetch", &Core::prefetch)
        .def("_flies", &Core::flies)
        .def("pin", &Core::pin, "key"_a, "ttl"_a)
        .def("unpin", &Core::unpin, "key"_a)
        .def("drop_namespace", &Core::drop_namespace, "namespace"_a)
        .def("_flush", &Core::flush)
        .def("make_room", &Core::make_room, "kind"_a, "tokens"_a, "tier"_a = 0)
        .def("available_tokens", &Core::available_tokens)
        .def("_free_pages", &Core::free_pages)
        .def("_counts", &Core::counts)
        .def("_take_events", &Core::take_events)
        .def("_find_eviction", &Core::find_eviction)
        .def("_frozen", &Core::state)
        .def("_nodes", &Core::nodes)
        .def("_nodes_on_the_way", &Core::nodes_on_the_way)
        .def("memory_bytes", &Core::memory_bytes)
        .def("_node_bytes", &Core::node_bytes);

    module.def("chain", &chain_of, "parent"_a, "tokens"_a, "page_size"_a);
}

}  // namespace rootcellar
