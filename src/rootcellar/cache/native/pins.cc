// What keeps an entry from leaving, and where it stands in the order of those that may. The twin of tree.py's later
// half.
#include <algorithm>

#include "tree.h"

namespace rootcellar {

// ---- holds and pins ----------------------------------------------------------------------------------------------

void Tree::hold(Node* node, bool far) {
    for (; node != nullptr; node = node->parent) {
        if (++(far ? node->far : node->refs) > 1 || node->parent == nullptr) return;  // a root has no entries
        for (Shelf* shelf : full_shelves) refresh(node, *shelf);
    }
}

void Tree::release(Node* node, bool far) {
    for (; node != nullptr; node = node->parent) {
        if (--(far ? node->far : node->refs) != 0 || node->parent == nullptr) return;
        for (Shelf* shelf : full_shelves) refresh(node, *shelf);
    }
}

void Tree::pin(Node* node, int k, std::int64_t start, std::int32_t count) {
    Shelf& shelf = *by_tier[DEVICE][k];
    while (start < node->end()) {
        Pins& pins = node->pins(k);
        if (start > node->start) {
            pins.add(start, count);
            refresh(node, shelf);
            return;
        }
        pins.covers += count;
        refresh(node, shelf);
        if (start == node->start) return;
        node = node->parent;
    }
}

void Tree::use_way(Node* node, const std::vector<std::int64_t>& starts) {
    const std::int64_t volume = shadow ? shadow->volume : 0;
    for (; node->parent != nullptr; node = node->parent) {
        node->used = volume;
        for (std::size_t k = 0; k < starts.size(); ++k)
            if (starts[k] < node->end()) {
                Pins& pins = node->pins(static_cast<int>(k));
                pins.tick = tick;
                if (pins.due < 0) pins.due = 0;  // it was asked for after all
            }
        if (given.policy == Policy::mru)  // use makes a key smaller, so it must be filed again at once
            for (Shelf& shelf : shelves) requeue(node, shelf);
    }
}

void Tree::expect(Node* node, int k, std::int32_t due) {
    if (node->pins(k).due == due) return;
    node->pins(k).due = due;
    for (const Tier tier : tiers)
        if (Shelf* shelf = by_tier[tier][k]; shelf != nullptr) requeue(node, *shelf);
}

void Tree::enqueue(Node* node) {
    if (node->queued >= 0) return;
    node->queued = static_cast<std::int32_t>(queued.size());
    queued.push_back(node);
}

// ---- the order of leaving ----------------------------------------------------------------------------------------

Rank Tree::rank(Node* node, const Shelf& shelf) {
    Rank rank{damage(node, shelf), shelf.index, 0, 0, node->id};
    const std::int64_t last = node->pins(shelf.k).tick;
    if (rank.damage >= AWAITED) {
        const Pins& pins = node->pins(shelf.k);
        rank.first = -(rank.damage == QUEUED ? pins.turn : pins.due);
        return rank;
    }
    switch (given.policy) {
        case Policy::lru: rank.first = last; break;
        case Policy::lfu: rank.first = node->hits, rank.second = last; break;
        case Policy::fifo: rank.first = node->created; break;
        case Policy::filo: rank.first = -node->created; break;
        case Policy::mru: rank.first = -last; break;
        case Policy::slru: rank.first = node->hits > 0, rank.second = last; break;
        case Policy::priority: rank.first = node->priority, rank.second = last; break;
        case Policy::adaptive: rank.first = node->group, rank.second = node->used; break;
    }
    return rank;
}

int Tree::damage(Node* node, const Shelf& shelf) const {
    const std::int32_t due = node->pins(shelf.k).due;
    const bool waited_for = node->pins(shelf.k).turn > 0;
    if (due < 0 && !waited_for && shelf.tier == DEVICE) return 0;
    const int damage = bare_damage(node, shelf);
    if (waited_for && (damage == 2 || shelf.recurrent())) return QUEUED;
    return due > 0 && damage == 2 ? AWAITED : damage;
}

int Tree::bare_damage(Node* node, const Shelf& shelf) const {
    if (shelf.full()) return node->first_child != nullptr || windows.empty() || ends_well(node) ? 2 : 0;
    if (shelf.recurrent()) return node->first_child != nullptr && node->first_child == node->last_child ? 1 : 2;
    const std::int64_t needed = std::max<std::int64_t>(0, node->size - reach(shelf.k, node->end()));
    const std::int64_t lo = node->entry(shelf.index).lo;
    if (lo == needed) return 2;
    return lo < needed || node->first_child != nullptr ? 1 : 0;
}

std::int64_t Tree::reach(int k, std::int64_t page) const {
    return page - start_page(k, page * page_size);
}

bool Tree::ends_well(Node* node) const {
    for (const int k : windows) {
        const std::int64_t need = std::min<std::int64_t>(reach(k, node->end()), node->size);
        if (need == 0) continue;
        const bool have = std::any_of(tiers.begin(), tiers.end(), [&](Tier tier) {
            const Shelf* shelf = by_tier[tier][k];
            if (shelf == nullptr) return false;
            const Entry& entry = node->entry(shelf->index);
            return entry.present() && entry.lo <= node->size - need;
        });
        if (!have) return false;
    }
    return true;
}

void Tree::restage(Node* node) {
    if (!windows.empty())
        for (Shelf& shelf : shelves) requeue(node, shelf);
}

void Tree::requeue(Node* node, Shelf& shelf) {
    const Entry& entry = node->entry(shelf.index);
    if (entry.present() && entry.filed >= 0) shelf.arena->order->push(node, rank(node, shelf));
}

void Tree::requeue_states(Node* node) {
    for (Shelf* shelf : window_shelves)
        if (shelf->recurrent()) requeue(node, *shelf);
    if (!windows.empty())
        for (Shelf* shelf : full_shelves) requeue(node, *shelf);
}

}  // namespace rootcellar
