// A cache as plain Python values: what checks, explanations and comparisons read. freeze.py does the same for the twin
// and says what the fields are; every tuple here has its counterpart there, field by field.
#include <algorithm>

#include "python.h"

namespace rootcellar {

namespace {

nb::bytes raw(const void* data, std::size_t size) {
    return nb::bytes(size == 0 ? "" : data, size);
}

nb::bytes raw(const std::vector<std::int32_t>& pages) {
    return raw(pages.data(), pages.size() * sizeof(std::int32_t));
}

nb::tuple rank_of(const Rank& rank) {
    return nb::make_tuple(rank.damage, rank.first, rank.second, rank.id, rank.shelf);
}

nb::object entry_of(const Shelf& shelf, const Entry& entry) {
    if (!entry.present()) return nb::none();
    const Rank* rank = shelf.arena->order->filed(entry);
    nb::object filed = nb::none();
    if (rank != nullptr) filed = rank_of(*rank);
    return nb::make_tuple(raw(entry.pages.all()), entry.lo, entry.evictable, filed);
}

nb::object starts_of(const Pins& pins) {
    std::vector<std::pair<std::int64_t, std::int32_t>> starts;
    if (pins.starts) starts = *pins.starts;
    std::sort(starts.begin(), starts.end());
    return python_tuple(starts, [](const auto& item) { return nb::make_tuple(item.first, item.second); });
}

nb::tuple record(Cache& cache, Node* node) {
    Tree& tree = cache.tree;
    nb::list ticks, dues, turns, covers, starts, kids, entries, flights, digests;
    for (std::size_t k = 0; k < tree.kinds.size(); ++k) {
        const Pins& pins = node->pins(static_cast<int>(k));
        ticks.append(pins.tick);
        dues.append(pins.due);
        turns.append(pins.turn);
        covers.append(pins.covers);
        starts.append(starts_of(pins));
    }
    for (const Shelf& shelf : tree.shelves) {
        const Entry& entry = node->entry(shelf.index);
        kids.append(entry.kids);
        entries.append(entry_of(shelf, entry));
    }
    if (node->flights)
        for (const Flight* flight : *node->flights)
            flights.append(
                nb::make_tuple(flight->id, flight->k, static_cast<int>(flight->src), static_cast<int>(flight->dst)));
    for (std::uint32_t i = 0; i < node->digests.size(); ++i) digests.append(python_digest(node->digests[i]));
    nb::object name = nb::none();
    if (node->parent == nullptr) name = python_name(node->name->text);
    return nb::make_tuple(node->id, node->parent == nullptr ? 0 : node->parent->id, name, node->detached, node->start,
                          node->size, raw(node->tokens.data(), node->tokens.size() * sizeof(std::int64_t)), node->refs,
                          node->far, node->created, node->hits, node->priority, node->owner, node->group, node->used,
                          nb::tuple(ticks), nb::tuple(dues), nb::tuple(turns), nb::tuple(covers), nb::tuple(starts),
                          nb::tuple(kids), nb::tuple(entries), nb::tuple(flights), nb::tuple(digests));
}

nb::tuple lease_of(const Lease& lease) {
    std::vector<std::int64_t> waits = lease.waits;
    std::sort(waits.begin(), waits.end());
    nb::list starts, sources;
    for (const std::int64_t start : lease.starts) starts.append(start);
    for (const Node* source : lease.sources) {
        if (source == nullptr)
            sources.append(nb::none());
        else
            sources.append(source->id);
    }
    return nb::make_tuple(lease.row, lease.serial, lease.node == nullptr ? 0 : lease.node->id,
                          python_name(lease.name->text), lease.cached, lease.length, lease.committed, lease.priority,
                          nb::tuple(starts), nb::tuple(sources), lease.stepped,
                          python_tuple(waits, [](std::int64_t id) { return nb::int_(id); }), lease.lost, lease.strides,
                          lease.prefix, lease.above);
}

nb::tuple flight_of(const Flight& flight) {
    return nb::make_tuple(
        flight.id, flight.k, static_cast<int>(flight.src), static_cast<int>(flight.dst), flight.start,
        raw(flight.slots), flight.held, flight.node == nullptr ? 0 : flight.node->id,
        flight.after == nullptr ? 0 : flight.after->id,
        python_tuple(flight.waiters, [](const Ref<Lease>& lease) { return nb::int_(lease->serial); }));
}

nb::object shadow_of(const Shadow* shadow) {
    if (shadow == nullptr) return nb::none();
    nb::list seen;
    shadow->seen.each(
        [&](const Seen::Known& known) { seen.append(nb::make_tuple(known.prefix, known.volume, known.history)); });
    return nb::make_tuple(shadow->stride, shadow->window, shadow->volume, raw(&shadow->worth, sizeof(Histogram)),
                          raw(&shadow->returns, sizeof(Histogram)), raw(&shadow->gone, sizeof(Histogram)),
                          nb::tuple(seen), shadow->last_sampled, shadow->news, shadow->faded,
                          shadow->resting, shadow->turned, shadow->failures, shadow->watched, shadow->gap,
                          shadow->lost, shadow->noise, shadow->reach);
}

nb::object evictions_of(const Evictions& evictions) {
    nb::list notes;
    evictions.each([&](const Evictions::Note& note) {
        const Eviction& eviction = note.eviction;
        notes.append(nb::make_tuple(note.where, raw(note.what.data(), note.what.size()), eviction.tick, eviction.k,
                                    static_cast<int>(eviction.tier), eviction.tokens, eviction.created, eviction.used));
    });
    return nb::tuple(notes);
}

}  // namespace

// At most `limit` nodes (-1: all) of listed, then of dropped namespaces; each before its children, those in order.
nb::list nodes_of(Cache& cache, std::int64_t limit) {
    std::vector<Node*> stack(cache.tree.detached.rbegin(), cache.tree.detached.rend());
    for (Node* root = cache.tree.last_root; root != nullptr; root = root->previous) stack.push_back(root);
    nb::list records;
    while (!stack.empty() && static_cast<std::int64_t>(nb::len(records)) != limit) {
        Node* node = stack.back();
        stack.pop_back();
        records.append(record(cache, node));
        for (Node* child = node->last_child; child != nullptr; child = child->previous) stack.push_back(child);
    }
    return records;
}

// What `match` would walk along in each namespace, and in the key's own all children of the last node.
nb::list nodes_along(Cache& cache, const Key& key) {
    nb::list records;
    for (Node* root = cache.tree.first_root; root != nullptr; root = root->next) {
        Hit hit;
        cache.tree.find(Key{key.tokens, key.count, root->name}, hit);
        records.append(record(cache, root));
        for (Node* node : hit.path) records.append(record(cache, node));
        if (root->name.get() != key.name.get()) continue;
        const Node* last = hit.path.empty() ? root : hit.path.back();
        for (Node* child = last->first_child; child != nullptr; child = child->next)
            records.append(record(cache, child));
    }
    return records;
}

nb::tuple frozen_of(Cache& cache) {
    Tree& tree = cache.tree;
    nb::list shelves, arenas, leases, pins, offers, expiries, flights, written;
    for (const Shelf& shelf : tree.shelves)
        shelves.append(
            nb::make_tuple(shelf.used, shelf.entries, shelf.cached, shelf.evictable, shelf.in_flight, shelf.evicted));
    for (const auto& arena : tree.arenas)
        arenas.append(nb::make_tuple(arena->evictable, raw(arena->slots.free_list())));
    for (const Ref<Lease>& lease : cache.leases)
        if (lease) leases.append(lease_of(*lease));
    for (const auto& item : cache.pins) pins.append(lease_of(*item.second));
    for (const auto& item : cache.offers) offers.append(lease_of(*item.second));
    for (auto left = cache.expiries; !left.empty(); left.pop())
        expiries.append(nb::make_tuple(left.top().first, left.top().second));
    std::vector<const Flight*> flying;
    for (const auto& item : cache.flights) flying.push_back(item.second.get());
    std::sort(flying.begin(), flying.end(), [](const Flight* a, const Flight* b) { return a->id < b->id; });
    for (const Flight* flight : flying) flights.append(flight_of(*flight));
    for (int tier = 0; tier < TIERS; ++tier)
        if (cache.written[tier]) written.append(tier);
    const nb::tuple counts =
        nb::make_tuple(tree.tick, tree.version, tree.nodes, tree.last_id, cache.serial, cache.flight_serial,
                       cache.flights_failed, cache.requests, cache.input_tokens);
    return nb::make_tuple(counts, nb::tuple(nodes_of(cache, -1)), nb::tuple(shelves), nb::tuple(arenas),
                          nb::tuple(leases),
                          python_tuple(cache.free_rows, [](std::int32_t row) { return nb::int_(row); }),
                          nb::tuple(pins), nb::tuple(offers), nb::tuple(expiries), nb::tuple(flights),
                          shadow_of(tree.shadow.get()), evictions_of(tree.evictions), nb::tuple(written));
}

}  // namespace rootcellar
