// What opening a lease takes: whether there is room, which is counted, and the copies of what the device lacks. The twin
// of loads.py.
#include <algorithm>
#include <utility>

#include "cache.h"

namespace rootcellar {

// Whether a fresh hit can be opened at boundary `pages` and `room` more tokens of each paged kind then be grown. It is
// counted, not tried: a request that has to wait for room leaves no trace, not even an edge that was split.
bool Cache::fits_beside(const Hit& hit, std::int64_t pages, const std::vector<std::int64_t>& room) {
    needs_.clear();
    const auto ask = [&](Shelf* shelf, std::int64_t count) {
        const std::int64_t start = tree.start_page(shelf->k, pages * tree.page_size);
        for (const Node* node : hit.path) {
            const std::int64_t first = std::max<std::int64_t>(start, node->start);
            const std::int64_t end = std::min<std::int64_t>(pages, node->end());
            if (first >= end) continue;
            const Entry& entry = node->entry(shelf->index);
            const std::int64_t held = entry.present() ? node->start + entry.lo : end;
            if (first < held && flying_to(node, shelf->k, DEVICE) == nullptr)
                count += std::min(held, end) - first;  // to be loaded
            if (entry.present())                       // may leave now, and not then
                count += std::max<std::int64_t>(0, std::min(held + entry.evictable, end) - std::max(held, first));
        }
        needs_.emplace_back(shelf, count);
    };
    for (std::size_t i = 0; i < paged.size(); ++i) ask(paged[i], tree.pages_of(room.at(i)));
    for (Shelf* shelf : states) ask(shelf, 1);
    return tree.fits(needs_);
}

// What HOST must have room for so that a fresh hit can be opened at boundary `pages`: what only STORAGE has passes
// through it, and what HOST holds on the way may leave now, and not then.
const Needs& Cache::staged(const Hit& hit, std::int64_t pages) {
    needs_.clear();
    const auto ask = [&](const Shelf* shelf) {
        Shelf* host = tree.shelf(HOST, shelf->k);
        const Shelf* storage = tree.shelf(STORAGE, shelf->k);
        if (host == nullptr || storage == nullptr) return;
        const std::int64_t start = tree.start_page(shelf->k, pages * tree.page_size);
        std::int64_t passing = 0, staying = 0;
        for (const Node* node : hit.path) {
            const std::int64_t first = std::max<std::int64_t>(start, node->start);
            const std::int64_t end = std::min<std::int64_t>(pages, node->end());
            if (first >= end) continue;
            const Entry &here = node->entry(shelf->index), &near = node->entry(host->index);
            const Entry& far = node->entry(storage->index);
            const std::int64_t held = here.present() ? node->start + here.lo : end;
            staying += near.evictable;
            if (near.present() && node->start + near.lo <= first) continue;
            if (first < held && far.present() && node->start + far.lo <= first &&
                flying_to(node, shelf->k, DEVICE) == nullptr && flying_to(node, shelf->k, HOST) == nullptr)
                passing += std::min(held, end) - first;
        }
        if (passing != 0) needs_.emplace_back(host, passing + staying);
    };
    for (const Shelf* shelf : paged) ask(shelf);
    for (const Shelf* shelf : states) ask(shelf);
    return needs_;
}

// Make room for the copies and states a new lease needs, and plan the copies. False: no room, nothing planned.
bool Cache::load(Lease& lease) {
    struct Plan {
        Shelf* shelf;
        Node* node;
        std::int64_t first;
        Shelf* source;
    };
    std::vector<std::pair<Shelf*, std::vector<Piece>>> wanted;
    needs_.clear();
    const auto ask = [&](Shelf* shelf) {
        std::vector<Piece> lacking;
        if (lease.cached != 0) lacking = missing(lease.node, shelf->k, lease.starts[shelf->k], DEVICE);
        std::int64_t pages = 0;
        for (const Piece& piece : lacking)
            if (flying_to(piece.node, shelf->k, DEVICE) == nullptr) pages += piece.node->end() - piece.first;
        needs_.emplace_back(shelf, pages + (shelf->recurrent() ? 1 : 0));
        if (!lacking.empty()) wanted.emplace_back(shelf, std::move(lacking));
    };
    for (Shelf* shelf : paged) ask(shelf);
    for (Shelf* shelf : states) ask(shelf);
    if (!tree.make_room_for(needs_)) return false;
    std::vector<Plan> plans;
    std::vector<Flight*> ready;
    for (const auto& [shelf, lacking] : wanted) {
        for (const Piece& piece : lacking) {
            Flight* flight = flying_to(piece.node, shelf->k, DEVICE);
            Shelf* source = source_of(piece.node, shelf->k, piece.first, DEVICE);
            if (flight != nullptr ? flight->start > piece.first : source == nullptr) return false;
            if (flight != nullptr)
                ready.push_back(flight);
            else
                plans.push_back({shelf, piece.node, piece.first, source});
        }
    }
    // First what HOST has, so that it stays while room is made there for what comes from STORAGE.
    std::stable_partition(plans.begin(), plans.end(), [](const Plan& item) { return item.source->tier != STORAGE; });
    const std::int64_t number = flight_serial;
    const std::size_t asked = outbox.size();
    for (const Plan& item : plans) {
        Flight* flight = fetch(item.node, *item.source, *item.shelf, item.first);
        if (flight == nullptr) {
            std::vector<Flight*> made;
            for (std::int64_t id = number + 1; id <= flight_serial; ++id)
                if (const auto at = flights.find(id); at != flights.end()) made.push_back(at->second.get());
            call_off(made);
            flight_serial = number;
            outbox.resize(asked);
            return false;
        }
        ready.push_back(flight);
    }
    for (Flight* flight : ready) {
        flight->waiters.emplace_back(&lease);
        if (std::find(lease.waits.begin(), lease.waits.end(), flight->id) == lease.waits.end())
            lease.waits.push_back(flight->id);
    }
    return true;
}

}  // namespace rootcellar
