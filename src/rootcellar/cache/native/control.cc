// What an operator asks of the cache: pin a prefix, drop a namespace, save or send, empty a tier. The twin of
// control.py.
#include <algorithm>

#include "cache.h"

namespace rootcellar {

namespace {
constexpr std::int64_t FOREVER = std::int64_t{1} << 62;  // ticks; more could not be added to the tick of now
}

// ---- pins --------------------------------------------------------------------------------------------------------

std::int64_t Cache::pin(const Key& key, std::int64_t ttl) {
    Hit hit;
    tree.find(key, hit);
    const std::int64_t length = hit.reaches[DEVICE];
    if (length == 0) return 0;
    const Ref<Lease> lease(new Lease);
    lease->serial = ++serial;
    lease->node = tree.place_of(hit, key.name, length / tree.page_size);
    lease->name = key.name;
    lease->cached = lease->length = lease->committed = length;
    pin_place(*lease);
    pins.emplace(lease->serial, lease);
    expiries.emplace(tree.tick + std::min(ttl, FOREVER), lease->serial);
    return length;
}

std::int64_t Cache::unpin(const Key& key) {
    Hit hit;
    tree.find(key, hit);
    std::vector<std::int64_t> gone;
    for (const auto& [number, lease] : pins)
        if (std::find(hit.path.begin(), hit.path.end(), lease->node) != hit.path.end()) gone.push_back(number);
    for (const std::int64_t number : gone) drop_pin(number);
    return static_cast<std::int64_t>(gone.size());
}

void Cache::expire() {
    while (!expiries.empty() && expiries.top().first <= tree.tick) {
        const std::int64_t number = expiries.top().second;
        expiries.pop();
        if (pins.contains(number)) drop_pin(number);
    }
}

void Cache::drop_pin(std::int64_t number) {
    const auto found = pins.find(number);
    const Ref<Lease> lease = found->second;
    pins.erase(found);
    unpin_place(*lease);
    tree.prune(lease->node);
}

// ---- namespaces and tiers ----------------------------------------------------------------------------------------

std::int64_t Cache::drop_namespace(const Ref<Name>& name) {
    Node* root = name->root;
    if (root == nullptr) return 0;
    tree.unlist(root);
    std::vector<std::int64_t> gone;
    for (const auto& [number, lease] : pins)
        if (lease->name.get() == name.get()) gone.push_back(number);
    for (const std::int64_t number : gone) drop_pin(number);
    root->detached = true;
    tree.detached.push_back(root);
    std::int64_t held = 0;
    std::vector<Node*> stack;
    for (Node* child = root->first_child; child != nullptr; child = child->next) stack.push_back(child);
    while (!stack.empty()) {
        Node* node = stack.back();
        stack.pop_back();
        if (node->refs == 0) {
            tree.drop_subtree(node);
            continue;
        }
        held += node->size * tree.page_size;
        for (Node* child = node->first_child; child != nullptr; child = child->next) stack.push_back(child);
    }
    ++tree.version;
    return held;
}

void Cache::forget_tier(Tier tier) {
    std::vector<std::int64_t> numbers;
    for (const auto& item : pins) numbers.push_back(item.first);
    for (const std::int64_t number : numbers) drop_pin(number);
    std::vector<Node*> stack, order;
    for (Node* root = tree.first_root; root != nullptr; root = root->next)
        for (Node* child = root->first_child; child != nullptr; child = child->next) stack.push_back(child);
    while (!stack.empty()) {
        Node* node = stack.back();
        stack.pop_back();
        order.push_back(node);
        for (Node* child = node->first_child; child != nullptr; child = child->next) stack.push_back(child);
    }
    for (auto node = order.rbegin(); node != order.rend(); ++node) {
        for (Shelf* shelf : tree.by_tier[tier])
            if (shelf != nullptr) tree.forget_entry(*shelf, *node);
        tree.prune(*node);
    }
}

void Cache::flush() {
    if (tree.journal) tree.journal->silent = true;
    std::vector<Ref<Name>> names;
    for (Node* root = tree.first_root; root != nullptr; root = root->next) names.push_back(root->name);
    for (const Ref<Name>& name : names) drop_namespace(name);
    tree.forget_detached();
    if (!tree.journal) return;
    tree.journal->silent = false;
    KVEvent cleared{};
    cleared.what = KVEvent::What::cleared;
    tree.journal->events.push_back(std::move(cleared));
}

// ---- copies on request -------------------------------------------------------------------------------------------

std::set<std::int64_t> Cache::copy(const Key& key, const Hit& hit, std::int64_t boundary, Tier dst) {
    std::set<std::int64_t> ids;
    if (boundary == 0) return ids;
    Hit again;
    const Hit* fresh = &hit;
    if (!tree.is_fresh(hit)) {
        tree.find(key, again);
        fresh = &again;
        boundary = std::min(boundary, again.reaches[PEER]);
    }
    Node* place = tree.place_of(*fresh, key.name, boundary / tree.page_size);
    tree.hold(place);
    for (std::size_t k = 0; k < tree.kinds.size(); ++k) {
        const int kind = static_cast<int>(k);
        Shelf* target = tree.shelf(dst, kind);
        for (const Piece& piece : missing(place, kind, tree.start_page(kind, boundary), dst)) {
            Flight* flight = flying_to(piece.node, kind, dst);
            if (flight == nullptr) {
                Shelf* source = source_of(piece.node, kind, piece.first, dst);
                if (source == nullptr || target == nullptr) break;
                flight = plan(piece.node, *source, *target, piece.first, true);
                if (flight == nullptr) break;
            }
            ids.insert(flight->id);
        }
    }
    tree.release(place);
    tree.prune(place);
    return ids;
}

std::int64_t Cache::save(Tier dst) {
    std::int64_t planned = 0;
    std::vector<Node*> nodes;
    for (Node* root = tree.first_root; root != nullptr; root = root->next)
        for (Node* child = root->first_child; child != nullptr; child = child->next) nodes.push_back(child);
    for (std::size_t i = 0; i < nodes.size(); ++i) {  // parents first: the list grows as it is read
        Node* node = nodes[i];
        for (Node* child = node->first_child; child != nullptr; child = child->next) nodes.push_back(child);
        for (std::size_t k = 0; k < tree.kinds.size(); ++k) {
            Shelf* source = tree.shelf(DEVICE, static_cast<int>(k));
            Shelf* target = tree.shelf(dst, static_cast<int>(k));
            if (source == nullptr || target == nullptr || node->entry(target->index).present()) continue;
            const Entry& entry = node->entry(source->index);
            if (entry.present() && flying_to(node, static_cast<int>(k), dst) == nullptr)
                planned += plan(node, *source, *target, node->start + entry.lo, true) != nullptr;
        }
    }
    return planned;
}

}  // namespace rootcellar
