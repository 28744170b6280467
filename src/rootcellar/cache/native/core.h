// The object that Python calls: it takes arguments apart, enters the cache once, and puts answers together.
//
// The GIL is held throughout: a verb takes microseconds, and a cache belongs to one thread.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "python.h"

namespace rootcellar {

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

inline nb::object lease_words(const Lease& lease) {
    return nb::module_::import_("rootcellar.cache.words")
        .attr("lease")(lease.row, lease.cached, lease.length, lease.lost, lease.waits.size());
}

inline nb::tuple python_eviction(const Eviction& gone) {
    return nb::make_tuple(gone.tick, gone.k, static_cast<int>(gone.tier), gone.tokens, gone.created, gone.used);
}

inline std::int64_t integer(nb::handle value) {
    const long long number = PyLong_AsLongLong(value.ptr());
    if (number == -1 && PyErr_Occurred() != nullptr) throw nb::python_error();
    return number;
}

inline Tier tier_of(nb::handle value) {
    const std::int64_t tier = integer(value);
    if (tier < 0 || tier >= TIERS) throw nb::value_error("a tier is one of 0 (DEVICE) to 3 (PEER)");
    return static_cast<Tier>(tier);
}

template <class T>
T& instance(nb::handle object, const char* otherwise) {
    static PyObject* type = nb::type<T>().ptr();
    if (Py_TYPE(object.ptr()) != reinterpret_cast<PyTypeObject*>(type)) throw nb::type_error(otherwise);
    return *nb::inst_ptr<T>(object);
}

inline Lease& lease_of(nb::handle object) {
    return *instance<PyLease>(object, "give a Lease that this cache opened").lease;
}

inline const PyHit& hit_of(nb::handle object) {
    return instance<PyHit>(object, "give a Hit that this cache found");
}

class Core {
  public:
    Core(const Settings& settings, const Sizes& sizes, std::vector<Table> tables, std::vector<Buffer> buffers,
         std::int64_t least_shared)
        : cache_(settings, sizes, std::move(tables)), buffers_(std::move(buffers)) {
        cache_.tree.least_shared = least_shared;
        if (settings.events) cache_.tree.journal = std::make_unique<Journal>(cache_.tree);
    }

    std::exception_ptr failure;  // of the verb entered last
    void rethrow() { std::rethrow_exception(std::exchange(failure, {})); }

    // ---- the verbs

    PyHit match(nb::handle key) {
        PyHit hit{{}, view(key), nb::borrow(key)};
        cache_.tree.find(hit.view.key, hit.hit);
        cache_.tree.touch(hit.hit);
        return hit;
    }

    nb::object open(const PyHit& hit, Tier tier, std::int64_t priority, nb::handle room) {
        const Verb verb(cache_.tree);
        counts_.clear();
        if (!room.is_none())
            for (const Shelf* shelf : cache_.paged)
                counts_.push_back(integer(room[cache_.tree.kinds[shelf->k].name.c_str()]));
        Ref<Lease> lease = cache_.open(key_of(hit), hit.hit, tier, priority, room.is_none() ? nullptr : &counts_);
        if (!lease) return nb::none();
        return nb::cast(PyLease{std::move(lease)});
    }

    bool grow(nb::handle lease, nb::handle tokens, bool step = true) {
        const Verb verb(cache_.tree);
        return cache_.grow(lease_of(lease), integer(tokens), step);
    }

    nb::list grow_many(nb::handle leases, nb::handle tokens) {
        const Verb verb(cache_.tree);
        const bool same = PyLong_Check(tokens.ptr());
        counts_.clear();
        if (!same)
            for (const nb::handle item : nb::iter(tokens)) counts_.push_back(integer(item));
        const nb::list held = take_batch(leases);
        const std::size_t count = batch_.size();
        if (same) counts_.assign(count, integer(tokens));
        if (counts_.size() != count) throw Refusal{"uneven", {"numbers of tokens"}};
        answers_.assign(count, 0);
        cache_.grow_many(batch_, counts_.data(), reinterpret_cast<bool*>(answers_.data()));
        nb::list all;
        if (std::find(answers_.begin(), answers_.end(), 0) == answers_.end()) {  // nearly always
            all.append(true);
            PyObject* many = PySequence_Repeat(all.ptr(), static_cast<Py_ssize_t>(count));
            if (many == nullptr) throw nb::python_error();
            return nb::steal<nb::list>(many);
        }
        for (const char answer : answers_) all.append(answer != 0);
        return all;
    }

    void commit(nb::handle lease, nb::handle key, bool snapshot) {
        const Verb verb(cache_.tree);
        KeyView keys = view(key);
        const ArrayLender lender(keys);
        cache_.commit(lease_of(lease), keys.key, snapshot);
    }

    void commit_many(nb::handle leases, nb::handle keys, bool snapshot) {
        const nb::list held = take_batch(leases);
        if (nb::len(keys) != batch_.size()) throw Refusal{"uneven", {"keys"}};
        const std::vector<Ref<Lease>> batch = own_batch();
        std::size_t i = 0;
        // Each commit is complete before the next: what one throws away no other can name.
        for (const nb::handle key : nb::iter(keys)) {
            const Verb verb(cache_.tree);
            KeyView tokens = view(key);
            const ArrayLender lender(tokens);
            cache_.commit(*batch.at(i++), tokens.key, snapshot);
        }
    }

    void close(nb::handle lease, bool keep) {
        const Verb verb(cache_.tree);
        cache_.close(lease_of(lease), keep);
    }

    void close_many(nb::handle leases, bool keep) {
        const nb::list held = take_batch(leases);
        for (const Ref<Lease>& lease : own_batch()) {
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
            for (std::int64_t page = node->start; page < begin; ++page, into += size)
                count_up(into, 0, size);  // the padding page
            if (!entry.present()) continue;
            // Slots of consecutive pages are consecutive too.
            entry.pages.each(0, static_cast<std::int32_t>(end - begin), [&](std::int32_t first, std::int32_t count) {
                count_up(into, static_cast<std::int32_t>(first * size), count * size);
                into += count * size;
            });
        }
        return array;
    }

    // ---- tiers

    nb::list moves() {
        nb::list list;
        for (const Move& move : cache_.outbox)
            list.append(nb::make_tuple(move.id, move.k, static_cast<int>(move.src), static_cast<int>(move.dst),
                                       numpy_pages(move.src_slots), numpy_pages(move.dst_slots), move.first,
                                       python_tuple(move.digests, python_digest)));
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

    nb::object ask(nb::handle key, nb::handle tier) {
        const KeyView keys = view(key);
        const std::optional<Lacking> lacking = cache_.ask(keys.key, tier_of(tier));
        if (!lacking) return nb::none();
        return nb::make_tuple(lacking->reach, python_tuple(lacking->firsts, [](auto page) { return nb::int_(page); }));
    }

    nb::object offer(nb::handle key, std::int64_t start) {
        const Verb verb(cache_.tree);
        const KeyView keys = view(key);
        const std::optional<Offer> offer = cache_.offer(keys.key, start);
        if (!offer) return nb::none();
        return nb::make_tuple(offer->id, offer->tokens, python_tuple(offer->parts, [](const Part& part) {
                                  return nb::make_tuple(part.k, part.first, numpy_pages(part.slots),
                                                        python_tuple(part.digests, python_digest));
                              }));
    }

    bool settle(std::int64_t id) {
        const Verb verb(cache_.tree);
        return cache_.settle(id);
    }

    std::int64_t save(nb::handle tier) {
        const Verb verb(cache_.tree);
        return cache_.save(tier_of(tier));
    }

    void forget_tier(nb::handle tier) {
        const Verb verb(cache_.tree);
        cache_.forget_tier(tier_of(tier));
    }

    void write_to(nb::handle tier, bool on) { cache_.write_to(tier_of(tier), on); }

    std::pair<std::int64_t, std::int64_t> busy(nb::handle tier) const {
        return cache_.busy(tier.is_none() ? TIERS : tier_of(tier));
    }

    nb::object prefetch(const PyHit& hit, nb::handle tier) {
        const Verb verb(cache_.tree);
        const std::int64_t reach = cache_.boundary(hit.hit, tier_of(tier));
        if (reach <= hit.hit.reaches[HOST]) return nb::none();
        nb::set moves;
        for (const std::int64_t id : cache_.prefetch(key_of(hit), hit.hit, reach)) moves.add(nb::int_(id));
        return nb::make_tuple(moves, reach);
    }

    bool flies(std::int64_t move) const { return cache_.flights.contains(move); }

    // ---- control

    std::int64_t write_down(nb::handle key) {
        const Verb verb(cache_.tree);
        const KeyView keys = view(key);
        return cache_.write_down(keys.key);
    }

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

    std::int64_t expect(nb::handle key, std::int64_t when) {
        const Verb verb(cache_.tree);
        const KeyView keys = view(key);
        return cache_.expect(keys.key, when);
    }

    std::int64_t foresee(nb::handle keys) {
        const Verb verb(cache_.tree);
        const nb::list given(keys);
        std::vector<KeyView> views;  // which keep the keys' memory
        std::vector<Key> all;
        for (std::size_t i = 0; i < nb::len(given); ++i)
            all.push_back(views.emplace_back(view(list_item(given, i))).key);
        return cache_.foresee(all);
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
        if (shelf == nullptr) throw Refusal{"no_shelf", {kind}};
        const std::int64_t size = shelf->recurrent() ? 1 : cache_.tree.page_size;
        return cache_.tree.make_room(*shelf->arena, tokens / size + (tokens % size > 0));
    }

    // ---- observability

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
        return numpy_pages(cache_.tree.shelves.at(shelf).arena->slots.free_list());
    }

    nb::tuple counts() const {
        nb::list shelves, hits;
        for (const Shelf& shelf : cache_.tree.shelves)
            shelves.append(nb::make_tuple(shelf.arena->slots.pages(), shelf.arena->slots.free_pages(), shelf.used,
                                          shelf.cached, shelf.evictable, shelf.in_flight, shelf.evicted));
        for (const Tier tier : cache_.tree.tiers) hits.append(cache_.hit_tokens[tier]);
        return nb::make_tuple(shelves, cache_.live, cache_.tree.nodes, cache_.tree.tick, cache_.requests,
                              cache_.input_tokens, hits);
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
        return python_eviction(*eviction);
    }

    nb::list take_evictions() {
        nb::list list;
        for (const Eviction& eviction : cache_.tree.evictions.take()) list.append(python_eviction(eviction));
        return list;
    }

    nb::object last_eviction(nb::handle key) {
        const KeyView keys = view(key);
        const Eviction* eviction = last_eviction_of(cache_, keys.key);
        if (eviction == nullptr) return nb::none();
        return python_eviction(*eviction);
    }

    std::int64_t tick() const { return cache_.tree.tick; }
    nb::list tree(std::int64_t limit) { return tree_of(cache_, limit); }
    nb::tuple trail(nb::handle key) {
        const KeyView keys = view(key);
        return trail_of(cache_, keys.key);
    }

    nb::tuple frozen() { return frozen_of(cache_); }
    nb::list nodes(std::int64_t limit) { return nodes_of(cache_, limit); }
    nb::list nodes_on_the_way(nb::handle key) {
        const KeyView keys = view(key);
        return nodes_along(cache_, keys.key);
    }
    std::size_t memory_bytes() const { return cache_.tree.bytes(); }
    std::size_t ledger_bytes() const { return cache_.tree.ledger.bytes; }
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

    // The leases of a call, all of them open; what keeps them alive is returned.
    nb::list take_batch(nb::handle leases) {
        nb::list held;
        if (PyList_Check(leases.ptr()))
            held = nb::borrow<nb::list>(leases);
        else
            held = nb::list(leases);
        batch_.clear();
        const std::size_t count = nb::len(held);
        for (std::size_t i = 0; i < count; ++i) batch_.push_back(&lease_of(list_item(held, i)));
        for (const Lease* lease : batch_) cache_.must_be_open(*lease);
        return held;
    }

    // The batch for a call of several verbs: between two of them other code may run, and call this cache.
    std::vector<Ref<Lease>> own_batch() const { return {batch_.begin(), batch_.end()}; }

    int kind_index(const std::string& name) const {
        if (name.empty()) return ALL;
        for (std::size_t k = 0; k < cache_.tree.kinds.size(); ++k)
            if (cache_.tree.kinds[k].name == name) return static_cast<int>(k);
        return ALL - 1;
    }

    int paged_kind(const std::string& name) const {
        for (const Shelf* shelf : cache_.paged)
            if (cache_.tree.kinds[shelf->k].name == name) return shelf->k;
        throw Refusal{"no_paged_kind", {name}};
    }

    Cache cache_;
    std::vector<Buffer> buffers_;  // of the page tables, held as long as the cache writes them
    nb::object last_name_;         // the namespace looked up last, and what it was
    Ref<Name> last_;
    std::vector<Lease*> batch_;
    std::vector<std::int64_t> counts_;
    std::vector<char> answers_;
};

}  // namespace rootcellar
