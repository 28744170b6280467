// Giving memory back: make room in an arena, and throw away what nothing can reach any more. The twin of evict.py.
#include <algorithm>

#include "tree.h"

namespace rootcellar {

bool Tree::make_room(Arena& arena, std::int64_t pages) {
    if (arena.slots.free_pages() >= pages) return true;
    if (arena.room() < pages) return false;
    while (arena.slots.free_pages() < pages) {
        const Item item = arena.order->pop(*this);
        if (item.node == nullptr) throw Refusal{"nothing_filed", {arena.name, std::int64_t{arena.evictable}}};
        Shelf& shelf = shelves[item.rank.shelf];
        const std::int64_t wanted = pages - arena.slots.free_pages();
        if (shelf.full())
            drop_tail(shelf, item.node, wanted);
        else
            drop_head(shelf, item.node, wanted);
    }
    return true;
}

// The sums by arena, in the order in which arenas are first named: a few, so a list that is searched will do.
const std::vector<std::pair<Arena*, std::int64_t>>& Tree::by_arena(const Needs& needs) {
    sums_.clear();
    for (const auto& [shelf, pages] : needs) {
        auto at = sums_.begin();
        while (at != sums_.end() && at->first != shelf->arena) ++at;
        if (at == sums_.end())
            sums_.emplace_back(shelf->arena, pages);
        else
            at->second += pages;
    }
    return sums_;
}

bool Tree::fits(const Needs& needs) {
    for (const auto& [arena, pages] : by_arena(needs))
        if (arena->room() < pages) return false;
    return true;
}

bool Tree::make_room_for(const Needs& needs) {
    if (!fits(needs)) return false;
    for (std::size_t i = 0; i < sums_.size(); ++i) make_room(*sums_[i].first, sums_[i].second);
    return true;
}

// Evict up to `pages` from the end of a full-attention leaf; a longer leaf keeps its upper part.
void Tree::drop_tail(Shelf& shelf, Node* node, std::int64_t pages) {
    if (pages < node->size) split(node, static_cast<std::int32_t>(node->size - pages), !spill && keeps(node, shelf));
    if (spill) spill(node, shelf);
    if (node->parent == nullptr) broken("a root has an entry");
    const std::string_view first(reinterpret_cast<const char*>(node->tokens.data()), page_size * sizeof(std::int64_t));
    evictions.note(node->parent->id, first, eviction_of(shelf, node, node->size));
    take_off(shelf, node, node->size);
    prune(node);
}

// Evict up to `pages` from the head of an entry; the part that serves the node's end is a step of its own.
void Tree::drop_head(Shelf& shelf, Node* node, std::int64_t pages) {
    const Entry& entry = node->entry(shelf.index);
    std::int64_t count = std::min<std::int64_t>(pages, entry.evictable);
    const std::int64_t inside = node->size - reach(shelf.k, node->end()) - entry.lo;
    if (inside > 0)
        count = std::min(count, inside);
    else if (spill)
        spill(node, shelf);
    evictions.note(node->id, kinds[shelf.k].name, eviction_of(shelf, node, count));
    take_off(shelf, node, static_cast<std::int32_t>(count));
    restage(node);
    discard(node);
}

Eviction Tree::eviction_of(const Shelf& shelf, Node* node, std::int64_t pages) const {
    return {tick, shelf.k, shelf.tier, pages * page_size, node->created, node->pins(shelf.k).tick};
}

void Tree::take_off(Shelf& shelf, Node* node, std::int32_t count) {
    const Pages pages = detach(node, shelf, count);
    shelf.give(pages);
    shelf.evicted += pages.size();
}

void Tree::forget_entry(Shelf& shelf, Node* node) {
    if (!node->entry(shelf.index).present()) return;
    take_off(shelf, node, node->size);
    restage(node);
}

void Tree::prune(Node* node) {
    Node* unheld = nullptr;
    Node* unreachable = nullptr;
    Node* climb = node;
    for (; climb->parent != nullptr; climb = climb->parent) {
        if (climb->held()) continue;
        unheld = climb;
        if (dead(climb)) unreachable = climb;
    }
    Node* top = climb->detached ? unheld : unreachable;
    if (top != nullptr)
        drop_subtree(top);
    else
        discard(node);
}

void Tree::drop_subtree(Node* top) {
    std::vector<Node*> order = {top};
    for (std::size_t i = 0; i < order.size(); ++i)
        for (Node* child = order[i]->first_child; child != nullptr; child = child->next) order.push_back(child);
    for (auto at = order.rbegin(); at != order.rend(); ++at) {
        Node* node = *at;
        for (Shelf& shelf : shelves) forget_entry(shelf, node);
        if (node->has_flights()) {
            for (Flight* flight : *node->flights)
                if (flight->node == node) flight->node = flight->start < node->start ? node->parent : nullptr;
            node->flights->clear();
        }
        discard(node);
    }
}

}  // namespace rootcellar
