// Copies under way: planning them, and learning what became of them. The twin of flights.py.
#include <algorithm>

#include "cache.h"

namespace rootcellar {

namespace {

// The nodes a flight covers, lowest first.
std::vector<Node*> path_nodes(const Flight& flight) {
    std::vector<Node*> path;
    for (Node* node = flight.node; node != nullptr && node->end() > flight.start; node = node->parent)
        path.push_back(node);
    return path;
}

}  // namespace

// ---- plan --------------------------------------------------------------------------------------------------------

// Plan to copy pages [start, node.end) from one shelf to another of the same kind. Null: no room there. The source has
// them, or will have them once `after` is done.
Flight* Cache::plan(Node* node, Shelf& source, Shelf& target, std::int64_t start, bool held, Flight* after) {
    const auto first = static_cast<std::int32_t>(start);
    auto made = std::make_unique<Flight>(
        Flight{++flight_serial, source.k, source.tier, target.tier, first, held, {}, node, after, {}});
    Flight* flight = made.get();
    if (!node->flights) node->flights = std::make_unique<std::vector<Flight*>>();
    node->flights->push_back(flight);
    if (held) tree.hold(node, flight->far());
    refresh_flight(*flight);
    if (!tree.make_room(*target.arena, node->end() - start)) {
        land(*flight);
        return nullptr;
    }
    flight->slots.resize(node->end() - start);
    target.take(flight->slots.data(), static_cast<std::int32_t>(flight->slots.size()));
    target.in_flight += static_cast<std::int32_t>(flight->slots.size());
    flights.emplace(flight->id, std::move(made));
    if (after == nullptr) depart(*flight);
    return flight;
}

// The same towards the device, from STORAGE by way of HOST. Null: no room there or on HOST.
Flight* Cache::fetch(Node* node, Shelf& source, Shelf& target, std::int64_t start) {
    if (source.tier != STORAGE) return plan(node, source, target, start, true);
    Shelf& host = *tree.shelf(HOST, source.k);
    Flight* first = flying_to(node, source.k, HOST);
    if (first == nullptr) first = plan(node, source, host, start, true);
    if (first == nullptr || first->start > start) return nullptr;
    return plan(node, host, target, start, true, first);
}

// Ask for the copy: its source is there.
void Cache::depart(Flight& flight) {
    const Shelf& source = *tree.shelf(flight.src, flight.k);
    Move move{.id = flight.id,
              .k = flight.k,
              .src = flight.src,
              .dst = flight.dst,
              .src_slots = {},
              .dst_slots = flight.slots,
              .first = flight.start,
              .digests = {}};
    const std::vector<Node*> path = path_nodes(flight);
    for (auto at = path.rbegin(); at != path.rend(); ++at) {
        const Entry& entry = (*at)->entry(source.index);
        const std::int32_t skipped = std::max(flight.start, (*at)->start) - (*at)->start - entry.lo;
        if (!entry.present() || skipped < 0) broken("what is to be copied left meanwhile");
        const std::vector<std::int32_t> pages = entry.pages.all(skipped);
        move.src_slots.insert(move.src_slots.end(), pages.begin(), pages.end());
    }
    if (std::max(flight.src, flight.dst) >= STORAGE) {  // these begin at once, so nothing has split their node
        const Digest* digests = tree.page_digests(flight.node);
        move.digests.assign(digests + (flight.start - flight.node->start), digests + flight.node->size);
    }
    flight.after = nullptr;
    outbox.push_back(std::move(move));
}

// End flights that nobody was told of, the newest first.
void Cache::call_off(const std::vector<Flight*>& some) {
    for (auto at = some.rbegin(); at != some.rend(); ++at) {
        Flight& flight = **at;
        lose(flight, off_the_books(flight));
        land(flight);
        flights.erase(flight.id);
    }
}

// Count a flight as ended; where it was going.
Shelf& Cache::off_the_books(const Flight& flight) {
    Shelf& target = *tree.shelf(flight.dst, flight.k);
    target.in_flight -= static_cast<std::int32_t>(flight.slots.size());
    return target;
}

// Free a destination that will not be filled, and lose the leases that waited for it.
void Cache::lose(Flight& flight, Shelf& target) {
    target.give(flight.slots.data(), static_cast<std::int32_t>(flight.slots.size()));
    for (const Ref<Lease>& lease : flight.waiters) {
        lease->waits.clear();
        lease->lost = true;
    }
}

// The flights that begin when this one is done, the oldest first.
std::vector<Flight*> Cache::followers(const Flight& flight) const {
    std::map<std::int64_t, Flight*> found;
    for (const Node* node : path_nodes(flight))
        if (node->has_flights())
            for (Flight* later : *node->flights)
                if (later->after == &flight) found.emplace(later->id, later);
    std::vector<Flight*> sorted;
    for (const auto& item : found) sorted.push_back(item.second);
    return sorted;
}

// Recount what may leave after a flight came or went.
void Cache::refresh_flight(const Flight& flight) {
    for (Node* node : path_nodes(flight))
        for (const Tier tier : {flight.src, flight.dst}) {
            Shelf* shelf = tree.shelf(tier, flight.k);
            if (shelf != nullptr && !shelf->full()) tree.refresh(node, *shelf);
        }
}

// Take a flight off the tree; what became unreachable is thrown away.
void Cache::land(Flight& flight) {
    Node* place = flight.node;
    for (Node* node : path_nodes(flight))
        if (node->flights) std::erase(*node->flights, &flight);
    refresh_flight(flight);
    if (place == nullptr) return;
    if (flight.held) tree.release(place, flight.far());
    tree.prune(place);
}

// The nearest shelf but `exclude` whose entry covers the node from page `start` on.
Shelf* Cache::source_of(Node* node, int k, std::int64_t start, Tier exclude) const {
    for (const Tier tier : tree.tiers) {
        Shelf* shelf = tree.shelf(tier, k);
        if (tier == exclude || shelf == nullptr) continue;
        const Entry& entry = node->entry(shelf->index);
        if (entry.present() && entry.lo <= start - node->start) return shelf;
    }
    return nullptr;
}

Flight* Cache::flying_to(const Node* node, int k, Tier tier) const {
    if (node->has_flights())
        for (Flight* flight : *node->flights)
            if (flight->k == k && flight->dst == tier) return flight;
    return nullptr;
}

// What `tier` lacks of kind k in pages [start, place.end), top down; each piece ends where its node ends.
std::vector<Cache::Piece> Cache::missing(Node* place, int k, std::int64_t start, Tier tier) {
    std::vector<Piece> pieces;
    const Shelf* shelf = tree.shelf(tier, k);
    if (shelf == nullptr) return pieces;
    for (Node* climb = place; climb != nullptr && climb->end() > start; climb = climb->parent) {
        const Entry& entry = climb->entry(shelf->index);
        const std::int64_t first = std::max<std::int64_t>(start, climb->start);
        if (!entry.present()) {
            pieces.push_back({climb, shelf->recurrent() ? climb->end() - 1 : first});
        } else if (entry.lo > first - climb->start) {
            climb = tree.split(climb, entry.lo);
            pieces.push_back({climb, first});
        }
    }
    std::reverse(pieces.begin(), pieces.end());
    return pieces;
}

// Plan to write down what a path's nodes need at their ends, top down, where they were hit often enough.
void Cache::write_through(Node* place, std::int64_t hits) {
    std::vector<Node*> path;
    for (Node* climb = place; climb->parent != nullptr; climb = climb->parent) path.push_back(climb);
    for (auto node = path.rbegin(); node != path.rend(); ++node)
        if ((*node)->hits >= hits) {
            copy_down(*node, DEVICE, HOST);
            copy_down(*node, HOST, STORAGE);
        }
}

// Plan to copy what resuming at the node's end needs of the node from one tier to a farther one.
void Cache::copy_down(Node* node, Tier src, Tier dst) {
    if (!written[dst]) return;
    for (std::size_t k = 0; k < tree.kinds.size(); ++k) {
        const int kind = static_cast<int>(k);
        Shelf* source = tree.shelf(src, kind);
        Shelf* target = tree.shelf(dst, kind);
        if (source == nullptr || target == nullptr) continue;
        const Entry& entry = node->entry(source->index);
        if (!entry.present() || node->entry(target->index).present() || flying_to(node, kind, dst) != nullptr) continue;
        const std::int64_t start =
            std::max<std::int64_t>(node->start + entry.lo, node->end() - tree.reach(kind, node->end()));
        // The device is read before the next step: its pages need not wait for a slow tier.
        if (start < node->end()) plan(node, *source, *target, start, src != DEVICE);
    }
}

// Write-back: an entry is about to leave DEVICE; plan to save it to HOST unless a copy is there or on its way.
void Cache::spill(Node* node, Shelf& shelf) {
    Shelf* target = tree.shelf(HOST, shelf.k);
    if (shelf.tier != DEVICE || !written[HOST] || target == nullptr || node->entry(target->index).present()) return;
    if (flying_to(node, shelf.k, HOST) != nullptr) return;
    // Room in an arena is made by whichever kind may leave: nothing that this place in the tree needs may.
    tree.hold(node);
    const Entry& entry = node->entry(shelf.index);
    if (target->arena->room() >= entry.count()) plan(node, shelf, *target, node->start + entry.lo, false);
    tree.release(node);
}

// ---- learn -------------------------------------------------------------------------------------------------------

std::unique_ptr<Flight> Cache::take_flight(std::int64_t move) {
    const auto found = flights.find(move);
    if (found == flights.end() || found->second->after != nullptr) return nullptr;
    std::unique_ptr<Flight> flight = std::move(found->second);
    flights.erase(found);
    off_the_books(*flight);
    return flight;
}

// Hand the destination's pages to the nodes; where they have some by now, the copies are duplicates and freed.
void Cache::done(std::int64_t move) {
    const std::unique_ptr<Flight> flight = take_flight(move);
    if (!flight) return;
    const std::vector<Flight*> later = followers(*flight);
    Shelf& target = *tree.shelf(flight->dst, flight->k);
    const std::int64_t from = flight->start;
    std::int64_t end = from;
    for (Node* node : path_nodes(*flight)) {
        end = std::max<std::int64_t>(end, node->end());
        const std::int64_t first = std::max<std::int64_t>(from, node->start);
        attach_missing(node, target, flight->slots.data() + (first - from), node->end() - first, first);
    }
    target.give(flight->slots.data() + (end - from), static_cast<std::int32_t>(flight->slots.size() - (end - from)));
    for (const Ref<Lease>& lease : flight->waiters) std::erase(lease->waits, flight->id);
    land(*flight);
    for (Flight* follower : later) depart(*follower);
    if (flight->dst == HOST && flight->node != nullptr && flight->node->parent != nullptr) {
        const std::vector<Node*> path = path_nodes(*flight);
        for (auto node = path.rbegin(); node != path.rend(); ++node) copy_down(*node, HOST, STORAGE);
    }
    for (const Ref<Lease>& lease : flight->waiters)
        if (lease->row != 0 && leases[lease->row].get() == lease.get()) fill_rows(*lease);
}

// Give a node pages from absolute page `first` to its end, as far as its entry lacks them; free the others.
void Cache::attach_missing(Node* node, Shelf& shelf, const std::int32_t* pages, std::int64_t count,
                           std::int64_t first) {
    const Entry& entry = node->entry(shelf.index);
    const std::int64_t lo = first - node->start;
    const std::int64_t wanted = !entry.present() ? count : std::max<std::int64_t>(0, entry.lo - lo);
    shelf.give(pages + wanted, static_cast<std::int32_t>(count - wanted));
    if (wanted != 0) tree.attach(node, shelf, pages, static_cast<std::int32_t>(wanted), static_cast<std::int32_t>(lo));
}

// Free the destination, lose the leases that waited, and forget a farther source that could not be read.
void Cache::failed(std::int64_t move) {
    const std::unique_ptr<Flight> flight = take_flight(move);
    if (!flight) return;
    ++flights_failed;
    lose(*flight, *tree.shelf(flight->dst, flight->k));
    call_off(followers(*flight));
    Shelf* source = tree.shelf(flight->src, flight->k);
    if (flight->held && flight->src > flight->dst && source != nullptr) {
        for (Node* node : path_nodes(*flight)) {
            const bool others = node->has_flights() &&
                                std::any_of(node->flights->begin(), node->flights->end(), [&](const Flight* other) {
                                    return other != flight.get() && other->blocks(flight->k, flight->src);
                                });
            if (!others) tree.forget_entry(*source, node);
        }
    }
    land(*flight);
}

// Note what a store or a peer holds of a key, as far as there is room to note it.
void Cache::found(const Key& key, Tier tier, int kind, std::optional<std::int64_t> start) {
    const std::int64_t size = tree.page_size, pages = key.count / size;
    if (!given.reuse || pages == 0) return;
    std::vector<std::pair<Shelf*, std::int64_t>> wanted;
    for (std::size_t k = 0; k < tree.kinds.size(); ++k) {
        Shelf* shelf = tree.shelf(tier, static_cast<int>(k));
        if ((kind != ALL && kind != static_cast<int>(k)) || shelf == nullptr) continue;
        std::int64_t first = tree.start_page(static_cast<int>(k), pages * size);
        if (start && !shelf->recurrent()) {
            const std::int64_t whole = *start / size + (*start % size > 0);
            first = kind == ALL ? std::min(first, whole) : whole;
        }
        wanted.emplace_back(shelf, first);
    }
    Node* place = lay_path(key, pages);
    tree.hold(place);
    for (const auto& [shelf, first] : wanted) {
        for (const Piece& piece : missing(place, shelf->k, first, tier)) {
            if (shelf->full() && piece.first > piece.node->start) continue;
            const std::int64_t count = piece.node->end() - piece.first;
            if (flying_to(piece.node, shelf->k, tier) != nullptr || !tree.make_room(*shelf->arena, count)) break;
            fresh_pages_.resize(count);
            shelf->take(fresh_pages_.data(), static_cast<std::int32_t>(count));
            tree.attach(piece.node, *shelf, fresh_pages_.data(), static_cast<std::int32_t>(count),
                        static_cast<std::int32_t>(piece.first - piece.node->start));
        }
    }
    tree.release(place);
    if (kind != ALL && !wanted.empty() && wanted.front().first->full())
        tree.discard(place);  // not what another such kind is yet to be found for
    else
        tree.prune(place);
}

// The node that ends at page `pages` of a key, made (holding nothing) as far as the tree lacks it.
Node* Cache::lay_path(const Key& key, std::int64_t pages) {
    Hit hit;
    tree.find(key, hit);
    const std::int64_t size = tree.page_size, known = hit.branch / size, end = std::min(known, pages);
    Node* node = tree.root(key.name);
    for (Node* step : hit.path) {
        if (step->start >= end) break;
        node = step->end() <= end ? step : tree.split(step, static_cast<std::int32_t>(end - step->start));
    }
    if (known < pages) node = tree.add(node, key.tokens + known * size, static_cast<std::int32_t>(pages - known));
    return node;
}

// Forget what a tier no longer holds; an entry that is being read or written is left to its flight.
void Cache::lost(const Key& key, Tier tier, int kind, std::int64_t start) {
    const std::int64_t size = tree.page_size, first = start / size;
    Hit hit;
    tree.find(key, hit);
    for (auto at = hit.path.rbegin(); at != hit.path.rend(); ++at) {
        Node* node = *at;
        if (node->end() <= first || node->start * size >= key.count) continue;
        for (std::size_t k = 0; k < tree.kinds.size(); ++k) {
            Shelf* shelf = tree.shelf(tier, static_cast<int>(k));
            if ((kind != ALL && kind != static_cast<int>(k)) || shelf == nullptr) continue;
            if (node->has_flights() &&
                std::any_of(node->flights->begin(), node->flights->end(),
                            [&](const Flight* flight) { return flight->blocks(static_cast<int>(k), tier); }))
                continue;
            if (shelf->full() && node->start < first && node->entry(shelf->index).present())
                tree.split(node, static_cast<std::int32_t>(first - node->start));
            tree.forget_entry(*shelf, node);
        }
        tree.prune(node);
    }
}

}  // namespace rootcellar
